"""
The ways to embed that `local.py` compares, and what else it measures in processes of their own.

Each way takes the texts that it is to embed (`TextSet.given`) and returns texts a second in the steady state, the lowest cosine
to the reference, and what is known of padding, backend and idle device.
"""

from __future__ import annotations

import os
import statistics
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads

from benchmarks import steady_state
from benchmarks.batch_search import searched
from benchmarks.local_texts import MODEL, encode_padding, load, lowest_cosine, model_folder, values_of
from benchmarks.measure import num_cores

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.local_texts import Row, Vectors

WARM_UP_BATCHES = 4


def encode(texts: Row, dtype: str, device: str, batch_size: int) -> Row:
    """Call `SentenceTransformer.encode` once with all texts, after a warm-up."""
    model = load(device, dtype)
    values = values_of(texts)
    model.encode(values[: WARM_UP_BATCHES * batch_size], batch_size=batch_size, show_progress_bar=False)
    began = time.perf_counter()
    vectors = model.encode(values, batch_size=batch_size, show_progress_bar=False)
    rate = len(values) / (time.perf_counter() - began)
    return _result(texts, vectors, rate, padding=encode_padding(texts, batch_size))


def encode_pool(texts: Row, batch_size: int) -> Row:
    """Call `encode` with a pool of processes, one for each core and of one thread each; their start is not counted."""
    os.environ["OMP_NUM_THREADS"] = "1"  # which the processes of the pool inherit
    num_processes = num_cores()
    model = load("cpu")
    values = values_of(texts)
    pool = model.start_multi_process_pool(["cpu"] * num_processes)
    try:
        warm_up = values[: WARM_UP_BATCHES * batch_size * num_processes]
        model.encode(warm_up, pool=pool, batch_size=batch_size, chunk_size=batch_size)
        began = time.perf_counter()
        vectors = model.encode(values, pool=pool, batch_size=batch_size)
        rate = len(values) / (time.perf_counter() - began)
    finally:
        model.stop_multi_process_pool(pool)
    chunk_rows = min(-(-len(values) // num_processes // 10), 5000)  # as the library cuts them
    return _result(texts, vectors, rate, padding=encode_padding(texts, batch_size, chunk_rows))


class Predictor:
    """What Ray's documentation has one write for batch inference; it also notes who was done with which rows when."""

    def __init__(self, folder: str, device: str, batch_size: int) -> None:
        from sentence_transformers import SentenceTransformer

        self.model = SentenceTransformer(folder, device=device)
        self.batch_size = batch_size

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Add the vectors of a batch."""
        batch["embedding"] = self.model.encode(list(batch["text"]), batch_size=self.batch_size)
        batch["actor"] = np.full(len(batch["row"]), os.getpid())
        batch["done_at"] = np.full(len(batch["row"]), time.time())
        return batch


def ray_recipe(texts: Row, output: str, device: str, batch_size: int, call_rows: int, tuned: bool) -> Row:
    """
    Read, `map_batches` of a class that calls `encode`, write: actors of one CPU, or of one GPU.

    The steady state is the sum over actors of their rows after their first batch, over the time from then to their last: so
    neither starts nor waits for the last actor count, nor does the writing of the last rows.

    Args:
        texts: To embed.
        output: Folder to write to.
        device: Of the model.
        batch_size: Of `encode`.
        call_rows: Of `map_batches`: texts that `encode` is called with.
        tuned: As documented, Ray runs a single actor on two cores: small inputs are one block, and the last core is kept for
            reading and writing, since a pool that takes all cores never reads a row. To be tuned is to cut the blocks by hand,
            and to tell Ray of one core more than there is, so that every core has its actor.
    """
    import ray
    import ray.data

    on_gpu = device == "cuda"
    ray.init(include_dashboard=False, logging_level="ERROR", num_cpus=num_cores() + 1 if tuned else None)
    ray.data.DataContext.get_current().enable_progress_bars = False
    most = int(ray.cluster_resources()["GPU"]) if on_gpu else num_cores()
    rows = ray.data.read_parquet(texts["source"])
    if tuned:
        rows = rows.repartition(-(-texts["rows"] // call_rows))
    rows.map_batches(
        Predictor,
        fn_constructor_args=(model_folder(), device, batch_size),
        batch_size=call_rows,
        num_cpus=1,
        num_gpus=1 if on_gpu else None,
        compute=ray.data.ActorPoolStrategy(min_size=most if tuned else 1, max_size=most),
    ).write_parquet(output)
    ray.shutdown()
    rate, num_actors = steady_state.of_recipe(output)
    padding = encode_padding(texts, batch_size, call_rows)
    return _result(texts, _written(output), rate, padding=padding, backend=f"actors: {num_actors}")


def daft(texts: Row, warm_up: Row, output: str) -> Row:
    """
    Daft's `embed_text`, Parquet to Parquet, as it is by default: it calls `encode`, once for every 64 texts.

    A run over a few texts is taken off one over all, so that each run's own start is left out. The first run of the process counts in
    neither: it imports torch, and would make what is taken off larger than what is left.
    """
    from daft import col, read_parquet
    from daft.functions import embed_text

    def run(source: str, target: str) -> float:
        began = time.perf_counter()
        vectors = embed_text(col("text"), provider="transformers", model=model_folder())
        read_parquet(source).with_column("embedding", vectors).write_parquet(target)
        return time.perf_counter() - began

    run(warm_up["source"], f"{output}-first")
    few_s = run(warm_up["source"], f"{output}-few")
    rate = (texts["rows"] - warm_up["rows"]) / (run(texts["source"], output) - few_s)
    return _result(texts, _written(output), rate)


def loop(texts: Row, output: str, dtype: str, device: str, shard_rows: int) -> Row:
    """Do what the actors of the engine do, and nothing else; count each loop from the end of its first shard to that of its last."""
    from benchmarks.bare_loop import loops

    ran = loops(_job(texts, output, dtype, device, shard_rows), num_gpus=int(device == "cuda"))
    rate, counted = steady_state.of_loops(ran)
    done = sorted((one for of_loop in ran.done for one in of_loop), key=lambda one: one.shard.start)
    answers = [one.answer for one in done]
    return _result(
        texts,
        np.concatenate([answer.vectors for answer in answers]),
        rate,
        padding=1 - sum(one.num_tokens for one in answers) / max(sum(one.num_padded_tokens for one in answers), 1),
        computed=_computed(texts, [(one.shard, one.answer.num_tokens) for one in counted]),
        device_idle=1 - sum(one.busy_s for one in answers) / sum(one.held_s for one in answers),
        backend=ran.backend,
    )


def end_to_end(
    texts: Row, output: str, dtype: str, device: str, shard_rows: int, options: dict[str, Any] | None = None
) -> Row:
    """Run the engine, Parquet to Parquet, and count its steady state."""
    import engine

    job = _job(texts, output, dtype, device, shard_rows) | (options or {})
    result = engine.run(progress=False, **job)
    rate, counted = steady_state.of_output(output, result.num_actors)
    return _result(
        texts,
        _written(f"{output}/data"),
        rate,
        padding=result.padding_share,
        computed=_computed(texts, [(one, one.usage.num_tokens) for one in counted]),
        device_idle=result.device_idle_share,
        backend=result.backend,
        said_rows_per_s=result.rows_per_s,
        start_s=result.start_s,
    )


def batch_rates(texts: Row, dtype: str, device: str, batch_sizes: Sequence[int]) -> dict[str, float]:
    """Return texts a second of `encode` for batch sizes up to the best and beyond, the better of two turns or more."""
    import torch

    model = load(device, dtype)
    values = values_of(texts)
    model.encode(values[: max(batch_sizes)], show_progress_bar=False)

    def rate_of(batch_size: int) -> float:
        began = time.perf_counter()
        try:
            model.encode(values, batch_size=batch_size, show_progress_bar=False)
        except torch.OutOfMemoryError:
            return 0.0
        return len(values) / (time.perf_counter() - began)

    return {str(size): rate for size, rate in searched(rate_of, batch_sizes, most=len(values)).items()}


def inline(texts: Row, device: str, counts: Sequence[int]) -> list[Row]:
    """Call `engine.embed` and `encode` in turn with so many texts, both warm; return the median seconds of each."""
    import engine

    model = load(device)
    values = values_of(texts)
    ways = {
        "engine_s": lambda some: engine.embed(some, model=MODEL, device=device),
        "encode_s": lambda some: model.encode(some, show_progress_bar=False),
    }
    rows = []
    for count in counts:
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(1 + max(5, min(100, 1000 // count))):
            start = number * count % max(len(values) - count, 1)
            for name, embed in ways.items():
                began = time.perf_counter()
                embed(values[start : start + count])
                seconds[name].append(time.perf_counter() - began)
        rows.append({"texts": count} | {name: statistics.median(taken[1:]) for name, taken in seconds.items()})
    return rows


def _job(texts: Row, output: str, dtype: str, device: str, shard_rows: int) -> dict[str, Any]:
    return {
        "source": texts["source"],
        "output": output,
        "model": MODEL,
        "id_column": "row",
        "dtype": dtype,
        "device": device,
        "shard_rows": shard_rows,
    }


def _result(texts: Row, vectors: Vectors, texts_per_s: float, **more: Any) -> Row:
    return {"texts_per_s": texts_per_s, "cosine": lowest_cosine(vectors, texts), **more}


def _computed(texts: Row, shards: Sequence[tuple[Any, int]]) -> float:
    """
    Return which share of the tokens of shards went through the model: not those of texts that came before.

    Args:
        texts: Of which the shards are.
        shards: What has the rows of each, from `start` to `stop`; and its tokens that were computed.
    """
    lengths = np.load(texts["lengths"])
    return sum(num for _, num in shards) / sum(int(lengths[one.start : one.stop].sum()) for one, _ in shards)


def _written(folder: str) -> Vectors:
    """Return the vectors of a folder of Parquet, in the order of the texts."""
    table = pads.dataset(folder, format="parquet").to_table(columns=["row", "embedding"])
    column = table.column("embedding").combine_chunks()
    values = column.storage if isinstance(column, pa.ExtensionArray) else column  # Ray has a type for tensors
    vectors = values.flatten().to_numpy().reshape(len(values), -1)
    return vectors[np.argsort(table.column("row").to_numpy())]
