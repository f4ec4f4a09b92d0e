"""The scoring stage (§2.3) as a batch job: any base, any adapter or none, on a pool that holds the base."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray

from rella.artifacts import Artifact, Part
from rella.config import Experiment
from rella.data.questions import Catalogue, Neighbours, questions
from rella.data.selection import Chosen, SubsetRule, choose, split_subset
from rella.data.tables import Tables
from rella.dist.dataset import Shared, catalogue_of
from rella.dist.remote_progress import ProgressHandle, RemoteProgress
from rella.dist.session import Resources
from rella.dist.shards import Shard, cut, run_shards
from rella.dist.split import how_to_load, run_split
from rella.models import ModelIdentity
from rella.schemas import SCORES, check
from rella.storage import Storage
from rella.wording import Wording

if TYPE_CHECKING:
    from rella.lm.passes import TokenBudget
    from rella.lm.reading import Reader

ADAPTER = "adapter"
"""Folder of the PEFT adapter in a `reit` artifact."""


@dataclass(frozen=True)
class ScoreTask:
    """One set of samples to score with one adapter or none."""

    artifact: Artifact
    experiment: Experiment
    shared: Shared
    wording: Wording
    adapter: Artifact | str | None
    """A finished `reit` artifact, the URI of a PEFT folder, or None for zero-shot."""

    def adapter_folder(self) -> Path | None:
        """Return the adapter's folder on this machine.

        Raises:
            ArtifactError: the `reit` artifact is unfinished or damaged.
        """
        if isinstance(self.adapter, Artifact):
            return self.adapter.local_folder(ADAPTER)
        return None if self.adapter is None else Storage(self.adapter).local_copy("")


def scored_samples(tables: Tables, experiment: Experiment) -> Chosen:
    """Return the samples that a score stage covers, ascending by id."""
    e = experiment
    return choose(tables.samples, split_subset(tables.samples, e.score.split, e.test_rows, SubsetRule.of(e)))


def score_table(samples: Chosen, logits: np.ndarray) -> pa.Table:
    """Return a table of `schemas.SCORES` from (n, 2) float32 logits [Yes, No] (Eq. 2)."""
    from rella.lm.scoring import probabilities

    label = pa.array(np.nan_to_num(samples.label).astype(np.int8), mask=np.isnan(samples.label))
    columns = [samples.sample_id, label, logits[:, 0], logits[:, 1], probabilities(logits)]
    table = pa.table([c if isinstance(c, pa.Array) else pa.array(c) for c in columns], schema=SCORES)
    check(table, SCORES, "scores")
    return table


class ScoreWorker:
    """Holds the base model; attaches a task's adapter when a shard of that task comes; makes one part a shard."""

    def __init__(
        self,
        tasks: Sequence[ScoreTask],
        model: ModelIdentity,
        cpus: int,
        progress: ProgressHandle,
        split: bool = False,
    ) -> None:
        import torch

        from rella.lm.loading import best_device, load_tokenizer

        load, self.matched = how_to_load(split)
        torch.set_num_threads(cpus)
        self.tasks, self.identity, self.progress = tasks, model, progress
        self.budgets: dict[int, TokenBudget] = {}
        self.device = threading.Lock()
        self.tokenizer = load_tokenizer(model)
        first = tasks[0].experiment
        self.model = load(model, first.precision, best_device(), quantize=first.quantize)
        self.attached: int | None = None
        self.tables: dict[int, tuple[Catalogue, Chosen, Neighbours | None]] = {}

    def run(self, shard: Shard) -> Part:
        """Score the samples of a shard and write their part, the latter while another thread scores the next."""
        with self.device:
            found = self.compute(shard)
        return self.write(shard, [(shard, found)])

    def write(self, shard: Shard, found: Sequence[tuple[Shard, tuple[np.ndarray, dict[str, int]]]]) -> Part:
        """Write the part of a shard from its pieces."""
        samples = self.data(shard.task)[1].rows(shard.start, shard.stop)
        logits, facts = np.empty((len(samples), 2), np.float32), dict[str, int]()
        for piece, (values, counted) in found:
            logits[piece.start - shard.start : piece.stop - shard.start] = values
            facts = {name: facts.get(name, 0) + n for name, n in counted.items()}
        table = score_table(samples, logits)
        return self.tasks[shard.task].artifact.write_part(table, shard.shard, shard.shards, facts=facts)

    def compute(self, shard: Shard, repeated: int = 0) -> tuple[np.ndarray, dict[str, int]]:
        """Return the (n, 2) logits of a shard's samples and what was counted in all but the first `repeated`."""
        from rella.lm.scoring import question_logits

        task = self.tasks[shard.task]
        e = task.experiment
        catalogue, samples, neighbours = self.data(shard.task)
        mine = samples.rows(shard.start, shard.stop)
        reader = self.reader(task)
        encoder, again = reader.encoder(), reader.encoder()
        asked = questions(catalogue, mine, e.history, neighbours, int(e.score.k))
        logits, tokens = question_logits(
            self.adapted(shard.task),
            encoder,
            asked,
            reader.answers().pair,
            self._budget(e.score.batch_tokens),
            self.progress.report,
            e.score.bucketing,
        )
        facts = {
            "tokens": tokens - sum(map(len, again.encode(asked[:repeated]))),
            "truncated_prompts": encoder.truncated - again.truncated,
            "dropped_behaviours": encoder.dropped - again.dropped,
        }
        return logits, facts

    def _budget(self, tokens: int) -> TokenBudget:
        """The budget of all tasks that ask for this one: what the first learns of the memory, the others need not."""
        from rella.lm.passes import TokenBudget

        if tokens not in self.budgets:
            self.budgets[tokens] = TokenBudget(tokens, "score", "--score.batch-tokens", self.progress.say, self.matched)
        return self.budgets[tokens]

    def reader(self, task: ScoreTask) -> Reader:
        """Return the tokenizer under the task's options."""
        from rella.lm.reading import Reader

        return Reader(self.tokenizer, self.identity, task.experiment.prompt, task.wording)

    def data(self, number: int) -> tuple[Catalogue, Chosen, Neighbours | None]:
        """Return what a task's questions are made of, its samples and their neighbours."""
        if number not in self.tables:
            task = self.tasks[number]
            tables = task.shared.fetch_tables()
            chosen = scored_samples(tables, task.experiment)
            self.tables[number] = (
                catalogue_of(tables, task.wording, self.reader(task).display),
                chosen,
                task.shared.fetch_neighbours(),
            )
        return self.tables[number]

    def adapted(self, number: int) -> Any:  # noqa: ANN401 - transformers is untyped here
        """Return the base with the adapter of a task, if it has one."""
        from rella.lm.loading import attach_adapter, detach_adapter

        if self.attached != number:
            if self.attached is not None and self.tasks[self.attached].adapter is not None:
                self.model = detach_adapter(self.model)
            folder = self.tasks[number].adapter_folder()
            if folder is not None:
                self.model = attach_adapter(self.model, folder, self.identity)
            self.attached = number
        return self.model


