"""
`engine run` as the entry point of a job, with its options and its exit codes.

    ray job submit --working-dir . -- python jobs/embed.py --source … --output … --model …
"""

from __future__ import annotations

import sys
from pathlib import Path

# The engine may not be installed in the cluster's Python: it lies beside this folder in the job's working directory.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
