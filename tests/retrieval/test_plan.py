"""Cutting the work by target and merging what was found: every sample once, in order, whatever the cut."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rella.retrieval import engines
from rella.retrieval.engines import run, top_k
from rella.retrieval.index import Index, Samples
from rella.retrieval.plan import Plan, merge
from tests.retrieval.worlds import clusters, gaussian, world

LENGTHS = [200, 3, 90, 1, 400, 0, 60]


def made(rng: np.random.Generator, limit: float | None, monkeypatch: pytest.MonkeyPatch) -> tuple[Index, Samples]:
    vectors = clusters(rng, 80, 12)
    histories, samples = world(rng, vectors, LENGTHS, 500)
    # Popular and rare targets, so that both engines have work.
    item = np.minimum(rng.geometric(0.06, 500) - 1, 79).astype(np.int32)
    if limit is not None:
        monkeypatch.setattr(engines, "pays_from", lambda *_: limit)
    return Index.of(vectors, histories, "cosine"), Samples(samples[0], item, samples[2])


@pytest.mark.parametrize("limit", [-1.0, 1500.0, np.inf])
@pytest.mark.parametrize(("groups", "positions"), [(1, 10**9), (3, 900), (9, 100), (60, 20), (5, 1)])
def test_what_groups_find_merges_into_the_whole(
    limit: float, groups: int, positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, samples = made(np.random.default_rng(groups), limit, monkeypatch)
    k = 7
    plan = Plan.of(index, samples, k, groups, positions)
    found = []
    for group in range(plan.groups):
        mine = samples.take(plan.rows(group))
        keep = np.minimum(mine.end, k)
        at = (np.cumsum(keep) - keep).astype(np.int64)
        out = np.full(int(keep.sum()), -1, np.int32)
        run(index, mine, k, at, out, lambda _: None, 1, plan.engine(group))
        found.append(out.astype(np.uint16))
        assert plan.pairs[group] == mine.pairs
        assert plan.slots[group, -1] == len(out)
    whole = np.full(int(np.minimum(samples.end, k).sum()), -1, np.int32)
    starts = np.cumsum(np.minimum(samples.end, k)) - np.minimum(samples.end, k)
    run(index, samples, k, starts.astype(np.int64), whole, lambda _: None)
    parts = []
    for part in range(plan.parts):
        pieces = [f[plan.slots[g, part] : plan.slots[g, part + 1]] for g, f in enumerate(found)]
        offsets, merged = merge(plan, part, samples.end, k, pieces)
        assert offsets[-1] == len(merged)
        assert len(offsets) == plan.edges[part + 1] - plan.edges[part] + 1
        parts.append(merged)
    assert np.array_equal(np.concatenate(parts), whole)


@given(st.integers(0, 10**6), st.integers(1, 70), st.integers(1, 3000))
def test_every_sample_is_in_one_group_and_in_one_part(seed: int, groups: int, positions: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = gaussian(rng, 40, 3)
    histories, samples = world(rng, vectors, LENGTHS, int(rng.integers(0, 90)))
    plan = Plan.of(Index.of(vectors, histories, "l2"), Samples(*samples), 5, groups, positions)
    assert sorted(plan.order.tolist()) == list(range(len(samples[0])))
    assert plan.first[-1] == len(samples[0])
    for group in range(plan.groups):
        rows = plan.rows(group)
        assert len(rows) > 0
        assert (np.diff(rows) > 0).all()
        assert (plan.group[rows] == group).all()
    assert plan.edges[0] == 0
    assert plan.edges[-1] == len(samples[0])
    assert all(a < b for a, b in itertools.pairwise(plan.edges)) or len(samples[0]) == 0


def test_groups_are_of_about_equal_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    vectors = gaussian(rng, 2000, 8)
    histories, samples = world(rng, vectors, [300] * 40, 20_000)
    index, columns = Index.of(vectors, histories, "cosine"), Samples(*samples)
    monkeypatch.setattr(engines, "pays_from", lambda *_: 1500.0)
    plan = Plan.of(index, columns, 5, 10)
    assert 0 < plan.tables < plan.groups
    assert 9 <= plan.groups <= 12
    # A target's samples stay together in the table, a user's among the others.
    for group in range(plan.groups):
        mine = columns.take(plan.rows(group))
        rest = np.flatnonzero(plan.group != group)
        others = columns.take(rest[plan.group[rest] < plan.tables] if group < plan.tables else
                              rest[plan.group[rest] >= plan.tables])  # fmt: skip
        same = (mine.item, others.item) if group < plan.tables else (mine.user, others.user)
        assert not set(same[0].tolist()) & set(same[1].tolist())
    assert plan.pairs.max() < 2 * np.median(plan.pairs[: plan.tables])


def test_a_plan_s_name_tells_it_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    index, samples = made(np.random.default_rng(3), 1500.0, monkeypatch)
    one, same = (Plan.of(index, samples, 7, 6, 300) for _ in range(2))
    assert one.digest == same.digest
    names = {one.digest, Plan.of(index, samples, 7, 5, 300).digest, Plan.of(index, samples, 7, 6, 200).digest,
             Plan.of(index, samples, 8, 6, 300).digest}  # fmt: skip
    assert len(names) == 4


def test_the_whole_is_top_k(monkeypatch: pytest.MonkeyPatch) -> None:
    """No samples, and samples without a history, are no trouble."""
    rng = np.random.default_rng(4)
    vectors = gaussian(rng, 9, 3)
    histories, _ = world(rng, vectors, [5, 0], 1)
    none = Samples(*(np.zeros(0, np.int32) for _ in range(3)))
    plan = Plan.of(Index.of(vectors, histories, "dot"), none, 5, 4)
    assert (plan.groups, plan.parts, plan.edges.tolist()) == (0, 1, [0, 0])
    empty = Samples(*(np.array(c, np.int32) for c in ([0, 1, 0], [2, 3, 2], [0, 0, 2])))
    index = Index.of(vectors, histories, "dot")
    plan = Plan.of(index, empty, 5, 4)
    right = top_k(vectors, histories, empty.user, empty.item, empty.end, 5, "dot")
    assert right[0].tolist() == [0, 0, 0, 2]
    assert plan.edges.tolist() == [0, 3]
