"""Similarity of item vectors, defined once: the float64 sum, in index order, over the stored float32 values.

Items whose vectors are bit-equal tie exactly. An engine may work in float32; `error_bound` then says how far its
similarities can be from the definition. `quick` is a float64 sum in any order, and `quick_bound` its distance.
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
UNIT64 = 2.0**-53
"""Unit roundoff of float64."""

LONGEST = 1e18
"""Length from which vectors are refused."""

CHUNK = 1024
"""Vectors that are widened to float64 at once: few, so that their memory is taken from the system once."""

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


def prepare(vectors: Floats, distance: Distance) -> Floats:
    """Return the vectors that the measure is defined on: of unit length for `cosine`, unchanged otherwise.

    Args:
        vectors: (items, d) float32.
        distance: the measure; a zero vector has cosine 0 with everything.

    Raises:
        InputError: a value that is not finite or too large to be squared, with the item's number.
    """
    lengths = norms(vectors)
    # Without normalisation, similarities of longer vectors could overflow float32, and with them the error bound.
    longest = np.inf if distance == "cosine" else LONGEST
    bad = np.flatnonzero(~(lengths < longest))
    if bad.size:
        raise InputError(
            f"item {bad[0]}: its vector is not finite or longer than {longest:.0e} ({bad.size} such items): embed again"
        )
    if distance != "cosine":
        return np.ascontiguousarray(vectors, dtype=np.float32)
    divisors, ready = np.where(lengths == 0.0, 1.0, lengths)[:, None], np.empty(vectors.shape, np.float32)
    for rows in _chunks(len(vectors)):
        ready[rows] = vectors[rows].astype(np.float64) / divisors[rows]
    return ready


def norms(vectors: Floats) -> Doubles:
    """Return the (items,) float64 lengths of (items, d) vectors."""
    out = np.empty(len(vectors))
    for rows in _chunks(len(vectors)):
        wide = vectors[rows].astype(np.float64)
        out[rows] = np.sqrt((wide * wide).sum(axis=1))
    return out


def _chunks(rows: int) -> list[slice]:
    return [slice(start, start + CHUNK) for start in range(0, rows, CHUNK)]


def error_bound(target_norm: Doubles, largest_norm: float, d: int, distance: Distance) -> Floats:
    """Return ε per target: |float32 similarity − definition| ≤ ε, whatever the order of summation.

    A dot product of d terms is off by at most γ_d·|x|·|h|, γ_d = d·u / (1 − d·u) (Higham, §3.1); L2 from squared
    norms adds a few roundings of terms no larger than (|x| + |h|)². L1 sums d differences, of which each is rounded,
    and which together are at most √d·(|x| + |h|).

    Args:
        target_norm: (T,) float64 lengths of the targets' vectors.
        largest_norm: length of the longest history vector.
        d: dimensions.
        distance: the measure.
    """
    gamma = d * UNIT / (1.0 - d * UNIT)
    if distance == "l2":
        bound = (2.0 * gamma + 8.0 * UNIT) * (target_norm + largest_norm) ** 2
    elif distance == "l1":
        bound = (gamma + 4.0 * UNIT) * np.sqrt(d) * (target_norm + largest_norm)
    else:
        bound = (gamma + 2.0 * UNIT) * target_norm * largest_norm
    # Rounded up, so that the bound itself survives the cast.
    return np.nextafter(bound.astype(np.float32), np.float32(np.inf))


def quick_bound(target_norm: Doubles, largest_norm: float, d: int, distance: Distance) -> Doubles:
    """Return ε per target: |`quick` − definition| ≤ ε.

    Both are float64 sums of the same terms, in two orders, so each is at most γ_{d+3} of the terms' sizes off: products
    of two float32 are exact in float64, a difference and its square are rounded once each.

    Args:
        target_norm: (T,) float64 lengths of the targets' vectors.
        largest_norm: length of the longest history vector.
        d: dimensions.
        distance: the measure.
    """
    gamma = (d + 3) * UNIT64 / (1.0 - (d + 3) * UNIT64)
    reach = target_norm + largest_norm
    # Twice, for the two sums; a little more, as the bound is computed in float64 itself.
    return 2.001 * gamma * (np.sqrt(d) * reach if distance == "l1" else reach * reach)


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


@numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})
def quick(x: Floats, h: Floats, code: int) -> float:  # pragma: no cover - compiled
    """Return the float64 sum of the definition's terms in the order that the processor likes best."""
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


@numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})
def rough(x: Floats, h: Floats, code: int) -> np.float32:  # pragma: no cover - compiled
    """Return the similarity of two (d,) vectors in float32, within `error_bound` of the definition."""
    total = np.float32(0.0)
    if code == L1:
        for i in range(x.size):
            total -= abs(x[i] - h[i])
    elif code == L2:
        for i in range(x.size):
            gap = x[i] - h[i]
            total -= gap * gap
    else:
        for i in range(x.size):
            total += x[i] * h[i]
    return total
