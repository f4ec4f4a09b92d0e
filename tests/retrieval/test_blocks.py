"""The engine by user against the definition, written out once more in plain Python."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from rella.config import Distance
from rella.data.tables import Histories
from rella.retrieval import blocks
from rella.retrieval.blocks import top_k
from rella.retrieval.measures import CODES, error_bound, prepare, similarity

Floats = npt.NDArray[np.float32]
Samples = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int32]]

DISTANCES: tuple[Distance, ...] = ("cosine", "dot", "l2", "l1")


def unit(vector: Floats) -> list[float]:
    """The stored unit vector: float64 length by numpy's sum, then float32."""
    wide = vector.astype(np.float64)
    length = np.sqrt((wide * wide).sum())
    return [float(np.float32(x / length)) if length else 0.0 for x in wide]


def slow_similarity(x: list[float], h: list[float], distance: Distance) -> float:
    total = 0.0
    for a, b in zip(x, h, strict=True):
        if distance == "l1":
            total -= math.fabs(a - b)
        elif distance == "l2":
            total -= (a - b) * (a - b)
        else:
            total += a * b
    return total


def slow_top_k(vectors: Floats, histories: Histories, samples: Samples, k: int, distance: Distance) -> list[list[int]]:
    stored = [unit(v) if distance == "cosine" else [float(x) for x in v] for v in vectors]
    answer = []
    for u, i, e in zip(*(column.tolist() for column in samples), strict=True):
        start = int(histories.offset[u])
        scores = [slow_similarity(stored[i], stored[histories.item[start + p]], distance) for p in range(e)]
        answer.append(sorted(range(e), key=lambda p: (-scores[p], -p))[:k])
    return answer


def found(vectors: Floats, histories: Histories, samples: Samples, k: int, distance: Distance) -> list[list[int]]:
    offsets, positions = top_k(vectors, histories, *samples, k, distance)
    assert (offsets.dtype, positions.dtype) == (np.int64, np.int32)
    assert offsets[0] == 0
    assert offsets[-1] == len(positions)
    return [positions[a:b].tolist() for a, b in itertools.pairwise(offsets)]


def world(
    rng: np.random.Generator, vectors: Floats, lengths: list[int], samples: int = 60
) -> tuple[Histories, Samples]:
    """Users with random behaviours, and random samples of theirs in random order."""
    offset = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    item = rng.integers(0, len(vectors), offset[-1]).astype(np.int32)
    user = rng.integers(0, len(lengths), samples).astype(np.int32)
    end = np.array([rng.integers(0, lengths[u] + 1) for u in user], dtype=np.int32)
    target = rng.integers(0, len(vectors), samples).astype(np.int32)
    return Histories(offset, item, np.ones(offset[-1], dtype=np.float32)), (user, target, end)


def gaussian(rng: np.random.Generator, items: int, d: int) -> Floats:
    return rng.standard_normal((items, d)).astype(np.float32)


def duplicates(rng: np.random.Generator, items: int, d: int) -> Floats:
    """Few different vectors: most behaviours tie exactly."""
    return gaussian(rng, 3, d)[rng.integers(0, 3, items)]


def near_ties(rng: np.random.Generator, items: int, d: int) -> Floats:
    """One vector and its neighbours in float32: they differ by one unit in the last place of one entry."""
    centre = gaussian(rng, 1, d)[0]
    out = np.tile(centre, (items, 1))
    for n in range(items):
        place = int(rng.integers(0, d))
        out[n, place] = np.nextafter(out[n, place], np.float32(rng.choice([-np.inf, np.inf])))
    return out


def coarse(rng: np.random.Generator, items: int, d: int) -> Floats:
    """Small integers: different vectors with equal similarities."""
    return rng.integers(-1, 2, (items, d)).astype(np.float32)


def cancelling(rng: np.random.Generator, items: int, d: int) -> Floats:
    """Large entries whose products cancel: float32 sums lose what decides."""
    big = np.float32(2.0**12) * rng.choice([-1, 1], (items, d)).astype(np.float32)
    return (big + rng.standard_normal((items, d)).astype(np.float32)).astype(np.float32)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("make", [gaussian, duplicates, near_ties, coarse, cancelling], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("items", "d", "k"), [(40, 7, 5), (200, 33, 30)])
