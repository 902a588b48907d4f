"""Batching: every text once, under the budget, the longest first, and next to no padding on real text."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.batching import ALIKE, FULL_ENOUGH, pack, pack_for_streams, pack_in_turns
from engine.models.token_budget import CANDIDATES
from tests.test_tokens import of_minilm
from tests.tiny_models import sample

LENGTHS = st.lists(st.integers(0, 700), max_size=200)
BUDGETS = st.integers(1, 3000)
ROWS = st.none() | st.integers(1, 40)


def padded(lengths: np.ndarray, batches: list[np.ndarray]) -> int:
    return sum(len(batch) * int(lengths[batch].max()) for batch in batches)


@given(LENGTHS, BUDGETS, ROWS)
def test_every_text_is_in_one_batch(lengths, max_tokens, max_rows):
    """Nothing is lost, nothing is embedded twice, and no batch is empty."""
    batches = pack(np.array(lengths, np.int64), max_tokens=max_tokens, max_rows=max_rows)
    assert sorted(np.concatenate([*batches, np.empty(0, np.int64)]).tolist()) == list(range(len(lengths)))
    assert all(len(batch) for batch in batches)


@given(LENGTHS, BUDGETS, ROWS)
def test_a_batch_is_under_the_budget_unless_it_is_one_text(lengths, max_tokens, max_rows):
    """Rows times the longest: what the device has memory for. A text that is longer goes alone."""
    lengths = np.array(lengths, np.int64)
    for batch in pack(lengths, max_tokens=max_tokens, max_rows=max_rows):
        assert len(batch) == 1 or len(batch) * lengths[batch].max() <= max_tokens
        assert max_rows is None or len(batch) <= max_rows


@given(LENGTHS, BUDGETS, ROWS)
def test_the_longest_texts_come_first(lengths, max_tokens, max_rows):
    """Memory peaks in the first batch, where a device that has too little says so; lengths never rise again."""
    lengths = np.array(lengths, np.int64)
    batches = pack(lengths, max_tokens=max_tokens, max_rows=max_rows)
    in_order = lengths[np.concatenate([*batches, np.empty(0, np.int64)]).astype(np.int64)]
    assert (np.diff(in_order) <= 0).all()


@given(LENGTHS, BUDGETS, ROWS)
def test_a_batch_ends_where_it_is_full_or_texts_get_much_shorter(lengths, max_tokens, max_rows):
    """Fewer batches are fewer calls; but what is filled up with much shorter texts is filled up with padding."""
    lengths = np.array(lengths, np.int64)
    batches = pack(lengths, max_tokens=max_tokens, max_rows=max_rows)
    for batch, following in pairwise(batches):
        assert ends_well(lengths, batch, following, max_tokens, max_rows)


def ends_well(lengths: np.ndarray, batch: np.ndarray, following: np.ndarray, budget: int, max_rows: int | None) -> bool:
    """Say whether a batch is full, or as full as it must be with a text next that would be much padding in it."""
    longest = int(lengths[batch].max())
    rows = max(min(budget // max(longest, 1), max_rows or len(lengths)), 1)
    is_full_enough = len(batch) >= round(FULL_ENOUGH * rows)
    return len(batch) == rows or (is_full_enough and bool(lengths[following[0]] < ALIKE * longest))


MANY_BUDGETS = st.lists(st.sampled_from([16, 64, 128, 256, 300, 512, 1024]), min_size=1, max_size=3, unique=True)


@given(LENGTHS, MANY_BUDGETS, ROWS)
def test_under_several_budgets_each_batch_keeps_its_own(lengths, budgets, max_rows):
    """Every text is in one batch, the longest first, and a batch ends where its budget alone would have it end."""
    lengths = np.array(lengths, np.int64)
    batches = pack_in_turns(lengths, budgets, max_rows=max_rows)
    order = np.concatenate([*(batch for _, batch in batches), np.empty(0, np.int64)]).astype(np.int64)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    assert (np.diff(lengths[order]) <= 0).all()
    for number, (budget, batch) in enumerate(batches):
        assert budget in budgets
        assert len(batch) == 1 or len(batch) * lengths[batch].max() <= budget
        assert max_rows is None or len(batch) <= max_rows
        if number < len(batches) - 1:
            assert ends_well(lengths, batch, batches[number + 1][1], budget, max_rows)


@pytest.mark.parametrize(("budgets", "count"), [((256, 512, 1024), 6000), (CANDIDATES["cpu"], 24000)])
def test_budgets_that_take_turns_have_as_many_tokens_and_texts_of_all_lengths(budgets, count):
    """Only so can their speeds be compared."""
    lengths = np.random.default_rng(0).integers(1, 257, count)
    batches = pack_in_turns(lengths, budgets)
    for budget in budgets:
        own = np.concatenate([batch for one, batch in batches if one == budget])
        assert lengths[own].sum() == pytest.approx(lengths.sum() / 3, rel=0.1)
        assert np.quantile(lengths[own], [0.1, 0.5, 0.9]) == pytest.approx(
            np.quantile(lengths, [0.1, 0.5, 0.9]), abs=12
        )
    padding = 1 - lengths.sum() / padded(lengths, [batch for _, batch in batches])
    assert padding < 0.02


FEW = st.lists(st.integers(0, 300), max_size=60)
STREAMS = st.integers(1, 16)
CALLS = st.sampled_from([0, 8, 32])


def ended(lengths: np.ndarray, batches: list[np.ndarray], num_streams: int, call_tokens: int) -> int:
    """Return when the last stream is done, if each takes the next batch as it is free; in tokens."""
    streams = [0] * num_streams
    for batch in batches:
        at = streams.index(min(streams))
        streams[at] += len(batch) * int(lengths[batch].max()) + call_tokens
    return max(streams)


@given(FEW, BUDGETS, STREAMS, CALLS, st.booleans(), ROWS)
def test_few_texts_for_several_streams_are_each_in_one_batch_under_the_budget(
    lengths, budget, streams, call, can_share, rows
):
    """As under one budget: nothing is lost or embedded twice, the longest come first, and what a device has memory for is kept to."""
    lengths = np.array(lengths, np.int64)
    batches = pack_for_streams(
        lengths, max_tokens=budget, num_streams=streams, call_tokens=call, can_share=can_share, max_rows=rows
    )
    order = np.concatenate([*batches, np.empty(0, np.int64)]).astype(np.int64)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    assert (np.diff(lengths[order]) <= 0).all()
    for batch in batches:
        assert len(batch) == 1 or len(batch) * lengths[batch].max() <= budget
        assert rows is None or 0 < len(batch) <= rows


@given(FEW, st.integers(300, 3000), STREAMS)
def test_streams_are_done_with_few_texts_no_later_than_under_one_budget(lengths, budget, streams):
    """One batch for all of them would leave the other streams idle."""
    lengths = np.array(lengths, np.int64)
    spread = pack_for_streams(lengths, max_tokens=budget, num_streams=streams, call_tokens=0, can_share=False)
    full = pack(lengths, max_tokens=budget, full_enough=1)
    assert ended(lengths, spread, streams, 0) <= ended(lengths, full, streams, 0)


def test_few_texts_are_dealt_to_streams_as_evenly_as_their_lengths_allow():
    """About as many padded tokens for each stream; and one batch where calls would cost more than to share it."""
    lengths = np.array([11, 43, 4, 16, 26, 11, 10, 7, 5, 11])

    def packed(lengths: np.ndarray, call_tokens: int, num_streams: int = 2) -> list[list[int]]:
        batches = pack_for_streams(
            lengths, max_tokens=768, num_streams=num_streams, call_tokens=call_tokens, can_share=True
        )
        return [lengths[batch].tolist() for batch in batches]

    assert packed(lengths, 32) == [[43, 26], [16, 11, 11, 11, 10, 7, 5], [4]]
    assert packed(lengths[:1], 32) == [[11]]
    assert packed(np.array([10, 9]), 32) == [[10], [9]]
    assert packed(np.array([100, 90, 80]), 32, num_streams=4) == [[100], [90], [80]]
    assert packed(np.array([100, 90, 80]), 500, num_streams=4) == [[100, 90, 80]]


def test_texts_that_fill_a_batch_for_each_stream_are_packed_under_the_one_budget():
    """Smaller batches would cost more calls, and save the end of one call alone."""
    lengths = np.random.default_rng(0).integers(1, 257, 400)
    spread = pack_for_streams(lengths, max_tokens=768, num_streams=2, call_tokens=8, can_share=False)
    assert [batch.tolist() for batch in spread] == [batch.tolist() for batch in pack(lengths, max_tokens=768)]


def test_texts_without_tokens_and_no_texts_can_be_packed():
    """A tokenizer may make nothing of a text; a shard may have no text that can be embedded."""
    assert pack(np.array([], np.int64), max_tokens=8) == []
    assert [batch.tolist() for batch in pack(np.zeros(3, np.int32), max_tokens=8)] == [[0, 1, 2]]
    spread = pack_for_streams(np.zeros(3, np.int32), max_tokens=8, num_streams=2, call_tokens=8, can_share=True)
    assert sorted(np.concatenate(spread).tolist()) == [0, 1, 2]


def test_lengths_of_small_integers_do_not_overflow():
    """Their negatives are what is sorted by."""
    lengths = np.array([200, 3, 255], np.uint8)
    assert [batch.tolist() for batch in pack(lengths, max_tokens=255)] == [[2], [0], [1]]


@pytest.mark.parametrize(
    ("count", "max_tokens"), [(512, 256), (512, 512), (512, 768), (2048, 512), (2048, 1024), (2048, 1536)]
)
@pytest.mark.parametrize("kind", ["messages", "conversations"])
def test_real_text_is_hardly_padded(kind, max_tokens, count):
    """chitchat-dataset's texts, in small shards too: less than 3% of what the device computes is padding."""
    lengths = of_minilm()(sample(kind, count)).lengths
    batches = pack(lengths, max_tokens=max_tokens)
    assert 1 - lengths.sum() / padded(lengths, batches) < 0.03
    unsorted = [np.arange(start, min(start + 32, count)) for start in range(0, count, 32)]
    assert padded(lengths, batches) < 0.8 * padded(lengths, unsorted), "sorting is what does it"
