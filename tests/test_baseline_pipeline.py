"""Baselines: which fields are felt by which model, and what their stages read."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from rella.baseline_pipeline import (
    BaselinePipeline,
    build_baseline,
    build_text,
    idle_settings,
    needs_neighbours,
    refuse_idle,
    resolve_text,
    trained_rows,
)
from rella.baselines import BaselineConfig, TextBaseline, TextBaselineConfig, idle_fields, text_baseline
from rella.config import Experiment
from rella.errors import InputError
from rella.pipeline import build
from rella.prompts import BOOKCROSSING, ML_1M
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


def test_semantic_search_knows_the_size_of_its_vectors() -> None:
    """`auto` is the LLM's matter: every stage of the baseline sees a number, and the keys are those of that number."""
    auto = made(experiment("sim"))
    assert auto.experiment.pca_dim == 512
    given = made(replace(experiment("sim"), pca_dim=512))
    assert [s.key for s in auto.stages()] == [s.key for s in given.stages()]
    assert made(replace(experiment("sim"), pca_dim="none")).experiment.pca_dim == "none"


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
    assert (base.baseline.batch_size, base.baseline.step_rows) == ("auto", 512)
    assert [made(replace(base, shots=n)).experiment.baseline.step_rows for n in ("all", 300)] == [512, 256]
    asked = with_field(base, "baseline.batch_size", 64)
    assert [made(replace(asked, shots=n)).experiment.baseline.batch_size for n in ("all", 300)] == [64, 64]
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


BERT = replace(MODEL, name="bert", digest="b" * 64)
TEXT_FELT = {"ctr-bert": {"max_item_tokens", "tie"}, "ptab": set[str](), "p5": set[str]()}
"""Fields of the fit that one of them alone feels."""
TEXT_STAGE = {"ctr-bert": ("textctr",), "ptab": ("mlm", "textctr"), "p5": ("textctr",)}


def text_experiment(model: TextBaseline, **changes: Any) -> Experiment:
    config = replace(text_baseline(model), **{"valid_rows": 500, **changes})
    return Experiment(dataset="ml-1m", shots=2048, baseline=BaselineConfig(model=model), textctr=config)


def text_made(e: Experiment) -> BaselinePipeline:
    base = replace(BERT, model_type="t5") if e.baseline.model == "p5" else BERT
    return build_text(e, RAW, base, "float32", ML_1M)


def text_keys(e: Experiment) -> dict[str, str]:
    return {s.name: s.key for s in text_made(e).stages()}


@pytest.mark.parametrize("model", TEXT_FELT)
def test_an_lm_based_one_feels_what_its_stages_name(model: TextBaseline) -> None:
    base = text_experiment(model)
    before = text_keys(base)
    assert tuple(before) == ("prepare", *TEXT_STAGE[model], "score")
    only_ctr_bert = TEXT_FELT["ctr-bert"] - TEXT_FELT[model]
    for name, (other, stages) in FIELDS.items():
        if name in ("dataset", "baseline.model") or "prepare" in stages:
            continue
        own = set(stages) & set(TEXT_STAGE[model])
        if name.removeprefix("textctr.") in only_ctr_bert:
            own = set()
        # What comes after a stage changes with it; the rows of the scores are drawn where only some are scored.
        wanted = {"mlm": {"mlm", "textctr", "score"}, "textctr": {"textctr", "score"}}
        follow = set().union(*(wanted[s] for s in own)) | ({"score"} if name in ("test_rows", "score.split") else set())
        after = text_keys(with_field(base, name, other))
        assert {n for n in before if before[n] != after[n]} == follow, name


def test_the_model_and_the_words_are_in_the_keys() -> None:
    base = text_experiment("ptab")
    before = text_keys(base)
    for other in (
        build_text(base, RAW, replace(BERT, digest="c" * 64), "float32", ML_1M),
        build_text(base, RAW, BERT, "float32", BOOKCROSSING),
        build_text(base, RAW, BERT, "bfloat16", ML_1M),
    ):
        after = {s.name: s.key for s in other.stages()}
        assert {n for n in before if before[n] != after[n]} == {"mlm", "textctr", "score"}
    moved = build_text(base, RAW, replace(BERT, name="renamed", source="/elsewhere"), "float32", ML_1M)
    assert {s.name: s.key for s in moved.stages()} == before


