"""Principal component analysis of the item vectors (§3.2): scikit-learn's exact one, with signs fixed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rella.errors import InputError


@dataclass(frozen=True)
class Projection:
    """A fitted PCA. New items are projected with it, never refitted."""

    mean: npt.NDArray[np.float64]
    """(D,)."""
    components: npt.NDArray[np.float64]
    """(d, D), each with its entry of largest magnitude positive."""
    explained: npt.NDArray[np.float64]
    """(d,) shares of the variance."""

    def apply(self, vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return v_t of §3.2 for (n, D) pooled vectors: (n, d) float32."""
        return ((vectors.astype(np.float64) - self.mean) @ self.components.T).astype(np.float32)


def fit(vectors: npt.NDArray[np.float32], dimensions: int) -> Projection:
    """Fit on (n, D) float32 vectors in float64 through the covariance's eigenvectors.

    Keeps fewer than `dimensions` where the items do not span as many.

    Raises:
        InputError: fewer than two items, or more dimensions than D.
    """
    from sklearn.decomposition import PCA

    n, wide = vectors.shape
    if n < 2 or not 0 < dimensions <= wide:
        raise InputError(f"PCA to {dimensions} dimensions of {n} vectors of {wide}: at least 2 items, at most {wide}")
    fitted = PCA(n_components=min(dimensions, n - 1), svd_solver="covariance_eigh").fit(vectors.astype(np.float64))
    components = fitted.components_
    largest = components[np.arange(len(components)), np.abs(components).argmax(axis=1)]
    signs = np.where(largest < 0, -1.0, 1.0)
    return Projection(fitted.mean_, components * signs[:, None], fitted.explained_variance_ratio_)
