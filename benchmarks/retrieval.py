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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
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


def by_user_torch(world: World, v: Floats, users: Ints, k: int) -> Found:
    """(b): product, causal mask, `topk`."""
    weight, found = torch.from_numpy(v), Found()
    for u in users.tolist():
        start, stop = world.histories.offset[u : u + 2]
        e = weight[torch.from_numpy(world.histories.item[start:stop].astype(np.int64))]
        for at in range(0, len(e), 2048):  # a user of 32,202 behaviours would take 4 GB
            block = e[at : at + 2048] @ e[: at + 2048].T
            rows, columns = block.shape
            later = torch.arange(columns)[None, :] >= torch.arange(at, at + rows)[:, None]
            best = block.masked_fill_(later, -torch.inf).topk(min(k, columns))
            found.add(u, at, best.indices)
    return found


def by_user_faiss(world: World, v: Floats, users: Ints, k: int, block: int = 512) -> Found:
    """(c): what came before a block with FAISS, the triangle inside it with a small product, then the best of both."""
    import faiss

    found = Found()
    for u in users.tolist():
        start, stop = world.histories.offset[u : u + 2]
        e = v[world.histories.item[start:stop]]
        for at in range(0, len(e), block):
            targets = e[at : at + block]
            inside = targets @ targets.T
            inside[np.triu_indices(len(targets))] = -np.inf
            values, places = inside, np.broadcast_to(np.arange(at, at + len(targets)), inside.shape)
            if at:
                near, where = faiss.knn(targets, e[:at], min(k, at), metric=faiss.METRIC_INNER_PRODUCT)
                values, places = np.hstack([inside, near]), np.hstack([places, where])
            most = min(k, values.shape[1])
            best = np.argpartition(-values, most - 1, axis=1)[:, :most]
            order = np.argsort(-np.take_along_axis(values, best, 1), axis=1, kind="stable")
            best = np.take_along_axis(best, order, 1)
            found.add(u, at, np.take_along_axis(places, best, 1))
    return found


@dataclass
class Found:
    """What (b) and (c) found: positions by user and block."""

    blocks: list[tuple[int, int, Any]] = field(default_factory=list)

    def add(self, user: int, at: int, positions: Any) -> None:  # noqa: ANN401 - an array of torch or numpy
        """Keep the positions of the targets `at`, `at` + 1 ... of a user."""
        self.blocks.append((user, at, positions))

    def rows(self, world: World) -> Iterator[tuple[int, Ints]]:
        """Yield sample and positions, best first."""
        first = np.searchsorted(world.user, np.arange(len(world.histories.offset)))
        for user, at, positions in self.blocks:
            for n, row in enumerate(np.asarray(positions)):
                end = at + n
                if end >= MIN_HISTORY:
                    yield int(first[user]) + end - MIN_HISTORY, row[: min(end, len(row))].astype(np.int32)


def check(world: World, v: Floats, theirs: Iterable[tuple[int, Ints]], ours: Answer, k: int) -> int:
    """Compare others' answers with ours; return how many rows differ, all of them in ties of float32."""
    offsets, positions = ours
    differ = 0
    for s, row in theirs:
        mine, other = positions[offsets[s] : offsets[s + 1]], row[:k]
        if np.array_equal(mine, other):
            continue
        differ += 1
        x, h = v[world.item[s]].astype(np.float64), v[world.history(s)].astype(np.float64)
        gap = np.inf if mine.shape != other.shape else np.abs(h[mine] @ x - h[other] @ x).max()
        if gap > 1e-5:
            raise SystemExit(f"sample {s}: similarities differ by {gap}")
    return differ


def bounds(world: World, d: int) -> dict[str, float]:
    """Return the rates of this machine, measured now, and the seconds that they allow for ours at best.

    Best is: a row of products for every target that pays one, single products at the memory's rate for the others, and
    every behaviour's number read once.
    """
    a, b = np.ones((512, d), np.float32), np.ones((20_000, d), np.float32)
    a @ b.T
    gemm = 512 * 20_000 * d / min(timed(lambda: a @ b.T)[0] for _ in range(3))
    block, copy = np.ones(2**28, np.uint8), np.empty(2**28, np.uint8)
    memory = 2 * block.nbytes / min(timed(lambda: np.copyto(copy, block))[0] for _ in range(3))
    pairs = np.bincount(world.item, weights=world.end, minlength=world.items)
    by_row = pairs > engines.pays_from(world.items, d, "cosine")
    number = 2 if world.items <= 2**16 else 4
    seconds = np.count_nonzero(by_row) * world.items * d / gemm
    seconds += (4 * d * pairs[~by_row].sum() + number * world.pairs) / memory
    return {"gemm_gmac_per_s": gemm / 1e9, "memory_gb_per_s": memory / 1e9, "bound_seconds": float(seconds)}


