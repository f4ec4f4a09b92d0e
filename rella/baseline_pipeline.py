"""A baseline of Table 2 → stages → keys. Pure, as `rella.pipeline`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from rella.artifacts import Json
from rella.baselines import idle_fields
from rella.config import Experiment, leaves
from rella.errors import InputError
from rella.models import ModelIdentity
from rella.pipeline import MAX_AUTO_VALID, Pipeline, Stage, build, prepare_stage
from rella.stages import BASELINE, SCORE
from rella.wording import Wording


@dataclass(frozen=True)
class BaselinePipeline:
    """The stages of one baseline."""

    experiment: Experiment
    prepare: Stage
    retrieval: Pipeline | None
    """Where SIM's semantic search takes its neighbours from; None for everything else."""
    baseline: Stage
    score: Stage

    @property
    def retrieve(self) -> Stage | None:
        """The stage of the neighbours."""
        return None if self.retrieval is None else self.retrieval.retrieve

    def stages(self) -> Iterator[Stage]:
        """Yield what this baseline needs, inputs before what uses them."""
        yield self.prepare
        if self.retrieval is not None and self.retrieval.retrieve is not None:
            yield from (self.retrieval.embed, self.retrieval.pca, self.retrieval.retrieve)
        yield from (self.baseline, self.score)


def needs_neighbours(experiment: Experiment) -> bool:
    """Return whether the baseline reads what SUBR retrieved."""
    return experiment.baseline.model == "sim" and experiment.baseline.search == "semantic"


def resolve_rows(experiment: Experiment) -> Experiment:
    """Return the experiment with `baseline.valid_rows` resolved: all in full-shot, else min(N, 2000)."""
    rows = experiment.baseline.valid_rows
    if rows == "auto":
        rows = "all" if experiment.shots == "all" else min(experiment.shots, MAX_AUTO_VALID)
    return replace(experiment, baseline=replace(experiment.baseline, valid_rows=rows))


def build_baseline(
    experiment: Experiment,
    raw: Mapping[str, str],
    model: ModelIdentity | None = None,
    wording: Wording | None = None,
) -> BaselinePipeline:
    """Return the stages of `experiment`'s baseline.

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


def _fit_config(e: Experiment) -> dict[str, Json]:
    idle = {f"baseline.{name}" for name in idle_fields(e.baseline)}
    if e.shots == "all" and e.baseline.valid_rows == "all":
        idle |= {"data.seed", "data.subsets"}
    return {n: v for n, v, stages in leaves(e) if BASELINE in stages and n not in idle}


def _score_config(e: Experiment) -> dict[str, Json]:
    felt = {"score.split", "test_rows"} | (set() if e.test_rows == "all" else {"data.seed", "data.subsets"})
    return {n: v for n, v, _ in leaves(e) if n in felt}
