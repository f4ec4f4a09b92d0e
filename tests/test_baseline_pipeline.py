"""Baselines: which fields are felt by which model, and what their stages read."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from rella.baseline_pipeline import BaselinePipeline, build_baseline, needs_neighbours
from rella.baselines import BaselineConfig, idle_fields
from rella.config import Experiment
from rella.errors import InputError
from rella.pipeline import build
from tests.test_pipeline import FIELDS, MODEL, RAW, with_field

FELT = {
    "deepfm": set[str](),
    "autoint": {"attention_layers", "attention_size", "attention_heads"},
    "dcnv2": {"cross_layers"},
    "gru4rec": {"gru_layers", "gru_size"},
    "caser": {"vertical_kernels", "horizontal_kernels"},
    "sasrec": {"attention_layers", "attention_size", "attention_heads"},
    "din": {"attention_layers", "attention_size"},
    "sim": {"attention_layers", "attention_size", "search"},
}
SPECIAL = set().union(*FELT.values()) | {"category", "fill_up", "soft_history"}
COMMON = {f.name for f in fields(BaselineConfig)} - SPECIAL - {"model", "precision", "checkpoint_seconds"}


def experiment(model: str, **changes: Any) -> Experiment:
    return Experiment(shots=2048, baseline=BaselineConfig(model=model, **changes))  # type: ignore[arg-type]


def made(e: Experiment) -> BaselinePipeline:
    return build_baseline(e, RAW, MODEL)


@pytest.mark.parametrize("model", FELT)
def test_a_model_feels_its_own_fields_and_those_of_all(model: str) -> None:
    base = experiment(model)
    key = made(base).baseline.key
    for name in COMMON | SPECIAL:
        other = with_field(base, f"baseline.{name}", FIELDS[f"baseline.{name}"][0])
        felt = name in COMMON | FELT[model]
        assert (made(other).baseline.key != key) == felt, name
    assert made(with_field(base, "baseline.checkpoint_seconds", 1.0)).baseline.key == key
    assert idle_fields(base.baseline) == SPECIAL - FELT[model]


def test_a_search_feels_its_own_fields() -> None:
    hard, soft = experiment("sim", search="hard"), experiment("sim", search="soft")
    for base, felt in ((hard, {"category", "fill_up"}), (soft, {"soft_history"})):
        for name in ("category", "fill_up", "soft_history"):
            other = with_field(base, f"baseline.{name}", FIELDS[f"baseline.{name}"][0])
            assert (made(other).baseline.key != made(base).baseline.key) == (name in felt)


@pytest.mark.parametrize("name", ["k", "shots", "seed", "data.seed", "data.subsets", "tune.select_on"])
def test_the_experiment_s_fields_that_a_baseline_feels(name: str) -> None:
    base = experiment("din")
    assert made(with_field(base, name, FIELDS[name][0])).baseline.key != made(base).baseline.key


@pytest.mark.parametrize("name", ["model", "mix", "history", "prompt.variant", "tune.learning_rate", "embed.pooling"])
def test_what_belongs_to_the_llm_is_not_felt(name: str) -> None:
    base = experiment("din")
    other = made(with_field(base, name, FIELDS[name][0]))
    assert (other.baseline.key, other.score.key) == (made(base).baseline.key, made(base).score.key)


def test_full_shot_draws_no_subset() -> None:
    base = replace(experiment("din"), shots="all")
    assert base.baseline.valid_rows == "auto"
    assert made(base).experiment.baseline.valid_rows == "all"
    assert made(with_field(base, "data.seed", 7)).baseline.key == made(base).baseline.key
    assert made(experiment("din")).experiment.baseline.valid_rows == 2000
    assert made(replace(experiment("din"), shots=300)).experiment.baseline.valid_rows == 300
    few = with_field(base, "baseline.valid_rows", 100)
    assert made(with_field(few, "data.seed", 7)).baseline.key != made(few).baseline.key


def test_scores_feel_rows_and_split_alone() -> None:
    base = experiment("gru4rec")
    key = made(base).score.key
    assert made(with_field(base, "test_rows", 50)).score.key != key
    assert made(with_field(base, "score.split", "valid")).score.key != key
    assert made(with_field(base, "score.k", 7)).score.key == key
    # Which subset is drawn counts where one is drawn; here the fit's own subset changes as well, so look at the fields.
    assert "data.seed" not in made(base).score.config
    assert "data.seed" in made(with_field(base, "test_rows", 50)).score.config


def test_only_the_semantic_search_reads_what_subr_retrieved() -> None:
    semantic = made(experiment("sim"))
    names = [s.name for s in semantic.stages()]
    assert names == ["prepare", "embed", "pca", "retrieve", "baseline", "score"]
    assert semantic.retrieve is not None
    ours = build(replace(experiment("sim"), history="retrieved"), RAW, MODEL)
    assert ours.retrieve is not None
    assert semantic.retrieve.key == ours.retrieve.key, "the neighbours of ReLLa's own prompts"
    assert semantic.baseline.inputs["neighbours"].key == ours.retrieve.key
    for e in (experiment("din"), experiment("sim", search="hard"), experiment("sim", search="soft")):
        assert not needs_neighbours(e)
        pipeline = build_baseline(e, RAW)
        assert [s.name for s in pipeline.stages()] == ["prepare", "baseline", "score"]
        assert pipeline.retrieve is None
    with pytest.raises(InputError, match="semantic search needs an LLM's item vectors; name it with --lm"):
        build_baseline(experiment("sim"), RAW)
    with pytest.raises(InputError, match="k 90: retrieval keeps 80"):
        made(replace(experiment("sim"), k=90))


def test_slugs_say_what_it_is() -> None:
    assert made(experiment("din")).baseline.slug == "din-n2048-k30-seed0"
    assert made(experiment("sim", search="hard")).score.slug == "sim-hard-n2048-k30-seed0-test-all"
