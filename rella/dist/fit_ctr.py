"""The baseline stage on Ray Train: ID-based CTR models, every run of a job in one group of workers; and their scores.

As in `tune_lm`: a worker that dies takes its group with it, the next group goes on from the last checkpoint, and a
result file vouches for the weights of a finished run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray

from rella.artifacts import Artifact, Json, Part
from rella.config import Experiment
from rella.data.selection import Chosen, SubsetRule, choose, split_ids, split_subset
from rella.data.tables import Tables
from rella.dist.dataset import Shared
from rella.dist.group import guarded, launch
from rella.dist.remote_progress import ProgressHandle, RemoteProgress
from rella.dist.score import count_scored, score_table, scored_samples
from rella.dist.session import Resources
from rella.dist.shards import Shard, cut, run_shards
from rella.dist.telling import Telling, follower
from rella.dist.tune_lm import finished_run, outcomes, write_result
from rella.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from rella.ctr.batches import Batches

WEIGHTS = "weights.safetensors"
SCORE_ROWS = 65_536
"""Rows of one part of scores: these models take a million a minute on one core."""


@dataclass(frozen=True)
class FitTask:
    """One model to fit."""

    artifact: Artifact
    experiment: Experiment
    shared: Shared
    fields: dict[str, str]
    """Name of a field → its column, `users.<column>` or `items.<column>`."""
    title: str

    def outcome(self) -> tuple[list[Part], dict[str, Json]] | None:
        """Return parts and facts where the run has finished and its weights are whole, else None."""
        return finished_run(self.artifact)


def training_samples(tables: Tables, experiment: Experiment) -> Chosen:
    """Return the N few-shot samples, or the whole training split."""
    rule = SubsetRule.of(experiment)
    return choose(tables.samples, split_subset(tables.samples, "train", experiment.shots, rule))


def validation_samples(tables: Tables, experiment: Experiment) -> Chosen:
    """Return the samples that choose the step, never more than there are."""
    split, wanted = experiment.tune.select_on, experiment.baseline.valid_rows
    there = len(split_ids(tables.samples, split))
    n = wanted if wanted == "all" else min(int(wanted), there)
    return choose(tables.samples, split_subset(tables.samples, split, n, SubsetRule.of(experiment)))


class _Fitting:
    """A task's data in this process: features once, batches by samples."""

    def __init__(self, task: FitTask) -> None:
        from rella.ctr.features import Features

        self.task, self.tables = task, task.shared.fetch_tables()
        self.features = Features.of(self.tables, task.fields)
        self.histories, self.neighbours = self.tables.histories(), task.shared.fetch_neighbours()

    def batches(self, samples: Chosen, pinned: bool = False) -> Batches:
        from rella.ctr.batches import batches_of

        e = self.task.experiment
        return batches_of(e.baseline, self.features, self.histories, samples, e.k, self.neighbours, pinned)

    def model(self) -> nn.Module:
        from rella.ctr.models import build

        e = self.task.experiment
        return build(e.baseline, self.features, e.k, e.seed)


def _train(config: dict[str, Any]) -> None:
    """What every worker of the group runs: one model after another."""
    import torch

    torch.set_num_threads(config["cpus"])

    def fit_all() -> None:
        for number, task in enumerate(config["tasks"]):
            if task.outcome() is None:
                _fit(task, number, config["progress"])

    guarded(config["progress"], fit_all)


def _fit(task: FitTask, number: int, progress: ProgressHandle) -> None:
    import torch.distributed as dist
    from safetensors.torch import save

    from rella.ctr.fit import Fitter
    from rella.ctr.models import parameters
    from rella.lm.checkpoints import Checkpoints
    from rella.lm.loading import best_device

    started, data, device = time.monotonic(), _Fitting(task), best_device()
    e, rank, world = task.experiment, dist.get_rank(), dist.get_world_size()
    train, valid = (data.batches(s, device.type == "cuda") for s in (
        training_samples(data.tables, e), validation_samples(data.tables, e)))  # fmt: skip
    states = Checkpoints(task.artifact)

    told = Telling(progress, number, task.title, e.tune.select_on)
    model = data.model().to(device)
    fitter = Fitter(model, train, valid, e.baseline, e.seed, device, told, rank, world, states)
    fitted = fitter.run()
    if rank == 0:
        course, seconds = fitted.course, time.monotonic() - started
        resumed = course.resumed_at[-1] if course.resumed_at else 0
        part = task.artifact.write_file(WEIGHTS, save(fitted.best))
        trained = (course.steps - resumed) * e.baseline.step_rows
        facts = {
            "rows": len(train),
            "valid_rows": len(valid),
            "parameters": parameters(model),
            "best_step": course.best_step,
            "steps": course.steps,
            "epochs": round(course.steps / fitter.steps_per_epoch, 3),
            "valid": course.valid,
            "losses": [round(x, 6) for x in course.losses],
            "resumed_at": course.resumed_at,
            "workers": world,
            "seconds_training": round(seconds, 3),
            "rows_per_second": round(trained / seconds, 1),
        }
        write_result(task.artifact, [part], facts)
        states.clear()
        progress.end_at(number, e.baseline.max_epochs * len(train))
    dist.barrier()


