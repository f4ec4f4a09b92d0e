"""What an LM-based baseline's fit is fed with: its rows and its validation set, worded and tokenised once for all
workers of the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from rella.artifacts import Artifact, Json
from rella.baseline_pipeline import trained_rows
from rella.baselines import TextBaseline, TextBaselineConfig, as_text, mlm_stage
from rella.config import Experiment
from rella.data.selection import Chosen, SubsetRule, choose, split_ids, split_subset
from rella.data.tables import Tables
from rella.dist.dataset import Shared
from rella.dist.material import check_labels
from rella.dist.tune_lm import finished_run
from rella.errors import InputError
from rella.models import ModelIdentity
from rella.wording import Wording

if TYPE_CHECKING:
    from rella.artifacts import Part
    from rella.textctr.examples import PairExamples, Reader, TextExamples

    AnyExamples = TextExamples | PairExamples

CHUNK = 100_000
"""Samples that one task words and tokenises: about a minute on one core."""


@dataclass(frozen=True)
class TextTask:
    """One model to fit, or PTab's encoder to train further."""

    artifact: Artifact
    experiment: Experiment
    """With every `auto` resolved."""
    shared: Shared
    fields: dict[str, str]
    """Name of a field → its column, `users.<column>` or `items.<column>`."""
    wording: Wording
    base: ModelIdentity
    title: str
    mlm: bool = False
    """Whether this is PTab's further pre-training (stage A)."""
    encoder: Artifact | None = None
    """PTab's encoder, where its classifier starts from."""

    @property
    def name(self) -> TextBaseline:
        """Which baseline.

        Raises:
            InputError: an ID-based one.
        """
        found = as_text(self.experiment.baseline.model)
        if found is None:
            raise InputError(f"{self.experiment.baseline.model} is no LM-based baseline")
        return found

    @property
    def config(self) -> TextBaselineConfig:
        """Return the configuration of this fit."""
        config = self.experiment.textctr
        return mlm_stage(config) if self.mlm else config

    def outcome(self) -> tuple[list[Part], dict[str, Json]] | None:
        """Return parts and facts where the run has finished and its weights are whole, else None."""
        return finished_run(self.artifact)

    def reader(self, tables: Tables, tokenizer: Any) -> Reader:  # noqa: ANN401 - transformers is untyped here
        """Return what turns samples into this baseline's rows."""
        from rella.textctr.examples import reader_for

        e = self.experiment
        return reader_for(
            self.name, tables, self.fields, self.wording, e.prompt, self.base, tokenizer, self.config, e.k
        )


@dataclass(frozen=True)
class TextMaterial:
    """The tokenised rows of one fit."""

    train: AnyExamples
    valid: AnyExamples | None
    """None for PTab's further pre-training."""
    facts: dict[str, Json]


@dataclass(frozen=True)
class _Worded:
    """Some samples' rows, and what was lost."""

    examples: AnyExamples
    truncated: int
    dropped: int


def text_training_samples(tables: Tables, experiment: Experiment) -> tuple[Chosen, int]:
    """Return the training samples (N, `max_train_rows` or all) and how many the training split has."""
    from rella.textctr.texts import training_rows

    rows = training_rows(tables.samples, trained_rows(experiment), SubsetRule.of(experiment))
    return choose(tables.samples, rows.ids), rows.of


def text_validation_samples(tables: Tables, experiment: Experiment) -> Chosen:
    """Return the samples that choose the step, never more than there are."""
    split, wanted = experiment.tune.select_on, experiment.textctr.valid_rows
    there = len(split_ids(tables.samples, split))
    n = wanted if wanted == "all" else min(int(wanted), there)
    return choose(tables.samples, split_subset(tables.samples, split, n, SubsetRule.of(experiment)))


@ray.remote(num_cpus=1, num_returns=2)
def make_text_material(task: TextTask) -> tuple[TextMaterial, dict[str, Json]]:
    """Word and tokenise a fit's rows; return them and, for the driver, only what there is."""
    e, tables = task.experiment, task.shared.fetch_tables()
    samples, of = text_training_samples(tables, e)
    facts: dict[str, Json] = {"rows": len(samples), "rows_of": of}
    valid: AnyExamples | None = None
    if not task.mlm:
        check_labels(samples, "training samples", "raise --shots or change --data.seed")
        chosen = text_validation_samples(tables, e)
        remedy = "raise --textctr.valid-rows"
        check_labels(chosen, f"samples that choose the step ({e.tune.select_on})", remedy)
        valid = _worded(task, tables, chosen).examples
        facts |= {"positives": int(samples.label.sum()), "valid_rows": len(chosen), "selected_on": e.tune.select_on}
    train = _worded(task, tables, samples)
    facts |= {
        "tokens": int(train.examples.lengths.sum()),
        "truncated_texts": train.truncated,
        "dropped_behaviours": train.dropped,
    }
    return TextMaterial(train.examples, valid, facts), facts


def _worded(task: TextTask, tables: Tables, samples: Chosen) -> _Worded:
    """Return the rows of some samples; many are worded by several tasks at once."""
    if len(samples) <= CHUNK:
        return _word(task, tables, samples)
    parts = [samples.rows(start, start + CHUNK) for start in range(0, len(samples), CHUNK)]
    made: list[_Worded] = ray.get([_word_remotely.remote(task, part) for part in parts])
    return _Worded(_joined([m.examples for m in made]), sum(m.truncated for m in made), sum(m.dropped for m in made))


@ray.remote(num_cpus=1)
def _word_remotely(task: TextTask, samples: Chosen) -> _Worded:
    return _word(task, task.shared.fetch_tables(), samples)


def _word(task: TextTask, tables: Tables, samples: Chosen) -> _Worded:
    from rella.lm.loading import load_tokenizer

    reader = task.reader(tables, load_tokenizer(task.base))
    examples = reader.examples(samples)
    return _Worded(examples, reader.encoder.truncated, reader.encoder.dropped)


def _joined(parts: Sequence[AnyExamples]) -> AnyExamples:
    """Return parts of one kind as one, in their order."""
    from rella.textctr.examples import PairExamples, TextExamples
    from rella.textctr.texts import PackedIds

    labels = np.concatenate([p.labels for p in parts])
    texts = PackedIds.joined([p.users if isinstance(p, PairExamples) else p.texts for p in parts])
    pairs = [p for p in parts if isinstance(p, PairExamples)]
    if not pairs:
        return TextExamples(texts, labels)
    return PairExamples(texts, pairs[0].items, np.concatenate([p.item for p in pairs]), labels)
