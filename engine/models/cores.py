"""Cores: how many this process may use, in containers too."""

from __future__ import annotations

from functools import cache

import torch


@cache
def num_cores() -> int:
    """
    Return how many cores a model may use here: what the process was given, and never more than it may have.

    PyTorch counts the cores of the machine, or goes by OMP_NUM_THREADS, which the engine's actors are given; joblib knows
    of affinities and of the CPU limits of containers.
    """
    import joblib

    return max(min(torch.get_num_threads(), int(joblib.cpu_count())), 1)
