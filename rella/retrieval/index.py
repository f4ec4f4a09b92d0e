"""What every retrieval from a data set needs, made ready once: vectors and histories, the most frequent items first."""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
import numpy.typing as npt

from rella.config import Distance
from rella.data.tables import Histories
from rella.retrieval.measures import Doubles, Floats, norms, prepare

Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]
Columns = npt.NDArray[np.unsignedinteger]
"""uint16 where a catalogue has at most 65,536 items, else uint32."""


@numba.njit(cache=True, nogil=True)
def _frequencies(item: Ints, items: int) -> Longs:  # pragma: no cover - compiled
    """As `np.bincount`, which would copy all behaviours to numbers of eight bytes."""
    found = np.zeros(items, np.int64)
    for i in item:
        if i < 0 or i >= items:
            raise IndexError("a behaviour's item has no vector")
        found[i] += 1
    return found


@dataclass(frozen=True)
class Index:
    """Prepared vectors, and histories that point to them; flat arrays that workers share without a copy.

    Items are renumbered: column 0 is the most frequent one. So the part of a row of similarities that most behaviours
    look at is small enough for the processor's first cache, and the vectors that decide near-ties lie together.
    """

    distance: Distance
    vectors: Floats
    """(I, d) as the measure is defined on, by column."""
    norms: Doubles
    """(I,) lengths."""
    column: Ints
    """(I,) item → column."""
    offset: Longs
    """(U + 1,) user u's behaviours are `[offset[u], offset[u + 1])`."""
    behaviours: Columns
    """(R,) each behaviour's column."""

    @property
    def longest(self) -> float:
        """Length of the longest vector."""
        return float(self.norms.max(initial=0.0))

    @staticmethod
    def of(vectors: Floats, histories: Histories, distance: Distance) -> Index:
        """Make the index of (items, d) float32 vectors and all users' behaviours.

        Raises:
            InputError: a vector that is not finite, with the item's number.
        """
        ready = prepare(vectors, distance)
        order = np.argsort(-_frequencies(histories.item, len(ready)), kind="stable")
        column = np.empty(len(ready), np.int32)
        column[order] = np.arange(len(ready), dtype=np.int32)
        numbers: Columns = column.astype(np.uint16) if len(ready) <= 2**16 else column.astype(np.uint32)
        by_column, behaviours = ready[order], numbers[histories.item]
        offset = histories.offset.astype(np.int64, copy=False)
        return Index(distance, by_column, norms(by_column), column, offset, behaviours)


@dataclass(frozen=True)
class Samples:
    """Whose history is compared with which item."""

    user: Ints
    """(S,)"""
    item: Ints
    """(S,) the target, as the data set numbers it."""
    end: Ints
    """(S,) behaviours that the sample may see: the user's first `end`."""

    def __len__(self) -> int:
        return len(self.user)

    def take(self, rows: Longs) -> Samples:
        """Return these samples in this order."""
        return Samples(self.user[rows], self.item[rows], self.end[rows])

    @property
    def pairs(self) -> int:
        """(target, earlier behaviour) pairs."""
        return int(self.end.sum(dtype=np.int64))
