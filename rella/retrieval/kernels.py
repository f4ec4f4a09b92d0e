"""Compiled selection: which of a history's similarities are the K largest, and their exact order.

A history's similarities become bytes (bins of equal width above the mean); counting bytes, which processors do 64 at a
time, finds the bin of the K-th best, and only what lies in it or above is looked at. Candidates are ordered by their
float32 values; where two of them are too near for float32 the float64 definition decides.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from rella.retrieval.index import Columns, Ints
from rella.retrieval.measures import Floats, quick, similarity

BINS = 256
SPREAD = 5.0
"""Standard deviations above a row's mean that the bins cover; what is above is in the last one."""
PROBES = 512
"""Entries of a row that its mean and deviation are taken from."""
LANES = 64
"""Loops run over a multiple of this many entries, so that no scalar rest is left."""
PLENTY = 4
"""Candidates per neighbour from which a second, finer look pays."""
MANY = 512
"""Candidates from which n·log n beats comparing all with all."""
AHEAD = 2
"""Samples between the one at work and the one whose history is fetched from memory."""

Bytes = npt.NDArray[np.uint8]


class Scratch(NamedTuple):
    """Room for one sample at a time."""

    near: Bytes
    values: Floats
    places: Ints
    ranks: Ints
    slots: Ints
    spare_values: Floats
    spare_places: Ints
    exact: npt.NDArray[np.float64]


@numba.njit(cache=True, nogil=True)
def scratch(longest: int) -> Scratch:  # pragma: no cover - compiled
    """Return room for histories of up to `longest`."""
    n = longest + 2 * LANES
    return Scratch(
        np.zeros(n, np.uint8),
        np.empty(n, np.float32),
        np.empty(n, np.int32),
        np.empty(n, np.int32),
        np.empty(n, np.int32),
        np.empty(n, np.float32),
        np.empty(n, np.int32),
        np.empty(n, np.float64),
    )


