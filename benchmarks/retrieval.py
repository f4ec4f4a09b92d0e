"""SUBR's exact top K on synthetic MovieLens-25M: ours against what people run, on the same vectors, in one process.

    python benchmarks/retrieval.py [--quick] [--users N] [--k K] [--json FILE]

(a) the paper's notebooks: per sample, similarities of the history to the target, then a whole sort; (b) per user, one
matrix product, causal mask, `torch.topk`; (c) per user, blocks of targets against what came before, with FAISS. All use
every core. (a) runs on seeded samples, (b) and (c) on seeded users; ratios are their cost over ours, per sample for (a)
and per (target, earlier behaviour) pair for the others, so more is better. The answers are compared in the run.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rella.data.synthetic25m import ml25m_shape
from rella.data.tables import Histories
from rella.retrieval import engines
from rella.retrieval.measures import prepare

CORES = len(os.sched_getaffinity(0))
AUTHORS_K = 80
MIN_HISTORY = 5
SEED = 1

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]
Answer = tuple[npt.NDArray[np.int64], Ints]


@dataclass(frozen=True)
class World:
    """The ratings as histories, and every rating with enough before it as a sample."""

    histories: Histories
    items: int
    user: Ints
    item: Ints
    end: Ints

    @property
    def pairs(self) -> int:
        """(target, earlier behaviour) pairs."""
        return int(self.end.sum(dtype=np.int64))

    @staticmethod
    def of(users: int | None) -> World:
        """Return the world of the first `users` users."""
        ratings = ml25m_shape(users=users)
        count = np.diff(ratings.offsets)
        owner = np.repeat(np.arange(len(count), dtype=np.int32), count)
        order = np.lexsort((ratings.item, ratings.timestamp, owner))
        item = ratings.item[order].astype(np.int32)
        end = (np.arange(len(item)) - ratings.offsets[owner]).astype(np.int32)
        kept = end >= MIN_HISTORY
        stars = (ratings.half_stars[order] / 2).astype(np.float32)
        histories = Histories(ratings.offsets.astype(np.int64), item, stars)
        return World(histories, len(ratings.movie_id), owner[kept], item[kept], end[kept])

    def history(self, sample: int) -> Ints:
        """What a sample may see, as a ready array."""
        start = self.histories.offset[self.user[sample]]
        return self.histories.item[start : start + self.end[sample]]


def vectors(kind: str, items: int, d: int) -> Floats:
    """Unit vectors: `gauss`, or `clusters` whose members have cosines above 0.95."""
    rng = np.random.default_rng(SEED)
    if kind == "gauss":
        return prepare(rng.standard_normal((items, d)).astype(np.float32), "cosine")
    centres = rng.standard_normal((items // 40, d))
    spread = 0.2 * rng.standard_normal((items, d))
    return prepare((centres[rng.integers(0, len(centres), items)] + spread).astype(np.float32), "cosine")


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return seconds and result."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def _authors_sum(v: Floats, h: Ints, x: int) -> Ints:
    s = np.sum(v[h] * v[x], axis=-1)
    return np.argsort(-s)[:AUTHORS_K].astype(np.int32)


def _authors_product(v: Floats, h: Ints, x: int) -> Ints:
    return np.argsort(-(v[h] @ v[x]))[:AUTHORS_K].astype(np.int32)


_SHARED: dict[str, Any] = {}
"""What forked processes see without a copy."""


def _authors_share(part: tuple[str, npt.NDArray[np.int64]]) -> list[Ints]:
    name, samples = part
    way = _authors_sum if name == "sum" else _authors_product
    world, v = _SHARED["world"], _SHARED["v"]
    return [way(v, world.history(s), int(world.item[s])) for s in samples.tolist()]


def authors(world: World, v: Floats, samples: npt.NDArray[np.int64], name: str) -> tuple[float, list[Ints]]:
    """Return the seconds of (a) on all cores, and the positions, best first."""
    _SHARED.update(world=world, v=v)
    with multiprocessing.get_context("fork").Pool(CORES) as pool:
        pool.map(_authors_share, [("sum", samples[:CORES])] * CORES)  # started, imported, touched
        seconds, parts = timed(lambda: pool.map(_authors_share, [(name, p) for p in np.array_split(samples, CORES)]))
    return seconds, [row for part in parts for row in part]


def by_user_torch(world: World, v: Floats, users: Ints, k: int) -> int:
    """(b): return the pairs done."""
    weight, pairs = torch.from_numpy(v), 0
    for u in users.tolist():
        start, stop = world.histories.offset[u : u + 2]
        e = weight[torch.from_numpy(world.histories.item[start:stop].astype(np.int64))]
        n = len(e)
        for at in range(0, n, 2048):  # a user of 32,202 behaviours would take 4 GB
            block = e[at : at + 2048] @ e[: at + 2048].T
            rows, columns = block.shape
            later = torch.arange(columns)[None, :] >= torch.arange(at, at + rows)[:, None]
            block.masked_fill(later, -torch.inf).topk(min(k, columns))
        pairs += n * (n - 1) // 2
    return pairs


def by_user_faiss(world: World, v: Floats, users: Ints, k: int, block: int = 512) -> int:
    """(c): return the pairs done; the triangle inside a block is a small product."""
    import faiss

    pairs = 0
    for u in users.tolist():
        start, stop = world.histories.offset[u : u + 2]
        e = v[world.histories.item[start:stop]]
        n = len(e)
        for at in range(0, n, block):
            targets = e[at : at + block]
            inside = np.tril(targets @ targets.T, -1)
            np.argpartition(-inside, min(k, len(targets) - 1), axis=1)
            if at:
                faiss.knn(targets, e[:at], min(k, at), metric=faiss.METRIC_INNER_PRODUCT)
        pairs += n * (n - 1) // 2
    return pairs


def check(world: World, v: Floats, samples: npt.NDArray[np.int64], theirs: list[Ints], ours: Answer, k: int) -> int:
    """Compare (a)'s answers with ours; return how many rows differ, all of them in ties of float32."""
    offsets, positions = ours
    differ = 0
    for s, row in zip(samples.tolist(), theirs, strict=True):
        mine, other = positions[offsets[s] : offsets[s + 1]], row[:k]
        if np.array_equal(mine, other):
            continue
        differ += 1
        x, h = v[world.item[s]].astype(np.float64), v[world.history(s)].astype(np.float64)
        gap = np.abs(h[mine] @ x - h[other] @ x).max()
        if gap > 1e-5:
            raise SystemExit(f"sample {s}: similarities differ by {gap}")
    return differ


