"""Work cut into shards, run by a pool of Ray Data actors, one part a shard.

Every stage that makes parts goes through here: parts that an earlier run left whole are kept, the rest is done by
actors that load what they need once, and a shard whose actor dies is done again by another.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import ray
from ray.data import ActorPoolStrategy

from rella.artifacts import Artifact, Part
from rella.dist.session import Resources, failure, without_actor_notice
from rella.errors import WorkerError

_COLUMNS = ("task", "shard", "shards", "start", "stop")

MIN_SHARDS = 8
"""Small work is cut too, so that every worker gets some."""
MIN_ROWS = 64


@dataclass(frozen=True)
class Shard:
    """Rows [start, stop) of one task's input, and the part that they become."""

    task: int
    """Which of the tasks that share the pool."""
    shard: int
    shards: int
    start: int
    stop: int


def cut(task: int, rows: int, at_most: int) -> list[Shard]:
    """Cut `rows` rows into contiguous shards of at most `at_most`, at least one; whatever the cluster is.

    Their number alone says where the cuts are: a part's name holds that number, so a rerun with another `at_most` never
    takes a part that covers other rows.
    """
    size = max(1, min(at_most, max(MIN_ROWS, math.ceil(rows / MIN_SHARDS))))
    shards = max(1, math.ceil(rows / size))
    return cut_at(task, [i * rows // shards for i in range(shards)], rows)


def cut_at(task: int, starts: Sequence[int], rows: int) -> list[Shard]:
    """Return shards that begin at `starts` (ascending, the first 0) and end where the next begins, or at `rows`."""
    ends = [*starts[1:], rows]
    return [Shard(task, i, len(starts), a, b) for i, (a, b) in enumerate(zip(starts, ends, strict=True))]


def by_cost(task: int, cost: np.ndarray, at_most: int) -> list[Shard]:
    """Cut rows into contiguous shards of about equal summed cost, at most `at_most` each (a costlier row is alone)."""
    total = int(cost.sum())
    size = max(1, min(at_most, math.ceil(total / MIN_SHARDS)))
    before, shards = np.cumsum(cost) - cost, max(1, math.ceil(total / size))
    # As in `cut`, from the number of shards alone.
    bucket = before * shards // max(1, total)
    starts = np.flatnonzero(np.diff(bucket, prepend=-1)) if len(cost) else np.array([0])
    return cut_at(task, [int(s) for s in starts], len(cost))


def run_shards(
    worker: type,
    setup: Mapping[str, Any],
    artifacts: Sequence[Artifact],
    shards: Sequence[Shard],
    resources: Resources,
    on_kept: Callable[[Shard], None] | None = None,
    tables: Sequence[str] = (),
    threads: int = 1,
) -> list[list[Part]]:
    """Make every shard's part and return them by task, in shard order.

    Args:
        worker: a class; `worker(**setup)` loads, `worker.run(shard)` returns the part that it wrote.
        setup: keyword arguments of `worker`, serialisable; object references are passed as they are.
        artifacts: by task, where parts go.
        shards: of all tasks.
        resources: of one actor, and how many.
        on_kept: called for every shard that an earlier run left whole.
        tables: by task, which table the parts are of, where an artifact has several.
        threads: shards that a worker has under way; past 1 `run` is called by several threads at once, so that one may
            write while the next computes.
    """
    names = tables or [""] * len(artifacts)
    found = {s: artifacts[s.task].good_part(s.shard, s.shards, names[s.task]) for s in shards}
    made = {s: part for s, part in found.items() if part is not None}
    if on_kept is not None:
        for shard in made:
            on_kept(shard)
    todo = [s for s in shards if s not in made]
    if todo:
        made |= _run(worker, setup, todo, resources, threads)
    return [[made[s] for s in sorted(shards, key=lambda s: s.shard) if s.task == t] for t in range(len(artifacts))]


def _run(
    worker: type, setup: Mapping[str, Any], todo: Sequence[Shard], resources: Resources, threads: int
) -> dict[Shard, Part]:
    data = ray.data.from_items([asdict(s) for s in todo], override_num_blocks=len(todo))
    done = data.map_batches(
        _ShardActor,
        batch_size=1,
        compute=ActorPoolStrategy(
            size=min(resources.workers, len(todo)),
            # One more than threads would be work that another worker could have taken up.
            max_tasks_in_flight_per_actor=2,
            max_concurrent_calls_per_actor=threads,
            enable_true_multi_threading=threads > 1,
        ),
        # As bytes: Ray warns of actors that restart with object references among their arguments, as these references
        # could be gone by then. Pickled by hand they stay alive until the session ends.
        fn_constructor_kwargs={"packed": ray.cloudpickle.dumps((worker, dict(setup)))},
        num_cpus=resources.cpus,
        num_gpus=resources.gpus,
    )
    made: dict[Shard, Part] = {}
    with without_actor_notice():
        for batch in done.iter_batches(batch_size=None, prefetch_batches=0):
            for *numbers, outcome in zip(*(batch[c] for c in (*_COLUMNS, "outcome")), strict=True):
                found = json.loads(outcome)
                if "message" in found:
                    raise WorkerError(**found)
                made[Shard(*(int(n) for n in numbers))] = Part(**found["part"])
    return made


class _ShardActor:
    """What Ray Data calls: one row in, the same row with its part out.

    Errors travel as data: wrapped by Ray Data they would arrive as a page of text without their type.
    """

    def __init__(self, packed: bytes) -> None:
        self.worker, self.failed = None, ""
        try:
            worker, setup = ray.cloudpickle.loads(packed)
            self.worker = worker(**setup)
        except Exception as error:
            self.failed = json.dumps(failure(error))

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        shards = [Shard(**{n: int(batch[n][i]) for n in _COLUMNS}) for i in range(len(batch["task"]))]
        return {**batch, "outcome": [self._outcome(s) for s in shards]}

    def _outcome(self, shard: Shard) -> str:
        if self.worker is None:
            return self.failed
        try:
            return json.dumps({"part": asdict(self.worker.run(shard))})
        except Exception as error:
            return json.dumps(failure(error))
