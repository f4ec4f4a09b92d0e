"""Micro-batches: every row once, within the limits, as few passes as that allows, and equal work for the workers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rella.lm.micro import Limits, cut

Lengths = st.lists(st.integers(1, 60), min_size=1, max_size=50)


def plan(lengths: list[int], limits: Limits, workers: int, bucketing: bool = True) -> list[list[list[int]]]:
    batch = np.arange(len(lengths))
    return [[p.tolist() for p in pieces] for pieces in cut(batch, np.array(lengths), limits, workers, bucketing)]


@given(Lengths, st.integers(1, 20), st.integers(1, 300), st.integers(1, 4), st.booleans(), st.booleans())
def test_every_row_once_and_within_the_limits(
    lengths: list[int], rows: int, tokens: int, workers: int, packing: bool, bucketing: bool
) -> None:
    limits = Limits(rows, tokens, packing)
    passes = plan(lengths, limits, workers, bucketing)
    assert all(len(pieces) == workers for pieces in passes)
    flat = [row for pieces in passes for piece in pieces for row in piece]
    assert sorted(flat) == list(range(len(lengths)))
    if not bucketing:
        assert flat == sorted(flat)
    for pieces in passes:
        for piece in filter(None, pieces):
            assert len(piece) <= rows
            cost = limits.cost(np.array([lengths[row] for row in piece]))
            assert cost <= tokens or len(piece) == 1
    assert all(piece for pieces in passes[:-1] for piece in pieces), "only the last pass has idle workers"
    assert passes[-1][0]


@given(Lengths, st.integers(60, 300), st.integers(1, 3))
def test_bucketed_rows_come_longest_first(lengths: list[int], tokens: int, workers: int) -> None:
    passes = plan(lengths, Limits(100, tokens), workers)
    found = [lengths[row] for pieces in passes for piece in pieces for row in piece]
    assert found == sorted(lengths, reverse=True)


@given(Lengths, st.integers(60, 300), st.booleans())
def test_no_pass_more_than_needed(lengths: list[int], tokens: int, packing: bool) -> None:
    """By exhaustion over where contiguous pieces may end."""
    ordered = np.array(sorted(lengths, reverse=True))
    limits = Limits(8, tokens, packing)
    fewest = [0] + [len(lengths)] * len(lengths)
    for end in range(1, len(ordered) + 1):
        for start in range(max(0, end - 8), end):
            if limits.cost(ordered[start:end]) <= tokens:
                fewest[end] = min(fewest[end], fewest[start] + 1)
    assert len(plan(lengths, limits, 1)) == fewest[-1]


@pytest.mark.parametrize(("packing", "most"), [(False, 700), (True, 700)])
def test_pieces_are_of_equal_size(packing: bool, most: int) -> None:
    """Eleven rows of 100 fit seven and four into 700 tokens; two passes of six and five take less time."""
    passes = plan([100] * 11, Limits(100, most, packing), 1)
    assert sorted(len(piece) for pieces in passes for piece in pieces) == [5, 6]


def test_rows_alone_bind_too() -> None:
    assert [len(pieces[0]) for pieces in plan([5] * 16, Limits(2, 8192), 1)] == [2] * 8
    assert len(plan([5] * 16, Limits(2, 8192), 4)) == 2


def test_a_row_that_is_too_long_is_alone() -> None:
    assert plan([10, 500, 10], Limits(8, 100), 1) == [[[1]], [[0, 2]]]


def test_the_plan_is_a_function_of_the_set_of_rows() -> None:
    rng = np.random.default_rng(0)
    lengths, batch = rng.integers(1, 50, 40), rng.permutation(40)[:17]
    asked: dict[str, Any] = {"lengths": lengths, "limits": Limits(5, 120), "workers": 2}
    first, again = (cut(b, **asked) for b in (batch, np.sort(batch)))
    assert [[p.tolist() for p in pieces] for pieces in first] == [[p.tolist() for p in pieces] for pieces in again]


def test_packing_needs_fewer_passes_than_padding() -> None:
    lengths = [90, 80, 30, 20, 10, 10] * 10
    padded, packed = (len(plan(lengths, Limits(100, 200, on), 1, bucketing=False)) for on in (False, True))
    assert packed < padded
    assert packed >= math.ceil(sum(lengths) / 200)
