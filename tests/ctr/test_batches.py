"""Batches: the compiled kernels do what a loop over one sample's history does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from rella.baselines import BaselineConfig
from rella.ctr.batches import Batches, Recent, Retrieved, SameCategory, batches_of
from rella.ctr.features import Features
from rella.data.questions import Neighbours
from rella.data.selection import Chosen
from rella.data.tables import Histories, Tables
from rella.errors import InputError
from tests.ctr.worlds import FIELDS, everything, random_tables

K = 6
Places = Callable[[int, int, int, int], list[int]]
"""(row, user, item, end) → positions in the sample's history, in the order of time."""


def neighbours_of(samples: Chosen, seed: int, kind: type[np.integer]) -> Neighbours:
    """Return random positions for the samples and for others between them."""
    rng = np.random.default_rng(seed)
    ids = np.sort(np.concatenate([samples.sample_id, samples.sample_id + 10**6]))
    end = dict(zip(samples.sample_id.tolist(), samples.end.tolist(), strict=True))
    found = [rng.permutation(end.get(int(i), 4))[: 2 * K] for i in ids]
    offsets = np.concatenate([[0], np.cumsum([len(f) for f in found])]).astype(np.int64)
    return Neighbours(ids, offsets, np.concatenate(found).astype(kind))


def check(tables: Tables, made: Batches, places: Places, rows: list[int]) -> None:
    features, samples, histories = Features.of(tables, FIELDS), everything(tables), tables.histories()
    batch = made.take(np.array(rows))
    assert batch.items.shape == batch.ratings.shape == batch.mask.shape == (len(rows), made.k)
    for b, row in enumerate(rows):
        user, item, end = int(samples.user[row]), int(samples.item[row]), int(samples.end[row])
        assert batch.fields[b].tolist() == [*features.user_fields[user], *features.item_fields[item]]
        chosen = places(row, user, item, end)
        items, stars = histories.of(user, end)
        padding = [0] * (made.k - len(chosen))
        assert batch.items[b].tolist() == [*features.item_ids[items[chosen]], *padding]
        assert batch.ratings[b].tolist() == [*stars[chosen].astype(int), *padding]
        assert batch.lengths[b] == len(chosen) == batch.mask[b].sum()
        assert batch.label[b] == samples.label[row]


@pytest.mark.parametrize("seed", range(4))
def test_recent_behaviours(seed: int) -> None:
    tables = random_tables(seed)
    made = Batches(Features.of(tables, FIELDS), tables.histories(), everything(tables), Recent(), K)
    rows = np.random.default_rng(seed).integers(0, 60, 100).tolist()
    check(tables, made, lambda row, user, item, end: list(range(max(0, end - K), end)), rows)


@pytest.mark.parametrize("fill_up", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_hard_search(seed: int, fill_up: bool) -> None:
    tables = random_tables(seed)
    features, histories = Features.of(tables, FIELDS), tables.histories()
    made = Batches(features, histories, everything(tables), SameCategory(features.category(), fill_up), 3)
    category = tables.items.column("genre").to_pylist()
    kinds = []

    def places(row: int, user: int, item: int, end: int) -> list[int]:
        items, _ = histories.of(user, end)
        same = [n for n in range(end) if category[items[n]] == category[item]]
        kinds.append(min(len(same), 4))
        others = [n for n in range(end) if n not in same]
        wanted = max(0, 3 - len(same)) if fill_up or not same else 0
        return sorted(same[-3:] + others[len(others) - min(wanted, len(others)) :])

    check(tables, made, places, list(range(60)))
    assert {0, 1, 4} <= set(kinds)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int32])
def test_retrieved_behaviours(kind: type[np.integer]) -> None:
    tables = random_tables(7)
    samples = everything(tables)
    neighbours = neighbours_of(samples, 0, kind)
    source = Retrieved.of(neighbours, samples)
    made = Batches(Features.of(tables, FIELDS), tables.histories(), samples, source, K)
    check(
        tables,
        made,
        lambda row, user, item, end: neighbours.top(int(samples.sample_id[row]), K).tolist(),
        list(range(60))[::-1],
    )


def test_histories_without_ratings() -> None:
    tables = random_tables(8)
    features = replace(Features.of(tables, FIELDS), level=np.zeros(0, np.uint8))
    batch = Batches(features, tables.histories(), everything(tables), Recent(), K).take(np.arange(60))
    assert not batch.ratings.any()
    assert batch.items.any()


def test_prefetched_batches_are_those_of_the_plan() -> None:
    tables = random_tables(9)
    made = Batches(Features.of(tables, FIELDS), tables.histories(), everything(tables), Recent(), K)
    plan = [np.arange(3), np.zeros(0, np.int64), np.array([5, 5, 2])]
    found = list(made.prefetched(plan))
    assert [len(b) for b in found] == [3, 0, 3]
    for batch, rows in zip(found, plan, strict=True):
        assert batch.items.equal(made.take(rows).items)
    assert list(made.prefetched([])) == []


def test_a_fault_in_the_thread_reaches_the_caller() -> None:
    tables = random_tables(9)
    made = Batches(Features.of(tables, FIELDS), tables.histories(), everything(tables), Recent(), K)
    with pytest.raises(IndexError):
        list(made.prefetched([np.arange(3), np.array([10**6])]))


def test_each_search_has_its_batches() -> None:
    tables = random_tables(10)
    features, samples, histories = Features.of(tables, FIELDS), everything(tables), tables.histories()

    def of(model: str, search: str, neighbours: Neighbours | None = None) -> Batches:
        config = BaselineConfig(model=model, search=search, soft_history=40)  # type: ignore[arg-type]
        return batches_of(config, features, histories, samples, K, neighbours)

    assert isinstance(of("din", "hard").source, Recent)
    assert isinstance(of("sim", "hard").source, SameCategory)
    assert (of("sim", "soft").k, of("din", "soft").k) == (40, K)
    neighbours = neighbours_of(samples, 0, np.uint8)
    assert isinstance(of("sim", "semantic", neighbours).source, Retrieved)
    with pytest.raises(InputError, match="needs the neighbours"):
        of("sim", "semantic")
    first = int(neighbours.offsets[1])
    fewer = Neighbours(neighbours.sample_id[1:], neighbours.offsets[1:] - first, neighbours.positions[first:])
    with pytest.raises(InputError, match=f"sample {samples.sample_id[0]} has no neighbours"):
        of("sim", "semantic", fewer)
    with pytest.raises(InputError, match="no sample has neighbours"):
        of("sim", "semantic", Neighbours(np.zeros(0, np.int64), np.zeros(1, np.int64), np.zeros(0, np.uint8)))
    with pytest.raises(InputError, match="k is 0"):
        Batches(features, histories, samples, Recent(), 0)


def test_histories_are_not_copied() -> None:
    """What workers share stays one memory: flat arrays as they are."""
    tables = random_tables(11)
    histories: Histories = tables.histories()
    made = Batches(Features.of(tables, FIELDS), histories, everything(tables), Recent(), K)
    for own, shared in ((made._known.item, histories.item), (made._known.offset, histories.offset)):
        assert np.shares_memory(own, shared)
        assert not own.flags.writeable
