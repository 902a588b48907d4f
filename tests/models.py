"""Cheap deterministic models for tests: real providers by import path, as a user would write them."""

from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path

import numpy as np

from engine.models.base import BaseEmbeddingModel


class HashModel(BaseEmbeddingModel):
    """
    Vectors from a hash of the text.

    Args:
        dimension: Of the vectors.
        delay_s: Seconds that each call takes.
        fail_on: A text that contains this raises.
        env_file: A file to which each actor appends its process id and what it sees as CUDA_VISIBLE_DEVICES; and when it is
            closed, its process id to another of that name with `-closed`.
        crowd: Calls wait until so many actors are in that file, half a minute at most each.
        hold: A file: while it is there, calls wait.
    """

    def __init__(
        self,
        dimension: int = 8,
        delay_s: float = 0.0,
        fail_on: str | None = None,
        env_file: str | None = None,
        crowd: int = 0,
        hold: str = "",
    ) -> None:
        self.hold = hold
        self.size = dimension
        self.crowd = crowd
        self.delay_s = delay_s
        self.fail_on = fail_on
        if env_file:
            with open(env_file, "a") as file:  # noqa: PTH123
                file.write(f"{os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES', '')}\n")
        self.env_file = env_file

    async def close(self) -> None:
        if self.env_file:
            with open(f"{self.env_file}-closed", "a") as file:  # noqa: ASYNC230, PTH123 - a test's
                file.write(f"{os.getpid()}\n")

    def slug(self) -> str:
        return f"hash-{self.size}"

    async def embed(self, texts: list[str]) -> np.ndarray:
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        for _ in range(300):
            if not self.env_file or Path(self.env_file).read_text().count("\n") >= self.crowd:  # noqa: ASYNC240 - a test's
                break
            await asyncio.sleep(0.1)
        while self.hold and Path(self.hold).exists():  # noqa: ASYNC110, ASYNC240 - a test's
            await asyncio.sleep(0.05)
        if self.fail_on and any(self.fail_on in text for text in texts):
            raise RuntimeError("it contains what must not be")
        return np.stack([self.vector(text) for text in texts])

    def vector(self, text: str) -> np.ndarray:
        """Return what any run must give for `text`: shape (dimension,), float32, in (0, 1]."""
        seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
        return 1 - np.random.default_rng(seed).random(self.size, dtype=np.float32)


class BrokenModel(HashModel):
    """Fails whatever the text."""

    async def embed(self, texts: list[str]) -> np.ndarray:
        raise RuntimeError("always")


class LostModel(HashModel):
    """
    In the first process that builds it all calls fail, as after a lost CUDA context; in another they do not.

    Args:
        first: A file that the first process makes.
    """

    def __init__(self, first: str) -> None:
        super().__init__()
        self.lost = not Path(first).exists()
        Path(first).touch()

    def is_lost(self) -> bool:
        return self.lost

    async def embed(self, texts: list[str]) -> np.ndarray:
        if self.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return await super().embed(texts)


class ChattyModel(HashModel):
    """Prints to stdout, where only results belong."""

    async def embed(self, texts: list[str]) -> np.ndarray:
        print("chatter")  # noqa: T201
        return await super().embed(texts)


class ThreadsModel(HashModel):
    """Answers with the number of threads that torch takes in its process."""

    async def embed(self, texts: list[str]) -> np.ndarray:
        import torch

        return np.full((len(texts), 2), torch.get_num_threads(), np.float32)
