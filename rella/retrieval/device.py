"""The exact engine by item on a torch device: rows of the item-item table, ragged gathers, top K, exact near-ties.

The same plan as `rella.retrieval.table` in operations that a GPU is good at: histories of about the same length are
padded to a rectangle, `topk` keeps K and some to spare, and what float32 cannot tell apart is summed in float64, one
dimension after the other, for all such pairs at once. Positions are those of the other engines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rella.retrieval import blocks
from rella.retrieval.index import Index, Ints, Longs, Samples
from rella.retrieval.measures import error_bound
from rella.retrieval.table import SLICE, depth, grouped

ROW_CELLS = 2**28
"""Entries of the table that are held at once."""
CELLS = 2**25
"""Entries of the rectangles that histories are padded to."""
SPARE = 32
"""Neighbours beyond the K-th that are kept for near-ties; a sample with more of them is left to the processor."""
EXACT = 2**19
"""Pairs that are summed in float64 at once."""


@dataclass(frozen=True)
class _There:
    """The index on the device."""

    index: Index
    vectors: Tensor
    squares: Tensor
    offset: Tensor
    behaviours: Tensor

    @staticmethod
    def of(index: Index, device: torch.device) -> _There:
        def put(array: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        squares = put((index.norms**2).astype(np.float32))
        behaviours = put(index.behaviours.astype(np.int32))
        return _There(index, put(index.vectors), squares, put(index.offset), behaviours)

    def rows(self, targets: Tensor) -> Tensor:
        """Return the targets' float32 similarities to all items, (T, I)."""
        rows = torch.zeros(len(targets), len(self.vectors), device=self.vectors.device)
        for part in self.vectors.split(SLICE, dim=1):
            rows.addmm_(part[targets], part.T)
        if self.index.distance == "l2":
            rows.mul_(2.0).sub_(self.squares[None, :]).sub_(self.squares[targets][:, None])
        return rows

    def exact(self, targets: Tensor, others: Tensor) -> Tensor:
        """Return the definition for pairs of columns, (n,) float64: summed in index order."""
        out = torch.zeros(len(targets), dtype=torch.float64, device=targets.device)
        for start in range(0, len(targets), EXACT):
            cut = slice(start, start + EXACT)
            x, h = (self.vectors[rows[cut]].double().T.contiguous() for rows in (targets, others))
            total = out[cut]
            for a, b in zip(x, h, strict=True):
                if self.index.distance == "l2":
                    gap = a - b
                    total -= gap * gap
                else:
                    total += a * b
        return out


