"""Similarity of item vectors, defined once: the float64 sum, in index order, over the stored float32 values.

Items whose vectors are bit-equal tie exactly. An engine may work in float32; `error_bound` then says how far its
similarities can be from the definition.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

from rella.config import Distance
from rella.errors import InputError

COSINE, DOT, L2, L1 = 0, 1, 2, 3
CODES: dict[Distance, int] = {"cosine": COSINE, "dot": DOT, "l2": L2, "l1": L1}
"""Numbers of the measures for compiled kernels; larger similarity = closer, distances count negative."""

UNIT = 2.0**-24
"""Unit roundoff of float32."""

LONGEST = 1e18
"""Length from which vectors are refused."""

Floats = npt.NDArray[np.float32]


def prepare(vectors: Floats, distance: Distance) -> Floats:
    """Return the vectors that the measure is defined on: of unit length for `cosine`, unchanged otherwise.

    Args:
        vectors: (items, d) float32.
        distance: the measure; a zero vector has cosine 0 with everything.

    Raises:
        InputError: a value that is not finite or too large to be squared, with the item's number.
    """
    wide = vectors.astype(np.float64)
    norms = np.sqrt((wide * wide).sum(axis=1, keepdims=True))
    # Without normalisation, similarities of longer vectors could overflow float32, and with them the error bound.
    longest = np.inf if distance == "cosine" else LONGEST
    bad = np.flatnonzero(~(norms[:, 0] < longest))
    if bad.size:
        raise InputError(
            f"item {bad[0]}: its vector is not finite or longer than {longest:.0e} ({bad.size} such items): embed again"
        )
    if distance != "cosine":
        return np.ascontiguousarray(vectors, dtype=np.float32)
    return np.ascontiguousarray((wide / np.where(norms == 0.0, 1.0, norms)).astype(np.float32))


def error_bound(target_norm: npt.NDArray[np.float64], largest_norm: float, d: int, distance: Distance) -> Floats:
    """Return ε per target: |float32 similarity from a GEMM − definition| ≤ ε, whatever the order of summation.

    A dot product of d terms is off by at most γ_d·|x|·|h|, γ_d = d·u / (1 − d·u) (Higham, §3.1); L2 from squared
    norms adds a few roundings of terms no larger than (|x| + |h|)².

    Args:
        target_norm: (T,) float64 lengths of the targets' vectors.
        largest_norm: length of the longest history vector.
        d: dimensions.
        distance: `cosine`, `dot` or `l2`.
    """
    gamma = d * UNIT / (1.0 - d * UNIT)
    if distance == "l2":
        bound = (2.0 * gamma + 8.0 * UNIT) * (target_norm + largest_norm) ** 2
    else:
        bound = (gamma + 2.0 * UNIT) * target_norm * largest_norm
    # Rounded up, so that the bound itself survives the cast.
    return np.nextafter(bound.astype(np.float32), np.float32(np.inf))


@numba.njit(cache=True, nogil=True, error_model="numpy")
def similarity(x: Floats, h: Floats, code: int) -> float:  # pragma: no cover - compiled
    """Return the definition for two (d,) vectors: float64, summed in index order."""
    total = 0.0
    if code == L1:
        for i in range(x.size):
            total -= abs(np.float64(x[i]) - np.float64(h[i]))
    elif code == L2:
        for i in range(x.size):
            gap = np.float64(x[i]) - np.float64(h[i])
            total -= gap * gap
    else:
        for i in range(x.size):
            total += np.float64(x[i]) * np.float64(h[i])
    return total


@numba.njit(cache=True, nogil=True, error_model="numpy")
def similarities(x: Floats, g: Floats, h: Floats, code: int) -> tuple[float, float]:  # pragma: no cover - compiled
    """Return the definition for x with two vectors, in the time of one: neither sum waits for the other."""
    first, second = 0.0, 0.0
    if code == L1:
        for i in range(x.size):
            first -= abs(np.float64(x[i]) - np.float64(g[i]))
            second -= abs(np.float64(x[i]) - np.float64(h[i]))
    elif code == L2:
        for i in range(x.size):
            a, b = np.float64(x[i]) - np.float64(g[i]), np.float64(x[i]) - np.float64(h[i])
            first -= a * a
            second -= b * b
    else:
        for i in range(x.size):
            first += np.float64(x[i]) * np.float64(g[i])
            second += np.float64(x[i]) * np.float64(h[i])
    return first, second
