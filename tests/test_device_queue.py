"""The device queue: callers in turn, streams that are never idle for nothing, and an error that stays with its batch."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from engine.models.backends.base import Batch
from engine.models.device_queue import READY_BATCHES, DeviceQueue, DeviceTime, Done
from engine.models.encoders import PackedEncoder
from engine.models.token_budget import TokenBudget
from tests.scripted import Lengths, Scripted, batch_of, wait


def numbers(batches: Iterable[Batch]) -> list[int]:
    return [int(batch.positions[0]) for batch in batches]


def many(first: int, count: int) -> list[Batch]:
    """Make batches of one text; a batch's number is its text's position."""
    return [batch_of(1 + number % 7, first=first + number) for number in range(count)]


def ran(queue: DeviceQueue, batches: Iterable[Batch], *, alone: bool = False) -> tuple[list[Done], DeviceTime]:
    """Run batches; return what became of all of them."""
    done: list[Done] = []
    spent = queue.run(batches, done.append, alone=alone)
    return done, spent


def started(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
    """Call in a thread of its own."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(call(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def test_batches_come_back_in_order_each_with_its_vectors():
    """However the streams overtake each other."""
    backend = Scripted(lambda batch: time.sleep(0.002 * (batch.positions[0] % 3)), num_streams=3)
    batches = many(0, 30)
    done, _ = ran(DeviceQueue(backend), batches)
    assert [one.batch for one in done] == batches
    assert all(one.error is None and one.seconds > 0 for one in done)
    for one in done:
        np.testing.assert_array_equal(one.vectors, backend.compute(one.batch))


def test_streams_are_used_and_never_more_than_there_are():
    """A backend is called from so many threads at once and not from one more: its requests are as many."""
    backend = Scripted(lambda _: time.sleep(0.002), num_streams=3)
    queue = DeviceQueue(backend)
    with ThreadPoolExecutor(4) as callers:
        list(callers.map(lambda caller: ran(queue, many(100 * caller, 20)), range(4)))
    assert backend.most_at_once == 3
    assert len(backend.began) == 80


def test_batches_are_asked_for_as_there_is_room():
    """A shard's padded batches are never all in memory: there are those in the streams, two that wait, one that is made."""
    gate, made = threading.Event(), []
    backend = Scripted(lambda _: wait(gate), num_streams=2)

    def batches() -> Iterator[Batch]:
        for batch in many(0, 20):
            made.append(batch)
            yield batch

    answer = started(ran, DeviceQueue(backend), batches())
    deadline = time.monotonic() + 20
    while len(made) < 5 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    assert len(made) == 2 + READY_BATCHES + 1
    gate.set()
    done, _ = answer.result(20)
    assert numbers(one.batch for one in done) == list(range(20))


def test_callers_come_in_turn():
    """The second one's batches are not asked for before all of the first one's are handed over."""
    gate, filled, log = threading.Event(), threading.Event(), []
    backend = Scripted(lambda _: wait(gate), num_streams=1)
    queue = DeviceQueue(backend)

    def batches(first: int) -> Iterator[Batch]:
        for batch in many(first, 10):
            log.append(int(batch.positions[0]))
            if len(log) == 1 + READY_BATCHES + 1:
                filled.set()
            yield batch

    answers = [started(ran, queue, batches(0))]
    wait(filled)
    answers.append(started(ran, queue, batches(100)))
    time.sleep(0.05)
    assert max(log) < 100
    gate.set()
    for answer in answers:
        answer.result(20)
    assert log == [*range(10), *range(100, 110)]
    assert numbers(backend.began) == log


def test_the_next_caller_s_first_batch_does_not_wait_for_the_last_one_s_end():
    """Between two shards the device has something to do: the last batch here ends only when the next one's first began."""
    last, next_one = threading.Event(), threading.Event()

    def act(batch: Batch) -> None:
        if batch.positions[0] == 1:
            last.set()
            wait(next_one)
        elif batch.positions[0] == 100:
            next_one.set()

    queue = DeviceQueue(Scripted(act, num_streams=2))
    first = started(ran, queue, many(0, 2))
    wait(last)
    second = started(ran, queue, many(100, 3))
    done, _ = first.result(20)
    assert [one.error for one in done] == [None, None]
    assert len(second.result(20)[0]) == 3


