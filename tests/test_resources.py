"""How many actors a job gets, and what each asks Ray for."""

from __future__ import annotations

import pytest

from engine.config import load_config
from engine.errors import ConfigError
from engine.pipeline.resources import LIGHT_CPUS, decide

CUSTOM = {"model": "custom:tests.models.HashModel"}
"""Which may use several GPUs."""


def chosen(cluster: dict[str, float], num_parcels: int = 1000, **options):
    return decide(load_config(source="in", output="out", **options), [cluster], num_parcels)


def test_one_actor_for_each_gpu():
    """Eight GPUs, eight actors, and the model's threads are left alone."""
    got = chosen({"CPU": 64, "GPU": 8})
    assert (got.num_gpus, got.min_actors, got.max_actors, got.num_threads) == (1, 8, 8, 0)


@pytest.mark.parametrize(("gpus", "share", "actors"), [(2, 0.5, 4), (2, 0.4, 4), (1, 0.25, 4), (4, 2, 2), (3, 2, 1)])
def test_a_share_is_of_one_gpu(gpus, share, actors):
    """Two actors of 0.4 fit on each GPU, not five on two: a share does not straddle devices."""
    assert chosen({"CPU": 64, "GPU": gpus}, gpus_per_actor=share, **CUSTOM).max_actors == actors


def test_several_gpus_for_a_local_model_are_refused():
    """It runs on one; the others would be held, and paid for, and stand still. A custom model may use them."""
    with pytest.raises(ConfigError, match="gpus_per_actor 2: a local model runs on one GPU"):
        chosen({"CPU": 64, "GPU": 8}, gpus_per_actor=2)
    assert chosen({"CPU": 64, "GPU": 8}, gpus_per_actor=1).max_actors == 8
    assert chosen({"CPU": 64, "GPU": 8}, gpus_per_actor=2, **CUSTOM).num_gpus == 2


@pytest.mark.parametrize(("cpus", "actors", "threads"), [(1, 1, 1), (2, 1, 2), (4, 1, 4), (16, 4, 4), (18, 4, 4)])
def test_on_cpus_one_actor_for_each_group_of_cores(cpus, actors, threads):
    """Groups of up to four cores, and threads to match."""
    got = chosen({"CPU": cpus})
    assert (got.max_actors, got.num_threads, got.num_gpus) == (actors, threads, 0)


@pytest.mark.parametrize(
    "cluster", [{"CPU": 1}, {"CPU": 2}, {"CPU": 3}, {"CPU": 64}, {"CPU": 2, "GPU": 4}, {"CPU": 8, "GPU": 1}]
)
@pytest.mark.parametrize("cores", [None, 1])
def test_actors_leave_room_for_their_light_tasks(cluster, cores):
    """Readers and publishers always find a slot beside all actors, or the pipeline would stand still."""
    got = chosen(cluster, cpus_per_actor=cores)
    publishers = got.max_actors if got.min_publishers else 0
    asked = got.max_actors * got.num_cpus + (got.max_readers + publishers) * LIGHT_CPUS
    assert asked <= cluster["CPU"]


def test_actors_on_cores_commit_themselves_and_those_on_gpus_have_publishers():
    """A publisher beside cores that compute takes their time; beside a GPU it keeps Python's lock free for its kernels."""
    assert chosen({"CPU": 8}).min_publishers == 0
    assert chosen({"CPU": 8, "GPU": 8}, device="cpu").min_publishers == 0
    assert chosen({"CPU": 8, "GPU": 8}).min_publishers == 2
    assert chosen({"CPU": 8}, model="openai:text-embedding-3-small").min_publishers == 1


def test_device_cpu_leaves_gpus_alone():
    """Asked for the CPU, no GPU is taken."""
    assert chosen({"CPU": 8, "GPU": 8}, device="cpu").num_gpus == 0


def test_device_cpu_and_gpus_for_each_actor_contradict_each_other():
    """The pool would hold the GPUs that are to be left alone, and the model would not use them."""
    with pytest.raises(ConfigError, match="gpus_per_actor: device cpu leaves GPUs alone"):
        chosen({"CPU": 8, "GPU": 8}, device="cpu", gpus_per_actor=1)


def test_no_more_actors_start_than_there_is_work():
    """Three parcels on eight GPUs load three models."""
    assert chosen({"CPU": 64, "GPU": 8}, num_parcels=3).min_actors == 3


