"""
Whether `torch.compile` pays on a CPU: the packaged MiniLM as it is, compiled (dynamic shapes, weights frozen) and in OpenVINO.

    python benchmarks/compiled.py        about four minutes on one core; it needs a C++ compiler

One thread, batches of about 512 tokens of several shapes in turn; each way counts with its fastest round of a shape.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch._inductor.config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.local_texts import load
from engine.models.backends.base import Batch, features_of
from engine.models.backends.openvino import OpenVinoBackend

if TYPE_CHECKING:
    from collections.abc import Callable

SHAPES = ((34, 15), (32, 16), (21, 24), (8, 63), (8, 64), (2, 250), (2, 256))
ROUNDS = 12


def main() -> None:
    torch.set_num_threads(1)
    torch._inductor.config.freezing = True
    for dtype in ("float32", "bfloat16"):
        ways = of_torch(dtype) | {"openvino": OpenVinoBackend(load("cpu"), dtype, 1)}
        for name, compute in ways.items():
            began = time.perf_counter()
            compute(batch(*SHAPES[0]))
            print(f"{dtype} {name}: first batch {time.perf_counter() - began:.1f} s")
        seconds: dict[tuple[str, tuple[int, int]], list[float]] = defaultdict(list)
        for _ in range(ROUNDS):
            for shape in SHAPES:
                for name, compute in ways.items():
                    began = time.perf_counter()
                    compute(batch(*shape))
                    seconds[name, shape].append(time.perf_counter() - began)
        for shape in SHAPES:
            speeds = ", ".join(f"{name} {np.prod(shape) / min(seconds[name, shape]):,.0f}" for name in ways)
            print(f"{dtype} {shape[0]} texts of {shape[1]} tokens: tokens/s: {speeds}")


def of_torch(dtype: str) -> dict[str, Callable[[Batch], Any]]:
    """Return the model as it is, and compiled."""
    model = load("cpu", dtype).eval()

    def forward(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        vectors: torch.Tensor = model(features_of(input_ids, attention_mask))["sentence_embedding"]
        return vectors

    def called(function: Callable[..., torch.Tensor]) -> Callable[[Batch], Any]:
        def compute(one: Batch) -> Any:
            with torch.no_grad():
                return function(torch.from_numpy(one.input_ids), torch.from_numpy(one.attention_mask))

        return compute

    return {"torch": called(forward), "compiled": called(torch.compile(forward, dynamic=True))}


def batch(rows: int, tokens: int) -> Batch:
    """Make a batch of words that say nothing."""
    ids = np.random.default_rng(0).integers(1000, 20_000, (rows, tokens))
    return Batch(np.arange(rows), ids, np.ones_like(ids), ids.size)


if __name__ == "__main__":
    main()
