"""Cores: a model takes as many as its process was given, and the process's own threads are left as they are."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from engine.models.cores import num_cores
from tests.tiny_models import BERT, bert_tokenizer, cosines, mixed, packed, save_transformer, with_modules

COUNT = "from engine.models.cores import num_cores; print(num_cores())"
AFFINITY = f"import os; os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}}); {COUNT}"
CONTAINER = f"""
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
if libc.unshare(0x20000) or libc.mount(b"none", b"/", None, (1 << 14) | (1 << 18), None):
    print("not permitted"); raise SystemExit
if libc.mount(b"none", b"/sys/fs/cgroup", b"tmpfs", 0, b""):
    print("not permitted"); raise SystemExit
with open("/sys/fs/cgroup/cpu.max", "w") as file:
    file.write("100000 100000")
{COUNT}
"""
LIMITS = {
    "no limit": (COUNT, {}),
    "affinity": (AFFINITY, {}),
    "a container's CPU limit": (CONTAINER, {}),
    "OMP_NUM_THREADS": (COUNT, {"OMP_NUM_THREADS": "1"}),
    "LOKY_MAX_CPU_COUNT": (COUNT, {"LOKY_MAX_CPU_COUNT": "1"}),
    "more threads than cores": (COUNT, {"OMP_NUM_THREADS": "64"}),
}


@pytest.fixture(scope="module")
def started() -> dict[str, subprocess.Popen[str]]:
    """A process for each limit, all at once: most of their time they import torch."""
    own = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "LOKY_MAX_CPU_COUNT")}
    return {
        name: subprocess.Popen(
            [sys.executable, "-c", code],
            env=own | limits,
            cwd=Path(__file__).parent.parent,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name, (code, limits) in LIMITS.items()
    }


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one core to begin with")
@pytest.mark.parametrize("limit", LIMITS)
def test_a_model_takes_the_cores_that_its_process_was_given(started, limit):
    """In a container torch counts the machine's, and as many streams would wait for one another."""
    output, _ = started[limit].communicate(timeout=120)
    if output.strip() == "not permitted":
        pytest.skip("mounting is not permitted here")
    assert started[limit].returncode == 0
    found = int(output)
    if limit in ("no limit", "more threads than cores"):
        assert 2 <= found <= len(os.sched_getaffinity(0))
    else:
        assert found == 1


def threads_of_a_new_thread() -> int:
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return seen[0]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_model_leaves_the_threads_of_the_process_as_they_are(tmp_path, number):
    """The caller's own, and those that start later: a notebook's other work must not slow down. See test_backends too."""
    folder = save_transformer(tmp_path, BERT, bert_tokenizer())
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        encoder = packed(with_modules(folder))
        assert (torch.get_num_threads(), threads_of_a_new_thread()) == (number, number)
        encoder(mixed())
        encoder(mixed()[:1])
        assert (torch.get_num_threads(), threads_of_a_new_thread()) == (number, number)
        assert encoder._queue.backend.num_streams == num_cores(), "a stream for each core"
    finally:
        torch.set_num_threads(before)


def test_each_stream_computes_on_one_core_unless_there_is_one_batch(tmp_path):
    """Threads that share a batch wait for each other; a batch that is alone may use all cores."""
    folder = save_transformer(tmp_path, BERT, bert_tokenizer())
    model = with_modules(folder)
    expected = with_modules(folder).encode(mixed())
    seen: list[int] = []
    model.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    encoder = packed(model, batch_tokens=128)
    seen.clear()
    assert cosines(encoder(mixed()).vectors, expected).min() >= 0.99999
    assert len(seen) > 10
    assert set(seen) == {1}
    seen.clear()
    encoder(["one text"])
    assert seen == [num_cores()]
    seen.clear()
    encoder(mixed())
    assert set(seen) == {1}, "also in the thread that had them all"
