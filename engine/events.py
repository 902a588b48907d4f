"""The events of a run: what a progress line, a log or a notebook shows while it goes on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RunPlanned:
    """Event: it is known what is left to do; Ray is joined or started next."""

    pending_rows: int
    pending_shards: int
    num_rows: int
    output: str


@dataclass(frozen=True, slots=True)
class PoolStarted:
    """Event: the actors begin to load the model."""

    num_actors: int
    device: str


@dataclass(frozen=True, slots=True)
class ShardDone:
    """Event: a shard is committed."""

    num_rows: int
    num_rejects: int
    num_tokens: int
    num_bytes: int
