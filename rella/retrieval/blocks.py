"""The exact engine by user: targets against what came before them, one user after the other.

For users with several samples a GEMM of a block of targets against the user's behaviours, for others one product after
the other, both float32 with a proven bound ε; wherever two values are within 2ε of each other the float64 definition
decides, so block size, threads and device never change a position. L1 has no GEMM and goes pair by pair.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
from threadpoolctl import threadpool_limits

from rella.retrieval.index import Columns, Index, Ints, Longs, Samples
from rella.retrieval.kernels import Scratch, bin_width, candidates, choose, encode, scratch, spare_bins
from rella.retrieval.measures import CODES, Doubles, Floats, error_bound, quick_bound, rough

BLOCK = 128
"""Targets of one GEMM."""
FEW = 16
"""Samples of a user below which copying the history's vectors together costs more than the GEMM saves."""
PAIRS = 4_000_000
"""(target, behaviour) pairs that a thread works on before it takes more."""


def run(
    index: Index, samples: Samples, k: int, at: Longs, out: Ints, on_pairs: Callable[[int], None], threads: int = 1
) -> None:
    """Write, for each sample, the positions of the K behaviours most similar to its target to out[at[s]:], best first.

    Args:
        index: vectors and histories.
        samples: (S,) any.
        k: K, at least 1.
        at: (S,) where each sample's min(end, K) positions go.
        out: is filled.
        on_pairs: called with the number of (target, behaviour) pairs done since the last call.
        threads: groups of users that are worked on at once.
    """
    # A user's samples in the order of what they may see, so that a block of them has few products in vain.
    order = np.lexsort((samples.end, samples.user))
    user, end = samples.user[order], samples.end[order]
    column, where, longest = index.column[samples.item[order]], at[order], int(end.max(initial=0))

    def work(cut: slice) -> int:
        bounds = _bounds(index, column[cut])
        alone, together = _split(user[cut], index.distance == "l1")
        _one_by_one(alone, column[cut], user[cut], end[cut], where[cut], *bounds, index.offset, index.behaviours,
                    index.vectors, k, CODES[index.distance], longest, out)  # fmt: skip
        for rows in together:
            _user(index, rows, cut, user, column, end, where, bounds, k, out)
        return int(end[cut].sum(dtype=np.int64))

    with threadpool_limits(1), ThreadPoolExecutor(threads) as pool:
        for pairs in pool.map(work, _cuts(user, end)):
            on_pairs(pairs)


def _cuts(user: Ints, end: Ints) -> list[slice]:
    """Cut samples that are sorted by user into runs of about equal cost; a user's stay together."""
    starts = np.flatnonzero(np.diff(user, prepend=-1))
    if not len(starts):
        return []
    cost = np.add.reduceat(end.astype(np.int64) + 1, starts)
    group = (np.cumsum(cost) - cost) // PAIRS
    edges = [*starts[np.flatnonzero(np.diff(group, prepend=-1))].tolist(), len(user)]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def _bounds(index: Index, targets: Ints) -> tuple[Floats, Doubles]:
    norms, d = index.norms[targets], index.vectors.shape[1]
    return (
        error_bound(norms, index.longest, d, index.distance),
        quick_bound(norms, index.longest, d, index.distance),
    )


def _split(user: Ints, all_alone: bool) -> tuple[Longs, list[slice]]:
    """Return the rows of users with few samples, and the runs of the others."""
    edges = [*np.flatnonzero(np.diff(user, prepend=-1)).tolist(), len(user)]
    runs = [slice(a, b) for a, b in itertools.pairwise(edges)]
    together = [] if all_alone else [r for r in runs if r.stop - r.start >= FEW]
    alone = np.ones(len(user), bool)
    for rows in together:
        alone[rows] = False
    return np.flatnonzero(alone), together


def _user(
    index: Index, rows: slice, cut: slice, user: Ints, column: Ints, end: Ints, where: Longs,
    bounds: tuple[Floats, Doubles], k: int, out: Ints,
) -> None:  # fmt: skip
    """Retrieve for one user's samples, `rows` of `cut`."""
    start, stop = cut.start + rows.start, cut.start + rows.stop
    begin = index.offset[user[start]]
    behaviours = index.behaviours[begin : begin + end[stop - 1]]
    history = index.vectors[behaviours]
    for a in range(start, stop, BLOCK):
        b = min(a + BLOCK, stop)
        seen = int(end[b - 1])
        approx = index.vectors[column[a:b]] @ history[:seen].T
        if index.distance == "l2":
            squares = (index.norms**2).astype(np.float32)
            approx = 2.0 * approx - squares[behaviours[:seen]] - squares[column[a:b]][:, None]
        mine = slice(a - cut.start, b - cut.start)
        _of_block(approx, bounds[0][mine], bounds[1][mine], column[a:b], end[a:b], where[a:b], behaviours,
                  index.vectors, k, CODES[index.distance], out)  # fmt: skip


@numba.njit(cache=True, nogil=True)
def _of_values(
    values: Floats, s: Scratch, bound: float, tiny: float, vectors: Floats, target: int, history: Columns, k: int,
    code: int, out: Ints, at: int,
) -> None:  # pragma: no cover - compiled  # fmt: skip
    """Select from the (n,) similarities of a sample's history."""
    keep = min(values.size, k)
    if keep == 0:
        return
    low, width = bin_width(values)
    encode(values, low, width, s.near)
    count = candidates(s.near, values.size, keep, spare_bins(2.0 * bound, width), s.places)
    for c in range(count):
        s.values[c] = values[s.places[c]]
    choose(s, count, keep, 2.0 * bound, 2.0 * tiny, vectors, target, history, code, out, at)


@numba.njit(cache=True, nogil=True)
def _of_block(
    approx: Floats, bound: Floats, tiny: Doubles, targets: Ints, end: Ints, at: Longs, behaviours: Columns,
    vectors: Floats, k: int, code: int, out: Ints,
) -> None:  # pragma: no cover - compiled  # fmt: skip
    s = scratch(approx.shape[1])
    for t in range(targets.size):
        history = behaviours[: end[t]]
        _of_values(approx[t, : end[t]], s, np.float64(bound[t]), tiny[t], vectors, targets[t], history, k, code, out,
                   at[t])  # fmt: skip


@numba.njit(cache=True, nogil=True)
def _one_by_one(
    rows: Longs, targets: Ints, user: Ints, end: Ints, at: Longs, bound: Floats, tiny: Doubles, offset: Longs,
    behaviours: Columns, vectors: Floats, k: int, code: int, longest: int, out: Ints,
) -> None:  # pragma: no cover - compiled  # fmt: skip
    s, values = scratch(longest), np.empty(longest, np.float32)
    for r in rows:
        history = behaviours[offset[user[r]] : offset[user[r]] + end[r]]
        x = vectors[targets[r]]
        for j in range(history.size):
            values[j] = rough(x, vectors[history[j]], code)
        _of_values(values[: history.size], s, np.float64(bound[r]), tiny[r], vectors, targets[r], history, k, code,
                   out, at[r])  # fmt: skip
