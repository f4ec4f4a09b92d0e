"""Data sets on which retrieval is tested, and the definition written out once more in plain Python."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from rella.config import Distance
from rella.data.tables import Histories

Floats = npt.NDArray[np.float32]
Samples = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int32]]

DISTANCES: tuple[Distance, ...] = ("cosine", "dot", "l2", "l1")


def unit(vector: Floats) -> list[float]:
    """The stored unit vector: float64 length by numpy's sum, then float32."""
    wide = vector.astype(np.float64)
    length = np.sqrt((wide * wide).sum())
    return [float(np.float32(x / length)) if length else 0.0 for x in wide]


def slow_similarity(x: list[float], h: list[float], distance: Distance) -> float:
    total = 0.0
    for a, b in zip(x, h, strict=True):
        if distance == "l1":
            total -= math.fabs(a - b)
        elif distance == "l2":
            total -= (a - b) * (a - b)
        else:
            total += a * b
    return total


def slow_top_k(vectors: Floats, histories: Histories, samples: Samples, k: int, distance: Distance) -> list[list[int]]:
    stored = [unit(v) if distance == "cosine" else [float(x) for x in v] for v in vectors]
    answer = []
    for u, i, e in zip(*(column.tolist() for column in samples), strict=True):
        start = int(histories.offset[u])
        scores = [slow_similarity(stored[i], stored[histories.item[start + p]], distance) for p in range(e)]
        answer.append(sorted(range(e), key=lambda p: (-scores[p], -p))[:k])
    return answer


def world(
    rng: np.random.Generator, vectors: Floats, lengths: list[int], samples: int = 60
) -> tuple[Histories, Samples]:
    """Users with random behaviours, and random samples of theirs in random order."""
    offset = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    item = rng.integers(0, len(vectors), offset[-1]).astype(np.int32)
    user = rng.integers(0, len(lengths), samples).astype(np.int32)
    end = np.array([rng.integers(0, lengths[u] + 1) for u in user], dtype=np.int32)
    target = rng.integers(0, len(vectors), samples).astype(np.int32)
    return Histories(offset, item, np.ones(offset[-1], dtype=np.float32)), (user, target, end)


def gaussian(rng: np.random.Generator, items: int, d: int) -> Floats:
    return rng.standard_normal((items, d)).astype(np.float32)


def duplicates(rng: np.random.Generator, items: int, d: int) -> Floats:
    """Few different vectors: most behaviours tie exactly."""
    return gaussian(rng, 3, d)[rng.integers(0, 3, items)]


def near_ties(rng: np.random.Generator, items: int, d: int) -> Floats:
    """One vector and its neighbours in float32: they differ by one unit in the last place of one entry."""
    centre = gaussian(rng, 1, d)[0]
    out = np.tile(centre, (items, 1))
    for n in range(items):
        place = int(rng.integers(0, d))
        out[n, place] = np.nextafter(out[n, place], np.float32(rng.choice([-np.inf, np.inf])))
    return out


def coarse(rng: np.random.Generator, items: int, d: int) -> Floats:
    """Small integers: different vectors with equal similarities."""
    return rng.integers(-1, 2, (items, d)).astype(np.float32)


def cancelling(rng: np.random.Generator, items: int, d: int) -> Floats:
    """Large entries whose products cancel: float32 sums lose what decides."""
    big = np.float32(2.0**12) * rng.choice([-1, 1], (items, d)).astype(np.float32)
    return (big + rng.standard_normal((items, d)).astype(np.float32)).astype(np.float32)


def clusters(rng: np.random.Generator, items: int, d: int) -> Floats:
    """A few tight groups: cosines above 0.95 within, and everything else far below."""
    centres = rng.standard_normal((max(2, items // 60), d))
    near = centres[rng.integers(0, len(centres), items)]
    return (near + 0.15 * rng.standard_normal((items, d))).astype(np.float32)


def lonely(rng: np.random.Generator, items: int, d: int) -> Floats:
    """Equal vectors but for a few: a row without deviation where bins would be of no width."""
    out = np.ones((items, d), dtype=np.float32)
    out[:: max(1, items // 5)] += rng.standard_normal(d).astype(np.float32)
    return out


MAKERS = [gaussian, duplicates, near_ties, coarse, cancelling, clusters, lonely]
