"""The plan: cuts that depend on the files alone, and what is left of them."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from engine.models.base import BaseEmbeddingModel
from engine.planning import MIN_SHARD_ROWS, choose_shard_rows, cut, make_plan, parcels
from engine.schema import InputFile, Shard
from engine.sources.shape import FileShape
from tests.builders import FINGERPRINT, make_shard

GROUPS = st.lists(st.one_of(st.integers(0, 40), st.integers(0, 5000)), max_size=60)
SHARD_ROWS = st.one_of(st.integers(1, 50), st.integers(1, 2000))
FILES = st.lists(GROUPS, max_size=6)


def shape(groups, *, name: str = "a.parquet", row_bytes: int = 100, size: int = 1) -> FileShape:
    file = InputFile(name, f"/source/{name}", size, "1")
    return FileShape(file=file, row_groups=tuple(groups), text_bytes=sum(groups) * row_bytes, kept_types=())


def shapes(files) -> list[FileShape]:
    return [shape(groups, name=f"{number}.parquet") for number, groups in enumerate(files)]


def is_giant(rows: int, shard_rows: int) -> bool:
    return rows > shard_rows * 3 // 2


# Cuts


@given(GROUPS, SHARD_ROWS)
@example([], 1)
@example([0, 0], 1)
@example([1] * 1000, 256)
@example([1_000_000], 256)
def test_ranges_hold_each_row_once_and_in_order(groups, shard_rows):
    """From the first row to the last, none is empty and none overlaps."""
    ranges = list(cut(groups, shard_rows))
    assert all(start < stop for start, stop in ranges)
    assert all(before[1] == after[0] for before, after in pairwise(ranges))
    assert (ranges[0][0], ranges[-1][1]) == (0, sum(groups)) if sum(groups) else not ranges


@given(GROUPS, SHARD_ROWS)
def test_no_range_is_more_than_half_as_large_again(groups, shard_rows):
    """What a shard costs in memory is bounded by what was asked for."""
    assert all(stop - start <= max(shard_rows, shard_rows * 3 // 2) for start, stop in cut(groups, shard_rows))


@given(GROUPS, SHARD_ROWS)
def test_row_groups_that_are_not_giants_stay_whole(groups, shard_rows):
    """No bound of a range lies inside such a group: it would be read twice."""
    bounds = {bound for rows in cut(groups, shard_rows) for bound in rows}
    position = 0
    for rows in groups:
        if not is_giant(rows, shard_rows):
            assert not bounds & set(range(position + 1, position + rows))
        position += rows


@given(st.integers(1, 10**7), SHARD_ROWS)
def test_a_giant_row_group_is_cut_evenly(rows, shard_rows):
    """Its pieces differ by one row at most, and none is a small rest."""
    assume(is_giant(rows, shard_rows))
    assume(rows // shard_rows < 10_000)
    sizes = {stop - start for start, stop in cut([rows], shard_rows)}
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= shard_rows
    assert 2 * min(sizes) >= shard_rows


@given(st.lists(st.integers(0, 5), max_size=3000), st.integers(5, 500))
@example([1] * 5000, 256)
def test_tiny_row_groups_are_joined(groups, shard_rows):
    """Two neighbouring ranges would not have fitted into one."""
    sizes = [stop - start for start, stop in cut(groups, shard_rows)]
    assert all(one + other > shard_rows for one, other in pairwise(sizes))
    assert len(sizes) <= 2 * sum(groups) / shard_rows + 1


@given(GROUPS, GROUPS, SHARD_ROWS)
def test_what_stands_before_a_giant_decides_nothing_behind_it(before, behind, shard_rows):
    """A cut is a matter of the neighbourhood, so that it can be understood from the footer."""
    giant = shard_rows * 2
    position = sum(before) + giant
    ranges = [(start - position, stop - position) for start, stop in cut([*before, giant, *behind], shard_rows)]
    assert [rows for rows in ranges if rows[0] >= 0] == list(cut(behind, shard_rows))


# Parcels


@given(st.lists(st.integers(1, 300), max_size=200), st.integers(1, 400))
def test_parcels_hold_each_shard_once_and_are_full(sizes, shard_rows):
    """In order; more rows than a shard has only in a parcel of one; two neighbours would not have fitted into one."""
    max_rows = max(shard_rows, MIN_SHARD_ROWS)
    pending = [make_shard(size, start=number * 1000) for number, size in enumerate(sizes)]
    groups = list(parcels(pending, shard_rows))
    assert [shard for group in groups for shard in group] == pending
    rows = [sum(len(shard) for shard in group) for group in groups]
    assert all(num_rows <= max_rows or len(group) == 1 for num_rows, group in zip(rows, groups, strict=True))
    assert all(num_rows + len(after[0]) > max_rows for num_rows, after in zip(rows, groups[1:], strict=False))


# Plans


@given(FILES, SHARD_ROWS, st.randoms(use_true_random=False))
def test_what_is_committed_is_taken_away_and_moves_nothing(files, shard_rows, random):
    """The shards are the same whatever is done; the pending are those that are not, in order, and counts add up."""
    fresh = make_plan(shapes(files), shard_rows=shard_rows, fingerprint=FINGERPRINT, committed=set())
    committed = {shard.id for shard in fresh.pending if random.random() < 0.5}
    rest = make_plan(shapes(files), shard_rows=shard_rows, fingerprint=FINGERPRINT, committed=committed)
    assert rest.pending == tuple(shard for shard in fresh.pending if shard.id not in committed)
    assert rest.num_shards == fresh.num_shards == len({shard.id for shard in fresh.pending})
    assert (rest.num_files, rest.num_rows) == (len(files), sum(map(sum, files)))
    assert rest.pending_rows == sum(map(len, rest.pending))
    assert rest.done_rows == sum(len(shard) for shard in fresh.pending if shard.id in committed)
    assert 0 <= rest.pending_bytes <= rest.num_bytes
    assert not rest.unknown


@given(FILES, SHARD_ROWS)
def test_the_order_and_number_of_other_files_change_no_shard(files, shard_rows):
    """A source that grows, or is listed in another order, keeps the ids of its shards."""
    every = make_plan(shapes(files), shard_rows=shard_rows, fingerprint=FINGERPRINT, committed=set())
    for one in shapes(files):
        alone = make_plan([one], shard_rows=shard_rows, fingerprint=FINGERPRINT, committed=set())
        assert set(alone.pending) <= set(every.pending)


def test_committed_shards_that_no_file_has_are_named():
    """Their inputs are gone or changed; the others are still known."""
    now = make_plan([shape([10])], shard_rows=5, fingerprint=FINGERPRINT, committed=set())
    committed = {now.pending[0].id, "gone"}
    assert make_plan([shape([10])], shard_rows=5, fingerprint=FINGERPRINT, committed=committed).unknown == {"gone"}


@pytest.mark.parametrize(
    "other",
    [
        Shard.of("e" * 32, make_shard().file, 0, 10),
        Shard.of(FINGERPRINT, make_shard().file, 0, 9),
        Shard.of(FINGERPRINT, make_shard().file, 1, 10),
        Shard.of(FINGERPRINT, InputFile("b.parquet", "/source/a.parquet", 1000, "12345"), 0, 10),
        Shard.of(FINGERPRINT, InputFile("a.parquet", "/source/a.parquet", 1001, "12345"), 0, 10),
        Shard.of(FINGERPRINT, InputFile("a.parquet", "/source/a.parquet", 1000, "12346"), 0, 10),
    ],
)
def test_another_input_job_or_range_is_another_shard(other):
    """Path, size, time of change, rows and fingerprint are all in the id."""
    assert other.id != make_shard().id


def test_the_place_of_a_source_is_not_in_the_id():
    """The same files mounted elsewhere are the same shards."""
    moved = InputFile("a.parquet", "/elsewhere/a.parquet", 1000, "12345")
    assert Shard.of(FINGERPRINT, moved, 0, 10).id == make_shard().id


def test_a_source_without_rows_has_an_empty_plan():
    """No files, or empty ones."""
    for files in ([], [[]], [[0, 0]]):
        plan = make_plan(shapes(files), shard_rows=5, fingerprint=FINGERPRINT, committed=set())
        assert (plan.num_shards, plan.num_rows, plan.pending_rows, plan.pending_bytes) == (0, 0, 0, 0)


# The size of shards


def shard_rows_of(shapes: list[FileShape]) -> int:
    return choose_shard_rows(
        shapes, max_rows=BaseEmbeddingModel.max_shard_rows, max_bytes=BaseEmbeddingModel.max_shard_bytes
    )


@given(st.integers(0, 10**7), st.integers(1, 10**6))
def test_a_shard_has_rows_and_its_text_fits_into_memory(num_rows, row_bytes):
    """From one-word rows to rows of a megabyte: some rows, and no more than a gibibyte of text."""
    shard_rows = shard_rows_of([shape([num_rows], row_bytes=row_bytes)])
    assert shard_rows >= 1
    assert not num_rows or shard_rows * row_bytes <= 1024**3


@given(st.integers(1, 10**9), st.integers(1, 10**9), st.integers(1, 10**5))
def test_larger_jobs_never_get_smaller_shards(one, other, row_bytes):
    """With rows of the same width: the number of shards is what grows too much otherwise."""
    small, large = sorted((one, other))
    assert shard_rows_of([shape([small], row_bytes=row_bytes)]) <= shard_rows_of([shape([large], row_bytes=row_bytes)])


@given(st.integers(1, 10**7), st.integers(1, 10**5), st.integers(1, 10**5))
def test_wider_rows_never_get_larger_shards(num_rows, one, other):
    """A shard is so much text, whatever its rows (to the row that rounding costs)."""
    narrow, wide = (shard_rows_of([shape([num_rows], row_bytes=width)]) for width in sorted((one, other)))
    assert wide <= narrow + 1


def test_a_huge_job_has_a_number_of_shards_that_a_driver_bears():
    """A billion rows of a tweet each: at most a few hundred thousand shards."""
    assert 10**9 / shard_rows_of([shape([10**9], row_bytes=140)]) <= 300_000


@given(st.lists(st.integers(0, 10**5), min_size=1, max_size=20))
def test_the_size_of_shards_does_not_depend_on_how_rows_lie_in_files(rows):
    """It is chosen from rows and bytes of the whole job."""
    apart = [shape([count], name=str(number)) for number, count in enumerate(rows)]
    assert shard_rows_of(apart) == shard_rows_of(apart[::-1]) == shard_rows_of([shape(rows)])