def run(
    index: Index,
    samples: Samples,
    k: int,
    at: Longs,
    out: Ints,
    on_pairs: Callable[[int], None],
    device: torch.device | str = "cuda",
) -> None:
    """Write, for each sample, the positions of the K behaviours most similar to its target to out[at[s]:], best first.

    Args:
        index: vectors and histories; `l1` cannot be asked for here.
        samples: (S,) any.
        k: K, at least 1.
        at: (S,) where each sample's min(end, K) positions go.
        out: is filled.
        on_pairs: called with the number of (target, behaviour) pairs done since the last call.
        device: where.
    """
    there = _There.of(index, torch.device(device))
    columns = index.column[samples.item]
    order, first = grouped(columns, len(index.vectors))
    targets = np.flatnonzero(np.diff(first))
    most, left = max(1, ROW_CELLS // max(1, len(index.vectors))), []
    precision = torch.get_float32_matmul_precision()
    # TF32 would round every factor to 10 bits, far outside the bound.
    torch.set_float32_matmul_precision("highest")
    try:
        for start in range(0, len(targets), most):
            block = targets[start : start + most]
            mine = order[first[block[0]] : first[block[-1] + 1]]
            row = np.searchsorted(block, columns[mine])
            left.append(_block(there, block, mine, row, samples, k, at, out, on_pairs))
    finally:
        torch.set_float32_matmul_precision(precision)
    rest = np.concatenate([*left, np.zeros(0, np.int64)])
    if len(rest):
        blocks.run(index, samples.take(rest), k, at[rest], out, lambda _: None)


def _block(
    there: _There, block: Longs, mine: Longs, row: Longs, samples: Samples, k: int, at: Longs, out: Ints,
    on_pairs: Callable[[int], None],
) -> Longs:  # fmt: skip
    """Retrieve for the samples `mine` of a block of targets; return those that are left to the processor."""
    index, device = there.index, there.vectors.device
    targets = torch.from_numpy(block).to(device)
    rows = there.rows(targets)
    terms = depth(index.vectors.shape[1])
    bound = error_bound(index.norms[block], index.longest, terms, index.distance).astype(np.float64)
    slack, left = torch.from_numpy(2.0 * bound).to(device), []
    for cut in _rectangles(samples.end[mine]):
        s, r = mine[cut], torch.from_numpy(row[cut]).to(device)
        user, end = (torch.from_numpy(c[s]).to(device) for c in (samples.user, samples.end))
        found, unsure = _rectangle(there, rows, targets, slack, r, user, end, k)
        counts = np.minimum(samples.end[s], k)
        places = np.repeat(at[s] - (np.cumsum(counts) - counts), counts) + np.arange(int(counts.sum()))
        out[places] = found.cpu().numpy()[np.arange(found.shape[1])[None, :] < counts[:, None]]
        left.append(s[unsure.cpu().numpy()])
        on_pairs(int(samples.end[s].sum(dtype=np.int64)))
    return np.concatenate([*left, np.zeros(0, np.int64)])


def _rectangles(end: Ints) -> Iterator[Longs]:
    """Yield samples of about the same history length, few enough for a rectangle; those without a history never."""
    order = np.argsort(end, kind="stable")
    start, stop = int(np.searchsorted(end[order], 1)), len(order)
    while start < stop:
        # The longest comes last: as many as fit if all were as long as twice the first.
        length = int(end[order[start]])
        reach = int(np.searchsorted(end[order], 2 * length, side="right"))
        size = min(reach - start, max(1, CELLS // (2 * length)))
        yield order[start : start + size]
        start += size


def _rectangle(
    there: _There, rows: Tensor, targets: Tensor, slack: Tensor, row: Tensor, user: Tensor, end: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Return (B, ≤ K) positions, best first, and which samples have too many near-ties to be sure of them."""
    longest = int(end.max())
    place = torch.arange(longest, device=rows.device)
    seen = place[None, :] < end[:, None]
    behaviour = there.offset[user.long()][:, None] + place[None, :]
    history = there.behaviours[behaviour.clamp_(max=len(there.behaviours) - 1)].long()
    values = rows[row[:, None], history].masked_fill_(~seen, -torch.inf)
    most = min(longest, k + SPARE)
    best, positions = (t for t in values.topk(most))
    best, gap = best.double(), slack[row][:, None]
    keep = end.clamp(max=k).long()
    wanted = best >= best.gather(1, keep[:, None] - 1) - gap
    wanted &= best > -torch.inf
    unsure = wanted[:, -1] & (end > most)
    close = wanted[:, :-1] & wanted[:, 1:] & (best[:, :-1] - best[:, 1:] <= gap)
    tied = torch.nn.functional.pad(close, (0, 1)) | torch.nn.functional.pad(close, (1, 0))
    which, rank = tied.nonzero(as_tuple=True)
    best[which, rank] = there.exact(targets[row[which]], history[which, positions[which, rank]])
    best.masked_fill_(~wanted, -torch.inf)
    # By value, of equals the more recent: two stable sorts, the less important first.
    recent = positions.argsort(dim=1, descending=True)
    order = recent.gather(1, best.gather(1, recent).argsort(dim=1, descending=True, stable=True))
    return positions.gather(1, order)[:, :k].int(), unsure
