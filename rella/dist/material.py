"""What a tuning run is fed with: its rows and its validation set, worded and tokenised once for all workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from rella.artifacts import Json
from rella.config import Experiment
from rella.data.fewshot import training_rows, twins_identical
from rella.data.questions import questions
from rella.data.selection import Chosen, SubsetRule, choose, split_ids, split_subset
from rella.data.tables import Tables
from rella.dist.dataset import Shared, catalogue_of
from rella.errors import InputError
from rella.models import ModelIdentity
from rella.wording import Wording


@dataclass(frozen=True)
class Material:
    """The tokenised rows of one run: training set and validation set."""

    rows: list[Any]
    """`rella.lm.tuning.Row`s."""
    valid: list[np.ndarray]
    """Prompts, int32 ids."""
    valid_label: np.ndarray
    facts: dict[str, Json]


@ray.remote(num_cpus=1, num_returns=2)
def make_material(
    shared: Shared, experiment: Experiment, wording: Wording, model: ModelIdentity
) -> tuple[Material, dict[str, Json]]:
    """Word and tokenise a run's rows once for all workers; return them and, for the driver, only what there is."""
    from rella.lm.loading import load_tokenizer
    from rella.lm.reading import Reader
    from rella.lm.tuning import Row

    e, tables, neighbours = experiment, shared.fetch_tables(), shared.fetch_neighbours()
    reader = Reader(load_tokenizer(model), model, e.prompt, wording)
    catalogue, encoder = catalogue_of(tables, wording, reader.display), reader.encoder()
    answers = {label: reader.trained(label) for label in (0, 1)}
    shots = choose(tables.samples, split_subset(tables.samples, "train", e.shots, SubsetRule.of(e)))
    check_labels(shots, "few-shot samples", "raise --shots or change --data.seed")
    valid = validation_samples(tables, e)
    check_labels(valid, f"samples that choose the step ({e.tune.select_on})", "raise --tune.valid-rows")
    twins: dict[bool, list[Any]] = {}
    ids, flags = training_rows(shots.sample_id, e.mix)
    for flag in sorted(set(flags.tolist())):
        asked = questions(catalogue, shots, "retrieved" if flag else "recent", neighbours, e.k)
        twins[flag] = [
            Row(prompt, answers[int(label)]) for prompt, label in zip(encoder.encode(asked), shots.label, strict=True)
        ]
    rows = [
        twins[flag][place] for place, flag in zip(np.searchsorted(shots.sample_id, ids), flags.tolist(), strict=True)
    ]
    prompts = encoder.encode(questions(catalogue, valid, e.history, neighbours, e.k))
    facts = {
        "shots": len(shots),
        "rows": len(rows),
        "positives": int(shots.label.sum()),
        "identical_twins": round(twins_identical(shots.end, e.k), 6),
        "tokens": sum(r.tokens for r in rows),
        "truncated_prompts": encoder.truncated,
        "dropped_behaviours": encoder.dropped,
        "valid_rows": len(valid),
        "selected_on": e.tune.select_on,
    }
    return Material(rows, prompts, valid.label.astype(np.int8), facts), facts


def check_labels(samples: Chosen, what: str, remedy: str) -> None:
    """Verify that samples are labelled and of both classes.

    Raises:
        InputError: none, unlabelled ones, or all labels equal; says what to do.
    """
    if not len(samples):
        raise InputError(f"there are no {what}: give the split a share with --data.split")
    unlabelled = int(np.isnan(samples.label).sum())
    if unlabelled:
        raise InputError(f"{unlabelled} of the {len(samples)} {what} have no label")
    if samples.label.min() == samples.label.max():
        raise InputError(f"all {len(samples)} {what} have the label {int(samples.label[0])}: {remedy}")


def validation_samples(tables: Tables, experiment: Experiment) -> Chosen:
    """Return the seeded samples that choose the step, at most `tune.valid_rows` of the split `tune.select_on`."""
    e = experiment
    there = len(split_ids(tables.samples, e.tune.select_on))
    wanted = min(int(e.tune.valid_rows), there)
    return choose(
        tables.samples,
        split_subset(tables.samples, e.tune.select_on, wanted, SubsetRule.of(e)) if wanted else np.zeros(0, np.int64),
    )
