"""Heterogeneity of behaviour sequences (Appendix D.4, Table 9): how many different genres K behaviours have."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from rella.data.questions import Neighbours

Ints = npt.NDArray[np.integer]

BLOCK = 65_536
"""Samples that are looked at together."""


def first_genres(genre: Sequence[str]) -> npt.NDArray[np.int32]:
    """Return a number for each item's genre, the first listed: (items,), equal where the genre is."""
    return np.unique(np.asarray(genre, dtype=str), return_inverse=True)[1].astype(np.int32)


def recent_kinds(kinds: Ints, first: Ints, end: Ints, k: int) -> npt.NDArray[np.int32]:
    """Return the number of different kinds among each sample's K most recent behaviours: (S,) int32.

    Args:
        kinds: (R,) of every behaviour, users one after the other.
        first: (S,) where the sample's user begins in `kinds`.
        end: (S,) behaviours that the sample may see.
        k: K, at least 1.
    """
    return _by_block(kinds, first, end, lambda rows: np.maximum(end[rows, None] - 1 - np.arange(k), -1))


def retrieved_kinds(
    kinds: Ints, first: Ints, end: Ints, k: int, sample_id: Ints, neighbours: Neighbours
) -> npt.NDArray[np.int32]:
    """Return the number of different kinds among each sample's K most similar behaviours (SUBR): (S,) int32.

    Args:
        kinds: as in `recent_kinds`.
        first: as there.
        end: as there.
        k: K, at most what was retrieved.
        sample_id: (S,).
        neighbours: of these samples at least.
    """
    row = np.searchsorted(neighbours.sample_id, sample_id)

    def positions(rows: slice) -> Ints:
        at = neighbours.offsets[row[rows], None] + np.arange(k)
        inside = at < np.minimum(neighbours.offsets[row[rows] + 1], neighbours.offsets[row[rows]] + k)[:, None]
        found = neighbours.positions[np.where(inside, at, 0)].astype(np.int64)
        return np.where(inside, found, -1)

    return _by_block(kinds, first, end, positions)


def _by_block(kinds: Ints, first: Ints, end: Ints, positions: Callable[[slice], Ints]) -> npt.NDArray[np.int32]:
    """Count different kinds at the positions, (rows, k), of each block's samples; -1 is none."""
    out = np.zeros(len(end), np.int32)
    for start in range(0, len(end), BLOCK):
        rows = slice(start, start + BLOCK)
        where: Ints = positions(rows)
        seen = np.where(where >= 0, kinds[np.where(where >= 0, first[rows, None] + where, 0)], -1)
        seen.sort(axis=1)
        new = np.diff(seen, axis=1, prepend=-1) != 0
        out[rows] = (new & (seen >= 0)).sum(axis=1)
    return out
