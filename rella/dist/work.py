"""What each stage does for the jobs that lack it: inputs from the runner, outcomes in the order of the jobs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rella.artifacts import Artifact, Part
from rella.baseline_pipeline import BaselinePipeline
from rella.data.facts import dataset_facts
from rella.data.sources import table1_row
from rella.dist.checks import check_both_labels
from rella.dist.context import Context, Job, Outcome
from rella.stages import BASELINE, EMBED, MLM, PCA, PREPARE, REIT, RETRIEVE, SCORE, TEXTCTR
from rella.storage import resolve_uri

if TYPE_CHECKING:
    from rella.dist.fit_ctr import BaselineScoreTask, FitTask
    from rella.dist.score import ScoreTask
    from rella.dist.text_material import TextTask


def _prepare(runner: Context, jobs: Sequence[Job]) -> Iterable[Outcome]:
    from rella.data.samples import assemble

    for job in jobs:
        e = job.experiment
        raw = runner.source.load(e.data)
        tables = assemble(raw, e.data)
        tables.validate()
        facts = dataset_facts(raw, tables)
        check_both_labels(facts)
        runner.say(f"{PREPARE:<9} {table1_row(facts)}")
        held = (tables.users, tables.items, tables.interactions, tables.samples)
        runner.storage.check_space(sum(int(t.nbytes) for t in held), f"the {PREPARE} stage")
        columns = {"users": tables.users, "items": tables.items}
        columns |= {"interactions": tables.interactions, "samples": tables.samples}
        yield [job.artifact.write_part(t, 0, 1, name) for name, t in columns.items()], facts


def _embed(runner: Context, jobs: Sequence[Job]) -> Iterable[Outcome]:
    from rella.dist.embed import embed
    from rella.dist.session import resources

    for job in jobs:
        data = job.pipeline.prepare.artifact(runner.storage)
        items = data.manifest().facts["items"]
        e = job.pipeline.experiment
        wording = runner.source.wording(e)
        parts = embed(job.artifact, data, e, runner.model, wording, items, resources(e.cluster))
        yield parts, {"items": items, "hidden_size": runner.model.hidden_size}


def _pca(runner: Context, jobs: Sequence[Job]) -> Iterable[Outcome]:
    from rella.dist.embed import project

    for job in jobs:
        pooled = job.stage.inputs["pooled"].artifact(runner.storage)
        dim = job.pipeline.experiment.pca_dim
        yield project(job.artifact, pooled, None if dim == "none" else int(dim)), {}


def _retrieve(runner: Context, jobs: Sequence[Job]) -> Iterable[Outcome]:
    from rella.dist.retrieve import retrieve
    from rella.dist.session import resources

    for job in jobs:
        e, pipeline = job.pipeline.experiment, job.pipeline
        vectors = job.stage.inputs["vectors"].artifact(runner.storage)
        where = replace(e.cluster, gpu=e.retrieve.gpu)
        data = pipeline.prepare.artifact(runner.storage)
        yield retrieve(job.artifact, data, vectors, e, resources(where))


def _reit(runner: Context, jobs: Sequence[Job]) -> Iterable[Outcome]:
    from rella.dist.session import resources
    from rella.dist.tune_lm import TuneTask, tune

    tasks = []
    for job in jobs:
        e, retrieved = job.pipeline.experiment, "neighbours" in job.stage.inputs
        shared = runner.share(job.pipeline, retrieved)
        wording, title = runner.source.wording(e), job.stage.slug.removeprefix(f"{runner.model.name}-")
        tasks.append(TuneTask(job.artifact, e, shared, wording, title))
    return tune(tasks, runner.model, resources(runner.experiment.cluster), runner.say)


def _baseline(runner: Context, jobs: Sequence[Job]) -> Iterable[Outcome]:
    from rella.dist.fit_ctr import fit
    from rella.dist.session import resources

    return fit([_fit_task(runner, job, job.artifact) for job in jobs], resources(runner.experiment.cluster), runner.say)


def _fit_task(runner: Context, job: Job, artifact: Artifact) -> FitTask:
    from rella.dist.fit_ctr import FitTask, field_columns

    pipeline = job.pipeline
    columns = field_columns(pipeline.prepare.artifact(runner.storage))
    shared = runner.share(pipeline, "neighbours" in job.stage.inputs)
    return FitTask(artifact, pipeline.experiment, shared, columns, job.stage.slug)


def _mlm(runner: Context, jobs: Sequence[Job]) -> Iterable[Outcome]:
    return _fit_texts(runner, [replace(_text_task(runner, job, job.artifact), mlm=True) for job in jobs])


def _textctr(runner: Context, jobs: Sequence[Job]) -> Iterable[Outcome]:
    tasks = []
    for job in jobs:
        found = job.stage.inputs.get("encoder")
        encoder = None if found is None else found.artifact(runner.storage)
        tasks.append(replace(_text_task(runner, job, job.artifact), encoder=encoder))
    return _fit_texts(runner, tasks)


def _fit_texts(runner: Context, tasks: Sequence[TextTask]) -> Iterable[Outcome]:
    from rella.dist.fit_text import fit_texts
    from rella.dist.session import resources

    return fit_texts(tasks, resources(runner.experiment.cluster), runner.say)


def _text_task(runner: Context, job: Job, artifact: Artifact) -> TextTask:
    from rella.dist.fit_ctr import field_columns
    from rella.dist.text_material import TextTask

    pipeline = job.pipeline
    columns = field_columns(pipeline.prepare.artifact(runner.storage))
    e, shared = pipeline.experiment, runner.share(pipeline, False)
    wording = runner.source.wording(e)
    return TextTask(artifact, e, shared, columns, wording, runner.text_base, job.stage.slug)


def _score(runner: Context, jobs: Sequence[Job]) -> Iterable[Outcome]:
    by = {BASELINE: _score_baselines, TEXTCTR: _score_texts, REIT: _score_lm}
    made: dict[str, list[Part]] = {}
    for kind, work in by.items():
        mine = [job for job in jobs if _scored_by(job) == kind]
        made |= {job.stage.key: parts for job, parts in (work(runner, mine) if mine else ())}
    return [(made[job.stage.key], {"rows": sum(p.rows for p in made[job.stage.key])}) for job in jobs]


def _scored_by(job: Job) -> str:
    """The stage that makes the model that scores; of an LLM `reit`, with an adapter or without."""
    return job.stage.inputs["baseline"].name if isinstance(job.found_in, BaselinePipeline) else REIT


def _score_texts(runner: Context, jobs: Sequence[Job]) -> Iterable[tuple[Job, list[Part]]]:
    from rella.dist.score_text import TextScoreTask, score_texts
    from rella.dist.session import resources

    fitted = [job.stage.inputs["baseline"].artifact(runner.storage) for job in jobs]
    tasks = [TextScoreTask(job.artifact, _text_task(runner, job, a)) for job, a in zip(jobs, fitted, strict=True)]
    return zip(jobs, score_texts(tasks, resources(runner.experiment.cluster)), strict=True)


def _score_baselines(runner: Context, jobs: Sequence[Job]) -> Iterable[tuple[Job, list[Part]]]:
    from rella.dist.fit_ctr import score_baselines
    from rella.dist.session import resources

    tasks = [baseline_score_task(runner, job) for job in jobs]
    return zip(jobs, score_baselines(tasks, resources(runner.experiment.cluster)), strict=True)


def baseline_score_task(runner: Context, job: Job) -> BaselineScoreTask:
    """Return what a worker scores an ID-based baseline's samples with."""
    from rella.dist.fit_ctr import BaselineScoreTask

    fitted = job.stage.inputs["baseline"].artifact(runner.storage)
    return BaselineScoreTask(job.artifact, fitted, _fit_task(runner, job, fitted))


