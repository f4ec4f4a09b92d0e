"""Every engine against the definition, and against each other where the definition would be too slow."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rella.config import Distance
from rella.data.tables import Histories
from rella.errors import InputError
from rella.retrieval import blocks, kernels, table
from rella.retrieval.engines import Engine, top_k
from tests.retrieval.worlds import (
    DISTANCES,
    MAKERS,
    Floats,
    Samples,
    clusters,
    coarse,
    duplicates,
    near_ties,
    slow_top_k,
    world,
)

ENGINES: tuple[tuple[Engine, Distance], ...] = tuple(
    (engine, distance)
    for engine in ("table", "blocks", "auto")
    for distance in DISTANCES
    if (engine, distance) != ("table", "l1")
)


def found(
    vectors: Floats,
    histories: Histories,
    samples: Samples,
    k: int,
    distance: Distance,
    engine: Engine = "auto",
    threads: int = 1,
) -> list[list[int]]:
    offsets, positions = top_k(vectors, histories, *samples, k, distance, threads=threads, engine=engine)
    assert (offsets.dtype, positions.dtype) == (np.int64, np.int32)
    assert offsets[0] == 0
    assert offsets[-1] == len(positions)
    return [positions[a:b].tolist() for a, b in itertools.pairwise(offsets)]


@pytest.mark.parametrize(("engine", "distance"), ENGINES)
@pytest.mark.parametrize("make", MAKERS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("items", "d", "k"), [(40, 7, 5), (200, 33, 30)])
def test_every_position_is_the_definition_s(
    make: Callable[..., Floats], items: int, d: int, k: int, engine: Engine, distance: Distance
) -> None:
    rng = np.random.default_rng([items, d, k])
    vectors = make(rng, items, d)
    histories, samples = world(rng, vectors, [1, 60, 0, 7, 90], 60)
    answer = found(vectors, histories, samples, k, distance, engine)
    assert answer == slow_top_k(vectors, histories, samples, k, distance)


@pytest.mark.parametrize("engine", ["table", "blocks"])
def test_the_planted_near_ties_defeat_float32_and_quick_sums(engine: Engine) -> None:
    """Otherwise the tests above would prove nothing about the second, exact look."""
    rng = np.random.default_rng(0)
    vectors = near_ties(rng, 300, 64)
    histories, samples = world(rng, vectors, [200] * 3, 60)
    plain = []
    for u, i, e in zip(*samples, strict=True):
        items = histories.of(u, e)[0]
        approx = vectors[items] @ vectors[i]
        plain.append(sorted(range(e), key=lambda p: (-approx[p], -p))[:10])
    right = slow_top_k(vectors, histories, samples, 10, "dot")
    assert plain != right
    assert found(vectors, histories, samples, 10, "dot", engine) == right


@pytest.mark.parametrize(("engine", "distance"), ENGINES)
def test_ties_go_to_the_more_recent(engine: Engine, distance: Distance) -> None:
    vectors = np.array([[1, 2], [3, -1], [1, 2]], dtype=np.float32)
    histories = Histories(np.array([0, 6]), np.array([0, 1, 2, 0, 1, 2], np.int32), np.ones(6, np.float32))
    samples = (np.array([0], np.int32), np.array([0], np.int32), np.array([6], np.int32))
    assert found(vectors, histories, samples, 6, distance, engine) == [[5, 3, 2, 0, 4, 1]]
    assert found(vectors, histories, samples, 3, distance, engine) == [[5, 3, 2]]
    # Only the first four behaviours are visible.
    samples = (*samples[:2], np.array([4], np.int32))
    assert found(vectors, histories, samples, 2, distance, engine) == [[3, 2]]


@pytest.mark.parametrize(("engine", "distance"), ENGINES)
def test_short_histories_give_all_they_have(engine: Engine, distance: Distance) -> None:
    vectors = np.eye(3, dtype=np.float32)
    histories = Histories(np.array([0, 0, 1, 3]), np.array([2, 0, 1], np.int32), np.ones(3, np.float32))
    samples = tuple(np.array(c, np.int32) for c in ([0, 1, 1, 2, 2], [0, 1, 1, 1, 0], [0, 0, 1, 2, 1]))
    answer = found(vectors, histories, samples, 30, distance, engine)  # type: ignore[arg-type]
    assert answer == [[], [], [0], [1, 0], [0]]
    nothing = tuple(np.zeros(0, np.int32) for _ in range(3))
    assert found(vectors, histories, nothing, 30, distance, engine) == []  # type: ignore[arg-type]


@pytest.mark.parametrize(("engine", "distance"), ENGINES)
def test_a_zero_vector(engine: Engine, distance: Distance) -> None:
    rng = np.random.default_rng(5)
    vectors = coarse(rng, 20, 4)
    vectors[[0, 3, 7]] = 0.0
    histories, samples = world(rng, vectors, [30, 30], 40)
    answer = found(vectors, histories, samples, 8, distance, engine)
    assert answer == slow_top_k(vectors, histories, samples, 8, distance)


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        (table, "ROWS", 1),
        (table, "ROWS", 7),
        (table, "SHARE", 1),
        (table, "ROOM", 4000),
        (blocks, "BLOCK", 1),
        (blocks, "BLOCK", 5),
        (blocks, "FEW", 1),
        (blocks, "FEW", 10_000),
        (blocks, "PAIRS", 50),
    ],
)
def test_how_work_is_cut_changes_nothing(module: Any, name: str, value: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    vectors = near_ties(rng, 120, 64)
    histories, samples = world(rng, vectors, [300, 90, 5], 200)
    for distance in DISTANCES:
        engine: Engine = "table" if module is table and distance != "l1" else "blocks"
        before = found(vectors, histories, samples, 10, distance, engine)
        with monkeypatch.context() as changed:
            changed.setattr(module, name, value)
            assert found(vectors, histories, samples, 10, distance, engine, threads=2) == before


@pytest.mark.parametrize("make", MAKERS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("k", [5, 30, 80])
def test_long_histories_and_wide_vectors(make: Callable[..., Floats], k: int) -> None:
    """Several slices of dimensions, several blocks of targets, histories of which only a sliver is kept."""
    rng = np.random.default_rng(k)
    vectors = make(rng, 700, 300)
    histories, samples = world(rng, vectors, [3000, 200, 1, 80, 900], 500)
    first = top_k(vectors, histories, *samples, k, engine="blocks")
    second = top_k(vectors, histories, *samples, k, engine="table", threads=2)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_hundreds_of_ties_are_ordered() -> None:
    """More candidates than are compared all with all, and more equals than are inserted one by one."""
    rng = np.random.default_rng(6)
    vectors = duplicates(rng, 50, 20)
    histories, samples = world(rng, vectors, [4 * kernels.MANY], 12)
    right = slow_top_k(vectors, histories, samples, 700, "cosine")
    for engine in ("table", "blocks"):
        assert found(vectors, histories, samples, 700, "cosine", engine) == right  # type: ignore[arg-type]


@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 30), st.integers(1, 50), st.sampled_from(DISTANCES))
def test_any_world(seed: int, items: int, d: int, k: int, distance: Distance) -> None:
    rng = np.random.default_rng(seed)
    vectors = MAKERS[seed % len(MAKERS)](rng, items, d)
    histories, samples = world(rng, vectors, rng.integers(0, 60, 6).tolist(), 12)
    right = slow_top_k(vectors, histories, samples, k, distance)
    for engine, its in ENGINES:
        if its == distance:
            assert found(vectors, histories, samples, k, distance, engine) == right


@pytest.mark.parametrize("engine", ["table", "blocks", "auto"])
def test_a_smaller_k_is_a_prefix(engine: Engine) -> None:
    rng = np.random.default_rng(8)
    vectors = near_ties(rng, 60, 16)
    histories, samples = world(rng, vectors, [100, 50], 50)
    whole = found(vectors, histories, samples, 80, "cosine", engine)
    for k in (1, 2, 17, 60):
        assert found(vectors, histories, samples, k, "cosine", engine) == [row[:k] for row in whole]


@pytest.mark.parametrize("engine", ["table", "blocks", "auto"])
def test_every_pair_is_counted(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(9)
    vectors = clusters(rng, 300, 8)
    histories, samples = world(rng, vectors, [50, 70], 400)
    monkeypatch.setattr(blocks, "PAIRS", 100)
    monkeypatch.setattr(table, "ROWS", 50)
    pairs: list[int] = []
    top_k(vectors, histories, *samples, 5, on_pairs=pairs.append, engine=engine)
    assert sum(pairs) == samples[2].sum()
    assert len(pairs) > 1


def test_large_catalogues_have_wider_numbers() -> None:
    """Above 65,536 items two bytes are too few."""
    rng = np.random.default_rng(11)
    vectors = rng.integers(-3, 4, (70_000, 3)).astype(np.float32)
    histories, samples = world(rng, vectors, [900, 300], 30)
    right = slow_top_k(vectors, histories, samples, 12, "dot")
    for engine in ("table", "blocks"):
        assert found(vectors, histories, samples, 12, "dot", engine) == right  # type: ignore[arg-type]


def test_what_cannot_be_retrieved_is_said() -> None:
    vectors = np.ones((3, 2), np.float32)
    histories = Histories(np.array([0, 1]), np.array([0], np.int32), np.ones(1, np.float32))
    one = np.zeros(1, np.int32)
    with pytest.raises(InputError, match="k is 0"):
        top_k(vectors, histories, one, one, one, 0)
    with pytest.raises(InputError, match="l1"):
        top_k(vectors, histories, one, one, one, 3, "l1", engine="table")
    for bad in (np.nan, np.inf):
        vectors[1, 0] = bad
        with pytest.raises(InputError, match="item 1: its vector is not finite"):
            top_k(vectors, histories, one, one, one, 1)
