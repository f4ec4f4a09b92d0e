"""Scores of an LM-based baseline as a batch job: a pool of actors that hold the fitted model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rella.artifacts import Artifact, Part
from rella.data.selection import Chosen
from rella.dist.fit_ctr import WEIGHTS
from rella.dist.remote_progress import ProgressHandle, RemoteProgress
from rella.dist.score import count_scored, score_table, scored_samples
from rella.dist.session import Resources
from rella.dist.shards import Shard, cut, run_shards
from rella.dist.text_material import TextTask

if TYPE_CHECKING:
    from rella.textctr.examples import Reader
    from rella.textctr.predict import Predictor


@dataclass(frozen=True)
class TextScoreTask:
    """Samples to score with one fitted model."""

    artifact: Artifact
    fit: TextTask
    """How its rows and its model are made; its artifact holds the weights."""


@dataclass(frozen=True)
class _Held:
    """What one task's shards have in common; the predictor keeps the item tower's states between them."""

    reader: Reader
    predictor: Predictor[Any]
    samples: Chosen


class TextScoreWorker:
    """Holds the model of the task whose shard it does; makes one part a shard."""

    def __init__(self, tasks: Sequence[TextScoreTask], cpus: int, progress: ProgressHandle) -> None:
        import torch

        torch.set_num_threads(cpus)
        self.tasks, self.progress = tasks, progress
        self.held: dict[int, _Held] = {}

    def run(self, shard: Shard) -> Part:
        """Score the samples of a shard and write their part."""
        held = self._of(shard.task)
        mine, encoder = held.samples.rows(shard.start, shard.stop), held.reader.encoder
        encoder.truncated = encoder.dropped = 0
        examples = held.reader.examples(mine)
        found = held.predictor(examples, None, lambda rows: self.progress.report(rows))
        facts = {
            "tokens": int(examples.lengths.sum()),
            "truncated_texts": encoder.truncated,
            "dropped_behaviours": encoder.dropped,
        }
        table = score_table(mine, found.logits)
        return self.tasks[shard.task].artifact.write_part(table, shard.shard, shard.shards, facts=facts)

    def _of(self, number: int) -> _Held:
        if number not in self.held:
            # One at a time: two would not fit on a small card.
            self.held.clear()
            self.held[number] = _load(self.tasks[number].fit)
        return self.held[number]


def _load(task: TextTask) -> _Held:
    from rella.lm.loading import best_device, load_tokenizer
    from rella.textctr.baselines import load_baseline
    from rella.textctr.model import put_weights, weights_from_bytes
    from rella.textctr.predict import Predictor

    tables, tokenizer, config = task.shared.fetch_tables(), load_tokenizer(task.base), task.config
    part = next(p for p in task.artifact.manifest().parts if p.name == WEIGHTS)
    model = load_baseline(task.name, task.base, tokenizer, config, task.experiment.seed, best_device())
    put_weights(model, weights_from_bytes(task.artifact.checked(part)))
    predictor: Predictor[Any] = Predictor(model, config.batch_tokens, config.arithmetic)
    return _Held(task.reader(tables, tokenizer), predictor, scored_samples(tables, task.experiment))


def score_texts(tasks: Sequence[TextScoreTask], resources: Resources) -> list[list[Part]]:
    """Score every task's samples in one pool; return the parts by task."""
    counts = count_scored([(t.fit.shared, t.fit.experiment) for t in tasks])
    shards = [
        s
        for n, (t, rows) in enumerate(zip(tasks, counts, strict=True))
        for s in cut(n, rows, t.fit.experiment.score.shard_rows)
    ]
    with RemoteProgress("score", sum(counts), "samples") as progress:
        setup = {"tasks": list(tasks), "cpus": resources.cpus, "progress": progress.handle}
        kept = lambda shard: progress.handle.kept(shard.stop - shard.start)  # noqa: E731
        return run_shards(TextScoreWorker, setup, [t.artifact for t in tasks], shards, resources, kept)
