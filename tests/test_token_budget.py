"""The token budget: kept if it is given, and else found on the job's own batches, without deciding any vector."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import numpy as np
import pytest

from engine.models import device_queue
from engine.models.backends.base import Batch
from engine.models.device_queue import Done
from engine.models.encoders import PackedEncoder
from engine.models.token_budget import BATCHES_TO_TELL, CANDIDATES, TokenBudget
from tests.scripted import Lengths, Scripted, wait
from tests.tiny_models import BERT, bert_tokenizer, cosines, mixed, packed, sample, save_transformer, with_modules

SMALL, MIDDLE, LARGE = CANDIDATES["cpu"]
MUCH = 10**6
FULL = {SMALL: 1.0, MIDDLE: 1.0, LARGE: 1.0}


def done(budget: int, tokens_per_s: float, count: int = BATCHES_TO_TELL, *, failed: bool = False) -> list[Done]:
    """Make what a device has done: full batches, at a speed."""
    ids = np.ones((budget // 32, 32), np.int64)
    batch = Batch(np.arange(len(ids)), ids, ids, budget)
    if failed:
        return [Done(batch, None, ValueError(), 0.0)] * count
    return [Done(batch, np.ones((len(ids), 2), np.float32), None, ids.size / tokens_per_s)] * count


def compare(budget: TokenBudget, done: list[Done], fills: dict[int, float]) -> None:
    for one in done:
        budget.note(one)
    budget.compare(fills)


def on_trial(budget: TokenBudget, num_tokens: int) -> tuple[int, ...]:
    """Return what a call of so many tokens is packed under, and end its trial."""
    with budget.trial(num_tokens) as budgets:
        return budgets


def compared(small: float, middle: float, large: float, fills: dict[int, float] | None = None) -> TokenBudget:
    """Return a budget that has seen batches of each candidate, at such speeds."""
    budget = TokenBudget("cpu")
    assert on_trial(budget, MUCH) == (SMALL, MIDDLE, LARGE)
    compare(budget, [*done(SMALL, small), *done(MIDDLE, middle), *done(LARGE, large)], fills or FULL)
    return budget


def texts_of(num_tokens: int) -> list[str]:
    """Return texts for the tokenizer `Lengths`, of so many tokens together, in no order."""
    lengths = [*range(1, 60)] * (num_tokens // 1770 + 1)
    random.Random(0).shuffle(lengths)
    return [str(length) for length in lengths]


# What holds


def test_a_budget_that_is_given_stays():
    """Whatever the device says of it."""
    budget = TokenBudget("cpu", 300)
    assert on_trial(budget, MUCH) == (300,)
    compare(budget, [*done(SMALL, 1000), *done(LARGE, 9000)], FULL)
    assert (on_trial(budget, MUCH), budget.value) == ((300,), 300)


@pytest.mark.parametrize(("kind", "others"), [("cpu", "cpu"), ("cuda", "cuda"), ("mps", "cpu")])
def test_a_device_begins_with_the_middle_one_of_its_candidates(kind, others):
    """A GPU is filled, a core's caches are not overrun."""
    assert TokenBudget(kind).value == sorted(CANDIDATES[others])[1]
    assert on_trial(TokenBudget(kind), 10**9) == CANDIDATES[others]


def test_little_text_is_never_on_trial():
    """Groups of a few texts would be padded, and say nothing; what is large enough for two candidates is tried with these."""
    budget = TokenBudget("cpu")
    for num_tokens in (0, 1, 6 * SMALL, 6 * MIDDLE - 1):
        assert on_trial(budget, num_tokens) == (MIDDLE,)
    assert on_trial(budget, 6 * MIDDLE) == (SMALL, MIDDLE)
    compare(budget, done(SMALL, 1000, count=1), {SMALL: 1.0, MIDDLE: 1.0})
    assert on_trial(budget, 6 * LARGE) == (SMALL, MIDDLE, LARGE)


def test_one_call_at_a_time_is_on_trial():
    """Two would disturb each other's measurements; the next one comes when the first has told."""
    budget = TokenBudget("cpu")
    with budget.trial(MUCH) as budgets:
        assert budgets == (SMALL, MIDDLE, LARGE)
        assert [on_trial(budget, MUCH) for _ in range(3)] == [(MIDDLE,)] * 3
    assert on_trial(budget, MUCH) == (SMALL, MIDDLE, LARGE)


