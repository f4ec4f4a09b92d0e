"""The keys: what changes a stage's artifact, what does not, and that nothing slips from one side to the other."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from rella import pipeline
from rella.artifacts import digest
from rella.config import DataConfig, EmbedConfig, Experiment, RetrieveConfig, ScoreConfig, TuneConfig, leaves
from rella.models import ModelIdentity
from rella.pipeline import VARIANTS, Pipeline, Stage, build, chosen_variants, prepare_stage, resolve_auto
from rella.prompts import ML_1M
from rella.stages import STAGES
from rella.storage import Storage
from rella.wording import Wording, item_part, prompt_part

RAW = {"ratings.dat": "1" * 64}
MODEL = ModelIdentity("toy", "/models/toy", None, "a" * 64, 1024, 2048, "llama")

DOWNSTREAM = {
    "prepare": {"prepare", "embed", "pca", "retrieve", "reit", "score"},
    "embed": {"embed", "pca", "retrieve", "reit", "score"},
    "pca": {"pca", "retrieve", "reit", "score"},
    "retrieve": {"retrieve", "reit", "score"},
    "reit": {"reit", "score"},
    "score": {"score"},
}
"""A stage and all that is made from it, in an experiment that uses every stage."""

NEITHER: tuple[str, ...] = ()
LM = ("embed", "reit", "score")
BASELINE = ("baseline",)
MLM = ("mlm",)
TEXTCTR = ("textctr",)
TEXT = (*MLM, *TEXTCTR)
OTHERS = {*BASELINE, *TEXT}
"""Stages of another pipeline: tests/test_baseline_pipeline.py."""
LM_STAGES = tuple(stage for stage in STAGES if stage not in OTHERS)

# field → (another valid value, the stages that the field itself belongs to)
FIELDS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "dataset": ("ml-1m", ("prepare",)),
    "dataset_file": ("/data/songs.yaml", NEITHER),
    "raw_dir": ("/data/elsewhere", NEITHER),
    "storage": ("/elsewhere", NEITHER),
    "model": ("vicuna-7b", NEITHER),
    "revision": ("main", NEITHER),
    "precision": ("bfloat16", LM),
    "quantize": ("int8", LM),
    "k": (20, ("reit", "baseline", *TEXT)),
    "shots": (512, ("reit", "baseline", *TEXT)),
    "mix": ("retrieved", ("reit",)),
    "history": ("recent", ("reit", "score")),
    "test_rows": (50, ("score",)),
    "adapter": ("none", NEITHER),
    "distance": ("l2", ("retrieve",)),
    "pca_dim": (64, ("pca",)),
    "seed": (1, ("reit", "baseline", *TEXT)),
    "seeds": (3, NEITHER),
    "restart": ("unfinished", NEITHER),
    "variants": ("ours", NEITHER),
    "data.positive_above": (3.5, ("prepare",)),
    "data.min_history": (6, ("prepare",)),
    "data.order": ("file", ("prepare",)),
    "data.targets": ("last", ("prepare",)),
    "data.split_by": ("column", ("prepare",)),
    "data.split": ((7, 2, 1), ("prepare",)),
    "data.shuffle_seed": (7, ("prepare",)),
    "data.strict": (False, ("prepare",)),
    "data.subsets": ("authors", ("retrieve", "reit", "baseline", *TEXT, "score")),
    "data.sample_users": (401, ("prepare",)),
    "data.sample_seed": (2025, ("prepare",)),
    "data.seed": (43, ("retrieve", "reit", "baseline", *TEXT, "score")),
    "embed.pool_bos": (False, ("embed",)),
    "embed.pooling": ("generated", ("embed",)),
    "embed.wrapped": (False, ("embed",)),
    "embed.batch_tokens": (1024, NEITHER),
    "embed.shard_items": (512, NEITHER),
    "retrieve.k_max": (90, ("retrieve",)),
    "retrieve.samples": ("all", ("retrieve",)),
    "retrieve.shard_pairs": (1000, NEITHER),
    "retrieve.cut": ("targets", NEITHER),
    "retrieve.gpu": (True, NEITHER),
    "prompt.template": ("sample", LM),
    "prompt.wrapper": ("plain", LM),
    "prompt.variant": ("authors", ("reit", *TEXT, "score")),
    "prompt.trailing_blank": (True, ("reit", "score")),
    "prompt.answer_eos": (True, ("reit",)),
    "prompt.genre": ("all", ("embed",)),
    "prompt.isbn": (False, ("embed",)),
    "prompt.title_chars": (100, (*LM, *TEXT)),
    "prompt.max_tokens": (900, ("reit", "score")),
    "tune.learning_rate": (1.5e-3, ("reit",)),
    "tune.batch_size": (256, ("reit",)),
    "tune.max_epochs": (10, ("reit",)),
    "tune.stop_after": (1, ("reit",)),
    "tune.patience": (2, ("reit",)),
    "tune.valid_per_epoch": (3, ("reit",)),
    "tune.weight_decay": (0.01, ("reit",)),
    "tune.clip": (0.5, ("reit",)),
    "tune.lora_rank": (16, ("reit",)),
    "tune.lora_alpha": (32, ("reit",)),
    "tune.lora_dropout": (0.0, ("reit",)),
    "tune.lora_targets": (("q_proj",), ("reit",)),
    "tune.valid_rows": (100, ("reit",)),
    "tune.select_on": ("test", ("reit", "baseline", *TEXTCTR)),
    "tune.micro_batch_rows": (4, NEITHER),
    "tune.micro_batch_tokens": (1024, NEITHER),
    "tune.bucketing": (False, NEITHER),
    "tune.packing": (True, NEITHER),
    "tune.checkpoint_seconds": (0.0, NEITHER),
    "tune.zero_stage": (1, NEITHER),
    "tune.gradient_checkpointing": (2, NEITHER),
    "tune.deepspeed": ("cluster/deepspeed/zero2.json", NEITHER),
    "baseline.model": ("din", (*BASELINE, *TEXTCTR)),
    "baseline.search": ("soft", BASELINE),
    "baseline.category": ("Movie title", BASELINE),
    "baseline.fill_up": (True, BASELINE),
    "baseline.soft_history": (64, BASELINE),
    "baseline.embedding_dim": (16, BASELINE),
    "baseline.dropout": (0.2, BASELINE),
    "baseline.dnn_size": (64, BASELINE),
    "baseline.dnn_layers": (2, BASELINE),
    "baseline.cross_layers": (2, BASELINE),
    "baseline.attention_layers": (2, BASELINE),
    "baseline.attention_size": (32, BASELINE),
    "baseline.attention_heads": (2, BASELINE),
    "baseline.gru_layers": (2, BASELINE),
    "baseline.gru_size": (32, BASELINE),
    "baseline.vertical_kernels": (2, BASELINE),
    "baseline.horizontal_kernels": (4, BASELINE),
    "baseline.learning_rate": (2e-3, BASELINE),
    "baseline.weight_decay": (0.01, BASELINE),
    "baseline.batch_size": (128, BASELINE),
    "baseline.max_epochs": (3, BASELINE),
    "baseline.valid_per_epoch": (2, BASELINE),
    "baseline.patience": (2, BASELINE),
    "baseline.valid_rows": (100, BASELINE),
    "baseline.init_std": (0.001, BASELINE),
    "baseline.precision": ("float32", BASELINE),
    "baseline.checkpoint_seconds": (0.0, NEITHER),
    "textctr.base": ("t5-base", NEITHER),
    "textctr.revision": ("main", NEITHER),
    "textctr.max_tokens": (256, TEXT),
    "textctr.max_item_tokens": (64, TEXTCTR),
    "textctr.tie": (True, TEXTCTR),
    "textctr.dropout": (0.0, TEXT),
    "textctr.learning_rate": (1e-4, TEXTCTR),
    "textctr.warmup": (0.1, TEXTCTR),
    "textctr.batch_size": (256, TEXTCTR),
    "textctr.max_epochs": (3, TEXTCTR),
    "textctr.weight_decay": (0.01, TEXT),
    "textctr.clip": (0.5, TEXT),
    "textctr.valid_per_epoch": (2, TEXTCTR),
    "textctr.valid_rows": (100, TEXTCTR),
    "textctr.patience": (2, TEXTCTR),
    "textctr.max_train_rows": (1000, TEXT),
    "textctr.mlm_probability": (0.2, MLM),
    "textctr.mlm_learning_rate": (1e-4, MLM),
    "textctr.mlm_warmup": (0.1, MLM),
    "textctr.mlm_batch_size": (256, MLM),
    "textctr.mlm_epochs": (3, MLM),
    "textctr.precision": ("bfloat16", TEXT),
    "textctr.micro_batch_tokens": (1024, NEITHER),
    "textctr.batch_tokens": (1024, NEITHER),
    "textctr.checkpoint_seconds": (0.0, NEITHER),
    "score.split": ("valid", ("score",)),
    "score.k": (15, ("score",)),
    "score.batch_tokens": (1024, NEITHER),
    "score.bucketing": (False, NEITHER),
    "score.shard_rows": (100, NEITHER),
    "cluster.workers": (4, NEITHER),
    "cluster.gpu": (False, NEITHER),
    "cluster.cpus_per_worker": (2, NEITHER),
    "cluster.base_workers": (2, ()),
    "cluster.min_workers": (1, ()),
    "cluster.max_failures": (0, NEITHER),
    "cluster.on_busy": ("leave", NEITHER),
    "tracking.to": ((), NEITHER),
    "tracking.folder": ("/elsewhere", NEITHER),
    "tracking.project": ("films", NEITHER),
}

# An experiment that feels every field: subsets everywhere, the synthetic data set, ReiT on retrieved behaviours. The
# template is another data set's, so that changing the data set changes the first stage and nothing else by itself.
WHOLE = Experiment(
    dataset="sample",
    data=DataConfig(split_by="user"),
    embed=EmbedConfig(wrapped=True),
    prompt=replace(Experiment().prompt, template="ml-1m"),
    retrieve=RetrieveConfig(samples="train:8192,valid:2000,test:200"),
    tune=TuneConfig(valid_rows=2000),
    score=ScoreConfig(k=30),
    test_rows=200,
)


def keys_of(p: Pipeline) -> dict[str, str]:
    return {stage.name: stage.key for stage in p.stages()}


def with_field(experiment: Experiment, name: str, value: Any) -> Experiment:
    head, _, rest = name.partition(".")
    if rest:
        return replace(experiment, **{head: with_field(getattr(experiment, head), rest, value)})
    return replace(experiment, **{head: value})


def changed(before: Mapping[str, str], after: Mapping[str, str]) -> set[str]:
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def downstream(*stages: str) -> set[str]:
    return set().union(*(DOWNSTREAM[s] for s in stages if s not in OTHERS))


def test_every_field_and_its_side_is_written_down_here() -> None:
    assert {name: set(stages) for name, _, stages in leaves(Experiment())} == {
        name: set(stages) for name, (_, stages) in FIELDS.items()
    }


def test_every_dataclass_field_is_a_leaf() -> None:
    """`leaves` is what keys are made of: it must miss nothing, at any depth."""

    def count(config: Any) -> int:
        values = [getattr(config, f.name) for f in dataclasses.fields(config)]
        return sum(count(v) if dataclasses.is_dataclass(v) else 1 for v in values)

    assert count(Experiment()) == len(FIELDS) == len(list(leaves(Experiment())))


@pytest.mark.parametrize("name", [n for n in FIELDS if n != "adapter"])
def test_a_field_changes_its_own_stages_and_what_follows_them(name: str) -> None:
    other, stages = FIELDS[name]
    before = {n: v for n, v, _ in leaves(WHOLE)}[name]
    assert before != other or name == "baseline.precision", "that one has one value so far"
    base = build(WHOLE, RAW, MODEL)
    assert set(keys_of(base)) == set(LM_STAGES), "the experiment must use every stage"
    after = build(with_field(WHOLE, name, other), RAW, MODEL)
    assert changed(keys_of(base), keys_of(after)) == downstream(*stages)


def test_the_adapter_decides_which_stages_there_are() -> None:
    whole, zero_shot = keys_of(build(WHOLE, RAW, MODEL)), keys_of(build(replace(WHOLE, adapter="none"), RAW, MODEL))
    assert changed(whole, zero_shot) == {"reit", "score"}
    assert "reit" not in zero_shot
    outside = replace(WHOLE, adapter="/adapters/one")
    one, two = (keys_of(build(outside, RAW, MODEL, digest * 64)) for digest in "cd")
    assert "reit" not in one
    assert changed(one, two) == {"score"}
    assert one["score"] != zero_shot["score"]


@pytest.mark.parametrize("field", ["data.sample_users", "data.sample_seed"])
def test_other_data_sets_do_not_feel_the_sample_s_fields(field: str) -> None:
    experiment = replace(WHOLE, dataset="ml-1m")
    other = with_field(experiment, field, FIELDS[field][0])
    assert keys_of(build(experiment, RAW, MODEL)) == keys_of(build(other, RAW, MODEL))


@pytest.mark.parametrize(
    ("samples", "rows", "own"),
    [
        ("all", "all", {"reit", "score"}),
        ("all", 200, {"reit", "score"}),
        ("train:8192,valid:2000,test", "all", {"retrieve", "reit", "score"}),
    ],
)
def test_the_data_seed_counts_where_a_subset_is_drawn(samples: str, rows: Any, own: set[str]) -> None:
    experiment = replace(WHOLE, retrieve=replace(WHOLE.retrieve, samples=samples), test_rows=rows)
    other = with_field(experiment, "data.seed", 43)
    assert changed(keys_of(build(experiment, RAW, MODEL)), keys_of(build(other, RAW, MODEL))) == own
    # Zero-shot on all rows with all neighbours draws nothing.
    zero = [keys_of(build(replace(e, adapter="none"), RAW, MODEL)) for e in (experiment, other)]
    assert (zero[0] == zero[1]) == (samples == "all" and rows == "all")


def test_the_model_s_digest_counts_and_its_name_and_place_do_not() -> None:
    whole = keys_of(build(WHOLE, RAW, MODEL))
    moved = replace(MODEL, name="renamed", source="/elsewhere", revision="abc")
    assert keys_of(build(WHOLE, RAW, moved)) == whole
    assert changed(whole, keys_of(build(WHOLE, RAW, replace(MODEL, digest="b" * 64)))) == downstream("embed")


def test_the_raw_files_digests_change_everything() -> None:
    whole = keys_of(build(WHOLE, RAW, MODEL))
    assert changed(whole, keys_of(build(WHOLE, {"ratings.dat": "2" * 64}, MODEL))) == set(LM_STAGES)


@pytest.mark.parametrize("stage", LM_STAGES)
def test_a_raised_version_changes_its_stage_and_what_follows(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = keys_of(build(WHOLE, RAW, MODEL))
    monkeypatch.setitem(pipeline.VERSIONS, stage, pipeline.VERSIONS[stage] + 1)
    assert changed(before, keys_of(build(WHOLE, RAW, MODEL))) == DOWNSTREAM[stage]


def test_two_learning_rates_share_everything_before_tuning() -> None:
    first, second = (
        build(replace(WHOLE, tune=replace(WHOLE.tune, learning_rate=rate)), RAW, MODEL) for rate in (1e-3, 1.5e-3)
    )
    shared = {s.key for s in first.stages()} & {s.key for s in second.stages()}
    assert {s.name for s in first.stages() if s.key in shared} == {"prepare", "embed", "pca", "retrieve"}


@pytest.mark.parametrize("variant", ["wo-it", "wo-it-retrieval"])
def test_zero_shot_does_not_depend_on_tuning(variant: str) -> None:
    experiment = VARIANTS[variant].apply(WHOLE)
    before = keys_of(build(experiment, RAW, MODEL))
    names = [n for n in FIELDS if n.startswith("tune.")] + ["shots", "mix", "seed", "seeds"]
    for name in names:
        after = keys_of(build(with_field(experiment, name, FIELDS[name][0]), RAW, MODEL))
        assert after == before, name


def test_without_retrieval_no_retrieval_setting_counts() -> None:
    experiment = VARIANTS["wo-retrieval"].apply(WHOLE)
    before = build(experiment, RAW, MODEL)
    assert [s.name for s in before.stages()] == ["prepare", "reit", "score"]
    for name in ("distance", "pca_dim", "embed.pool_bos", "retrieve.k_max", "retrieve.samples"):
        after = build(with_field(experiment, name, FIELDS[name][0]), RAW, MODEL)
        assert keys_of(after) == keys_of(before), name


def test_which_stages_need_neighbours() -> None:
    """(mix, history) → does training read retrieved behaviours, does scoring?"""
    for mix, history, reit, score in (
        ("mixed", "retrieved", True, True),
        ("mixed", "recent", True, False),
        ("retrieved", "recent", True, False),
        ("original", "retrieved", True, True),  # for the validation rows
        ("original", "recent", False, False),
    ):
        p = build(replace(WHOLE, mix=mix, history=history), RAW, MODEL)  # type: ignore[arg-type]
        assert p.reit is not None
        assert ("neighbours" in p.reit.inputs, "neighbours" in p.score.inputs) == (reit, score), (mix, history)
        assert (p.retrieve is not None) == reit


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ({"prompt.max_tokens": 2048 - 8}, {"prompt.max_tokens": "auto"}),
        ({"prompt.template": "sample"}, {"prompt.template": "auto"}),
        ({"pca_dim": 512}, {"pca_dim": "auto"}),
        ({"tune.valid_rows": 2000}, {"tune.valid_rows": "auto"}),
        ({"score.k": 30}, {"score.k": "auto"}),
        ({"tune.lora_targets": ("q_proj", "v_proj")}, {"tune.lora_targets": "auto"}),
    ],
)
def test_auto_and_the_value_it_stands_for_share_their_artifacts(given: dict[str, Any], value: dict[str, Any]) -> None:
    both = []
    for changes in (given, value):
        experiment = WHOLE
        for name, v in changes.items():
            experiment = with_field(experiment, name, v)
        both.append(keys_of(build(experiment, RAW, MODEL)))
    assert both[0] == both[1]


def test_resolve_auto() -> None:
    e = resolve_auto(replace(Experiment(), dataset="ml-1m", shots=256, k=15), replace(MODEL, hidden_size=128))
    assert (e.pca_dim, e.prompt.max_tokens, e.prompt.template) == (128, 2040, "ml-1m")
    assert (e.tune.valid_rows, e.score.k) == (256, 15)
    assert resolve_auto(replace(Experiment(), shots=65536), MODEL).tune.valid_rows == 2000
    assert resolve_auto(replace(Experiment(), shots="all"), MODEL).tune.valid_rows == 2000
    assert resolve_auto(Experiment(), replace(MODEL, hidden_size=5120)).pca_dim == 512
    kept = resolve_auto(WHOLE, MODEL)
    assert (kept.score.k, kept.tune.valid_rows, kept.prompt.template) == (30, 2000, "ml-1m")
    assert resolve_auto(kept, MODEL) == kept


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("pca_dim", 1025, "pca_dim 1025: toy has hidden size 1024"),
        ("pca_dim", 0, "pca_dim 0"),
        ("prompt.max_tokens", 2041, "toy reads at most 2040"),
    ],
)
def test_what_the_model_cannot_do_is_said(field: str, value: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_auto(with_field(Experiment(), field, value), MODEL)


def test_the_rows_of_table_3() -> None:
    rows = {name: (v.title, v.apply(WHOLE)) for name, v in VARIANTS.items()}
    assert {n: (title, e.mix, e.history, e.shots, e.adapter) for n, (title, e) in rows.items()} == {
        "ours": ("ReLLa (Ours)", "mixed", "retrieved", 8192, "auto"),
        "wo-mixture": ("ReLLa (w/o Mixture)", "retrieved", "retrieved", 8192, "auto"),
        "wo-retrieval": ("ReLLa (w/o Retrieval)", "original", "recent", 8192, "auto"),
        "half-n": ("ReLLa (½N-shot)", "mixed", "retrieved", 4096, "auto"),
        "wo-it": ("ReLLa (w/o IT)", "mixed", "retrieved", 8192, "none"),
        "wo-it-retrieval": ("ReLLa (w/o IT & Retrieval)", "mixed", "recent", 8192, "none"),
    }
    with pytest.raises(ValueError, match="half-n needs a number"):
        VARIANTS["half-n"].apply(replace(WHOLE, shots="all"))


def test_the_choice_of_variants() -> None:
    def names(variants: str, dataset: str = "ml-1m") -> list[str]:
        return [v.name for v in chosen_variants(replace(WHOLE, variants=variants, dataset=dataset))]

    assert names("auto", "sample") == names("all") == list(VARIANTS)
    assert names("auto") == ["ours"]
    assert names("wo-it, ours") == ["wo-it", "ours"]
    with pytest.raises(ValueError, match=r"unknown wo-itt; there are ours, wo-mixture"):
        names("ours,wo-itt")


def test_stages_come_after_their_inputs() -> None:
    for variant in VARIANTS.values():
        seen: set[str] = set()
        for stage in build(variant.apply(WHOLE), RAW, MODEL).stages():
            assert {s.key for s in stage.inputs.values()} <= seen
            seen.add(stage.key)


def test_where_artifacts_lie() -> None:
    p = build(WHOLE, RAW, MODEL)
    assert p.reit is not None
    assert p.reit.path == f"sample/reit/toy-n8192-k30-mixed-seed0-{p.reit.key[:12]}"
    assert p.score.path == f"sample/score/toy-n8192-mixed-seed0-k30-retrieved-test-200-{p.score.key[:12]}"
    zero = build(VARIANTS["wo-it-retrieval"].apply(WHOLE), RAW, MODEL).score
    assert zero.path == f"sample/score/toy-zero-shot-k30-recent-test-200-{zero.key[:12]}"
    storage = Storage("/somewhere")
    assert p.reit.artifact(storage).path == p.reit.path
    assert p.reit.artifact(storage).key == p.reit.key
    assert all(set(s.key) <= set("0123456789abcdef") and len(s.key) == 64 for s in p.stages())


def test_preparing_alone_gives_the_pipeline_s_first_stage() -> None:
    assert prepare_stage(Experiment(), RAW).key == build(Experiment(), RAW, MODEL).prepare.key


def test_the_canonical_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key's text is written out here: another form would lose every artifact there is."""
    monkeypatch.setitem(pipeline.VERSIONS, "prepare", 3)
    monkeypatch.setitem(pipeline.VERSIONS, "score", 1)
    first = Stage("prepare", "sample", "slug", {"split": (8, 1, 1), "above": 3.0}, identity={"raw": {"é": "1"}})
    config, identity = '{"above":3.0,"split":[8,1,1]}', '{"raw":{"é":"1"}}'
    text = f'{{"config":{config},"identity":{identity},"inputs":{{}},"stage":"prepare","version":3}}'
    assert first.key == hashlib.sha256(text.encode("utf-8")).hexdigest()
    second = Stage("score", "sample", "another", {}, {"data": first})
    text = f'{{"config":{{}},"identity":{{}},"inputs":{{"data":"{first.key}"}},"stage":"score","version":1}}'
    assert second.key == hashlib.sha256(text.encode()).hexdigest()


