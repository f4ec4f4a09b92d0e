"""A baseline of Table 2 → stages → keys. Pure, as `rella.pipeline`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from rella.artifacts import Json, digest
from rella.baselines import FEW_SHOT_BATCH, FULL_SHOT_BATCH, as_text, idle_fields, idle_text_fields
from rella.config import Experiment, leaves
from rella.errors import InputError
from rella.models import ModelIdentity
from rella.pipeline import MAX_AUTO_VALID, Pipeline, Stage, build, prepare_stage
from rella.stages import BASELINE, MLM, SCORE, TEXTCTR, Precision
from rella.wording import Wording, prompt_part

Rows = int | Literal["all"]


@dataclass(frozen=True)
class BaselinePipeline:
    """The stages of one baseline."""

    experiment: Experiment
    prepare: Stage
    retrieval: Pipeline | None
    """Where SIM's semantic search takes its neighbours from; None for everything else."""
    baseline: Stage
    """The fitted model: stage `baseline`, of an LM-based one `textctr`."""
    score: Stage
    mlm: Stage | None = None
    """PTab's further pre-training."""

    @property
    def retrieve(self) -> Stage | None:
        """The stage of the neighbours."""
        return None if self.retrieval is None else self.retrieval.retrieve

    def stages(self) -> Iterator[Stage]:
        """Yield what this baseline needs, inputs before what uses them."""
        yield self.prepare
        if self.retrieval is not None and self.retrieval.retrieve is not None:
            yield from (self.retrieval.embed, self.retrieval.pca, self.retrieval.retrieve)
        if self.mlm is not None:
            yield self.mlm
        yield from (self.baseline, self.score)


def needs_neighbours(experiment: Experiment) -> bool:
    """Return whether the baseline reads what SUBR retrieved."""
    return experiment.baseline.model == "sim" and experiment.baseline.search == "semantic"


def resolve_rows(experiment: Experiment) -> Experiment:
    """Return the experiment with what depends on N resolved: `baseline.valid_rows` and `baseline.batch_size`."""
    own = experiment.baseline
    batch = own.batch_size
    if batch == "auto":
        batch = FULL_SHOT_BATCH if experiment.shots == "all" else FEW_SHOT_BATCH
    rows = _valid_rows(own.valid_rows, experiment.shots)
    return replace(experiment, baseline=replace(own, valid_rows=rows, batch_size=batch))


def _valid_rows(asked: Rows | Literal["auto"], trained: Rows) -> Rows:
    if asked != "auto":
        return asked
    return "all" if trained == "all" else min(trained, MAX_AUTO_VALID)


def trained_rows(experiment: Experiment) -> Rows:
    """Return how many rows an LM-based baseline is trained on, at most: the smaller of N and `max_train_rows`."""
    counts = [n for n in (experiment.shots, experiment.textctr.max_train_rows) if n != "all"]
    return min(counts, default="all")


def resolve_text(experiment: Experiment, precision: Precision) -> Experiment:
    """Return an LM-based baseline's experiment with every `auto` that enters a key replaced by its value.

    Args:
        experiment: with or without `auto` values.
        precision: what `auto` stands for on these cards.

    Raises:
        InputError: P5 in float16, or `max_train_rows` below 1.
    """
    config, trained = experiment.textctr, trained_rows(experiment)
    if trained != "all" and trained < 1:
        raise InputError(f"{trained} training rows: --shots and --textctr.max-train-rows take 1 or more, or `all`")
    chosen = precision if config.precision == "auto" else config.precision
    if experiment.baseline.model == "p5" and chosen == "float16":
        raise InputError(
            "T5's activations overflow in float16: leave --textctr.precision out, or give bfloat16 or float32"
        )
    bites = config.max_train_rows != "all" and trained == config.max_train_rows != experiment.shots
    resolved = replace(
        config,
        precision=chosen,
        valid_rows=_valid_rows(config.valid_rows, trained),
        max_train_rows=config.max_train_rows if bites else "all",
    )
    return replace(experiment, textctr=resolved)


def idle_settings(experiment: Experiment) -> set[str]:
    """Return the fields of `baseline` and `textctr` that the experiment's baseline does not feel, with their dots."""
    text = as_text(experiment.baseline.model)
    if text is None:
        found = {f"baseline.{name}" for name in idle_fields(experiment.baseline)}
        return found | {name for name, _, _ in leaves(experiment) if name.startswith("textctr.")}
    found = {name for name, _, _ in leaves(experiment) if name.startswith("baseline.")} - {"baseline.model"}
    return found | {f"textctr.{name}" for name in idle_text_fields(text)}


def refuse_idle(experiment: Experiment, given: set[str]) -> None:
    """Verify that every field that somebody has set by hand changes something.

    Args:
        experiment: with its baseline.
        given: dotted names of the fields that were set for this run alone.

    Raises:
        InputError: one of them belongs to another baseline; names the field that was meant, if there is one.
    """
    idle = sorted(given & idle_settings(experiment))
    if not idle:
        return
    own = {name for name, _, _ in leaves(experiment)} - idle_settings(experiment)
    section, _, name = idle[0].partition(".")
    meant = f"{'textctr' if section == 'baseline' else 'baseline'}.{name}"
    flags = [f"--{field.replace('_', '-')}" for field in (idle[0], meant)]
    remedy = f"did you mean {flags[1]}?" if meant in own else "leave it out"
    raise InputError(f"{flags[0]}: {experiment.baseline.model} does not feel it; {remedy}")