def test_every_position_is_the_definition_s(
    make: Callable[..., Floats], items: int, d: int, k: int, distance: Distance
) -> None:
    rng = np.random.default_rng([items, d, k])
    vectors = make(rng, items, d)
    histories, samples = world(rng, vectors, [1, 60, 0, 7, 90], 40)
    assert found(vectors, histories, samples, k, distance) == slow_top_k(vectors, histories, samples, k, distance)


def test_the_planted_near_ties_defeat_float32() -> None:
    """Otherwise the test above would prove nothing about the second, exact look."""
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
    assert found(vectors, histories, samples, 10, "dot") == right


@pytest.mark.parametrize("distance", DISTANCES)
def test_ties_go_to_the_more_recent(distance: Distance) -> None:
    vectors = np.array([[1, 2], [3, -1], [1, 2]], dtype=np.float32)
    histories = Histories(np.array([0, 6]), np.array([0, 1, 2, 0, 1, 2], np.int32), np.ones(6, np.float32))
    samples = (np.array([0], np.int32), np.array([0], np.int32), np.array([6], np.int32))
    assert found(vectors, histories, samples, 6, distance) == [[5, 3, 2, 0, 4, 1]]
    assert found(vectors, histories, samples, 3, distance) == [[5, 3, 2]]
    # Only the first four behaviours are visible.
    samples = (*samples[:2], np.array([4], np.int32))
    assert found(vectors, histories, samples, 2, distance) == [[3, 2]]


@pytest.mark.parametrize("distance", DISTANCES)
def test_short_histories_give_all_they_have(distance: Distance) -> None:
    vectors = np.eye(3, dtype=np.float32)
    histories = Histories(np.array([0, 0, 1, 3]), np.array([2, 0, 1], np.int32), np.ones(3, np.float32))
    samples = tuple(np.array(c, np.int32) for c in ([0, 1, 1, 2, 2], [0, 1, 1, 1, 0], [0, 0, 1, 2, 1]))
    assert found(vectors, histories, samples, 30, distance) == [[], [], [0], [1, 0], [0]]  # type: ignore[arg-type]
    nothing = tuple(np.zeros(0, np.int32) for _ in range(3))
    assert found(vectors, histories, nothing, 30, distance) == []  # type: ignore[arg-type]


@pytest.mark.parametrize("distance", DISTANCES)
def test_a_zero_vector(distance: Distance) -> None:
    rng = np.random.default_rng(5)
    vectors = coarse(rng, 20, 4)
    vectors[[0, 3, 7]] = 0.0
    histories, samples = world(rng, vectors, [30, 30], 40)
    assert found(vectors, histories, samples, 8, distance) == slow_top_k(vectors, histories, samples, 8, distance)