def test_alone_means_that_nothing_else_is_on_the_device():
    """Neither what came before, nor what comes after, nor the next of its own."""
    together: dict[int, int] = {}

    def act(batch: Batch) -> None:
        time.sleep(0.003)
        together[int(batch.positions[0])] = len(backend.active)

    backend = Scripted(act, num_streams=3)
    queue = DeviceQueue(backend)
    answers = [started(ran, queue, many(0, 12))]
    answers += [started(ran, queue, many(100, 3), alone=True), started(ran, queue, many(200, 12))]
    for answer in answers:
        answer.result(20)
    assert len(together) == 27
    assert [together[number] for number in (100, 101, 102)] == [1, 1, 1]
    assert backend.most_at_once == 3, "the others were not alone"
    assert sum(one.error is None for one in ran(queue, many(0, 9))[0]) == 9


@pytest.mark.parametrize("alone", [False, True])
def test_an_error_is_told_of_its_batch_and_the_queue_lives_on(alone):
    """Its neighbours have their vectors, and so has the next caller."""

    def act(batch: Batch) -> None:
        if batch.positions[0] in (0, 3, 9):
            raise ValueError("no")

    backend = Scripted(act)
    queue = DeviceQueue(backend)
    for _ in range(4):  # more often than there are places
        done, _ = ran(queue, many(0, 10), alone=alone)
        assert [number for number, one in enumerate(done) if one.error is not None] == [0, 3, 9]
        assert {type(one.error) for one in done} == {ValueError, type(None)}
        assert all((one.vectors is None) == (one.error is not None) for one in done)
    assert backend.num_relieved == 0


def test_an_error_holds_no_frames():
    """They would hold the batch's tensors on a device that has no memory left."""

    def act(batch: Batch) -> None:
        raise torch.OutOfMemoryError("no")

    done, _ = ran(DeviceQueue(Scripted(act)), many(0, 1))
    assert done[0].error.__traceback__ is None


def test_a_device_that_ran_out_of_memory_is_relieved_before_the_next_batch():
    """What its allocator holds in reserve is in pieces of the wrong size."""
    seen = []

    def act(batch: Batch) -> None:
        seen.append(backend.num_relieved)
        if batch.positions[0] == 1:
            raise torch.OutOfMemoryError("no")

    backend = Scripted(act, num_streams=1)
    ran(DeviceQueue(backend), many(0, 4))
    assert seen == [0, 0, 1, 1]


@pytest.mark.parametrize("alone", [False, True])
def test_what_a_caller_s_own_batches_raise_is_raised_to_it_alone(alone):
    """The ones before are finished, and the turn goes on."""

    def batches() -> Iterator[Batch]:
        yield from many(0, 3)
        raise KeyError("no more")

    backend = Scripted()
    queue = DeviceQueue(backend)
    for _ in range(5):
        with pytest.raises(KeyError):
            ran(queue, batches(), alone=alone)
    done, _ = ran(queue, many(100, 10), alone=True)
    assert all(one.error is None for one in done)
    assert len(backend.began) == 25


def test_a_device_is_never_busy_for_longer_than_it_is_held():
    """And held for no longer than the time that has passed: all callers together, since a batch may end in another's turn."""
    backend = Scripted(lambda _: time.sleep(0.002), num_streams=3)
    queue = DeviceQueue(backend)
    began = time.perf_counter()
    spent = [ran(queue, many(0, 30))[1]]
    with ThreadPoolExecutor(3) as callers:
        spent += [one for _, one in callers.map(lambda caller: ran(queue, many(100 * caller, 30)), range(1, 9))]
    passed = time.perf_counter() - began
    held, busy = sum(one.held_s for one in spent), sum(one.busy_s for one in spent)
    assert all(one.busy_s > 0 and one.held_s > 0 for one in spent)
    assert 0.002 * 9 * 30 / 3 <= busy <= held <= passed