@intrinsic
def prefetch(typing_context: Any, array: Any, index: Any) -> Any:  # noqa: ANN401 - numba's types
    """Ask for the cache line of array[index], which need not exist."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ANN401
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        place = context.cast(builder, arguments[1], signature.args[1], types.intp)
        address = builder.bitcast(builder.gep(data, [place]), ir.IntType(8).as_pointer())
        word = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), word, word, word])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        # To read, wanted soon by the second cache and nearer, data.
        builder.call(function, [address, word(0), word(2), word(1)])
        return context.get_dummy_value()

    return types.void(array, index), generate


@numba.njit(cache=True, nogil=True)
def bin_width(row: Floats) -> tuple[float, float]:  # pragma: no cover - compiled
    """Return where a row's bins begin and how wide they are, from some of its entries: they only say what pays."""
    step = max(1, row.size // PROBES)
    count, total, squares = 0, 0.0, 0.0
    for i in range(0, row.size, step):
        count += 1
        total += row[i]
        squares += row[i] * row[i]
    mean = total / max(1, count)
    deviation = np.sqrt(max(0.0, squares / max(1, count) - mean * mean))
    return mean, max(SPREAD * deviation / BINS, 1e-12)


@numba.njit(cache=True, nogil=True)
def encode(row: Floats, low: float, width: float, codes: Bytes) -> None:  # pragma: no cover - compiled
    """Put the bin of every entry of a row in `codes`: a byte is what is gathered and counted."""
    scale = np.float32(1.0 / width)
    for i in range(row.size):
        place = (row[i] - np.float32(low)) * scale
        codes[i] = np.uint8(min(max(place, np.float32(0.0)), np.float32(BINS - 1)))


@numba.njit(cache=True, nogil=True)
def spare_bins(slack: float, width: float) -> int:  # pragma: no cover - compiled
    """Return below the K-th best's bin how many may hold values within `slack`: one more, as bins are rounded too."""
    return 1 + int(min(np.ceil(slack / width), BINS))


@numba.njit(cache=True, nogil=True)
def _at_least(near: Bytes, n: int, cut: int) -> int:  # pragma: no cover - compiled
    total, least = np.int32(0), np.uint8(cut)
    for j in range(n):
        total += np.int32(near[j] >= least)
    return int(total)


@numba.njit(cache=True, nogil=True)
def candidates(near: Bytes, n: int, keep: int, spare: int, places: Ints) -> int:  # pragma: no cover - compiled
    """Put the places that may be among the `keep` best in `places`, oldest first, and return their number.

    Args:
        near: (≥ n + LANES,) bins of the history; what is behind the n-th is overwritten.
        n: behaviours.
        keep: 1 to n.
        spare: bins below that of the K-th best that count.
        places: (≥ n + 1,) is filled.
    """
    cut = 0
    if keep < n:
        padded = (n + LANES - 1) // LANES * LANES
        for j in range(n, padded):
            near[j] = 0
        bit = BINS // 2
        while bit > 0:
            if _at_least(near, padded, cut | bit) >= keep:
                cut |= bit
            bit //= 2
    least, count = np.uint8(max(0, cut - spare)), 0
    for j in range(n):
        places[count] = j
        count += near[j] >= least
    return count


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
def _rank(s: Scratch, count: int) -> None:  # pragma: no cover - compiled
    """Say in `slots` which candidate is the largest, the second, ...: all are compared with all, without a branch."""
    values, ranks, slots = s.values, s.ranks, s.slots
    padded = (count + LANES - 1) // LANES * LANES
    for c in range(count, padded):
        values[c] = -np.inf
    for c in range(padded):
        ranks[c] = 0
        slots[c] = -1
    for x in range(count):
        value = values[x]
        for c in range(padded):
            ranks[c] += np.int32(value > values[c])
    for i in range(count):
        c = count - 1 - i
        rank = ranks[c]
        # Equal values have equal ranks: the more recent one, which comes first here, takes the first place.
        while slots[rank] >= 0:
            rank += 1
        slots[rank] = c


@numba.njit(cache=True, nogil=True)
def _sorted(s: Scratch, count: int) -> None:  # pragma: no cover - compiled
    """Put the candidates in `spare_values` and `spare_places`, largest first."""
    if count <= MANY:
        _rank(s, count)
    else:
        s.slots[:count] = np.argsort(-s.values[:count], kind="mergesort")
    for rank in range(count):
        s.spare_values[rank] = s.values[s.slots[rank]]
        s.spare_places[rank] = s.places[s.slots[rank]]


@numba.njit(cache=True, nogil=True)
def _by_value(exact: npt.NDArray[np.float64], places: Ints, start: int, stop: int) -> None:  # pragma: no cover
    """Sort [start, stop) by value, largest first, of equals the larger place first."""
    if stop - start > LANES:
        recent = np.argsort(-places[start:stop], kind="mergesort")
        order = recent[np.argsort(-exact[start:stop][recent], kind="mergesort")]
        exact[start:stop] = exact[start:stop][order]
        places[start:stop] = places[start:stop][order]
        return
    for c in range(start + 1, stop):
        value, place, i = exact[c], places[c], c - 1
        while i >= start and (exact[i] < value or (exact[i] == value and places[i] < place)):
            exact[i + 1] = exact[i]
            places[i + 1] = places[i]
            i -= 1
        exact[i + 1] = value
        places[i + 1] = place


@numba.njit(cache=True, nogil=True)
def _settle(
    s: Scratch, start: int, stop: int, tiny: float, vectors: Floats, target: int, history: Columns, code: int,
) -> None:  # pragma: no cover - compiled  # fmt: skip
    """Order candidates that float32 cannot tell apart: by a quick float64 sum, and where that cannot, by definition."""
    x = vectors[target]
    for c in range(start, stop):
        s.exact[c] = quick(x, vectors[history[s.spare_places[c]]], code)
    _by_value(s.exact, s.spare_places, start, stop)
    first = start
    while first < stop:
        last = first + 1
        while last < stop and s.exact[last - 1] - s.exact[last] <= tiny:
            last += 1
        if last - first > 1:
            for c in range(first, last):
                s.exact[c] = similarity(x, vectors[history[s.spare_places[c]]], code)
            _by_value(s.exact, s.spare_places, first, last)
        first = last


@numba.njit(cache=True, nogil=True)
def choose(
    s: Scratch, count: int, keep: int, slack: float, tiny: float, vectors: Floats, target: int, history: Columns,
    code: int, out: Ints, at: int,
) -> None:  # pragma: no cover - compiled  # fmt: skip
    """Write the places of the `keep` best of `count` candidates to out[at:], best first, of equals the more recent.

    Args:
        s: `values` and `places` hold the candidates, all that are within `slack` of the K-th best among them.
        count: how many.
        keep: 1 to `count`.
        slack: 2ε of the values.
        tiny: 2ε of `quick`.
        vectors: (I, d) float32.
        target: whose vector is compared.
        history: (n,) place → vector.
        code: the measure.
        out: is filled.
        at: where.
    """
    if count > PLENTY * keep + LANES:
        count = _fewer(s.values, s.places, count, keep, slack)
    _sorted(s, count)
    values = s.spare_values
    last = count
    while last > keep and np.float64(values[last - 1]) < np.float64(values[keep - 1]) - slack:
        last -= 1
    start = 0
    while start < min(last, keep):
        stop = start + 1
        while stop < last and np.float64(values[stop - 1]) - np.float64(values[stop]) <= slack:
            stop += 1
        if stop - start > 1:
            _settle(s, start, stop, tiny, vectors, target, history, code)
        start = stop
    for c in range(keep):
        out[at + c] = s.spare_places[c]
