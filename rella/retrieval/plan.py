"""How the retrieval for many samples is cut into work that nobody does twice, and put together in sample order again.

A row of similarities serves all samples of a target, so the work is cut by target; samples of rare targets, which need
no row, are cut by user. The result is wanted in the order of samples: every group of samples lists its positions in
that order, so that a part of the result takes one run of each group's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numba
import numpy as np
import numpy.typing as npt

from rella.errors import InputError
from rella.retrieval import engines
from rella.retrieval.engines import BY_USER, GATHERED, GEMM, SETTLED
from rella.retrieval.index import Index, Ints, Longs, Samples
from rella.retrieval.measures import Doubles
from rella.retrieval.table import grouped

POSITIONS = 32_000_000
"""Positions in one part of the result, about."""


@dataclass(frozen=True)
class Plan:
    """Groups of samples to retrieve for, and parts of the result to merge them into."""

    group: npt.NDArray[np.uint16]
    """(S,) which group a sample is in."""
    order: Ints
    """(S,) samples by group, ascending within."""
    first: Longs
    """(G + 1,) where each group's samples begin in `order`."""
    tables: int
    """The first so many groups are for the engine by item, the others for that by user."""
    edges: Longs
    """(P + 1,) where each part's samples begin."""
    slots: Longs
    """(G, P + 1) where each part's positions begin among a group's."""
    pairs: Longs
    """(G,) (target, earlier behaviour) pairs."""

    @property
    def groups(self) -> int:
        """How many groups there are."""
        return len(self.pairs)

    @property
    def parts(self) -> int:
        """How many parts the result has."""
        return len(self.edges) - 1

    @property
    def digest(self) -> str:
        """Name of this plan: what groups hold under another plan cannot be used."""
        told = hashlib.sha256()
        for array in (self.group, self.edges, self.slots):
            told.update(np.ascontiguousarray(array).tobytes())
        return told.hexdigest()[:12]

    def rows(self, group: int) -> Longs:
        """Return the numbers of a group's samples, ascending."""
        return self.order[self.first[group] : self.first[group + 1]].astype(np.int64)

    def engine(self, group: int) -> Literal["table", "blocks"]:
        """Return which engine a group is for."""
        return "table" if group < self.tables else "blocks"

    @staticmethod
    def of(index: Index, samples: Samples, k: int, groups: int, positions: int = POSITIONS) -> Plan:
        """Cut samples into about `groups` groups of equal expected time, and their result into parts.

        Args:
            index: vectors and histories.
            samples: (S,) in the order in which the result is wanted.
            k: K.
            groups: at least 1.
            positions: of one part, about.
        """
        group, tables, count = _groups(index, samples, groups)
        order, first = grouped(group, count)
        edges = _edges(samples.end, k, positions)
        slots, pairs = np.zeros((count, len(edges)), np.int64), np.zeros(count, np.int64)
        _count(group, samples.end, k, edges, slots[:, 1:], pairs)
        np.cumsum(slots, axis=1, out=slots)
        return Plan(group, order.astype(np.int32), first, tables, edges, slots, pairs)


def _groups(index: Index, samples: Samples, groups: int) -> tuple[npt.NDArray[np.uint16], int, int]:
    """Return each sample's group, the number of those for the engine by item, and that of all."""
    items, d = index.vectors.shape
    by_row = engines.by_row(index, samples)
    by_column, by_user = np.zeros(items), np.zeros(len(index.offset) - 1)
    by_column[index.column[by_row]] = items * d * GEMM
    _costs(samples.user, samples.item, samples.end, index.column, by_row, d * BY_USER, by_column, by_user)
    size = max(float(by_column.sum() + by_user.sum()) / groups, 1.0)
    of_column, tables = _by_cost(by_column, size)
    of_user, blocks = _by_cost(by_user, size)
    if tables + blocks > 2**16:
        raise InputError(f"{tables + blocks} groups of targets: raise --retrieve.shard-pairs")
    found = np.empty(len(samples), np.uint16)
    _assign(samples.user, samples.item, index.column, by_row, of_column, of_user + tables, found)
    return found, tables, tables + blocks


