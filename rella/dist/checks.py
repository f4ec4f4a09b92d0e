"""What is refused before anything expensive starts: data that cannot be told apart, and a disk that is too small."""

from __future__ import annotations

from collections.abc import Mapping

from rella.artifacts import Json
from rella.baseline_pipeline import BaselinePipeline
from rella.baselines import as_text
from rella.config import Experiment
from rella.errors import InputError
from rella.pipeline import Pipeline, Stage
from rella.stages import EMBED, PCA, REIT, RETRIEVE, SCORE

SCORE_BYTES = 32
"""Of one scored row: id, label, two logits, probability."""
SPARE_BYTES = 16_000_000
"""Beside the columns: what Parquet, manifests, leases and the file system's blocks take."""


def check_both_labels(facts: Mapping[str, Json]) -> None:
    """Verify that a data set has samples of both labels.

    Raises:
        InputError: all labels are equal.
    """
    positives = sum(int(facts[f"{split}_positives"]) for split in ("train", "valid", "test"))
    if positives in (0, facts["samples"]):
        raise InputError(
            f"all {facts['samples']:,} samples have the label {int(positives > 0)}, there is nothing to tell apart; "
            "change the label rule (--data.positive-above) or add samples of the other label"
        )


def check_counts(pipeline: Pipeline | BaselinePipeline, facts: Mapping[str, Json], until: str) -> None:
    """Verify, before anything expensive, that the data set has the samples that the experiment asks for.

    Args:
        pipeline: the experiment.
        facts: of its prepared data set: samples and positives by split.
        until: the last stage that will run.

    Raises:
        InputError: more shots or rows than samples, an empty split, or all labels equal; names the flag.
    """
    e = pipeline.experiment
    asked: list[tuple[str, str, int | str]] = []
    if isinstance(pipeline, BaselinePipeline):
        section = "baseline" if as_text(e.baseline.model) is None else "textctr"
        asked += [("--shots", "train", e.shots), (f"--{section}.valid-rows", e.tune.select_on, "all")]
    elif pipeline.reit is not None and until in (REIT, SCORE):
        asked += [("--shots", "train", e.shots), ("--tune.select-on", e.tune.select_on, "all")]
    if until == SCORE:
        asked.append(("--test-rows", e.score.split, e.test_rows))
    for flag, split, n in asked:
        there, positives = int(facts[split]), int(facts[f"{split}_positives"])
        if there == 0:
            raise InputError(f"{flag}: the {split} split is empty; give it a share with --data.split")
        if n != "all" and not 1 <= int(n) <= there:
            raise InputError(f"{flag} {n}: the {split} split has {there:,} samples; give 1 to {there}, or `all`")
        if positives in (0, there):
            raise InputError(
                f"{flag}: all {there:,} samples of the {split} split have the label {int(positives > 0)}, there is "
                "nothing to tell apart; change the label rule (--data.positive-above) or the data"
            )


def space_needed(stage: Stage, experiment: Experiment, facts: Mapping[str, Json], hidden_size: int) -> int:
    """Return the bytes that a stage takes at most; no more than the spare ones for those that look by themselves.

    Args:
        stage: what will be made.
        experiment: that it belongs to.
        facts: of its prepared data set.
        hidden_size: of the base model.
    """
    e, items = experiment, int(facts["items"])
    columns = 0
    if stage.name == EMBED:
        columns = 4 * items * hidden_size
    elif stage.name == PCA:
        columns = 4 * items * (hidden_size if e.pca_dim == "none" else int(e.pca_dim))
    elif stage.name == RETRIEVE and e.retrieve.samples == "all":
        # The parts, and what groups of targets have found for them.
        columns = 2 * 2 * e.retrieve.k_max * int(facts["samples"])
    elif stage.name == SCORE:
        columns = SCORE_BYTES * int(facts[e.score.split] if e.test_rows == "all" else e.test_rows)
    return columns + SPARE_BYTES
