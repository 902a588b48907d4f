"""Resources: how many actors, and what each of them is given. Pure: decided from the config and what the cluster has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.config import JobConfig
from engine.errors import ConfigError
from engine.models import registry
from engine.models.base import Needs

LIGHT_CPUS = 0.06
"""Readers and publishers wait for disks. With a whole CPU each, they would stand still behind the actors, or the actors
behind them: on 2 CPUs the textbook recipe runs one actor on one core for want of a slot for its writer (FACTS.md)."""
READERS_PER_ACTOR = 2
ACTORS_PER_PUBLISHER = 4
"""At first: a publisher is through with a shard in a fraction of what a model needs for it; the pool grows to one an actor."""
RESERVED_CPUS = 0.25
"""Of each actor's cores, for two readers, and a publisher where there is one."""
MAX_CORES_PER_ACTOR = 4
WAITING_CPUS = 0.5
"""Of an actor that asks a provider: enough for any provider's limits, and room for it beside other work on one core."""


@dataclass(frozen=True, slots=True)
class Resources:
    """What each actor asks Ray for, and how many there are."""

    num_cpus: float
    num_gpus: float
    num_threads: int
    """Of the model; 0 leaves them as they are, on GPUs."""
    min_actors: int
    max_actors: int
    parcels_inside: int
    """Of an actor, at once."""
    lacking: str = ""
    """What an actor needs and no node has now; empty if one fits on some node."""

    @property
    def kind(self) -> str:
        """What an actor is on: GPU, CPU, or API, if it only asks a provider."""
        return "GPU" if self.num_gpus else "CPU" if self.num_threads else "API"

    @property
    def max_readers(self) -> int:
        """Read tasks at once."""
        return READERS_PER_ACTOR * self.max_actors

    @property
    def min_publishers(self) -> int:
        """Publishers to begin with; never more than embedding actors, and none where those compute on cores, which commit themselves."""
        return 0 if self.kind == "CPU" else -(-self.min_actors // ACTORS_PER_PUBLISHER)


def decide(config: JobConfig, nodes: Sequence[Mapping[str, float]], num_parcels: int) -> Resources:
    """
    Decide on actors: one per GPU, or share of one, if there are GPUs and the job may use them; else one per group of cores.

    The pool starts with as many as the cluster can hold now, never more than there are parcels; `num_actors` lets it
    grow past that, onto nodes that an autoscaler adds.

    Args:
        config: Of the job.
        nodes: Ray's resources of each node, such as {"CPU": 8.0, "GPU": 2.0}: an actor must fit on one.
        num_parcels: How much there is to do.

    Raises:
        ConfigError: If no node can hold an actor, or all together not as many as there are to be at least, and the cluster will not
            grow; or if GPUs are asked for, and to be left alone, or more of them for an actor than its model can use.
    """
    needs = registry.model_class(config.of_model()).needs(config)
    if not needs.has_device:
        return _without_device(config, needs, [node.get("CPU", 0.0) for node in nodes], num_parcels)
    if config.device == "cpu" and config.gpus_per_actor is not None:
        raise ConfigError(
            "gpus_per_actor: device cpu leaves GPUs alone: give --gpus-per-actor or --device cpu, not both"
        )
    if needs.most_gpus is not None and (config.gpus_per_actor or 0) > needs.most_gpus:
        raise ConfigError(
            f"gpus_per_actor {config.gpus_per_actor:g}: a local model runs on one GPU, and others that its actor holds would stand still; "
            "leave it out, and each GPU has an actor of its own"
        )
    wants_gpu = config.gpus_per_actor is not None or config.device.startswith("cuda")
    gpus = [node.get("GPU", 0.0) for node in nodes]
    cpus = [node.get("CPU", 0.0) for node in nodes]
    if wants_gpu or (any(gpus) and config.device == "auto"):
        share = config.gpus_per_actor or 1.0
        # An actor needs some of a CPU too.
        usable = [count if own else 0.0 for count, own in zip(gpus, cpus, strict=True)]
        rooms = [_actors_on_gpus(count, share) for count in usable]
        core = min([1.0, *(own / room for own, room in zip(cpus, rooms, strict=True) if room)])
        num_cpus = core - min(RESERVED_CPUS, core / 2)
        need, has = f"{share:g} GPU", f"{max(usable, default=0):g} GPUs{'' if usable == gpus else ' beside CPUs'}"
        num_gpus, num_threads = share, 0
    else:
        cores = config.cpus_per_actor or max(1, min(MAX_CORES_PER_ACTOR, int(max(cpus, default=1))))
        rooms = [int(own // cores) for own in cpus]
        num_cpus, num_gpus, num_threads = cores - RESERVED_CPUS, 0.0, cores
        need, has = f"{cores} CPUs", f"{max(cpus, default=0):g} CPUs"
    room = sum(rooms)
    lacking = "" if room >= 1 else f"an actor needs {need}, and the cluster's largest node has {has}"
    if lacking and config.num_actors is None:
        raise ConfigError(
            f"{lacking}: ask for less (--gpus-per-actor, "
            "--cpus-per-actor, --device cpu), or give --num-actors if an autoscaler will add nodes"
        )
    if config.num_actors is None and (config.min_actors or 0) > room:
        raise ConfigError(
            f"min_actors {config.min_actors}: an actor needs {need}, and the cluster has room for {room}: ask for fewer, or for less "
            "of each (--gpus-per-actor, --cpus-per-actor), or give --num-actors if an autoscaler will add nodes"
        )
    most = config.num_actors or room
    least = config.min_actors or min(most, max(room, 1), max(num_parcels, 1))
    return Resources(num_cpus, num_gpus, num_threads, min(least, most), most, needs.parcels_inside, lacking)


def _without_device(config: JobConfig, needs: Needs, cpus: Sequence[float], num_parcels: int) -> Resources:
    """
    Actors that wait for a network need next to nothing, and more of them bring nothing: the limits are the provider's.

    However many are asked for, half of the cluster is left for readers and publishers, without which they would wait for ever.
    """
    most = config.num_actors or max(needs.actors or 1, config.min_actors or 1)
    num_cpus = min(WAITING_CPUS, max(sum(cpus), 1.0) / 2 / most)
    least = config.min_actors or min(most, max(num_parcels, 1))
    largest = max(cpus, default=0.0)
    # No error: where no node has CPUs, an autoscaler brings one for whom the work waits.
    lacking = f"an actor needs {num_cpus:g} CPUs, and the cluster's largest node has {largest:g} CPUs"
    return Resources(
        num_cpus, 0.0, 0, min(least, most), most, needs.parcels_inside, lacking if largest < num_cpus else ""
    )


def _actors_on_gpus(gpus: float, share: float) -> int:
    """A share is of one GPU: three actors of 0.4 do not fit on one, nor five on two."""
    if share >= 1:
        return int(gpus // share)
    return int(gpus) * int(1 / share + 1e-9)