@numba.njit(cache=True, nogil=True)
def _costs(
    user: Ints, item: Ints, end: Ints, column: Ints, by_row: npt.NDArray[np.bool_], by_pair: float,
    by_column: Doubles, by_user: Doubles,
) -> None:  # pragma: no cover - compiled  # fmt: skip
    """Add the expected nanoseconds of every sample to its target's column or to its user."""
    for s in range(user.size):
        if by_row[item[s]]:
            by_column[column[item[s]]] += end[s] * GATHERED + SETTLED
        else:
            by_user[user[s]] += end[s] * by_pair + SETTLED


@numba.njit(cache=True, nogil=True)
def _assign(
    user: Ints, item: Ints, column: Ints, by_row: npt.NDArray[np.bool_], of_column: Longs, of_user: Longs,
    out: npt.NDArray[np.uint16],
) -> None:  # pragma: no cover - compiled  # fmt: skip
    for s in range(user.size):
        out[s] = of_column[column[item[s]]] if by_row[item[s]] else of_user[user[s]]


def _by_cost(cost: Doubles, size: float) -> tuple[Longs, int]:
    """Return for each entry which run it is in, of runs of about equal summed cost, and how many there are."""
    total = float(cost.sum())
    if total == 0.0:
        return np.zeros(len(cost), np.int64), 0
    runs = max(1, round(total / size))
    before = np.cumsum(cost) - cost
    run = np.minimum((before * (runs / total)).astype(np.int64), runs - 1)
    # Numbered without gaps: a costly entry can be more than a run.
    number, run = np.unique(np.where(cost > 0, run, -1), return_inverse=True)
    empty = int(number[0] == -1)
    return np.maximum(run - empty, 0), len(number) - empty


@numba.njit(cache=True, nogil=True)
def _edges(end: Ints, k: int, positions: int) -> Longs:  # pragma: no cover - compiled
    """Cut samples so that each part has about `positions` positions and at least one sample; at least one part."""
    total = 0
    for e in end:
        total += min(e, k)
    parts = max(1, -(-total // positions))
    edges, count, share, before = np.zeros(parts + 1, np.int64), 1, 1, 0
    for s in range(end.size):
        if share < parts and before >= share * total // parts:
            while share < parts and before >= share * total // parts:
                share += 1
            if s > edges[count - 1]:
                edges[count] = s
                count += 1
        before += min(end[s], k)
    edges[count] = end.size
    return edges[: count + 1]


@numba.njit(cache=True, nogil=True)
def _count(
    group: npt.NDArray[np.uint16], end: Ints, k: int, edges: Longs, counts: Longs, pairs: Longs
) -> None:  # pragma: no cover - compiled
    """Add the positions that every group has for every part, and the pairs of every group."""
    for part in range(edges.size - 1):
        for row in range(edges[part], edges[part + 1]):
            counts[group[row], part] += min(end[row], k)
            pairs[group[row]] += end[row]


def merge(plan: Plan, part: int, end: Ints, k: int, pieces: Sequence[npt.NDArray[Any]]) -> tuple[Longs, Any]:
    """Return the positions of one part's samples in their order.

    Args:
        plan: how the work was cut.
        part: its number.
        end: (S,) of all samples.
        k: K.
        pieces: by group, what the group has for this part: positions of any integer type.

    Returns:
        offsets (n + 1,) int64 and positions (offsets[-1],) of the pieces' type, best first.
    """
    rows = slice(int(plan.edges[part]), int(plan.edges[part + 1]))
    offsets = np.zeros(rows.stop - rows.start + 1, np.int64)
    np.cumsum(np.minimum(end[rows], k), out=offsets[1:])
    starts = np.cumsum([0, *(len(piece) for piece in pieces[:-1])]).astype(np.int64)
    together = np.concatenate(pieces)
    out = np.empty(len(together), together.dtype)
    _interleave(plan.group[rows], offsets, starts, together, out)
    return offsets, out


@numba.njit(cache=True, nogil=True)
def _interleave(group: Any, offsets: Longs, cursors: Longs, pieces: Any, out: Any) -> None:  # pragma: no cover  # noqa: ANN401
    for row in range(group.size):
        at = cursors[group[row]]
        n = offsets[row + 1] - offsets[row]
        for c in range(n):
            out[offsets[row] + c] = pieces[at + c]
        cursors[group[row]] = at + n