def build_baseline(
    experiment: Experiment,
    raw: Mapping[str, str],
    model: ModelIdentity | None = None,
    wording: Wording | None = None,
) -> BaselinePipeline:
    """Return the stages of `experiment`'s ID-based baseline.

    Args:
        experiment: with or without `auto` values.
        raw: digests of the data set's original files.
        model: the LLM whose item vectors the semantic search compares; needed for that alone.
        wording: the data set's sentences, which that LLM reads.

    Raises:
        InputError: semantic search without a model, or K above what is retrieved.
    """
    e, retrieval = resolve_rows(experiment), None
    if needs_neighbours(e):
        if model is None:
            raise InputError("SIM's semantic search needs an LLM's item vectors; name it with --lm")
        retrieval = build(replace(e, history="retrieved"), raw, model, wording=wording)
        # What makes the vectors is asked of the experiment, where `auto` would be no number.
        e = replace(e, pca_dim=retrieval.experiment.pca_dim)
    prepare = prepare_stage(e, raw)
    inputs = {"data": prepare}
    if retrieval is not None and retrieval.retrieve is not None:
        inputs["neighbours"] = retrieval.retrieve
    searched = f"-{e.baseline.search}" if e.baseline.model == "sim" else ""
    name = f"{e.baseline.model}{searched}-n{e.shots}-k{e.k}-seed{e.seed}"
    baseline = Stage(BASELINE, e.dataset, name, _fit_config(e), inputs)
    scored = {**inputs, "baseline": baseline}
    score = Stage(SCORE, e.dataset, f"{name}-{e.score.split}-{e.test_rows}", _score_config(e), scored)
    return BaselinePipeline(e, prepare, retrieval, baseline, score)


def build_text(
    experiment: Experiment, raw: Mapping[str, str], base: ModelIdentity, precision: Precision, wording: Wording
) -> BaselinePipeline:
    """Return the stages of `experiment`'s LM-based baseline.

    Args:
        experiment: with or without `auto` values.
        raw: digests of the data set's original files.
        base: the pretrained BERT or T5.
        precision: what `textctr.precision: auto` stands for on these cards.
        wording: the data set's sentences, which the model reads.

    Raises:
        InputError: as `resolve_text`; or a model of another kind than the baseline is built on.
    """
    e = resolve_text(experiment, precision)
    _check_base(e, base)
    prepare = prepare_stage(e, raw)
    identity = {"model": base.digest, "wording": digest(prompt_part(wording))}
    how = f"n{trained_rows(e)}-k{e.k}-seed{e.seed}"
    inputs, mlm = {"data": prepare}, None
    if e.baseline.model == "ptab":
        mlm = Stage(MLM, e.dataset, f"{base.name}-{how}", _text_config(MLM, e), inputs, identity)
        inputs = {**inputs, "encoder": mlm}
    name = f"{e.baseline.model}-{base.name}-{how}"
    baseline = Stage(TEXTCTR, e.dataset, name, _text_config(TEXTCTR, e), inputs, identity)
    scored = {"data": prepare, "baseline": baseline}
    score = Stage(SCORE, e.dataset, f"{name}-{e.score.split}-{e.test_rows}", _score_config(e), scored)
    return BaselinePipeline(e, prepare, None, baseline, score, mlm)


def _check_base(e: Experiment, base: ModelIdentity) -> None:
    """Refuse, before data are prepared, a model that could not be loaded as this baseline."""
    if e.baseline.model == "p5":
        if base.model_type != "t5":
            raise InputError(f"P5 is built on T5, but {base.name} is {base.model_type!r}: give --base t5-base")
    elif e.textctr.max_tokens > base.max_positions:
        raise InputError(
            f"textctr.max_tokens {e.textctr.max_tokens}: {base.name} reads {base.max_positions} tokens; "
            "lower --textctr.max-tokens"
        )


def _text_config(stage: str, e: Experiment) -> dict[str, Json]:
    idle = idle_settings(e)
    if trained_rows(e) == "all" and (stage == MLM or e.textctr.valid_rows == "all"):
        idle |= {"data.seed", "data.subsets"}
    return {n: v for n, v, stages in leaves(e) if stage in stages and n not in idle}


def _fit_config(e: Experiment) -> dict[str, Json]:
    idle = {f"baseline.{name}" for name in idle_fields(e.baseline)}
    if e.shots == "all" and e.baseline.valid_rows == "all":
        idle |= {"data.seed", "data.subsets"}
    return {n: v for n, v, stages in leaves(e) if BASELINE in stages and n not in idle}


def _score_config(e: Experiment) -> dict[str, Json]:
    felt = {"score.split", "test_rows"} | (set() if e.test_rows == "all" else {"data.seed", "data.subsets"})
    return {n: v for n, v, _ in leaves(e) if n in felt}
