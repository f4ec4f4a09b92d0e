"""PCA against numpy's eigenvectors of the covariance."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from rella.pca import fit


def vectors(rng: np.random.Generator, n: int, d: int) -> npt.NDArray[np.float32]:
    """Correlated columns far from the origin, variances well apart."""
    scales = 2.0 ** -np.arange(d)
    rotation = np.linalg.qr(rng.standard_normal((d, d)))[0]
    return (rng.standard_normal((n, d)) * scales @ rotation + 5.0).astype(np.float32)


def test_components_are_the_covariance_s_eigenvectors() -> None:
    data = vectors(np.random.default_rng(0), 300, 8)
    found = fit(data, 5)
    wide = data.astype(np.float64)
    values, columns = np.linalg.eigh(np.cov(wide, rowvar=False))
    values, rows = values[::-1], columns.T[::-1]
    for component, row in zip(found.components, rows[:5], strict=True):
        row = row if row[np.abs(row).argmax()] > 0 else -row
        np.testing.assert_allclose(component, row, atol=1e-9)
    np.testing.assert_allclose(found.mean, wide.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.explained, (values / values.sum())[:5], rtol=1e-9)
    assert found.components.shape == (5, 8)


def test_the_projection_is_the_centred_product() -> None:
    data = vectors(np.random.default_rng(1), 100, 6)
    found = fit(data, 3)
    projected = found.apply(data)
    assert projected.dtype == np.float32
    expected = (data.astype(np.float64) - data.astype(np.float64).mean(0)) @ found.components.T
    np.testing.assert_array_equal(projected, expected.astype(np.float32))
    np.testing.assert_allclose(projected.mean(0), 0, atol=1e-5)
    # Uncorrelated, in falling order of variance.
    covariance = np.cov(projected.astype(np.float64), rowvar=False)
    np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=1e-7)
    assert (np.diff(np.diag(covariance)) < 0).all()


def test_the_largest_entry_of_every_component_is_positive() -> None:
    for seed in range(5):
        data = vectors(np.random.default_rng(seed), 40, 7)
        largest = np.array([c[np.abs(c).argmax()] for c in fit(data, 7).components])
        assert (largest > 0).all()
        # Mirrored data has mirrored coordinates, not other components.
        np.testing.assert_allclose(fit(-data, 7).components, fit(data, 7).components, atol=1e-7)


def test_signs_do_not_depend_on_the_library_s(monkeypatch: pytest.MonkeyPatch) -> None:
    import sklearn.decomposition

    class Mirrored(sklearn.decomposition.PCA):  # type: ignore[misc]
        def fit(self, x: npt.NDArray[np.float64], y: None = None) -> Mirrored:
            super().fit(x, y)
            self.components_ = -self.components_
            return self

    data = vectors(np.random.default_rng(6), 40, 7)
    usual = fit(data, 5)
    monkeypatch.setattr(sklearn.decomposition, "PCA", Mirrored)
    np.testing.assert_array_equal(fit(data, 5).components, usual.components)


def test_a_new_item_is_projected_and_not_refitted() -> None:
    data = vectors(np.random.default_rng(2), 50, 5)
    found = fit(data[:40], 3)
    np.testing.assert_array_equal(found.apply(data)[40:], found.apply(data[40:]))


def test_all_dimensions_keep_all_distances() -> None:
    data = vectors(np.random.default_rng(3), 30, 4)
    projected = fit(data, 4).apply(data).astype(np.float64)
    wide = data.astype(np.float64)
    distances = [np.linalg.norm(x[:, None] - x[None], axis=2) for x in (wide, projected)]
    np.testing.assert_allclose(distances[0], distances[1], atol=1e-5)


@pytest.mark.parametrize(
    ("n", "wide", "asked", "kept"), [(4, 10, 8, 3), (2, 10, 10, 1), (11, 10, 10, 10), (5, 10, 2, 2)]
)
def test_fewer_items_than_dimensions(n: int, wide: int, asked: int, kept: int) -> None:
    data = vectors(np.random.default_rng(4), n, wide)
    found = fit(data, asked)
    assert found.components.shape == (kept, wide)
    assert found.explained.shape == (kept,)
    assert found.apply(data).shape == (n, kept)
    np.testing.assert_allclose(found.components @ found.components.T, np.eye(kept), atol=1e-9)
    if asked >= n - 1:
        assert found.explained.sum() == pytest.approx(1.0)


@pytest.mark.parametrize(("n", "dimensions"), [(1, 2), (0, 2), (10, 0), (10, -1), (10, 5)])
def test_what_cannot_be_fitted(n: int, dimensions: int) -> None:
    with pytest.raises(ValueError, match=f"PCA to {dimensions} dimensions of {n} vectors of 4"):
        fit(np.ones((n, 4), np.float32), dimensions)


def test_the_same_data_gives_the_same_bits() -> None:
    data = vectors(np.random.default_rng(5), 60, 12)
    first, second = fit(data, 6), fit(data.copy(), 6)
    assert first.components.tobytes() == second.components.tobytes()
    assert first.apply(data).tobytes() == second.apply(data).tobytes()