def on_a_card(world: World, v: Floats, k: int, answer: Answer) -> float | None:
    """Return the seconds of the engine on a GPU, its answers compared with `answer`; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    from rella.retrieval import device
    from rella.retrieval.index import Index, Samples

    samples, out = Samples(world.user, world.item, world.end), np.empty_like(answer[1])
    index = Index.of(v, world.histories, "cosine")
    first = samples.take(np.arange(min(500, len(samples))))
    device.run(index, first, k, answer[0][: len(first)], out, lambda _: None)  # started
    seconds, _ = timed(lambda: device.run(index, samples, k, answer[0][:-1], out, lambda _: None))
    if not np.array_equal(out, answer[1]):
        raise SystemExit("the engine on the GPU gives other positions")
    return seconds


def compare(world: World, kind: str, d: int, k: int, targets: int, users: int) -> dict[str, float]:
    """Run everything on one kind of vectors and return the figures."""
    v, rng = vectors(kind, world.items, d), np.random.default_rng(SEED)
    compile_all(v, k)
    ours, answer = timed(lambda: engines.top_k(v, world.histories, world.user, world.item, world.end, k, threads=CORES))
    samples = np.sort(rng.choice(len(world.user), min(targets, len(world.user)), replace=False))
    chosen = np.sort(rng.choice(len(world.histories.offset) - 1, users, replace=False).astype(np.int32))
    a_sum, rows = authors(world, v, samples, "sum")
    a_product, _ = authors(world, v, samples, "product")
    b_seconds, b = timed(lambda: by_user_torch(world, v, chosen, k))
    c_seconds, c = timed(lambda: by_user_faiss(world, v, chosen, k))
    lengths = np.diff(world.histories.offset)[chosen]
    pairs, theirs = int((lengths * (lengths - 1) // 2).sum()), zip(samples.tolist(), rows, strict=True)
    per_sample, per_pair = ours / len(world.user), ours / world.pairs
    card = on_a_card(world, v, k, answer)
    found = {
        "seconds": ours,
        "ns_per_pair": per_pair * 1e9,
        "us_per_sample": per_sample * 1e6,
        "authors_us_per_sample": a_sum / len(samples) * 1e6,
        "engineer_ns_per_pair": b_seconds / pairs * 1e9,
        "ratio_authors": a_sum / len(samples) / per_sample,
        "ratio_authors_product": a_product / len(samples) / per_sample,
        "ratio_engineer": b_seconds / pairs / per_pair,
        "ratio_faiss": c_seconds / pairs / per_pair,
        "ties_authors": check(world, v, theirs, answer, min(k, AUTHORS_K)),
        "ties_engineer": check(world, v, b.rows(world), answer, k),
        "ties_faiss": check(world, v, c.rows(world), answer, k),
        **bounds(world, d),
        **({} if card is None else {"gpu_seconds": card}),
    }
    found["share_of_bound"] = found["bound_seconds"] / ours
    return found


def compile_all(v: Floats, k: int) -> None:
    """Run every engine on next to nothing, so that no compiler is in the times."""
    histories = Histories(np.array([0, 40]), np.arange(40, dtype=np.int32), np.ones(40, np.float32))
    few = tuple(np.full(20, value, np.int32) for value in (0, 7, 40))
    for engine in ("table", "blocks", "auto"):
        engines.top_k(v, histories, *few, k, engine=engine)  # type: ignore[arg-type]


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
    print(f"{size}, d = {options.d}, K = {options.k}")
    figures: dict[str, dict[str, float]] = {}
    for kind in ("gauss",) if options.quick else ("gauss", "clusters"):
        targets, users = (500, 30) if options.quick else (4000, 400)
        figures[kind] = compare(world, kind, options.d, options.k, targets, users)
        print(f"\n{kind}, {CORES} cores")
        for name, value in figures[kind].items():
            print(f"  {name:<26} {value:12,.3f}")
        if "gpu_seconds" not in figures[kind]:
            print(f"  {'gpu_seconds':<26} not measured: there is no GPU")
    if options.json:
        said = {"samples": len(world.user), "pairs": world.pairs, "cores": CORES, **figures["gauss"]}
        options.json.write_text(json.dumps(said, indent=1) + "\n")


if __name__ == "__main__":
    main()
