"""
What it brings to end batches where texts get much shorter, beside filling every batch up.

    python benchmarks/batches.py                        about four minutes on two cores
    python benchmarks/batches.py --dtypes bfloat16 --rounds 4      a look

Each shard is embedded both ways before the next one comes, in another order each round, and counts with its fastest round: on a machine
that others use too, speeds differ between seconds by more than between the ways, and nothing makes a round faster than it is.
The median is shown beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.local_texts import MODEL, dealt, drawn
from engine import batching
from engine.models.sentence_transformer import SentenceTransformerEmbeddingModel

SHARDS = {"messages": (2048, 512), "conversations": (256, 64)}
"""Texts of each kind, and of a shard of them."""
WAYS = {"filled up": 0.0, "alike": batching.ALIKE}
"""Of the longest text's tokens, those that a text of the same batch must have."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Batches that are filled up, and batches of texts that are alike.")
    parser.add_argument("--rounds", type=int, default=14, help="(%(default)s)")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="(%(default)s)")
    parser.add_argument("--batch-tokens", type=int, default=512, help="padded tokens a batch (%(default)s)")
    options = parser.parse_args()
    for dtype in options.dtypes.split(","):
        model = SentenceTransformerEmbeddingModel(
            MODEL.partition(":")[2], backend="openvino", dtype=dtype, batch_tokens=options.batch_tokens
        )
        for kind, (rows, shard_rows) in SHARDS.items():
            show(f"{dtype} {kind}", model, dealt(drawn(kind, rows), rows // shard_rows), shard_rows, options.rounds)


def show(
    title: str, model: SentenceTransformerEmbeddingModel, texts: list[str], shard_rows: int, num_rounds: int
) -> None:
    """Embed the texts both ways, and print the speeds."""
    seconds: dict[tuple[str, int], list[float]] = defaultdict(list)
    tokens, padded_tokens = defaultdict(int), defaultdict(int)
    for number in range(num_rounds):
        for start in range(0, len(texts), shard_rows):
            for way in list(WAYS)[:: (-1) ** number]:
                batching.ALIKE = WAYS[way]
                began = time.perf_counter()
                answer = asyncio.run(model.embed_rows(texts[start : start + shard_rows]))
                seconds[way, start].append(time.perf_counter() - began)
                tokens[way] += answer.num_tokens
                padded_tokens[way] += answer.num_padded_tokens
    for way in WAYS:
        taken = [of_shard for (one, _), of_shard in seconds.items() if one == way]
        best, median = (len(texts) / sum(map(chosen, taken)) for chosen in (min, statistics.median))
        padding = 1 - tokens[way] / padded_tokens[way]
        print(f"{title}, {way}: {best:.1f} texts/s at best, {median:.1f} median, padding {padding:.1%}")


if __name__ == "__main__":
    main()
