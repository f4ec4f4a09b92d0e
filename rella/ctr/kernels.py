"""Compiled: which behaviours of a sample's history are in its batch, and their features; the gradient of a look-up.

Rows of `items` and `ratings` are filled from the left, oldest first; what is behind a row's length is the padding, 0.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]


class Behaviours(NamedTuple):
    """All users' behaviours and their features."""

    offset: Longs
    """(U + 1,)."""
    item: Ints
    """(R,) row of the items table."""
    item_ids: Ints
    """(I,) feature of an item's id."""
    level: npt.NDArray[np.uint8]
    """(R,) rating level from 1, or empty."""


class Questions(NamedTuple):
    """Columns of all samples."""

    user: Ints
    item: Ints
    end: Ints


class Filled(NamedTuple):
    """The histories of a batch."""

    items: Ints
    """(B, K) features, 0 behind the length."""
    ratings: Ints
    """(B, K) levels, 0 behind the length and where there are no ratings."""
    lengths: Longs
    """(B,)."""


@numba.njit(cache=True, nogil=True)
def _put(out: Filled, b: int, j: int, place: int, known: Behaviours) -> None:  # pragma: no cover - compiled
    out.items[b, j] = known.item_ids[known.item[place]]
    out.ratings[b, j] = known.level[place] if known.level.size else 0


@numba.njit(cache=True, nogil=True)
def _close(out: Filled, b: int, length: int) -> None:  # pragma: no cover - compiled
    out.lengths[b] = length
    out.items[b, length:] = 0
    out.ratings[b, length:] = 0


@numba.njit(cache=True, nogil=True)
def _recent(out: Filled, b: int, start: int, end: int, known: Behaviours) -> None:  # pragma: no cover - compiled
    length = min(end, out.items.shape[1])
    for j in range(length):
        _put(out, b, j, start + end - length + j, known)
    _close(out, b, length)


@numba.njit(cache=True, nogil=True)
def recent(out: Filled, rows: Longs, asked: Questions, known: Behaviours) -> None:  # pragma: no cover - compiled
    """Fill `out` with the K most recent behaviours of the samples at `rows` (B,)."""
    for b in range(rows.size):
        row = rows[b]
        _recent(out, b, known.offset[asked.user[row]], asked.end[row], known)


@numba.njit(cache=True, nogil=True)
def same_category(
    out: Filled, rows: Longs, asked: Questions, known: Behaviours, category: Ints, fill_up: bool
) -> None:  # pragma: no cover - compiled
    """Fill `out` with the K most recent behaviours in the target's category; without one, with the K most recent.

    Args:
        out: is filled.
        rows: (B,) samples.
        asked: all samples' columns.
        known: all behaviours.
        category: (I,) by item.
        fill_up: whether the most recent others take the places that are left.
    """
    width = out.items.shape[1]
    for b in range(rows.size):
        row = rows[b]
        start, end, wanted = known.offset[asked.user[row]], asked.end[row], category[asked.item[row]]
        same, place = 0, start + end
        while place > start and same < width:
            place -= 1
            same += category[known.item[place]] == wanted
        others = min(width - same, end - same) if fill_up or same == 0 else 0
        j = length = same + others
        place = start + end
        while j > 0:
            place -= 1
            if category[known.item[place]] == wanted:
                if same == 0:
                    continue
                same -= 1
            else:
                if others == 0:
                    continue
                others -= 1
            j -= 1
            _put(out, b, j, place, known)
        _close(out, b, length)


@numba.njit(cache=True, nogil=True)
def at_positions(
    out: Filled,
    rows: Longs,
    asked: Questions,
    known: Behaviours,
    bounds: Longs,
    positions: npt.NDArray[np.integer],
) -> None:  # pragma: no cover - compiled
    """Fill `out` with the behaviours at each sample's first K `positions`, in the order of time.

    Args:
        out: is filled.
        rows: (B,) samples.
        asked: all samples' columns.
        known: all behaviours.
        bounds: (S, 2) where in `positions` each sample's begin and end.
        positions: indices into the samples' own histories, best first.
    """
    width = out.items.shape[1]
    ordered = np.empty(width, dtype=np.int64)
    for b in range(rows.size):
        row = rows[b]
        low = bounds[row, 0]
        length = min(bounds[row, 1] - low, width)
        for j in range(length):
            position, i = np.int64(positions[low + j]), j - 1
            while i >= 0 and ordered[i] > position:
                ordered[i + 1] = ordered[i]
                i -= 1
            ordered[i + 1] = position
        start = known.offset[asked.user[row]]
        for j in range(length):
            _put(out, b, j, start + ordered[j], known)
        _close(out, b, length)


@numba.njit(cache=True, nogil=True)
def add_rows(table: npt.NDArray[np.floating], ids: Ints, vectors: npt.NDArray[np.floating]) -> None:
    """Add the (N, E) `vectors` to the rows `ids` (N,) of `table`; the padding's, 0, gets nothing."""
    for n in range(ids.size):  # pragma: no cover - compiled
        row = ids[n]
        if row != 0:
            for e in range(vectors.shape[1]):
                table[row, e] += vectors[n, e]
