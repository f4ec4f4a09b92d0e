"""Which exact engine retrieves for which samples: a cost model decides by target item; the answers are the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numba
import numpy as np
import numpy.typing as npt

from rella.config import Distance
from rella.data.tables import Histories
from rella.errors import InputError
from rella.retrieval import blocks, table
from rella.retrieval.index import Index, Ints, Longs, Samples
from rella.retrieval.measures import Floats

Engine = Literal["auto", "table", "blocks"]

# One thread of an AMD EPYC with AVX-512, d = 512; only their ratios matter. Measured: benchmarks/LOG.md.
GEMM = 0.022
"""Nanoseconds for a multiplication and an addition in the GEMM of a block of targets."""
GATHERED = 2.5
"""Nanoseconds to gather a behaviour's entry from a row and to look whether it is near the K-th best."""
SETTLED = 700.0
"""Nanoseconds to order a sample's candidates and to settle near-ties, whatever the engine."""
BY_USER = 0.065
"""Nanoseconds for a multiplication and an addition of single products with the vectors in memory."""


def pays_from(items: int, d: int, distance: Distance) -> float:
    """Return the (target, behaviour) pairs from which a target's similarities to all items pay (infinite for L1).

    Args:
        items: rows of the vectors.
        d: dimensions.
        distance: the measure.
    """
    if distance == "l1":
        return np.inf
    return items * d * GEMM / max(d * BY_USER - GATHERED, 1e-9)


def by_row(index: Index, samples: Samples) -> npt.NDArray[np.bool_]:
    """Return, for each item, whether the engine by item takes the samples that have it as target: (items,)."""
    return _pays(index, pairs_by_item(samples.item, samples.end, len(index.vectors)))


def _pays(index: Index, pairs: Longs) -> npt.NDArray[np.bool_]:
    items, d = index.vectors.shape
    return pairs > pays_from(items, d, index.distance)


@numba.njit(cache=True, nogil=True)
def pairs_by_item(item: Ints, end: Ints, items: int) -> Longs:  # pragma: no cover - compiled
    """Return the (target, behaviour) pairs of each item as target: (items,)."""
    pairs = np.zeros(items, np.int64)
    for s in range(item.size):
        if item[s] < 0 or item[s] >= items:
            raise IndexError("a sample's item has no vector")
        pairs[item[s]] += end[s]
    return pairs


def seconds(index: Index, samples: Samples) -> tuple[float, float]:
    """Return what one thread is expected to take: for the rows of the table, and for all the rest."""
    by_item, (items, d) = pairs_by_item(samples.item, samples.end, len(index.vectors)), index.vectors.shape
    rows = _pays(index, by_item)
    pairs, in_table = int(by_item.sum()), int(by_item[rows].sum())
    rest = in_table * GATHERED + (pairs - in_table) * d * BY_USER + len(samples) * SETTLED
    return np.count_nonzero(rows) * items * d * GEMM * 1e-9, rest * 1e-9


def run(
    index: Index,
    samples: Samples,
    k: int,
    at: Longs,
    out: Ints,
    on_pairs: Callable[[int], None],
    threads: int = 1,
    engine: Engine = "auto",
) -> None:
    """Write, for each sample, the positions of the K behaviours most similar to its target to out[at[s]:], best first.

    Args:
        index: vectors and histories.
        samples: (S,) any.
        k: K, at least 1.
        at: (S,) where each sample's min(end, K) positions go.
        out: (…,) int32, is filled.
        on_pairs: called with the number of (target, behaviour) pairs done since the last call.
        threads: at once.
        engine: `table`, `blocks`, or by target whichever is expected to be faster.

    Raises:
        InputError: K below 1, or `table` for L1.
    """
    if k < 1:
        raise InputError(f"k is {k}: at least one behaviour must be retrieved")
    if engine == "table" and index.distance == "l1":
        raise InputError("l1: sums of absolute differences are no GEMM; use the engine by user")
    rows = np.full(len(index.vectors), engine == "table") if engine != "auto" else by_row(index, samples)
    chosen = rows[samples.item]
    for module, mine in ((table, chosen), (blocks, ~chosen)):
        if mine.all():
            module.run(index, samples, k, at, out, on_pairs, threads)
        elif mine.any():
            these = np.flatnonzero(mine)
            module.run(index, samples.take(these), k, at[these], out, on_pairs, threads)


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
    engine: Engine = "auto",
) -> tuple[Longs, Ints]:
    """Return, for each sample, the positions of the K behaviours most similar to its target, best first (SUBR, §3.2).

    Ties go to the more recent behaviour. A history of fewer than K gives all of it.

    Args:
        vectors: (items, d) float32.
        histories: all users' behaviours.
        user: (S,) int32, user of each sample.
        item: (S,) int32, target item.
        end: (S,) int32, behaviours that the sample may see: the user's first `end`.
        k: K, at least 1.
        distance: `cosine`, `dot`, `l2` or `l1`.
        on_pairs: called with the number of (target, behaviour) pairs done since the last call.
        threads: at once.
        engine: `table`, `blocks`, or by target whichever is expected to be faster.

    Returns:
        offsets (S + 1,) int64 and positions (offsets[-1],) int32: sample s has positions[offsets[s] : offsets[s + 1]].

    Raises:
        InputError: K below 1, a vector that is not finite, or `table` for L1.
    """
    offsets = np.zeros(len(user) + 1, dtype=np.int64)
    np.cumsum(np.minimum(end, k), out=offsets[1:])
    positions = np.empty(max(0, int(offsets[-1])), dtype=np.int32)
    index = Index.of(vectors, histories, distance)
    run(index, Samples(user, item, end), k, offsets[:-1], positions, on_pairs or (lambda _: None), threads, engine)
    return offsets, positions
