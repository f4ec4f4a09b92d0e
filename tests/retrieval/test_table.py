"""The engine by item against the definition, and against the engine by user where the definition would be too slow."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rella.config import Distance
from rella.data.tables import Histories
from rella.errors import InputError
from rella.retrieval import blocks, table
from rella.retrieval.measures import CODES, prepare, similarity
from tests.retrieval.test_blocks import (
    Floats,
    Samples,
    cancelling,
    coarse,
    duplicates,
    gaussian,
    near_ties,
    slow_top_k,
    world,
)

DISTANCES: tuple[Distance, ...] = ("cosine", "dot", "l2")


def clusters(rng: np.random.Generator, items: int, d: int) -> Floats:
    """A few tight groups: cosines above 0.95 within, and everything else far below."""
    centres = rng.standard_normal((max(2, items // 60), d))
    near = centres[rng.integers(0, len(centres), items)]
    return (near + 0.15 * rng.standard_normal((items, d))).astype(np.float32)


def lonely(rng: np.random.Generator, items: int, d: int) -> Floats:
    """Equal vectors but for a few: a row without deviation where bins would be of no width."""
    out = np.ones((items, d), dtype=np.float32)
    out[:: max(1, items // 5)] += rng.standard_normal(d).astype(np.float32)
    return out


def found(vectors: Floats, histories: Histories, samples: Samples, k: int, distance: Distance) -> list[list[int]]:
    offsets, positions = table.top_k(vectors, histories, *samples, k, distance)
    assert (offsets.dtype, positions.dtype) == (np.int64, np.int32)
    assert offsets[-1] == len(positions)
    return [positions[a:b].tolist() for a, b in itertools.pairwise(offsets)]


def same_as_blocks(
    vectors: Floats, histories: Histories, samples: Samples, k: int, distance: Distance, threads: int = 1
) -> None:
    first = blocks.top_k(vectors, histories, *samples, k, distance)
    second = table.top_k(vectors, histories, *samples, k, distance, threads=threads)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


MAKERS = [gaussian, duplicates, near_ties, coarse, cancelling, clusters, lonely]


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("make", MAKERS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("items", "d", "k"), [(40, 7, 5), (200, 33, 30)])
def test_every_position_is_the_definition_s(
    make: Callable[..., Floats], items: int, d: int, k: int, distance: Distance
) -> None:
    rng = np.random.default_rng([items, d, k])
    vectors = make(rng, items, d)
    histories, samples = world(rng, vectors, [1, 60, 0, 7, 90], 40)
    assert found(vectors, histories, samples, k, distance) == slow_top_k(vectors, histories, samples, k, distance)


@pytest.mark.parametrize("make", MAKERS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("k", [5, 30, 80])
def test_long_histories_and_wide_vectors(make: Callable[..., Floats], k: int) -> None:
    """Several slices of dimensions, several blocks of targets, histories of which only a sliver is kept."""
    rng = np.random.default_rng(k)
    vectors = make(rng, 700, 300)
    histories, samples = world(rng, vectors, [3000, 200, 1, 80, 900], 500)
    same_as_blocks(vectors, histories, samples, k, "cosine", threads=2)


@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 30), st.integers(1, 50), st.sampled_from(DISTANCES))
def test_any_world(seed: int, items: int, d: int, k: int, distance: Distance) -> None:
    rng = np.random.default_rng(seed)
    vectors = MAKERS[seed % len(MAKERS)](rng, items, d)
    histories, samples = world(rng, vectors, rng.integers(0, 60, 6).tolist(), 30)
    same_as_blocks(vectors, histories, samples, k, distance)


@pytest.mark.parametrize(("name", "value"), [("ROWS", 1), ("ROWS", 7), ("SLICE", 16), ("SLICE", 1000)])
def test_blocks_and_slices_change_nothing(name: str, value: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    vectors = clusters(rng, 120, 64)
    histories, samples = world(rng, vectors, [300, 90], 200)
    before = found(vectors, histories, samples, 10, "cosine")
    monkeypatch.setattr(table, name, value)
    assert found(vectors, histories, samples, 10, "cosine") == before


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("make", [gaussian, cancelling, clusters], ids=lambda f: f.__name__)
def test_rows_are_within_their_bound(make: Callable[..., Floats], distance: Distance) -> None:
    rng = np.random.default_rng(9)
    ready = prepare(make(rng, 90, 400), distance)
    targets = np.arange(0, 90, 7)
    rows, bound = table._rows(ready, table._norms(ready), targets, distance)
    right = np.array([[similarity(ready[t], h, CODES[distance]) for h in ready] for t in targets])
    off: npt.NDArray[np.float64] = np.abs(rows.astype(np.float64) - right)
    assert (off <= bound[:, None]).all()
    assert bound.max() < 1e3 * max(off.max(), 1e-9), "a bound that is far too wide would make everything exact and slow"


def test_slices_make_the_bound_narrower() -> None:
    rng = np.random.default_rng(1)
    ready = prepare(gaussian(rng, 10, 512), "cosine")
    _, sliced = table._rows(ready, table._norms(ready), np.arange(10), "cosine")
    from rella.retrieval.measures import error_bound

    whole = error_bound(table._norms(ready), 1.0, 512, "cosine")
    assert (sliced < 0.3 * whole).all()


def test_every_pair_is_counted() -> None:
    rng = np.random.default_rng(2)
    vectors = gaussian(rng, 300, 8)
    histories, (user, item, end) = world(rng, vectors, [50, 70], 400)
    seen: list[int] = []
    table.top_k(vectors, histories, user, item, end, 5, "cosine", seen.append)
    assert sum(seen) == end.sum()
    assert len(seen) > 1


def test_a_smaller_k_is_a_prefix() -> None:
    rng = np.random.default_rng(4)
    vectors = duplicates(rng, 80, 16)
    histories, samples = world(rng, vectors, [150] * 3, 60)
    many, few = (found(vectors, histories, samples, k, "cosine") for k in (40, 9))
    assert [row[:9] for row in many] == few


def test_what_cannot_be_retrieved_is_said() -> None:
    rng = np.random.default_rng(0)
    vectors = gaussian(rng, 5, 4)
    histories, samples = world(rng, vectors, [9], 3)
    with pytest.raises(InputError, match="k is 0"):
        table.top_k(vectors, histories, *samples, 0)
    with pytest.raises(InputError, match="l1"):
        table.top_k(vectors, histories, *samples, 3, "l1")
    none = tuple(column[:0] for column in samples)
    offsets, positions = table.top_k(vectors, histories, *none, 3)
    assert (offsets.tolist(), positions.tolist()) == ([0], [])