def test_a_pool_may_grow_past_the_cluster_of_now():
    """num_actors is where an autoscaler may take it."""
    got = chosen({"CPU": 8}, gpus_per_actor=1, num_actors=16)
    assert (got.min_actors, got.max_actors) == (1, 16)


@pytest.mark.parametrize(
    ("cluster", "options", "room"), [({"CPU": 8}, {}, 2), ({"CPU": 8, "GPU": 2}, {"gpus_per_actor": 0.5}, 4)]
)
def test_more_actors_at_least_than_there_is_room_for_are_refused(cluster, options, room):
    """They were as many as there is room for, without a word; unless --num-actors says that nodes will come."""
    with pytest.raises(ConfigError, match=f"min_actors 8: an actor needs .* room for {room}: "):
        chosen(cluster, min_actors=8, **options)
    assert chosen(cluster, min_actors=room, **options).min_actors == room
    assert chosen(cluster, min_actors=8, num_actors=8, **options).min_actors == 8


def test_a_cluster_that_cannot_hold_an_actor_is_refused():
    """A message instead of a wait without end."""
    with pytest.raises(ConfigError, match="largest node has 0 GPUs"):
        chosen({"CPU": 8}, gpus_per_actor=1)
    with pytest.raises(ConfigError, match="an actor needs 16 CPUs"):
        chosen({"CPU": 8}, cpus_per_actor=16)


def test_an_actor_must_fit_on_one_node():
    """Two GPUs on two nodes are not two GPUs for one actor, and half-filled nodes add up to nothing."""
    config = load_config(source="in", output="out", gpus_per_actor=2, **CUSTOM)
    with pytest.raises(ConfigError, match="an actor needs 2 GPU, and the cluster's largest node has 1 GPUs"):
        decide(config, [{"CPU": 8, "GPU": 1}, {"CPU": 8, "GPU": 1}], 1000)
    assert decide(config, [{"CPU": 8, "GPU": 3}, {"CPU": 8, "GPU": 2}], 1000).max_actors == 2
    assert decide(load_config(source="in", output="out"), [{"CPU": 0}, {"CPU": 6}, {"CPU": 6}], 1000).max_actors == 2


@pytest.mark.parametrize("cpus", [1, 2, 16])
@pytest.mark.parametrize("num_actors", [None, 1, 4, 40])
def test_actors_that_ask_a_provider_leave_half_of_the_cpus(cpus, num_actors):
    """One is enough for its limits; however many are asked for, readers and publishers find a slot."""
    got = chosen({"CPU": cpus, "GPU": 4}, model="openai:text-embedding-3-small", num_actors=num_actors)
    assert (got.max_actors, got.min_actors, got.num_gpus, got.kind) == (num_actors or 1, num_actors or 1, 0, "API")
    assert 0 < got.num_cpus * got.max_actors <= cpus / 2
    assert got.parcels_inside > 3


def test_as_many_actors_ask_a_provider_as_there_are_to_be_at_least():
    """By default one is the most; who asks for four to begin with raises that, and they share the same half of the cores."""
    got = chosen({"CPU": 2}, model="openai:text-embedding-3-small", min_actors=4)
    assert (got.min_actors, got.max_actors) == (4, 4)
    assert 0 < got.num_cpus * got.max_actors <= 1


def test_a_node_without_cpus_has_no_room():
    """An actor on a GPU needs some of a CPU; eight GPUs on a head without one are not counted, and what is missing is said."""
    config = load_config(source="in", output="out")
    got = decide(config, [{"GPU": 8}, {"CPU": 16, "GPU": 1}], 1000)
    assert (got.min_actors, got.max_actors, got.lacking) == (1, 1, "")
    with pytest.raises(ConfigError, match="needs 1 GPU, and the cluster's largest node has 0 GPUs beside CPUs"):
        decide(config, [{"GPU": 2}, {"CPU": 8}], 1000)
    assert decide(config, [{"CPU": 0.5, "GPU": 1}], 1000).num_cpus <= 0.5


def test_actors_that_ask_a_provider_say_what_they_wait_for():
    """No error, since an autoscaler may bring a node for whom the work waits; on a head without CPUs alone nothing would move."""
    config = load_config(source="in", output="out", model="openai:text-embedding-3-small")
    assert decide(config, [{}], 1000).lacking == "an actor needs 0.5 CPUs, and the cluster's largest node has 0 CPUs"
    assert decide(config, [{}, {"CPU": 1}], 1000).lacking == ""