# What is taken


@pytest.mark.parametrize(
    ("small", "middle", "large", "taken"),
    [
        (1000, 900, 800, SMALL),
        (800, 1000, 900, MIDDLE),
        (800, 900, 1000, LARGE),
        (1020, 1000, 1025, MIDDLE),
        (1000, 1000, 1000, MIDDLE),
    ],
)
def test_the_fastest_candidate_is_taken_if_it_is_worth_it(small, middle, large, taken):
    """A slower one is not, and nor is one that is faster by what measurements differ by themselves."""
    budget = compared(small, middle, large)
    assert (budget.value, on_trial(budget, MUCH)) == (taken, (taken,))


def test_padding_counts_against_a_candidate():
    """What is told are tokens, not what fills the rows up."""
    assert compared(1000, 1000, 1100).value == LARGE
    assert compared(1000, 1000, 1100, {SMALL: 0.99, MIDDLE: 0.99, LARGE: 0.85}).value == MIDDLE


def test_few_batches_say_nothing():
    """The trial goes on until each candidate has shown enough, over several calls."""
    budget = TokenBudget("cpu")
    for _ in range(BATCHES_TO_TELL - 1):
        assert len(on_trial(budget, MUCH)) == 3
        compare(budget, [*done(SMALL, 9000, 99), *done(MIDDLE, 1000, 99), *done(LARGE, 1000, 1)], FULL)
    assert budget.value == MIDDLE
    assert len(on_trial(budget, MUCH)) == 3
    compare(budget, done(LARGE, 1000, 1), FULL)
    assert (budget.value, on_trial(budget, MUCH)) == (SMALL, (SMALL,))


def test_batches_that_failed_say_nothing_of_speed():
    """They are over in no time."""
    budget = TokenBudget("cpu")
    on_trial(budget, MUCH)
    compare(budget, [*done(SMALL, 1000), *done(MIDDLE, 1000), *done(LARGE, 0, 99, failed=True)], FULL)
    assert len(on_trial(budget, MUCH)) == 3
    compare(budget, done(LARGE, 500), FULL)
    assert on_trial(budget, MUCH) == (MIDDLE,)


# Too large


def test_halving_settles(caplog):
    """A device without memory for a batch is asked for half of it, and no trial goes beyond it again."""
    budget = TokenBudget("cuda")
    on_trial(budget, 10**9)
    budget.halve(16384)
    compare(budget, [*done(32768, 1000), *done(16384, 9000)], {16384: 1.0, 32768: 1.0})
    assert (budget.value, on_trial(budget, 10**9)) == (8192, (8192,))
    assert "a batch of 16384 padded tokens does not fit into the device's memory: 8192 from now on" in caplog.text


def test_halving_never_raises_a_budget_and_never_ends_at_nothing():
    """Batches of before the first halving come back after it."""
    budget = TokenBudget("cpu", 100)
    budget.halve(1000)
    assert budget.value == 100
    budget.halve(100)
    assert budget.value == 50
    budget.halve(1)
    assert budget.value == 1


# On a device


