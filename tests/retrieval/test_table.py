"""What is special to the engine by item: its rows, their bound, and how work is cut."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from rella.config import Distance
from rella.retrieval import table
from rella.retrieval.gemm import add_products
from rella.retrieval.index import Index
from rella.retrieval.measures import CODES, error_bound, similarity
from tests.retrieval.worlds import Floats, cancelling, clusters, gaussian, world

DISTANCES: tuple[Distance, ...] = ("cosine", "dot", "l2")


def index_of(vectors: Floats, distance: Distance) -> Index:
    histories, _ = world(np.random.default_rng(0), vectors, [40, 90], 1)
    return Index.of(vectors, histories, distance)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("make", [gaussian, cancelling, clusters], ids=lambda f: f.__name__)
def test_rows_are_within_their_bound(make: Callable[..., Floats], distance: Distance) -> None:
    rng = np.random.default_rng(9)
    index, targets = index_of(make(rng, 90, 400), distance), np.arange(0, 90, 7)
    rows, bound, tiny = table._rows(index, targets, np.full(90 * 90, np.nan, np.float32))
    right = np.array([[similarity(index.vectors[t], h, CODES[distance]) for h in index.vectors] for t in targets])
    off: npt.NDArray[np.float64] = np.abs(rows.astype(np.float64) - right)
    assert (off <= bound[:, None]).all()
    assert bound.max() < 1e3 * max(off.max(), 1e-9), "a bound that is far too wide would make everything exact and slow"
    assert (tiny < 1e-6 * bound).all()


def test_slices_make_the_bound_narrower() -> None:
    index = index_of(gaussian(np.random.default_rng(1), 10, 512), "cosine")
    assert table.depth(512) == 132
    _, sliced, _ = table._rows(index, np.arange(10), np.empty(100, np.float32))
    assert (sliced < 0.3 * error_bound(index.norms, 1.0, 512, "cosine")).all()


@pytest.mark.parametrize("d", [1, 127, 128, 129, 300])
def test_slices_hold_every_dimension_once(d: int) -> None:
    rng = np.random.default_rng(d)
    vectors, targets = (rng.integers(-3, 4, (n, d)).astype(np.float32) for n in (20, 6))
    rows = np.full((6, 20), np.nan, np.float32)
    for start in range(0, d, table.SLICE):
        add_products(rows, targets, vectors, start, min(start + table.SLICE, d))
    assert np.array_equal(rows, targets @ vectors.T), "small integers: every sum is exact"


def test_products_refuse_what_blas_would_read_as_something_else() -> None:
    rows, targets, vectors = (np.zeros(shape, np.float32) for shape in ((3, 7), (3, 5), (7, 5)))
    add_products(rows, targets, vectors, 0, 5)
    for wrong in (
        (rows, targets, vectors, 0, 6),
        (rows, targets, vectors, 3, 3),
        (rows, targets[:2], vectors, 0, 5),
        (rows, targets, vectors.astype(np.float64), 0, 5),
        (np.zeros((7, 3), np.float32).T, targets, vectors, 0, 5),
    ):
        with pytest.raises(ValueError, match=r"rows .*, targets .*, vectors"):
            add_products(*wrong)  # type: ignore[arg-type]
    add_products(rows[:0], targets[:0], vectors, 0, 5)


def test_frequent_items_come_first() -> None:
    rng = np.random.default_rng(4)
    vectors = gaussian(rng, 30, 4)
    histories, _ = world(rng, vectors, [500], 1)
    index = Index.of(vectors, histories, "dot")
    counts = np.bincount(index.behaviours, minlength=30)
    assert (np.diff(counts) <= 0).all()
    assert np.array_equal(index.vectors[index.column], vectors)
    assert np.array_equal(index.column[histories.item], index.behaviours)
    assert index.behaviours.dtype == np.uint16


def test_blocks_are_of_about_equal_cost_and_hold_every_target_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    columns = np.minimum(rng.geometric(0.01, 40_000), 999).astype(np.int64)
    end = rng.integers(0, 2000, len(columns)).astype(np.int32)
    order, first = table.grouped(columns, 1000)
    assert (np.diff(columns[order]) >= 0).all()
    assert all((np.diff(order[a:b]) > 0).all() for a, b in itertools.pairwise(first) if b > a)
    targets = list(table._blocks(first, order, end, 48))
    assert np.array_equal(np.concatenate(targets), np.unique(columns))
    costs = [sum(int(end[order[first[t] : first[t + 1]]].sum()) + 1000 * (first[t + 1] - first[t]) for t in b)
             for b in targets]  # fmt: skip
    largest = max(int(end[columns == c].sum()) + 1000 * int((columns == c).sum()) for c in np.unique(columns))
    assert max(costs) <= sum(costs) / 48 + largest
    assert [len(b) for b in table._blocks(first, order, end, 1)] == [512, len(np.unique(columns)) - 512]
    monkeypatch.setattr(table, "ROWS", 3)
    assert max(len(b) for b in table._blocks(first, order, end, 48)) == 3
    none = np.zeros(0, np.int64)
    assert list(table._blocks(np.zeros(5, np.int64), none, none.astype(np.int32), 1)) == []
