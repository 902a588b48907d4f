"""stderr: what Ray's core writes beside Python is left out, all else passes."""

from __future__ import annotations

import subprocess
import sys

from tests.kills import ROOT

SCRIPT = """
import os, sys
from engine.streams import without_core_notices

def core(line):
    os.write(2, line.encode() + b"\\n")

with without_core_notices():
    core("[2026-11-24 13:30:19,267 E 19417 19417] core_worker.cc:2465: Actor with class name")
    core("[2026-11-24 13:30:19,267 F 19417 19417] core_worker.cc:1: Check failed")
    core("what a library says")
    print("from Python", file=sys.stderr)
core("[2026-11-24 13:30:19,267 W 19417 19417] after")
print("at the end", file=sys.stderr)
"""


def test_notices_of_the_core_are_left_out_and_all_else_passes():
    """Levels I, W and E go, F and whatever else is written to descriptor 2 or sys.stderr stays; afterwards all is as before."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, check=True)
    assert sorted(done.stderr.splitlines()) == sorted(
        [
            "[2026-11-24 13:30:19,267 F 19417 19417] core_worker.cc:1: Check failed",
            "what a library says",
            "from Python",
            "[2026-11-24 13:30:19,267 W 19417 19417] after",
            "at the end",
        ]
    )
