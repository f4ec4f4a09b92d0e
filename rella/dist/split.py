"""Shards made by one group of workers that share a base's weights (`rella.lm.split`), on Ray Train.

Each worker computes its rows of a shard; the first one puts them together and writes the part. Parts that are whole are
kept, and a group that loses a worker starts again behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import ray

from rella.artifacts import Artifact, Part
from rella.config import Experiment
from rella.dist.group import guarded, launch, setup_process
from rella.dist.remote_progress import ProgressHandle
from rella.dist.session import Resources
from rella.dist.shards import Shard
from rella.errors import ArtifactError, ClusterError


class SplitWorker(Protocol):
    """What makes parts of shards, alone or together with others."""

    def compute(self, shard: Shard, repeated: int = 0) -> Any:  # noqa: ANN401
        """Return what the shard's rows give; its first `repeated` rows are not counted, as another worker has them."""

    def write(self, shard: Shard, found: Sequence[tuple[Shard, Any]]) -> Part:
        """Write the shard's part from what was found for its rows; pieces may overlap."""


def how_to_load(split: bool) -> tuple[Callable[..., Any], Callable[[int], int] | None]:
    """Return what loads a worker's base, whole or its part of it, and what matches its passes with the others'."""
    from rella.lm.loading import load_base

    if not split:
        return load_base, None
    from rella.lm.split import load_split_base, most_passes

    return load_split_base, most_passes


def run_split(
    worker: Callable[..., SplitWorker],
    setup: Mapping[str, Any],
    artifacts: Sequence[Artifact],
    shards: Sequence[Shard],
    experiment: Experiment,
    resources: Resources,
    on_kept: Callable[[Shard], None],
) -> list[list[Part]]:
    """Make every shard's part by one group and return them by task, in shard order.

    Args:
        worker: a class; `worker(**setup, split=True)` loads its part of the base.
        setup: keyword arguments, serialisable; `progress` is among them.
        artifacts: by task.
        shards: of all tasks.
        experiment: how many workers share the base, and how often the group may start again.
        resources: of one worker.
        on_kept: called for every shard that an earlier run left whole.

    Raises:
        ClusterError: fewer workers than are to share the base.
        RellaError: the work failed; carries the first worker's error.
    """
    sharing = experiment.cluster.base_workers
    if sharing > resources.workers:
        raise ClusterError(
            f"cluster.base_workers {sharing}: the cluster has room for {resources.workers}; lower it, or add GPUs"
        )
    found = {s: artifacts[s.task].good_part(s.shard, s.shards) for s in shards}
    for shard in (s for s, part in found.items() if part is not None):
        on_kept(shard)
    todo = [s for s, part in found.items() if part is None]
    if todo:
        config = {
            "packed": ray.cloudpickle.dumps((worker, dict(setup), list(artifacts))),
            "shards": todo,
            "progress": setup["progress"],
            "cpus": resources.cpus,
        }
        launch(_work, config, artifacts[todo[0].task], experiment, replace(resources, workers=sharing, most=0))
    made = {s: part or artifacts[s.task].good_part(s.shard, s.shards) for s, part in found.items()}
    missing = next((s for s, part in made.items() if part is None), None)
    if missing is not None:
        artifact = artifacts[missing.task]
        name = artifact.part_name(missing.shard, missing.shards)
        raise ArtifactError(f"{artifact.where(name)} is not whole: start the same command again")
    ordered = sorted(((s, p) for s, p in made.items() if p is not None), key=lambda pair: pair[0].shard)
    return [[part for shard, part in ordered if shard.task == task] for task in range(len(artifacts))]


def _work(config: dict[str, Any]) -> None:
    """What every worker of the group runs."""
    guarded(config["progress"], lambda: _make_all(config))


def _make_all(config: dict[str, Any]) -> None:
    setup_process(config["cpus"])
    import torch.distributed as dist

    from rella.lm.split import collected, own_rows

    kind, setup, artifacts = ray.cloudpickle.loads(config["packed"])
    worker: SplitWorker = kind(**setup, split=True)
    for shard in _left(config["shards"], artifacts, setup["progress"]):
        start, stop, repeated = own_rows(shard.start, shard.stop)
        mine = replace(shard, start=start, stop=stop)
        found = collected((mine, worker.compute(mine, repeated)))
        if found:
            worker.write(shard, found)
    dist.barrier()


def _left(shards: Sequence[Shard], artifacts: Sequence[Artifact], progress: ProgressHandle) -> list[Shard]:
    """The shards that a group before this one has not made: as the first worker sees it, so that all do the same."""
    import torch.distributed as dist

    told: list[list[Shard]] = [[]]
    if dist.get_rank() == 0:
        told = [[s for s in shards if artifacts[s.task].good_part(s.shard, s.shards) is None]]
    dist.broadcast_object_list(told, src=0)
    return told[0]
