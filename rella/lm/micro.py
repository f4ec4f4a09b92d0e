"""A step's batch cut into micro-batches: what each worker computes in each forward and backward pass.

Every worker makes the same plan from the same lengths. How a batch is cut changes no result (`rella.lm.tuning`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Limits:
    """What one forward and backward pass of one worker may hold."""

    rows: int
    tokens: int
    """Padding included; a row that is longer than this is a piece of its own."""
    packing: bool = False
    """Whether rows stand one after the other, without padding."""

    def cost(self, lengths: Numbers) -> int:
        """Return the tokens of rows of these lengths in one piece."""
        return int(lengths.sum() if self.packing else lengths.max() * len(lengths))


def cut(batch: Numbers, lengths: Numbers, limits: Limits, workers: int, bucketing: bool = True) -> list[list[Numbers]]:
    """Return a step's passes, each with one piece of the batch for every worker.

    With `bucketing` a piece holds rows of similar length, and the longest come first, so that a card that is too small
    says so at once; without it rows stay as they come. As many passes as the limits ask for, and not one more: within
    them the limit is lowered until the pieces are of equal size. In the last pass some pieces may be empty.

    Args:
        batch: (B,) int64, row numbers.
        lengths: tokens of every row, by row number.
        limits: of one piece.
        workers: pieces in a pass.
        bucketing: whether rows are sorted by length.
    """
    ordered = batch[np.lexsort((batch, -lengths[batch]))] if bucketing else batch
    own = lengths[ordered].tolist()
    passes = -(-len(_ends(own, limits, limits.tokens)) // workers)
    low, high = 1, limits.tokens
    while low < high:
        middle = (low + high) // 2
        if len(_ends(own, limits, middle)) <= passes * workers:
            high = middle
        else:
            low = middle + 1
    ends = _ends(own, limits, high)
    pieces = np.split(ordered, ends[:-1])
    pieces += [ordered[:0]] * (passes * workers - len(pieces))
    return [pieces[n : n + workers] for n in range(0, len(pieces), workers)]


def _ends(lengths: list[int], limits: Limits, tokens: int) -> list[int]:
    """Where pieces end that are filled, in order, up to `tokens` and `limits.rows`."""
    ends: list[int] = []
    count, longest, total = 0, 0, 0
    for at, length in enumerate(lengths):
        longest, total = max(longest, length), total + length
        size = total if limits.packing else longest * (count + 1)
        if count and (size > tokens or count == limits.rows):
            ends.append(at)
            count, longest, total = 0, length, length
        count += 1
    return [*ends, len(lengths)]