def _score_lm(runner: Context, jobs: Sequence[Job]) -> Iterable[tuple[Job, list[Part]]]:
    from rella.dist.score import score
    from rella.dist.session import resources

    tasks = [lm_score_task(runner, job) for job in jobs]
    return zip(jobs, score(tasks, runner.model, resources(runner.experiment.cluster)), strict=True)


def lm_score_task(runner: Context, job: Job) -> ScoreTask:
    """Return what a worker scores an LLM's samples with: data, adapter or none."""
    from rella.dist.score import ScoreTask

    e, tuned = job.pipeline.experiment, job.stage.inputs.get("adapter")
    adapter: Artifact | str | None = None
    if tuned is not None:
        adapter = tuned.artifact(runner.storage)
    elif e.adapter != "none":
        adapter = resolve_uri(e.adapter)
    shared = runner.share(job.pipeline, "neighbours" in job.stage.inputs)
    return ScoreTask(job.artifact, e, shared, runner.source.wording(e), adapter)


WORK: dict[str, Callable[[Context, Sequence[Job]], Iterable[Outcome]]] = {
    PREPARE: _prepare,
    EMBED: _embed,
    PCA: _pca,
    RETRIEVE: _retrieve,
    REIT: _reit,
    BASELINE: _baseline,
    MLM: _mlm,
    TEXTCTR: _textctr,
    SCORE: _score,
}
"""Stage → what makes it."""
