"""
Former parts: which parts the vectors of a job's texts may be taken from.

By default the output's own parts of what its inputs were before; with `--reuse OUT` all parts of other outputs, if all that decides the
vectors of a text is the same there.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from engine.calibration import Calibration, fix, stored_calibration
from engine.errors import ConfigError
from engine.ledger import VECTORS
from engine.quantization import VectorFormat
from engine.reuse import Candidates, ReuseIndex, build
from engine.schema import differences, utc_now
from engine.survey import opened

if TYPE_CHECKING:
    from engine.ledger import Ledger
    from engine.schema import Job
    from engine.storage import Storage
    from engine.survey import Survey

logger = logging.getLogger(__name__)

OF_THE_SOURCE = ("text_column", "text_template", "text_rows")
"""What decides which text is embedded, and not what its vector is."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """How the vectors of an output are stored, and the slug of the custom model that they are of."""

    vectors: VectorFormat
    slug: str

    @classmethod
    def of(cls, storage: Storage) -> _Kind | None:
        """Return what the first commit of an output fixed; None if there is none, or it cannot be read."""
        try:
            fields = dict(json.loads(storage.read(VECTORS)))
            return cls(slug=fields.pop("slug", ""), vectors=VectorFormat(**fields))
        except (FileNotFoundError, ValueError, TypeError):
            return None


def check_reuse(asked: Survey) -> None:
    """
    Make sure that vectors of the outputs in `reuse` are those that the job would make.

    Raises:
        ConfigError: One is no output, or its vectors are decided by something else; names each field that differs.
    """
    for location in asked.config.reuse:
        ledger, job = opened(location)
        lines = differences(_deciding(job), _deciding(asked.job))
        if lines:
            shown = "\n  ".join(line.replace("in the output", f"in {ledger.root}", 1) for line in lines)
            raise ConfigError(
                f"reuse: the vectors in {ledger.root} are not those that this job makes:\n  {shown}\n"
                "Name an output of the same model and settings, or leave it out"
            )


def reuse_index(asked: Survey, beside: Storage | None = None) -> ReuseIndex | None:
    """
    Build the index of the vectors that can be reused, or find it built; None if there are no parts to take any from.

    Args:
        asked: The job.
        beside: Where to build it; by default in the output, which then has to be this run's.
    """
    storage = asked.ledger.storage
    own = Candidates(asked.ledger, tuple(sorted(asked.standing.plan.unknown)), asked.job.shard_rows)
    found = [own] if own.shard_ids else []
    kind = _Kind.of(storage)
    scale = calibration.scale if (calibration := stored_calibration(storage)) else _former_scale(asked)
    for location in asked.config.reuse:
        ledger, job = opened(location)
        other, why = _usable(ledger, kind, asked.config.output_dtype, scale)
        if other is None:
            logger.warning("reuse: nothing of %s can be reused: %s", ledger.root, why)
            continue
        kind = kind or other
        found.append(Candidates(ledger, tuple(sorted(ledger.live())), job.shard_rows))
    found = _joined(found)
    if not found or kind is None:
        return None
    index = build(beside or storage, found, kind.vectors, kind.slug)
    return replace(index, has_chunks=asked.config.long_texts == "chunk-rows")


def adopt_calibration(asked: Survey) -> None:
    """
    Give an int8 output that has no scale yet that of the first output in `reuse` that has one: only then can their vectors stand in it.

    The output has to be this run's.
    """
    storage = asked.ledger.storage
    if stored_calibration(storage) is None and _Kind.of(storage) is None and (scale := _former_scale(asked)):
        logger.info("reuse: int8 has the scale of the vectors that are reused, %.3g a step", scale)
        fix(storage, Calibration(scale, "reuse", created_at=utc_now()))


def _former_scale(asked: Survey) -> float | None:
    """Return the scale of the first output in `reuse` that has vectors of int8."""
    kinds = (_Kind.of(opened(location)[0].storage) for location in asked.config.reuse)
    return next((kind.vectors.scale for kind in kinds if kind is not None and kind.vectors.scale), None)


def _usable(ledger: Ledger, wanted: _Kind | None, dtype: str, scale: float | None) -> tuple[_Kind | None, str]:
    """Return how the vectors of another output are stored; or None, and why they cannot stand beside this output's."""
    found = _Kind.of(ledger.storage)
    if found is None or not ledger.live():
        return None, "it has no vectors yet"
    if dtype == "int8" and found.vectors.scale != scale:
        return None, "its int8 vectors have another scale, which is fixed for each output at its first run"
    if wanted is not None and found != wanted:
        return None, "its model answers with another dimension, or is another version"
    return found, ""


def _joined(found: list[Candidates]) -> list[Candidates]:
    """Return each output once: one may be named twice, or be the output itself."""
    joined: dict[str, Candidates] = {}
    for one in found:
        same = joined.get(one.ledger.root, one)
        ids = tuple(sorted({*one.shard_ids, *same.shard_ids}))
        joined[one.ledger.root] = Candidates(one.ledger, ids, one.shard_rows)
    return list(joined.values())


def _deciding(job: Job) -> dict[str, Any]:
    return {name: value for name, value in job.decided_by.items() if name not in OF_THE_SOURCE}
