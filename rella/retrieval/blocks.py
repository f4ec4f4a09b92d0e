"""The exact top-K engine by user: a GEMM of a block of targets against the user's behaviours, then selection.

The GEMM is float32 with a proven bound ε. Every behaviour within 2ε of the K-th best goes to the float64 definition, so
block size, threads and device never change a position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numba
import numpy as np
import numpy.typing as npt

from rella.config import Distance
from rella.data.tables import Histories
from rella.errors import InputError
from rella.retrieval.measures import CODES, Floats, error_bound, prepare, similarity

BLOCK = 512
"""Targets of one GEMM."""

Ints = npt.NDArray[np.int32]


def top_k(
    vectors: Floats,
    histories: Histories,
    user: Ints,
    item: Ints,
    end: Ints,
    k: int,
    distance: Distance = "cosine",
    on_pairs: Callable[[int], None] | None = None,
) -> tuple[npt.NDArray[np.int64], Ints]:
    """Return, for each sample, the positions of the K behaviours most similar to its target, best first (SUBR, §3.2).

    Ties go to the more recent behaviour. A history of fewer than K gives all of it.

    Args:
        vectors: (items, d) float32.
        histories: all users' behaviours.
        user: (S,) int32, user of each sample.
        item: (S,) int32, target item.
        end: (S,) int32, behaviours that the sample may see: the user's first `end`.
        k: K, at least 1.
        distance: `cosine`, `dot`, `l2` or `l1`.
        on_pairs: called with the number of (target, behaviour) pairs done since the last call.

    Returns:
        offsets (S + 1,) int64 and positions (offsets[-1],) int32: sample s has positions[offsets[s] : offsets[s + 1]].

    Raises:
        InputError: K below 1, or a vector that is not finite.
    """
    if k < 1:
        raise InputError(f"k is {k}: at least one behaviour must be retrieved")
    ready = prepare(vectors, distance)
    offsets = np.zeros(len(user) + 1, dtype=np.int64)
    np.cumsum(np.minimum(end, k), out=offsets[1:])
    positions = np.empty(int(offsets[-1]), dtype=np.int32)
    for rows in _by_user(user):
        behaviours, _ = histories.of(int(user[rows[0]]), int(end[rows].max()))
        history = ready[behaviours]
        for start in range(0, len(rows), BLOCK):
            block = rows[start : start + BLOCK]
            targets = ready[item[block]]
            _select_block(targets, history, end[block], k, distance, offsets[block], positions)
            if on_pairs is not None:
                on_pairs(int(end[block].sum()))
    return offsets, positions


def _by_user(user: Ints) -> Iterator[npt.NDArray[np.int64]]:
    """Yield the row numbers of each user's samples."""
    order = np.argsort(user, kind="stable")
    cuts = np.flatnonzero(np.diff(user[order])) + 1
    if len(order):
        yield from np.split(order, cuts)


def _select_block(
    targets: Floats,
    history: Floats,
    end: Ints,
    k: int,
    distance: Distance,
    at: npt.NDArray[np.int64],
    out: Ints,
) -> None:
    code = CODES[distance]
    if distance == "l1":
        # No GEMM gives a sum of absolute differences: the definition is the engine.
        _exact_only(targets, history, end, k, code, at, out)
        return
    approx = targets @ history.T
    target_norm = np.sqrt((targets.astype(np.float64) ** 2).sum(axis=1))
    squares = (history.astype(np.float64) ** 2).sum(axis=1)
    largest = float(np.sqrt(squares.max(initial=0.0)))
    if distance == "l2":
        approx = 2.0 * approx - squares.astype(np.float32) - (target_norm**2).astype(np.float32)[:, None]
    bound = error_bound(target_norm, largest, targets.shape[1], distance)
    _refine(approx.astype(np.float32, copy=False), bound, targets, history, end, k, code, at, out)


@numba.njit(cache=True, nogil=True)
def _sift(heap: Floats, value: float) -> None:  # pragma: no cover - compiled
    """Replace the smallest of a min-heap by a larger value."""
    i, n = 0, heap.size
    while True:
        child = 2 * i + 1
        if child >= n:
            break
        if child + 1 < n and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= value:
            break
        heap[i] = heap[child]
        i = child
    heap[i] = value


@numba.njit(cache=True, nogil=True)
def _emit(
    scores: npt.NDArray[np.float64], places: Ints, count: int, keep: int, at: int, out: Ints
) -> None:  # pragma: no cover - compiled
    """Write the `keep` best of `count` candidates, best first; the places ascend, so the later of two equals wins."""
    for rank in range(keep):
        best = 0
        for c in range(1, count):
            if scores[c] >= scores[best]:
                best = c
        out[at + rank] = places[best]
        # Taken out, so that it cannot win again, not even at -inf.
        for c in range(best, count - 1):
            scores[c] = scores[c + 1]
            places[c] = places[c + 1]
        count -= 1


@numba.njit(cache=True, nogil=True)
def _refine(
    approx: Floats,
    bound: Floats,
    targets: Floats,
    history: Floats,
    end: Ints,
    k: int,
    code: int,
    at: npt.NDArray[np.int64],
    out: Ints,
) -> None:  # pragma: no cover - compiled
    scores = np.empty(history.shape[0], np.float64)
    places = np.empty(history.shape[0], np.int32)
    for t in range(targets.shape[0]):
        n, row = end[t], approx[t]
        keep = min(n, k)
        if keep == 0:
            continue
        heap = np.full(keep, np.float32(-np.inf))
        for j in range(n):
            if row[j] > heap[0]:
                _sift(heap, row[j])
        least = heap[0] - 2.0 * np.float64(bound[t])
        count = 0
        for j in range(n):
            if row[j] >= least:
                scores[count] = similarity(targets[t], history[j], code)
                places[count] = j
                count += 1
        _emit(scores, places, count, keep, at[t], out)


@numba.njit(cache=True, nogil=True)
def _exact_only(
    targets: Floats, history: Floats, end: Ints, k: int, code: int, at: npt.NDArray[np.int64], out: Ints
) -> None:  # pragma: no cover - compiled
    for t in range(targets.shape[0]):
        n = end[t]
        scores = np.empty(n, np.float64)
        places = np.empty(n, np.int32)
        for j in range(n):
            scores[j] = similarity(targets[t], history[j], code)
            places[j] = j
        # Keep the candidates small before the quadratic selection.
        keep = min(n, k)
        if n > 2 * k:
            least = np.partition(scores, n - keep)[n - keep]
            count = 0
            for j in range(n):
                if scores[j] >= least:
                    scores[count] = scores[j]
                    places[count] = j
                    count += 1
        else:
            count = n
        _emit(scores, places, count, keep, at[t], out)
