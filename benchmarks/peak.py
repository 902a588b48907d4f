"""
The peak of a machine: the most FLOP/s at which it multiplies matrices, by whichever library does it best.

    python benchmarks/peak.py                   on all cores; half a minute
    python benchmarks/peak.py --device cuda

Tokens go through two matrices, there and back: square ones, and those of all-MiniLM-L6-v2's feed-forward layers, of which most of its
work is. PyTorch computes on all cores at a time; OpenVINO, where it is installed, in a stream a core, as the engine does.
"""

from __future__ import annotations

import argparse
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks.measure import num_cores

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Shape = tuple[int, int, int]
"""Tokens, and the sides of the first matrix; the second is the other way round."""
SHAPES: dict[str, tuple[Shape, ...]] = {
    "cpu": ((1024, 1024, 1024), (2048, 2048, 2048), (512, 384, 1536), (2048, 384, 1536)),
    "cuda": ((4096, 4096, 4096), (8192, 8192, 8192), (16_384, 384, 1536), (65_536, 384, 1536)),
}
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "bfloat16", "float16")}
PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}
"""Of OpenVINO: its names of dtypes."""
LAYERS = 4
"""Pairs of matrices that OpenVINO is given, so that what comes in and goes out in float32 weighs little."""
TRIAL_S = 1.0
"""Of each way to multiply: other work on the machine comes and goes."""
Found = dict[str, dict[str, float]]
"""The FLOP/s of each way to multiply, in each dtype."""


def matmul_rates(dtypes: Sequence[str], device: str) -> Found:
    """Return the FLOP/s of the best of several turns, for each way to multiply in each dtype."""
    has_openvino = device == "cpu" and find_spec("openvino") is not None
    found: Found = {dtype: {} for dtype in dtypes}
    for dtype, rates in found.items():
        for shape in SHAPES[device]:
            said = " x ".join(map(str, shape))
            rates[f"torch {said}"] = best_rate(*in_torch(shape, dtype, device))
            if has_openvino and dtype in PRECISIONS:
                rates[f"OpenVINO {said}"] = best_rate(*in_openvino(shape, dtype))
    return found


def best_rate(multiply: Callable[[], object], flops: float) -> float:
    """Call a multiplication of so many FLOPs again and again, and return the FLOP/s of the fastest call."""
    multiply()
    fastest, ends = float("inf"), time.perf_counter() + TRIAL_S
    while time.perf_counter() < ends:
        began = time.perf_counter()
        multiply()
        fastest = min(fastest, time.perf_counter() - began)
    return flops / fastest


def in_torch(shape: Shape, dtype: str, device: str) -> tuple[Callable[[], object], float]:
    """Return a call of PyTorch on all cores, or on the GPU, and its FLOPs."""
    import torch

    torch.set_num_threads(min(torch.get_num_threads(), num_cores()))
    rows, inner, outer = shape
    tokens, there, back = (
        torch.rand(*size, device=device).to(getattr(torch, dtype))
        for size in ((rows, inner), (inner, outer), (outer, inner))
    )

    def multiply() -> None:
        torch.matmul(torch.matmul(tokens, there), back)
        if device == "cuda":
            torch.cuda.synchronize()

    return multiply, _flops(shape)


def in_openvino(shape: Shape, dtype: str) -> tuple[Callable[[], object], float]:
    """Return a call of OpenVINO that has each core multiply tokens of its own, and the FLOPs of all cores."""
    import openvino as ov
    from openvino import opset13 as ops

    rows, inner, outer = shape
    chance = np.random.default_rng(0)
    tokens: Any = ops.parameter([rows, inner], np.float32)
    through = tokens
    for _ in range(LAYERS):
        for size in ((inner, outer), (outer, inner)):
            weights = chance.standard_normal(size, np.float32) / np.float32(size[0] ** 0.5)  # values stay of one size
            through = ops.matmul(through, ops.constant(weights), False, False)
    settings = {
        "INFERENCE_PRECISION_HINT": PRECISIONS[dtype],
        "NUM_STREAMS": num_cores(),
        "INFERENCE_NUM_THREADS": num_cores(),
        "ENABLE_CPU_PINNING": False,
    }
    queue = ov.AsyncInferQueue(ov.Core().compile_model(ov.Model([through], [tokens]), "CPU", settings), num_cores())
    values = chance.standard_normal((rows, inner), np.float32)
    for request in queue:
        request.set_input_tensor(ov.Tensor(values.copy()))

    def multiply() -> None:
        for _ in range(num_cores()):
            queue.start_async(None, share_inputs=True)
        queue.wait_all()

    return multiply, num_cores() * LAYERS * _flops(shape)


def _flops(shape: Shape) -> float:
    rows, inner, outer = shape
    return 4.0 * rows * inner * outer


def best(rates: dict[str, float]) -> tuple[str, float]:
    """Return the way to multiply that is fastest, and its FLOP/s."""
    way = max(rates, key=lambda one: rates[one])
    return way, rates[way]


def main() -> None:
    parser = argparse.ArgumentParser(description="How fast this machine multiplies matrices.")
    parser.add_argument("--device", choices=sorted(DTYPES), default="cpu", help="(%(default)s)")
    options = parser.parse_args()
    for dtype, rates in matmul_rates(DTYPES[options.device], options.device).items():
        for way, rate in sorted(rates.items(), key=lambda one: -one[1]):
            print(f"{dtype} {way}: {rate / 1e9:,.0f} GFLOP/s")


if __name__ == "__main__":
    main()