@ray.remote(num_cpus=0)
def _counts(asked: Sequence[tuple[Shared, Experiment]]) -> list[int]:
    return [len(scored_samples(shared.fetch_tables(), experiment)) for shared, experiment in asked]


def count_scored(asked: Sequence[tuple[Shared, Experiment]]) -> list[int]:
    """Return how many samples each of several score stages covers; in one worker, not in a process for each."""
    found: list[int] = ray.get(_counts.remote(list(asked)))
    return found


def score(tasks: Sequence[ScoreTask], model: ModelIdentity, resources: Resources) -> list[list[Part]]:
    """Score every task's samples in one pool; return the parts by task."""
    counts = count_scored([(t.shared, t.experiment) for t in tasks])
    shards = [
        s
        for n, (t, rows) in enumerate(zip(tasks, counts, strict=True))
        for s in cut(n, rows, t.experiment.score.shard_rows)
    ]
    with RemoteProgress("score", sum(counts), "prompts") as progress:
        setup = {"tasks": list(tasks), "model": model, "cpus": resources.cpus, "progress": progress.handle}
        kept = lambda shard: progress.handle.kept(shard.stop - shard.start)  # noqa: E731
        e, artifacts = tasks[0].experiment, [t.artifact for t in tasks]
        if e.cluster.base_workers > 1:
            return run_split(ScoreWorker, setup, artifacts, shards, e, resources, kept)
        return run_shards(ScoreWorker, setup, artifacts, shards, resources, kept, threads=2)
