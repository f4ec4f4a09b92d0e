"""The exact top-K engine by item: a target's similarities to all items, once, for every sample that has this target.

A GEMM of a block of targets gives rows of the item-item table. Each sample gathers its history's entries from its
target's row, a histogram finds where the K-th best lies, and what is near it is sorted. The GEMM is float32 with a
proven bound ε; wherever two values are within 2ε of each other the float64 definition decides, so block size, threads
and device never change a position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from rella.config import Distance
from rella.data.tables import Histories
from rella.errors import InputError
from rella.retrieval.measures import CODES, Floats, error_bound, prepare, similarities, similarity

ROWS = 128
"""Targets of one GEMM."""
SLICE = 128
"""Dimensions of one GEMM: their sums are added, which makes ε that of this many terms and a few more."""
BINS = 256
SPREAD = 5.0
"""Standard deviations above a row's mean that the bins cover; what is above is in the last one."""
PROBES = 512
"""Entries of a row that its mean and deviation are taken from."""
PLENTY = 4
"""Candidates per neighbour from which a second, finer look pays."""

Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]


def top_k(
    vectors: Floats,
    histories: Histories,
    user: Ints,
    item: Ints,
    end: Ints,
    k: int,
    distance: Distance = "cosine",
    on_pairs: Callable[[int], None] | None = None,
    threads: int = 1,
) -> tuple[Longs, Ints]:
    """Return, for each sample, the positions of the K behaviours most similar to its target, best first (SUBR, §3.2).

    Ties go to the more recent behaviour. A history of fewer than K gives all of it. Same arguments and answers as
    `blocks.top_k`; `l1` has no GEMM and is not offered here.

    Args:
        vectors: (items, d) float32.
        histories: all users' behaviours.
        user: (S,) int32, user of each sample.
        item: (S,) int32, target item.
        end: (S,) int32, behaviours that the sample may see: the user's first `end`.
        k: K, at least 1.
        distance: `cosine`, `dot` or `l2`.
        on_pairs: called with the number of (target, behaviour) pairs done since the last call.
        threads: blocks of targets that are worked on at once.

    Returns:
        offsets (S + 1,) int64 and positions (offsets[-1],) int32: sample s has positions[offsets[s] : offsets[s + 1]].

    Raises:
        InputError: K below 1, `l1`, or a vector that is not finite.
    """
    if k < 1:
        raise InputError(f"k is {k}: at least one behaviour must be retrieved")
    if distance == "l1":
        raise InputError("l1: sums of absolute differences are no GEMM; use the engine by user")
    ready = prepare(vectors, distance)
    offsets = np.zeros(len(user) + 1, dtype=np.int64)
    np.cumsum(np.minimum(end, k), out=offsets[1:])
    positions = np.empty(int(offsets[-1]), dtype=np.int32)
    order, first = _grouped(item, len(vectors))
    longest, norms = int(end.max(initial=0)), _norms(ready)

    def work(targets: Longs) -> int:
        rows, bound = _rows(ready, norms, targets, distance)
        _select(rows, bound, targets, first, order, user, end, histories.offset, histories.item, ready, k,
                CODES[distance], longest, offsets, positions)  # fmt: skip
        return int(end[np.concatenate([order[first[t] : first[t + 1]] for t in targets])].sum(dtype=np.int64))

    # One thread of BLAS in each of ours: two levels of threads would fight for the cores.
    with threadpool_limits(1), ThreadPoolExecutor(threads) as pool:
        for pairs in pool.map(work, _blocks(first)):
            if on_pairs is not None:
                on_pairs(pairs)
    return offsets, positions


def _blocks(first: Longs) -> Iterator[Longs]:
    """Yield the items that are targets, in blocks."""
    targets = np.flatnonzero(np.diff(first))
    for start in range(0, len(targets), ROWS):
        yield targets[start : start + ROWS]


def _norms(ready: Floats) -> npt.NDArray[np.float64]:
    return np.sqrt((ready.astype(np.float64) ** 2).sum(axis=1))