def bounds(world: World, d: int) -> dict[str, float]:
    """Return the rates of this machine, measured now, and the seconds that they allow for ours at best."""
    a, b = np.ones((512, d), np.float32), np.ones((20_000, d), np.float32)
    a @ b.T
    gemm = 512 * 20_000 * d / min(timed(lambda: a @ b.T)[0] for _ in range(3))
    block, copy = np.ones(2**26, np.uint8), np.empty(2**26, np.uint8)
    memory = 2 * block.nbytes / min(timed(lambda: np.copyto(copy, block))[0] for _ in range(3))
    targets = len(np.unique(world.item))
    seconds = targets * world.items * d / gemm + 4 * world.pairs / memory
    return {"gemm_gmac_per_s": gemm / 1e9, "memory_gb_per_s": memory / 1e9, "bound_seconds": seconds}


def compare(world: World, kind: str, d: int, k: int, targets: int, users: int) -> dict[str, float]:
    """Run everything on one kind of vectors and return the figures."""
    v, rng = vectors(kind, world.items, d), np.random.default_rng(SEED)
    first = slice(0, min(500, len(world.user)))
    engines.top_k(v, world.histories, world.user[first], world.item[first], world.end[first], k)  # compiled
    ours, answer = timed(lambda: engines.top_k(v, world.histories, world.user, world.item, world.end, k, threads=CORES))
    samples = np.sort(rng.choice(len(world.user), min(targets, len(world.user)), replace=False))
    chosen = rng.choice(len(world.histories.offset) - 1, users, replace=False).astype(np.int32)
    a_sum, rows = authors(world, v, samples, "sum")
    a_product, _ = authors(world, v, samples, "product")
    b_seconds, b_pairs = timed(lambda: by_user_torch(world, v, chosen, k))
    c_seconds, c_pairs = timed(lambda: by_user_faiss(world, v, chosen, k))
    per_sample, per_pair = ours / len(world.user), ours / world.pairs
    found = {
        "seconds": ours,
        "ns_per_pair": per_pair * 1e9,
        "us_per_sample": per_sample * 1e6,
        "ratio_authors": a_sum / len(samples) / per_sample,
        "ratio_authors_product": a_product / len(samples) / per_sample,
        "ratio_engineer": b_seconds / b_pairs / per_pair,
        "ratio_faiss": c_seconds / c_pairs / per_pair,
        "rows_that_differ_in_ties": check(world, v, samples, rows, answer, min(k, AUTHORS_K)),
        **bounds(world, d),
    }
    found["share_of_bound"] = found["bound_seconds"] / ours
    return found


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="under a minute: 3,000 users, Gaussian vectors")
    parser.add_argument("--users", type=int, help="users of the synthetic data set; default all 162,541")
    parser.add_argument("--k", type=int, default=30, help="K (default 30)")
    parser.add_argument("--d", type=int, default=512, help="dimensions (default 512)")
    parser.add_argument("--json", type=Path, help="write the figures of the Gaussian vectors there, flat")
    options = parser.parse_args()
    world = World.of(3000 if options.quick and options.users is None else options.users)
    size = f"{len(world.user):,} samples, {world.pairs:,} pairs, {world.items:,} items"
    different = len(np.unique(world.item))
    engine = engines.cheaper(world.items, options.d, different, len(world.user), world.pairs, "cosine")
    print(f"{size}, d = {options.d}, K = {options.k}; the cheaper engine: {engine}")
    figures: dict[str, dict[str, float]] = {}
    for kind in ("gauss",) if options.quick else ("gauss", "clusters"):
        targets, users = (500, 30) if options.quick else (4000, 400)
        figures[kind] = compare(world, kind, options.d, options.k, targets, users)
        print(f"\n{kind}, {CORES} cores")
        for name, value in figures[kind].items():
            print(f"  {name:<26} {value:12,.3f}")
    if options.json:
        said = {"samples": len(world.user), "pairs": world.pairs, "cores": CORES, **figures["gauss"]}
        options.json.write_text(json.dumps(said, indent=1) + "\n")


if __name__ == "__main__":
    main()
