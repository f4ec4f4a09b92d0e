"""Which exact engine retrieves a set of samples faster: a cost model; the answers are the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from rella.config import Distance
from rella.data.tables import Histories
from rella.retrieval import blocks, table
from rella.retrieval.measures import Floats
from rella.retrieval.table import Ints, Longs

Engine = Literal["table", "blocks"]

# One thread of an AMD EPYC with AVX-512, d = 512, K = 30; only their ratios matter. GEMM and BY_USER are rounded from
# measurements (benchmarks/LOG.md); how pairs and samples share the selection's time is estimated, on the high side.
GEMM = 0.03
"""Nanoseconds for a multiplication and an addition in the GEMM of a block of targets."""
GATHERED = 3.0
"""Nanoseconds to gather a behaviour's entry from a row and to look whether it is near the K-th best."""
SETTLED = 2500.0
"""Nanoseconds to sort a sample's candidates and to settle near-ties."""
BY_USER = 0.15
"""Nanoseconds for a multiplication and an addition in the small GEMMs of one user after the other, all included."""


def cheaper(items: int, d: int, targets: int, samples: int, pairs: int, distance: Distance) -> Engine:
    """Return the engine that is expected to be faster.

    The table costs a row of `items` products for every different target and little for a pair; the blocks cost a
    product for every pair. So few samples of a large catalogue go to the blocks, many to the table.

    Args:
        items: rows of the vectors.
        d: dimensions.
        targets: different items that are targets.
        samples: how many.
        pairs: (target, earlier behaviour) pairs.
        distance: `l1` has no GEMM, and only one engine.
    """
    by_item = targets * items * d * GEMM + pairs * GATHERED + samples * SETTLED
    by_user = pairs * d * BY_USER
    return "table" if distance != "l1" and by_item < by_user else "blocks"


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
    """Return the positions of the K most similar behaviours, by the engine that is cheaper: see `blocks.top_k`."""
    items, d = vectors.shape
    targets = int(np.count_nonzero(np.bincount(item, minlength=items))) if len(item) else 0
    if cheaper(items, d, targets, len(item), int(end.sum(dtype=np.int64)), distance) == "table":
        return table.top_k(vectors, histories, user, item, end, k, distance, on_pairs, threads)
    return blocks.top_k(vectors, histories, user, item, end, k, distance, on_pairs)
