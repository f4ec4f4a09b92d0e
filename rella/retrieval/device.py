"""The exact engine on a CUDA card: rows of the item-item table by GEMM, then a block of threads for every sample.

A row is rounded to 16 bits, of which two histograms of a byte each find the K-th best of a history; whatever could be
among the K best in spite of the roundings (`error_bound`, and the 16 bits) is summed in float64 in index order, which
is the definition, and ranked. Positions are those of the other engines; a sample with more candidates than `HELD` is
left to the processor.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from numba import config, cuda
from numba.cuda import libdevice
from torch import Tensor

from rella.errors import InputError
from rella.retrieval import blocks
from rella.retrieval.index import Index, Ints, Longs, Samples
from rella.retrieval.measures import Floats, error_bound
from rella.retrieval.table import SLICE, depth, grouped

Shorts = npt.NDArray[np.int16]

ROW_CELLS = 2**28
"""Entries of the table that are held at once."""
PIECE = 2**28
"""Positions that are kept on the card until they are copied back."""
CHUNK = 2**18
"""Samples of one launch."""
HELD = 256
"""Candidates of a sample that are kept at most."""
SELECTING, SETTLING = 128, 64
"""Threads for a sample."""
MIDDLE = 2**15
"""What 16 unsigned bits are shifted by, as torch has signed ones."""

# The compiler may not fuse it with the sum that follows: L2 is defined by two roundings. Numba's simulator multiplies.
_product: Any = operator.mul if config.ENABLE_CUDASIM else libdevice.dmul_rn


def _select(
    rows: Shorts, slack: Ints, row: Longs, begin: Longs, end: Ints, behaviours: Ints, k: int, found: Ints, count: Ints
) -> None:
    """Find each sample's candidates: found (S, HELD) and count (S,), which can be more than HELD."""
    s, t = cuda.blockIdx.x, cuda.threadIdx.x
    bins = cuda.shared.array(256, numba.int32)
    state = cuda.shared.array(3, numba.int32)
    n, first, r = end[s], begin[s], row[s]
    if t == 0:
        state[0], state[1], state[2] = k, 0, 0
    lowest = -1
    if n > k:
        for level in range(2):
            for b in range(t, 256, SELECTING):
                bins[b] = 0
            cuda.syncthreads()
            for i in range(t, n, SELECTING):
                q = int(rows[r, behaviours[first + i]]) + MIDDLE
                if level == 0:
                    cuda.atomic.add(bins, q >> 8, 1)
                elif q >> 8 == state[1]:
                    cuda.atomic.add(bins, q & 255, 1)
            cuda.syncthreads()
            if t == 0:
                b = 255
                while bins[b] < state[0]:
                    state[0] -= bins[b]
                    b -= 1
                state[1] = state[1] * 256 + b
            cuda.syncthreads()
        lowest = state[1] - slack[r]
    cuda.syncthreads()
    for i in range(t, n, SELECTING):
        if lowest < 0 or int(rows[r, behaviours[first + i]]) + MIDDLE >= lowest:
            slot = cuda.atomic.add(state, 2, 1)
            if slot < HELD:
                found[s, slot] = i
    cuda.syncthreads()
    if t == 0:
        count[s] = state[2]


def _settle(
    vectors: Floats, l2: bool, target: Ints, begin: Longs, behaviours: Ints, found: Ints, count: Ints, k: int,
    place: Longs, out: Ints,
) -> None:  # fmt: skip
    """Sum each sample's candidates as the measure is defined, and write the K best positions to out[place[s]:]."""
    s, t = cuda.blockIdx.x, cuda.threadIdx.x
    values = cuda.shared.array(HELD, numba.float64)
    n, x = count[s], target[s]
    if n > HELD:
        return
    for c in range(t, n, SETTLING):
        h, total = behaviours[begin[s] + found[s, c]], 0.0
        for j in range(vectors.shape[1]):
            a, b = np.float64(vectors[x, j]), np.float64(vectors[h, j])
            if l2:
                total -= _product(a - b, a - b)
            else:
                # Exact: 24 bits times 24 bits are at most 48.
                total += a * b
        values[c] = total
    cuda.syncthreads()
    for c in range(t, n, SETTLING):
        rank = 0
        for o in range(n):
            # Of equals the more recent.
            if values[o] > values[c] or (values[o] == values[c] and found[s, o] > found[s, c]):
                rank += 1
        if rank < k:
            out[place[s] + rank] = found[s, c]


@cache
def _compiled() -> tuple[Any, Any]:
    """Return the two kernels, compiled at their first launch."""
    return cuda.jit(_select), cuda.jit(_settle)