@pytest.mark.parametrize("distance", ["cosine", "l2"])
def test_the_block_size_changes_nothing(distance: Distance, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(7)
    vectors = near_ties(rng, 100, 48)
    histories, samples = world(rng, vectors, [80, 5, 120], 200)
    answers = []
    for block in (1, 3, 64, 512):
        monkeypatch.setattr(blocks, "BLOCK", block)
        answers.append(found(vectors, histories, samples, 12, distance))
    assert answers[1:] == answers[:1] * 3


def test_a_smaller_k_is_a_prefix() -> None:
    rng = np.random.default_rng(8)
    vectors = near_ties(rng, 60, 16)
    histories, samples = world(rng, vectors, [100, 50], 50)
    whole = found(vectors, histories, samples, 80, "cosine")
    for k in (1, 2, 17, 60):
        assert found(vectors, histories, samples, k, "cosine") == [row[:k] for row in whole]


def test_every_pair_is_counted() -> None:
    rng = np.random.default_rng(9)
    vectors = gaussian(rng, 30, 4)
    histories, samples = world(rng, vectors, [40, 20], 70)
    pairs: list[int] = []
    top_k(vectors, histories, *samples, 5, on_pairs=pairs.append)
    assert sum(pairs) == samples[2].sum()


def test_what_cannot_be_retrieved_is_said() -> None:
    vectors = np.ones((3, 2), np.float32)
    histories = Histories(np.array([0, 1]), np.array([0], np.int32), np.ones(1, np.float32))
    one = np.zeros(1, np.int32)
    with pytest.raises(ValueError, match="k is 0"):
        top_k(vectors, histories, one, one, one, 0)
    for bad in (np.nan, np.inf):
        vectors[1, 0] = bad
        with pytest.raises(ValueError, match="item 1: its vector is not finite"):
            top_k(vectors, histories, one, one, one, 1)


@pytest.mark.parametrize("distance", ["dot", "l2", "l1"])
def test_vectors_too_long_to_be_squared_are_refused_where_lengths_count(distance: str) -> None:
    vectors = np.array([[1.0, 2.0], [3e38, 3e38]], np.float32)
    with pytest.raises(ValueError, match="item 1: its vector is not finite or longer than 1e"):
        prepare(vectors, distance)  # type: ignore[arg-type]


def test_cosine_s_vectors_have_unit_length() -> None:
    vectors = np.array([[3, 4], [0, 0], [1e-30, 0], [3e38, 3e38]], np.float32)
    ready = prepare(vectors, "cosine")
    assert ready.dtype == np.float32
    np.testing.assert_allclose(ready, [[0.6, 0.8], [0, 0], [1, 0], [0.5**0.5, 0.5**0.5]], rtol=1e-7)
    assert np.array_equal(prepare(vectors[:3], "dot"), vectors[:3])


@pytest.mark.parametrize("distance", DISTANCES)
def test_the_compiled_definition_is_the_written_one(distance: Distance) -> None:
    rng = np.random.default_rng(10)
    for d in (1, 2, 31, 512):
        x, h = gaussian(rng, 2, d)
        expected = slow_similarity([float(v) for v in x], [float(v) for v in h], distance)
        assert similarity(x, h, CODES[distance]) == expected


def adversarial(rng: np.random.Generator, d: int) -> list[tuple[Floats, Floats]]:
    """Pairs of target and history blocks on which float32 sums go wrong as much as they can."""
    ones = np.ones((1, d), np.float32)
    third = np.full((1, d), 1 / 3, np.float32)
    growing = (np.arange(1, d + 1, dtype=np.float32) ** 3)[None]
    alternating = np.where(np.arange(d) % 2, -1, 1).astype(np.float32)[None] * np.float32(1 + 2**-12)
    tiny = np.full((1, d), 2.0**-13, np.float32)
    tiny[0, 0] = 1.0
    return [
        (ones, third),
        (growing, growing),
        (alternating, ones * np.float32(1 + 2**-11)),
        (tiny, tiny),
        (gaussian(rng, 20, d), gaussian(rng, 50, d)),
        (cancelling(rng, 20, d), cancelling(rng, 50, d)),
        (np.abs(gaussian(rng, 20, d)), np.abs(gaussian(rng, 50, d))),
    ]


@pytest.mark.parametrize("distance", ["dot", "l2"])
@pytest.mark.parametrize("d", [1, 8, 129, 512])
def test_the_error_bound_bounds(d: int, distance: Distance) -> None:
    """GEMM's sum, and the worst order there is: one term after the other in float32."""
    rng = np.random.default_rng(d)
    tightest = 0.0
    for targets, history in adversarial(rng, d):
        wide_t, wide_h = targets.astype(np.float64), history.astype(np.float64)
        norms, squares = np.sqrt((wide_t**2).sum(1)), (wide_h**2).sum(1)
        bound = error_bound(norms, float(np.sqrt(squares.max())), d, distance).astype(np.float64)
        one_by_one = np.zeros((len(targets), len(history)), np.float32)
        for i in range(d):
            one_by_one += targets[:, i, None] * history[None, :, i]
        for approx in (targets @ history.T, one_by_one):
            if distance == "l2":
                # As the engine does it: from the dot product and the squared lengths, in float32.
                approx = 2.0 * approx - squares.astype(np.float32) - (norms**2).astype(np.float32)[:, None]
                right = -((wide_t[:, None] - wide_h[None]) ** 2).sum(2)
            else:
                right = wide_t @ wide_h.T
            assert approx.dtype == np.float32
            error = np.abs(approx.astype(np.float64) - right)
            assert (error <= bound[:, None]).all()
            tightest = max(tightest, float((error / bound[:, None]).max()))
    if d > 1:
        assert tightest > 1e-3, "so wide a bound would send everything to the exact routine"


def test_the_bound_grows_with_its_arguments() -> None:
    norms = np.array([1.0, 2.0])
    small, large = error_bound(norms, 1.0, 8, "dot"), error_bound(norms, 1.0, 512, "dot")
    assert (large > small).all()
    assert small[1] > small[0] > 0
    assert small[0] >= 8 * 2.0**-24