def test_what_is_done_is_taken_before_all_batches_are_asked_for():
    """A shard's token ids and vectors are not kept batch by batch until the last one is done."""
    asked, taken, most = 0, 0, 0

    def batches() -> Iterator[Batch]:
        nonlocal asked, most
        for batch in many(0, 30):
            asked += 1
            most = max(most, asked - taken)
            yield batch

    def take(_: Done) -> None:
        nonlocal taken
        taken += 1

    DeviceQueue(Scripted(num_streams=1)).run(batches(), take)
    assert (asked, taken) == (30, 30)
    assert most <= 1 + READY_BATCHES + 2, "in the stream, waiting for it, made, and done just now"


def test_a_device_that_cannot_even_give_back_memory_makes_room_for_the_next_batch():
    """Each that kept its place would be one fewer, until all callers wait for ever."""
    backend = Scripted(raising_memory_error)
    backend.relieve = raising_memory_error
    queue = DeviceQueue(backend)
    for _ in range(10):
        with pytest.raises(MemoryError):
            started(ran, queue, many(0, 1)).result(timeout=20)


def raising_memory_error(*_: Any) -> None:
    raise MemoryError


def test_time_in_which_no_caller_came_is_held_and_not_busy():
    """That is what an idle device is: the reader, or Ray, was too slow for it."""
    queue = DeviceQueue(Scripted(lambda _: time.sleep(0.001)))
    ran(queue, many(0, 2))
    time.sleep(0.05)
    _, spent = ran(queue, many(0, 2))
    assert spent.held_s >= 0.05
    assert spent.busy_s < spent.held_s / 2


def test_a_batch_on_the_cores_of_several_streams_keeps_each_of_them_busy():
    """So that a device whose cores all work is not called half idle."""
    queue = DeviceQueue(Scripted(lambda _: time.sleep(0.02), num_streams=2))
    _, spent = ran(queue, [replace(batch_of(5), num_shares=2)])
    assert 0.02 <= spent.busy_s <= spent.held_s


@pytest.mark.parametrize(("has_shared_batches", "num_shares"), [(True, 4), (False, 1)])
def test_a_lone_batch_gets_the_cores_of_all_streams_where_they_can_share_it(has_shared_batches, num_shares):
    """PyTorch's can on CPUs; a stream of OpenVINO is one core, and the others are idle then, as the books say."""
    backend = Scripted(num_streams=4)
    backend.has_shared_batches = has_shared_batches
    PackedEncoder(Lengths(), backend, TokenBudget("cpu", 512))(["5", "3"])
    assert [batch.num_shares for batch in backend.began] == [num_shares]


@pytest.mark.parametrize(("call_tokens", "lengths"), [(8, [[40, 40], [39, 38]]), (None, [[40, 40, 39, 38]])])
def test_few_texts_are_spread_over_streams_that_have_cores_of_their_own(call_tokens, lengths):
    """One batch would leave the other core idle; but streams that share a GPU are no faster by half a batch each."""
    backend = Scripted(num_streams=2)
    backend.call_tokens = call_tokens
    PackedEncoder(Lengths(), backend, TokenBudget("cpu", 768))(["38", "40", "39", "40"])
    computed = [sorted(batch.attention_mask.sum(axis=1).tolist(), reverse=True) for batch in backend.began]
    assert sorted(computed, reverse=True) == lengths


def test_no_batches_are_no_time_on_the_device():
    """A caller without texts."""
    done, spent = ran(DeviceQueue(Scripted()), [])
    assert (done, spent.busy_s) == ([], 0)


def test_a_closed_queue_has_ended_its_threads():
    """What runs is finished first."""
    before = threading.active_count()
    queue = DeviceQueue(Scripted(lambda _: time.sleep(0.01), num_streams=3))
    answer = started(ran, queue, many(0, 6))
    answer.result(20)
    queue.close()
    deadline = time.monotonic() + 20
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.001)
    assert threading.active_count() <= before