def test_what_a_stage_is_made_of() -> None:
    p = build(WHOLE, RAW, MODEL)
    assert p.reit is not None
    assert p.retrieve is not None
    inputs = {s.name: {name: other.name for name, other in s.inputs.items()} for s in p.stages()}
    assert inputs == {
        "prepare": {},
        "embed": {"data": "prepare"},
        "pca": {"pooled": "embed"},
        "retrieve": {"data": "prepare", "vectors": "pca"},
        "reit": {"data": "prepare", "neighbours": "retrieve"},
        "score": {"data": "prepare", "neighbours": "retrieve", "adapter": "reit"},
    }
    assert p.prepare.config == {
        "dataset": "sample",
        "data.positive_above": 3.0,
        "data.min_history": 5,
        "data.order": "time",
        "data.targets": "every",
        "data.split_by": "user",
        "data.split": (8, 1, 1),
        "data.shuffle_seed": 42,
        "data.strict": True,
        "data.sample_users": 400,
        "data.sample_seed": 2024,
    }
    assert p.score.identity == {"model": "a" * 64, "wording": digest(prompt_part(Wording()))}
    assert p.embed.identity == {"model": "a" * 64, "wording": digest(item_part(Wording()))}
    assert json.loads(json.dumps(p.pca.config)) == {"pca_dim": 512}