def _rows(ready: Floats, norms: npt.NDArray[np.float64], targets: Longs, distance: Distance) -> tuple[Floats, Floats]:
    """Return the targets' float32 similarities to all items, (T, items), and their error bound (T,)."""
    d = ready.shape[1]
    block = ready[targets]
    rows = block[:, :SLICE] @ ready[:, :SLICE].T
    for start in range(SLICE, d, SLICE):
        rows += block[:, start : start + SLICE] @ ready[:, start : start + SLICE].T
    if distance == "l2":
        squares = (norms**2).astype(np.float32)
        rows *= 2.0
        rows -= squares[None, :]
        rows -= squares[targets][:, None]
    # A sum of partial sums: as many roundings on the way of a term as in a slice, and one for each slice.
    depth = min(d, SLICE) + -(-d // SLICE)
    return rows, error_bound(norms[targets], float(norms.max(initial=0.0)), depth, distance)


@numba.njit(cache=True, nogil=True)
def _grouped(item: Ints, items: int) -> tuple[Longs, Longs]:  # pragma: no cover - compiled
    """Return the samples' numbers ordered by target, and where each item's begin: (S,) and (items + 1,)."""
    first = np.zeros(items + 1, np.int64)
    for i in item:
        first[i + 1] += 1
    for i in range(items):
        first[i + 1] += first[i]
    order, at = np.empty(len(item), np.int64), first[:-1].copy()
    for s in range(len(item)):
        order[at[item[s]]] = s
        at[item[s]] += 1
    return order, first


@numba.njit(cache=True, nogil=True)
def _moments(row: Floats) -> tuple[float, float]:  # pragma: no cover - compiled
    """Mean and standard deviation of a row, from some of its entries: they only say where bins pay."""
    step = max(1, row.size // PROBES)
    count, total, squares = 0, 0.0, 0.0
    for i in range(0, row.size, step):
        count += 1
        total += row[i]
        squares += row[i] * row[i]
    mean = total / count
    return mean, np.sqrt(max(0.0, squares / count - mean * mean))


@numba.njit(cache=True, nogil=True)
def _fewer(values: Floats, places: Ints, count: int, keep: int, slack: float) -> int:  # pragma: no cover - compiled
    """Keep, of many candidates, those that may be among the best: at least the K-th less `slack`."""
    least = np.float64(np.partition(values[:count], count - keep)[count - keep]) - slack
    kept = 0
    for c in range(count):
        if values[c] >= least:
            values[kept] = values[c]
            places[kept] = places[c]
            kept += 1
    return kept


@numba.njit(cache=True, nogil=True)
def _sort(values: npt.NDArray[np.floating], places: Ints, start: int, stop: int) -> None:  # pragma: no cover
    """Sort [start, stop) by value, largest first, of equals the larger place first; quick where it is nearly sorted."""
    for c in range(start + 1, stop):
        value, place, i = values[c], places[c], c - 1
        while i >= start and (values[i] < value or (values[i] == value and places[i] < place)):
            values[i + 1] = values[i]
            places[i + 1] = places[i]
            i -= 1
        values[i + 1] = value
        places[i + 1] = place


@numba.njit(cache=True, nogil=True)
def _settle(
    values: Floats, places: Ints, count: int, keep: int, slack: float, exact: npt.NDArray[np.float64],
    ready: Floats, target: int, history: Ints, code: int,
) -> None:  # pragma: no cover - compiled  # fmt: skip
    """Order sorted candidates by the definition wherever float32 cannot tell them apart."""
    last = count
    while last > keep and values[last - 1] < values[keep - 1] - slack:
        last -= 1
    start = 0
    while start < min(last, keep):
        stop = start + 1
        while stop < last and values[stop - 1] - values[stop] <= slack:
            stop += 1
        if stop - start > 1:
            for c in range(start, stop - 1, 2):
                x, y = ready[history[places[c]]], ready[history[places[c + 1]]]
                exact[c], exact[c + 1] = similarities(ready[target], x, y, code)
            if (stop - start) % 2:
                exact[stop - 1] = similarity(ready[target], ready[history[places[stop - 1]]], code)
            _sort(exact, places, start, stop)
        start = stop


@numba.njit(cache=True, nogil=True)
def _encode(row: Floats, low: float, scale: float, codes: Bytes) -> None:  # pragma: no cover - compiled
    """Put the bin of every entry of a row in `codes`: what samples gather is a byte, and the row fits the cache."""
    for i in range(row.size):
        place = (row[i] - np.float32(low)) * np.float32(scale)
        codes[i] = np.uint8(min(max(place, np.float32(0.0)), np.float32(BINS - 1)))


@numba.njit(cache=True, nogil=True)
def _gather(
    row: Floats,
    codes: Bytes,
    history: Ints,
    keep: int,
    spare: int,
    bins: Ints,
    near: Bytes,
    values: Floats,
    places: Ints,
) -> int:  # pragma: no cover - compiled
    """Put the candidates in `values` and `places`, roughly largest first, and return their number.

    Bins of the row's values are counted; the bin of the K-th best and `spare` bins below it are kept.
    """
    bins[:] = 0
    for j in range(history.size):
        code = codes[np.uint32(history[j])]
        near[j] = code
        # Two counts of each bin in turn: most entries share a bin, and a count waits for the one before.
        bins[np.uint32((j & 1) * BINS + code)] += 1
    at, cut, more = 0, BINS, spare
    while cut > 0 and (at < keep or more > 0):
        more -= at >= keep
        cut -= 1
        here = bins[cut] + bins[BINS + cut]
        bins[cut] = at
        at += here
    for j in range(history.size):
        code = near[j]
        if code >= cut:
            i = bins[code]
            values[i] = row[np.uint32(history[j])]
            places[i] = j
            bins[code] = i + 1
    return at


@numba.njit(cache=True, nogil=True)
def _select(
    rows: Floats, bound: Floats, targets: Longs, first: Longs, order: Longs, user: Ints, end: Ints,
    offset: Longs, items: Ints, ready: Floats, k: int, code: int, longest: int, at: Longs, out: Ints,
) -> None:  # pragma: no cover - compiled  # fmt: skip
    codes, near, bins = np.empty(rows.shape[1], np.uint8), np.empty(longest, np.uint8), np.empty(2 * BINS, np.int32)
    values, places, exact = np.empty(longest, np.float32), np.empty(longest, np.int32), np.empty(longest, np.float64)
    for t in range(targets.size):
        row, target = rows[t], targets[t]
        slack = 2.0 * np.float64(bound[t])
        mean, deviation = _moments(row)
        width = max(SPREAD * deviation / BINS, 1e-12)
        _encode(row, mean, 1.0 / width, codes)
        # Bins that values within the slack of the K-th best may lie in, and one for roundings of the bins themselves.
        spare = 1 + int(min(np.ceil(slack / width), BINS))
        for s in order[first[target] : first[target + 1]]:
            history = items[offset[user[s]] : offset[user[s]] + end[s]]
            keep = min(history.size, k)
            if keep == 0:
                continue
            count = _gather(row, codes, history, keep, spare, bins, near, values, places)
            if count > PLENTY * keep + 64:
                count = _fewer(values, places, count, keep, slack)
            _sort(values, places, 0, count)
            _settle(values, places, count, keep, slack, exact, ready, target, history, code)
            for c in range(keep):
                out[at[s] + c] = places[c]
