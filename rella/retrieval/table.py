"""The exact engine by item: a target's similarities to all items, once, for every sample that has this target.

A GEMM of a block of targets gives rows of the item-item table; each sample gathers its history's entries from its
target's row. The GEMM is float32 with a proven bound ε; wherever two values are within 2ε of each other the float64
definition decides, so block size, threads and device never change a position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from rella.retrieval.gemm import add_products
from rella.retrieval.index import Columns, Index, Ints, Longs, Samples
from rella.retrieval.kernels import AHEAD, bin_width, candidates, choose, encode, prefetch, scratch, spare_bins
from rella.retrieval.measures import CODES, Doubles, Floats, error_bound, quick_bound

SLICE = 128
"""Dimensions of one GEMM: a sum of few terms has a narrow error bound, and fewer near-ties."""
ROWS = 512
"""Targets of one GEMM at most: fewer, and the packing of all vectors counts."""
ROOM = 2**27
"""Bytes of rows that one thread holds at most."""
SHARE = 16
"""Blocks for each of several threads, so that none waits long for another; one thread has as large ones as it may."""
SAMPLE = 1000
"""Pairs that a sample costs as much as, beside its own."""


def run(
    index: Index, samples: Samples, k: int, at: Longs, out: Ints, on_pairs: Callable[[int], None], threads: int = 1
) -> None:
    """Write, for each sample, the positions of the K behaviours most similar to its target to out[at[s]:], best first.

    Args:
        index: vectors and histories.
        samples: (S,) any; `l1` has no GEMM and cannot be asked for here.
        k: K, at least 1.
        at: (S,) where each sample's min(end, K) positions go.
        out: is filled.
        on_pairs: called with the number of (target, behaviour) pairs done since the last call.
        threads: blocks of targets that are worked on at once.
    """
    columns, longest = index.column[samples.item], int(samples.end.max(initial=0))
    order, first = grouped(columns, len(index.vectors))
    spaces: SimpleQueue[Floats] = SimpleQueue()
    for _ in range(threads):
        spaces.put(np.empty(0, np.float32))

    def work(targets: Longs) -> int:
        mine, lengths = order[first[targets[0]] : first[targets[-1] + 1]], np.diff(first)[targets]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        space = spaces.get()
        if space.size < len(targets) * len(index.vectors):
            space = np.empty(len(targets) * len(index.vectors), np.float32)
        rows, bound, tiny = _rows(index, targets, space)
        user, end = samples.user[mine], samples.end[mine]
        _select(rows, bound, tiny, targets, starts, user, end, at[mine], index.offset, index.behaviours, index.vectors,
                k, CODES[index.distance], longest, out)  # fmt: skip
        spaces.put(space)
        return int(end.sum(dtype=np.int64))

    # One thread of BLAS in each of ours: two levels of threads would fight for the cores.
    with threadpool_limits(1), ThreadPoolExecutor(threads) as pool:
        for pairs in pool.map(work, _blocks(first, order, samples.end, 1 if threads == 1 else SHARE * threads)):
            on_pairs(pairs)


def _blocks(first: Longs, order: Longs, end: Ints, shares: int) -> Iterator[Longs]:
    """Yield the columns that are targets in blocks of at most a share of the cost, few enough for the room."""
    targets = np.flatnonzero(np.diff(first))
    if not len(targets):
        return
    most = max(1, min(ROWS, ROOM // (4 * (len(first) - 1))))
    cost = np.add.reduceat(end[order].astype(np.int64), first[targets]) + SAMPLE * np.diff(first)[targets]
    before, limit = np.cumsum(cost) - cost, max(1, -(-int(cost.sum()) // shares))
    start = 0
    while start < len(targets):
        stop = int(np.searchsorted(before, before[start] + limit))
        stop = min(max(stop, start + 1), start + most)
        yield targets[start:stop]
        start = stop


def depth(d: int) -> int:
    """Return how many roundings a term meets on its way into a sum of slices: those of a slice, and one for each."""
    return min(d, SLICE) + -(-d // SLICE)


def _rows(index: Index, targets: Longs, space: Floats) -> tuple[Floats, Floats, Doubles]:
    """Return the targets' float32 similarities to all items, (T, I), and the bounds of float32 and of float64, (T,)."""
    items, d = index.vectors.shape
    rows = space[: len(targets) * items].reshape(len(targets), items)
    block = index.vectors[targets]
    for start in range(0, d, SLICE):
        add_products(rows, block, index.vectors, start, min(start + SLICE, d))
    if index.distance == "l2":
        squares = (index.norms**2).astype(np.float32)
        rows *= 2.0
        rows -= squares[None, :]
        rows -= squares[targets][:, None]
    norms = index.norms[targets]
    return (
        rows,
        error_bound(norms, index.longest, depth(d), index.distance),
        quick_bound(norms, index.longest, d, index.distance),
    )


@numba.njit(cache=True, nogil=True)
def grouped(group: npt.NDArray[Any], groups: int) -> tuple[Longs, Longs]:  # pragma: no cover - compiled
    """Return the rows ordered by group, ascending within, and where each group's begin: (S,) and (groups + 1,)."""
    first = np.zeros(groups + 1, np.int64)
    for g in group:
        first[g + 1] += 1
    for g in range(groups):
        first[g + 1] += first[g]
    order, at = np.empty(len(group), np.int64), first[:-1].copy()
    for row in range(len(group)):
        order[at[group[row]]] = row
        at[group[row]] += 1
    return order, first


@numba.njit(cache=True, nogil=True)
def _select(
    rows: Floats, bound: Floats, tiny: Doubles, targets: Longs, first: Longs, user: Ints, end: Ints, at: Longs,
    offset: Longs, behaviours: Columns, vectors: Floats, k: int, code: int, longest: int, out: Ints,
) -> None:  # pragma: no cover - compiled  # fmt: skip
    codes, s = np.empty(rows.shape[1], np.uint8), scratch(longest)
    # What a cache line holds, and how much of the next history is asked for in advance: the processor sees the rest.
    line, most = 64 // behaviours.itemsize, 512 // behaviours.itemsize
    for t in range(targets.size):
        row, slack = rows[t], 2.0 * np.float64(bound[t])
        low, width = bin_width(row)
        encode(row, low, width, codes)
        spare = spare_bins(slack, width)
        for i in range(first[t], first[t + 1]):
            if i + AHEAD < first[t + 1]:
                begin = offset[user[i + AHEAD]]
                for j in range(0, min(end[i + AHEAD], most), line):
                    prefetch(behaviours, begin + j)
            history = behaviours[offset[user[i]] : offset[user[i]] + end[i]]
            n = history.size
            keep = min(n, k)
            if keep == 0:
                continue
            for j in range(n):
                s.near[j] = codes[history[j]]
            count = candidates(s.near, n, keep, spare, s.places)
            for c in range(count):
                s.values[c] = row[history[s.places[c]]]
            choose(s, count, keep, slack, 2.0 * tiny[t], vectors, targets[t], history, code, out, at[i])
