"""The definition of similarity, and the bounds of what is quicker."""

from __future__ import annotations

import numpy as np
import pytest

from rella.config import Distance
from rella.retrieval.measures import CODES, error_bound, prepare, quick, quick_bound, rough, similarity
from tests.retrieval.worlds import DISTANCES, Floats, cancelling, gaussian, slow_similarity


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


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("d", [1, 8, 129, 512])
def test_single_products_are_within_their_bounds(d: int, distance: Distance) -> None:
    """In float32 and in float64, in whatever order the compiler took."""
    rng, code, off, reach = np.random.default_rng(d), CODES[distance], [0.0, 0.0], [0.0, 0.0]
    for targets, history in adversarial(rng, d):
        longest = float(np.sqrt((history.astype(np.float64) ** 2).sum(1).max()))
        for x in targets[:4]:
            norm = np.sqrt((x.astype(np.float64) ** 2).sum())[None]
            limits = (float(error_bound(norm, longest, d, distance)[0]), quick_bound(norm, longest, d, distance)[0])
            for h in history:
                right = similarity(x, h, code)
                for n, value in enumerate((rough(x, h, code), quick(x, h, code))):
                    gap = abs(float(value) - right)
                    assert gap <= limits[n]
                    off[n], reach[n] = max(off[n], gap / limits[n]), max(reach[n], limits[n] / (norm[0] + longest) ** 2)
    if d > 8:
        assert off[0] > 1e-3, "so wide a bound would send everything to the exact routine"
    assert reach[1] < 1e-9 * max(1.0, d)


def test_vectors_are_widened_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    from rella.retrieval import measures

    vectors = gaussian(np.random.default_rng(2), 100, 9)
    whole, lengths = prepare(vectors, "cosine"), measures.norms(vectors)
    monkeypatch.setattr(measures, "CHUNK", 7)
    assert np.array_equal(prepare(vectors, "cosine"), whole)
    assert np.array_equal(measures.norms(vectors), lengths)