class Clock(threading.local):
    """Of each stream its own, which goes on as its device says and not as long as the machine makes it wait."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


CLOCK = Clock()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_queue, "time", CLOCK)


def overhead(batch: Batch) -> None:
    """A device on which each call costs the same: the largest batches are the best."""
    CLOCK.now += 0.002


def small_cache(batch: Batch) -> None:
    """A device whose cache is soon overrun: the smallest batches are the best."""
    CLOCK.now += 1e-5 * batch.num_padded_tokens * (batch.num_padded_tokens / 256)


def middling(batch: Batch) -> None:
    """A device that has both."""
    CLOCK.now += 0.002 if batch.num_padded_tokens <= MIDDLE else 0.02


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(("device", "taken"), [(overhead, LARGE), (small_cache, SMALL), (middling, MIDDLE)])
def test_the_budget_is_found_on_the_job_s_own_batches(device: Callable[[Batch], None], taken):
    """No text is computed twice for it, batches of all candidates take turns, and after it there is one budget."""
    backend = Scripted(device)
    encoder = PackedEncoder(Lengths(), backend, TokenBudget("cpu"))
    texts = texts_of(40_000)
    encoded = encoder(texts)
    assert {batch.budget for batch in backend.began} == {SMALL, MIDDLE, LARGE}
    assert sorted(np.concatenate([batch.positions for batch in backend.began])) == list(range(len(texts)))
    np.testing.assert_array_equal(encoded.vectors[:, 0], [int(text) ** 2 for text in texts])
    assert encoder.budget.value == taken
    backend.began.clear()
    encoder(texts)
    assert {batch.budget for batch in backend.began} == {taken}


def test_on_a_device_that_streams_share_batches_on_trial_are_alone_and_first_ones_do_not_count(monkeypatch):
    """A small batch beside a large one would wait for that one's work, and whichever is first for memory and libraries."""
    noted: list[int] = []
    monkeypatch.setattr(TokenBudget, "note", lambda _, one: noted.append(int(one.batch.positions[0])))
    seen: set[tuple[int, int]] = set()
    later: list[int] = []

    def act(batch: Batch) -> None:
        overhead(batch)
        if (key := (threading.get_ident(), batch.budget)) in seen:
            later.append(int(batch.positions[0]))
        seen.add(key)

    backend = Scripted(act)
    PackedEncoder(Lengths(), backend, TokenBudget("cpu"))(texts_of(40_000))
    assert backend.most_at_once == 1
    assert {budget for _, budget in seen} == {SMALL, MIDDLE, LARGE}
    assert noted == later
    assert len(backend.began) == len(later) + len(seen)


def test_two_calls_at_once_are_on_trial_one_after_the_other():
    """The second one goes by the budget that holds meanwhile."""
    gate, inside = threading.Event(), threading.Event()

    def act(batch: Batch) -> None:
        inside.set()
        wait(gate)

    backend = Scripted(act)
    encoder = PackedEncoder(Lengths(), backend, TokenBudget("cpu"))
    calls = [threading.Thread(target=encoder, args=[texts_of(40_000)])]
    calls[0].start()
    wait(inside)
    calls.append(threading.Thread(target=encoder, args=[["61"] * 500]))
    calls[1].start()
    gate.set()
    for call in calls:
        call.join()
    of_first, of_second = (
        {batch.budget for batch in backend.began if (batch.input_ids.shape[1] == 61) is second}
        for second in (False, True)
    )
    assert (of_first, of_second) == ({SMALL, MIDDLE, LARGE}, {MIDDLE})


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("texts", [[str(6 * LARGE)], [str(3 * LARGE)] * 2], ids=["one text", "two texts"])
def test_a_call_of_fewer_texts_than_candidates_does_not_end_the_search(texts):
    """One text of thousands of tokens is one batch, of one candidate: the trial is open to the calls that come after."""
    backend = Scripted(overhead)
    encoder = PackedEncoder(Lengths(), backend, TokenBudget("cpu"))
    encoder(texts)
    encoder(texts_of(40_000))
    assert encoder.budget.value == LARGE


@pytest.mark.usefixtures("clock")
def test_a_call_that_fails_on_trial_does_not_end_the_search(monkeypatch):
    """The machine may have had no memory for its arrays."""
    encoder = PackedEncoder(Lengths(), Scripted(overhead), TokenBudget("cpu"))
    with monkeypatch.context() as patch:
        patch.setattr("engine.models.tokens.Tokens.padded", lambda *_, **__: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(MemoryError):
            encoder(texts_of(40_000))
    encoder(texts_of(40_000))
    assert encoder.budget.value == LARGE


def test_vectors_do_not_depend_on_the_budget(tmp_path):
    """On trial, given, or so small that each text is alone."""
    folder = save_transformer(tmp_path, BERT, bert_tokenizer())
    texts = [*mixed(), *sample("messages", 400)]
    answers = [packed(with_modules(folder), batch_tokens=budget)(texts) for budget in (None, 1, 64, 512, 4096)]
    assert len({answer.num_padded_tokens for answer in answers}) == 5, "they were packed in as many ways"
    for answer in answers[1:]:
        assert cosines(answer.vectors, answers[0].vectors).min() >= 0.99999