def test_two_classifiers_share_the_further_pretraining() -> None:
    first, second = (text_made(text_experiment("ptab", learning_rate=rate)) for rate in (5e-5, 1e-4))
    assert first.mlm is not None
    assert first.mlm == second.mlm
    assert first.baseline.inputs == {"data": first.prepare, "encoder": first.mlm}
    assert first.baseline.key != second.baseline.key


@pytest.mark.parametrize(
    ("shots", "at_most", "trained", "valid", "kept"),
    [
        ("all", "all", "all", "all", "all"),
        ("all", 8192, 8192, 2000, 8192),
        (512, 8192, 512, 512, "all"),
        (8192, 512, 512, 512, 512),
        (512, 512, 512, 512, "all"),
    ],
)
def test_a_limit_of_rows_counts_where_it_bites(shots: Any, at_most: Any, trained: Any, valid: Any, kept: Any) -> None:
    e = replace(text_experiment("ctr-bert", max_train_rows=at_most, valid_rows="auto"), shots=shots)
    assert trained_rows(e) == trained
    resolved = resolve_text(e, "float32")
    assert (resolved.textctr.valid_rows, resolved.textctr.max_train_rows) == (valid, kept)
    assert resolve_text(resolved, "bfloat16") == resolved
    feels_seed = text_keys(with_field(e, "data.seed", 7)) != text_keys(e)
    assert feels_seed == (trained != "all")


def test_without_validation_subset_stage_a_draws_nothing() -> None:
    e = replace(text_experiment("ptab", valid_rows=500), shots="all")
    before, after = text_keys(e), text_keys(with_field(e, "data.seed", 7))
    assert {n for n in before if before[n] != after[n]} == {"textctr", "score"}


def test_p5_in_float16_is_refused() -> None:
    with pytest.raises(InputError, match=r"overflow in float16: leave --textctr\.precision out"):
        text_made(text_experiment("p5", precision="float16"))
    assert text_made(text_experiment("ctr-bert", precision="float16")).baseline.config["textctr.precision"] == "float16"
    with pytest.raises(InputError, match="0 training rows"):
        text_made(text_experiment("ptab", max_train_rows=0))
    with pytest.raises(InputError, match="still `auto`"):
        _ = TextBaselineConfig().arithmetic


def test_a_model_of_another_kind_is_refused_before_anything_else() -> None:
    with pytest.raises(InputError, match="P5 is built on T5, but bert is 'bert': give --base t5-base"):
        build_text(text_experiment("p5"), RAW, replace(BERT, model_type="bert"), "float32", ML_1M)
    short = replace(BERT, max_positions=128)
    with pytest.raises(InputError, match=r"textctr\.max_tokens 512: bert reads 128 tokens"):
        build_text(text_experiment("ptab"), RAW, short, "float32", ML_1M)
    assert build_text(text_experiment("p5"), RAW, replace(short, model_type="t5"), "float32", ML_1M)


def test_settings_of_other_baselines_are_refused_where_somebody_gave_them() -> None:
    din, p5 = experiment("din"), text_experiment("p5")
    assert {"baseline.gru_size", "baseline.search", "textctr.base"} <= idle_settings(din)
    assert {"baseline.batch_size", "textctr.tie", "textctr.mlm_epochs"} <= idle_settings(p5)
    assert not idle_settings(p5) & {"baseline.model", "textctr.base", "textctr.batch_size", "tune.learning_rate"}
    for e, name, said in (
        (din, "baseline.gru_size", "--baseline.gru-size: din does not feel it; leave it out"),
        (din, "textctr.max_epochs", "--textctr.max-epochs: din .* did you mean --baseline.max-epochs"),
        (p5, "baseline.max_epochs", "--baseline.max-epochs: p5 .* did you mean --textctr.max-epochs"),
        (p5, "textctr.mlm_epochs", "--textctr.mlm-epochs: p5 does not feel it; leave it out"),
    ):
        with pytest.raises(InputError, match=said):
            refuse_idle(e, {name, "k"})
    refuse_idle(p5, {"k", "textctr.batch_size", "baseline.model", "tune.clip"})


def test_slugs_of_lm_based_ones() -> None:
    found = text_made(text_experiment("ptab", max_train_rows=512))
    assert found.mlm is not None
    assert found.mlm.slug == "bert-n512-k30-seed0"
    assert found.baseline.slug == "ptab-bert-n512-k30-seed0"
    assert found.score.slug == "ptab-bert-n512-k30-seed0-test-all"