@ray.remote(num_cpus=0)
def _rows(tasks: Sequence[FitTask]) -> list[int]:
    """In one worker, not in a process for each."""
    return [len(training_samples(t.shared.fetch_tables(), t.experiment)) for t in tasks]


def fit(
    tasks: Sequence[FitTask], resources: Resources, say: Callable[[str], None]
) -> list[tuple[list[Part], dict[str, Json]]]:
    """Fit every task's model in one worker group; return (parts, facts) by task.

    Raises:
        RellaError: a fit failed; carries the first worker's error.
    """
    left = [t for t in tasks if t.outcome() is None]
    if left:
        rows: list[int] = ray.get(_rows.remote(left))
        for task, n in zip(left, rows, strict=True):
            say(f"{'baseline':<9} {task.title}: {n:,} rows")
        total = sum(t.experiment.baseline.max_epochs * n for t, n in zip(left, rows, strict=True))
        with RemoteProgress("fit", total, "rows", follower(left)) as progress:
            config = {"tasks": left, "cpus": resources.cpus, "progress": progress.handle}
            launch(_train, config, left[0].artifact, left[0].experiment, resources)
    return outcomes(tasks)


@dataclass(frozen=True)
class BaselineScoreTask:
    """Samples to score with one fitted model."""

    artifact: Artifact
    fitted: Artifact
    fit: FitTask
    """How its data and model are made."""


class BaselineScoreWorker:
    """Holds the models of the tasks that it meets; makes one part a shard."""

    def __init__(self, tasks: Sequence[BaselineScoreTask], cpus: int, progress: ProgressHandle) -> None:
        import torch

        torch.set_num_threads(cpus)
        self.tasks, self.progress = tasks, progress
        self.held: dict[int, tuple[_Fitting, nn.Module, Chosen]] = {}

    def run(self, shard: Shard) -> Part:
        """Score the samples of a shard and write their part."""
        from rella.ctr.fit import predict
        from rella.lm.loading import best_device

        data, model, samples = self.of(shard.task)
        mine = samples.rows(shard.start, shard.stop)
        _, logits = predict(model, data.batches(mine), best_device())
        self.progress.report(len(mine))
        table: pa.Table = score_table(mine, np.stack([logits, np.zeros_like(logits)], axis=1))
        return self.tasks[shard.task].artifact.write_part(table, shard.shard, shard.shards)

    def of(self, number: int) -> tuple[_Fitting, nn.Module, Chosen]:
        """Return a task's data, its fitted model and its samples."""
        if number not in self.held:
            from safetensors.torch import load

            from rella.ctr.fit import load_weights
            from rella.lm.loading import best_device

            task = self.tasks[number]
            data = _Fitting(task.fit)
            part = next(p for p in task.fitted.manifest().parts if p.name == WEIGHTS)
            model = data.model()
            load_weights(model, load(task.fitted.checked(part)))
            samples = scored_samples(data.tables, task.fit.experiment)
            self.held = {number: (data, model.to(best_device()), samples)}
        return self.held[number]


def score_baselines(tasks: Sequence[BaselineScoreTask], resources: Resources) -> list[list[Part]]:
    """Score every task's samples in one pool; return the parts by task."""
    counts = count_scored([(t.fit.shared, t.fit.experiment) for t in tasks])
    shards = [s for n, rows in enumerate(counts) for s in cut(n, rows, SCORE_ROWS)]
    with RemoteProgress("score", sum(counts), "samples") as progress:
        setup = {"tasks": list(tasks), "cpus": resources.cpus, "progress": progress.handle}
        kept = lambda shard: progress.handle.kept(shard.stop - shard.start)  # noqa: E731
        return run_shards(BaselineScoreWorker, setup, [t.artifact for t in tasks], shards, resources, kept)


@ray.remote(num_cpus=0)
def _floor(tables: Tables, experiment: Experiment) -> dict[str, float]:
    from rella.ctr.floor import Floor
    from rella.metrics import evaluate

    train, test = training_samples(tables, experiment), scored_samples(tables, experiment)
    probability, _ = Floor.fit(train, len(tables.users), len(tables.items)).predict(test)
    found = evaluate(test.label, probability)
    return {"auc": found.auc, "log_loss": found.log_loss, "accuracy": found.accuracy}


def floor(shared: Shared, experiment: Experiment) -> dict[str, float]:
    """Return the metrics of what no model may fall below: shrunk means of user and item from the training rows."""
    found: dict[str, float] = ray.get(_floor.remote(shared.tables, experiment))
    return found


def field_columns(artifact: Artifact) -> dict[str, str]:
    """Return where the fields of a prepared data set are.

    Raises:
        InputError: it was prepared by a version that did not say.
    """
    found = artifact.manifest().facts.get("field_columns")
    if not found:
        raise InputError(f"{artifact.where()} does not say where its fields are: start again with --restart prepare")
    return dict(found)