def test_golden_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinned: a new field, a changed default or another canonical form changes them, which must be meant."""
    for stage in STAGES:
        monkeypatch.setitem(pipeline.VERSIONS, stage, 1)
    assert keys_of(build(WHOLE, RAW, MODEL)) == GOLDEN


GOLDEN = {
    "prepare": "afeb395eade2de7e9610046456e250ee8db6d09a5c4f3364eda0eb9099e9ac12",
    "embed": "4807f8a9080e76d955d63bcdaf28167790044fc1ff3fbd4a636ca7dabe0f18c2",
    "pca": "7bdf98f10a11e6f9ed51709e7d5ef781ed83bb7bb9033f2e991e4c848b64f4b5",
    "retrieve": "708eba60428bcb965af76ec8eccee05a428602bce6c39248512c23d1e1f78c42",
    "reit": "006463a2e5aeb531a9ca5ae012a79c975df2463cedbe0ece65d443a36ddb3d47",
    "score": "b8c5780a3e36796b3c41393c1055f6f2a19f0515eeb0aa1937c8379803c0ec02",
}


def test_words_are_in_the_keys_of_those_that_read_them() -> None:
    before = keys_of(build(WHOLE, RAW, MODEL, wording=ML_1M))
    said = keys_of(build(WHOLE, RAW, MODEL, wording=replace(ML_1M, note="Other words.")))
    assert changed(before, said) == {"reit", "score"}
    item = keys_of(build(WHOLE, RAW, MODEL, wording=replace(ML_1M, item="{title}")))
    assert changed(before, item) == downstream("embed")


@pytest.mark.parametrize(
    ("field", "value", "feels"),
    [("data.shuffle_seed", 7, "data.split_by"), ("prompt.wrapper", "plain", "embed.wrapped")],
)
def test_what_is_not_used_is_in_no_key(field: str, value: Any, feels: str) -> None:
    plain = with_field(WHOLE, feels, {"data.split_by": "time", "embed.wrapped": False}[feels])
    first, second = (build(e, RAW, MODEL) for e in (plain, with_field(plain, field, value)))
    assert first.embed.key == second.embed.key


@pytest.mark.parametrize("field", ["k", "score.k"])
def test_a_k_of_0_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} 0: a prompt shows at least 1 behaviour"):
        build(with_field(WHOLE, field, 0), RAW, MODEL)


def test_an_architecture_that_is_not_known() -> None:
    with pytest.raises(ValueError, match=r"'mamba' are not known .* --tune\.lora-targets"):
        build(WHOLE, RAW, replace(MODEL, model_type="mamba"))
    named = with_field(WHOLE, "tune.lora_targets", ("in_proj",))
    assert build(named, RAW, replace(MODEL, model_type="mamba")).reit is not None


def test_settings_are_the_fields_that_change_no_result() -> None:
    assert set(pipeline.settings(WHOLE)) == {name for name, (_, stages) in FIELDS.items() if not stages}


def test_k_reaches_the_scores_unless_they_have_their_own() -> None:
    zero_shot = replace(WHOLE, adapter="none")
    follows = replace(zero_shot, score=ScoreConfig(k="auto"))
    other = {"k": 10}
    assert build(zero_shot, RAW, MODEL).score.key == build(replace(zero_shot, **other), RAW, MODEL).score.key
    assert build(follows, RAW, MODEL).score.key != build(replace(follows, **other), RAW, MODEL).score.key


@pytest.mark.parametrize("change", [{"k": 91}, {"score": ScoreConfig(k=91)}])
def test_a_k_above_what_is_retrieved_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"raise --retrieve\.k-max"):
        build(replace(WHOLE, **change), RAW, MODEL)