@dataclass(frozen=True)
class _There:
    """The index on the device."""

    index: Index
    vectors: Tensor
    squares: Tensor
    behaviours: Tensor

    @staticmethod
    def of(index: Index, device: torch.device) -> _There:
        squares = _put((index.norms**2).astype(np.float32), device)
        return _There(index, _put(index.vectors, device), squares, _put(index.behaviours.astype(np.int32), device))

    def rows(self, block: Longs) -> tuple[Tensor, Tensor]:
        """Return the similarities of some targets to all items in 16 bits, (T, I) int16, and the slack, (T,) int32.

        What is among the K best of a history is at most the slack below the K-th best in 16 bits.
        """
        targets = _put(block, self.vectors.device)
        rows = torch.zeros(len(targets), len(self.vectors), device=self.vectors.device)
        for part in self.vectors.split(SLICE, dim=1):
            rows.addmm_(part[targets], part.T)
        if self.index.distance == "l2":
            rows.mul_(2.0).sub_(self.squares[None, :]).sub_(self.squares[targets][:, None])
        low, high = rows.aminmax(dim=1, keepdim=True)
        scale = torch.where(high > low, (2.0 * MIDDLE - 1.0) / (high - low), 0.0)
        rows.sub_(low).mul_(scale).clamp_(0.0, 2.0 * MIDDLE - 1.0).floor_().sub_(float(MIDDLE))
        terms = depth(self.vectors.shape[1])
        bound = error_bound(self.index.norms[block], self.index.longest, terms, self.index.distance)
        # Two roundings down, and the roundings of the scaling itself.
        slack = 2.0 * _put(bound, self.vectors.device).double() * scale[:, 0].double() + 3.0
        return rows.to(torch.int16), slack.clamp_(max=4.0 * MIDDLE).ceil_().int()


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
        k: K, at least 1; more than `HELD` is left to the processor.
        at: (S,) where each sample's min(end, K) positions go.
        out: is filled.
        on_pairs: called with the number of (target, behaviour) pairs done since the last call.
        device: a card.

    Raises:
        InputError: L1, which is no matrix product.
    """
    if index.distance == "l1":
        raise InputError("l1: sums of absolute differences are no matrix product; use the engine by user")
    if k > HELD:
        return blocks.run(index, samples, k, at, out, on_pairs)
    there, keep = _There.of(index, torch.device(device)), np.minimum(samples.end, k)
    precision = torch.get_float32_matmul_precision()
    # TF32 would round every factor to 10 bits, far outside the bound.
    torch.set_float32_matmul_precision("highest")
    try:
        for piece in _pieces(keep):
            left = _piece(there, samples, keep, piece, k, at, out, on_pairs)
            if len(left):
                blocks.run(index, samples.take(left), k, at[left], out, lambda _: None)
    finally:
        torch.set_float32_matmul_precision(precision)


def _pieces(keep: Ints) -> Iterator[slice]:
    """Cut samples into ranges whose positions are about `PIECE`."""
    before, start = np.cumsum(keep, dtype=np.int64), 0
    while start < len(keep):
        done = int(before[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(before, done + PIECE, side="right")))
        yield slice(start, stop)
        start = stop


def _piece(
    there: _There, samples: Samples, keep: Ints, piece: slice, k: int, at: Longs, out: Ints,
    on_pairs: Callable[[int], None],
) -> Longs:  # fmt: skip
    """Retrieve for a range of samples; return those that are left to the processor."""
    index, device = there.index, there.vectors.device
    place = np.cumsum(keep[piece], dtype=np.int64) - keep[piece]
    columns = index.column[samples.item[piece]]
    order, first = grouped(columns, len(index.vectors))
    targets = np.flatnonzero(np.diff(first))
    found = torch.empty(int(keep[piece].sum(dtype=np.int64)), dtype=torch.int32, device=device)
    left = torch.zeros(len(order), dtype=torch.bool, device=device)
    most = max(1, ROW_CELLS // max(1, len(index.vectors)))
    for start in range(0, len(targets), most):
        block = targets[start : start + most]
        mine, table = order[first[block[0]] : first[block[-1] + 1]], there.rows(block)
        for cut in range(0, len(mine), CHUNK):
            chunk = mine[cut : cut + CHUNK]
            asked = samples.take(chunk + piece.start)
            row = np.searchsorted(block, columns[chunk])
            count = _launch(there, table, row, asked, k, _put(place[chunk], device), found)
            left[_put(chunk, device)] = count > HELD
            on_pairs(asked.pairs)
    _bring(found, place, keep[piece], at[piece], out)
    return np.flatnonzero(left.cpu().numpy()) + piece.start


def _launch(
    there: _There, table: tuple[Tensor, Tensor], row: Longs, samples: Samples, k: int, place: Tensor, out: Tensor
) -> Tensor:
    """Retrieve for some samples, whose rows of the table are given, to out[place[s]:]; return their candidates (S,)."""
    index, device, (select, settle) = there.index, out.device, _compiled()
    target, begin = _put(index.column[samples.item], device), _put(index.offset[samples.user], device)
    found = torch.empty(len(samples), HELD, dtype=torch.int32, device=device)
    count = torch.empty(len(samples), dtype=torch.int32, device=device)
    known = _view(there.behaviours)
    given = (*(_view(x) for x in table), _view(_put(row, device)), _view(begin), _view(_put(samples.end, device)))
    select[len(samples), SELECTING](*given, known, k, _view(found), _view(count))
    given = (_view(there.vectors), index.distance == "l2", _view(target), _view(begin), known, _view(found))
    settle[len(samples), SETTLING](*given, _view(count), k, _view(place), _view(out))
    return count


def _bring(found: Tensor, place: Longs, keep: Ints, at: Longs, out: Ints) -> None:
    """Copy a piece's positions from the card to where they go."""
    if not len(found):
        return
    if np.array_equal(at - at[0], place):
        torch.from_numpy(out[at[0] : at[0] + len(found)]).copy_(found)
    else:
        out[np.repeat(at - place, keep) + np.arange(len(found))] = found.cpu().numpy()


def _put(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


def _view(tensor: Tensor) -> Any:  # noqa: ANN401 - what a kernel takes
    return cuda.as_cuda_array(tensor) if tensor.is_cuda else tensor.numpy()
