"""Executes pipelines: finds what is there, makes what is missing, in the order of the stages.

Runs that differ in little share what they can: all missing adapters are trained by one worker group, all missing
scores are computed by one pool.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from rella.artifacts import Artifact, Json, Manifest, Part, now, summed
from rella.config import Experiment
from rella.data.facts import dataset_facts
from rella.data.samples import assemble
from rella.data.sources import Source, table1_row
from rella.dist.checks import check_both_labels, check_counts, space_needed
from rella.leases import Lease
from rella.models import ModelIdentity, adapter_identity, check_adapter, identify
from rella.pipeline import (
    Pipeline,
    Stage,
    as_json,
    build,
    prepare_stage,
    resolve_auto,
    resolved_autos,
    restarted_stages,
    settings,
)
from rella.provenance import code_version, machine
from rella.stages import EMBED, PCA, PREPARE, REIT, RETRIEVE, SCORE, STAGES
from rella.storage import Storage, resolve_uri
from rella.wording import check_wording

if TYPE_CHECKING:
    from rella.dist.dataset import Shared

Outcome = tuple[list[Part], Mapping[str, Json]]
"""A stage's parts and facts."""

SWEEP_SECONDS = 600.0
"""Age at which a half-written file is nobody's any more."""


@dataclass(frozen=True)
class Job:
    """A stage to make, and for whom."""

    stage: Stage
    artifact: Artifact
    experiment: Experiment
    found_in: Pipeline | None = None
    """None for the first stage, which needs no other."""

    @property
    def pipeline(self) -> Pipeline:
        """The pipeline whose artifacts are the stage's inputs."""
        if self.found_in is None:
            raise RuntimeError(f"stage {self.stage.name} has inputs and was asked for without them")
        return self.found_in


@dataclass
class Runner:
    """Everything that the pipelines of one job share. Ray is not touched before a stage that needs it is missing."""

    experiment: Experiment
    say: Callable[[str], None] = print
    storage: Storage = field(init=False)
    source: Source = field(init=False)
    raw: Mapping[str, str] = field(init=False)
    _open: ExitStack = field(default_factory=ExitStack, init=False)
    _connected: bool = field(default=False, init=False)
    _shared: dict[tuple[str, str | None], Shared] = field(default_factory=dict, init=False)
    _restarted: set[str] = field(default_factory=set, init=False)
    _writable: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.storage = Storage(resolve_uri(self.experiment.storage))
        self.source = Source.of(self.experiment)
        self.raw = self.source.identity()

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    @cached_property
    def model(self) -> ModelIdentity:
        """The base model, resolved when a stage first needs it."""
        return identify(self.experiment.model, self.experiment.revision)

    def prepare(self) -> Artifact:
        """Make the first stage where it is missing and return it; no model is looked at.

        Raises:
            InputError: the wording does not go with the data set's fields.
        """
        stage = prepare_stage(self.experiment, self.raw)
        job = Job(stage, stage.artifact(self.storage), self.experiment)
        self._run_stage(PREPARE, [job])
        self._check_wording(self.experiment, job.artifact.manifest().facts)
        return job.artifact

    def _check_wording(self, experiment: Experiment, facts: Mapping[str, Json]) -> None:
        where = experiment.dataset_file or f"data set {experiment.dataset}"
        check_wording(self.source.wording(experiment), facts["profile"], facts["item_fields"], where)

    def pipeline(self, experiment: Experiment) -> Pipeline:
        """Return the stages of an experiment on this runner's data and model.

        Raises:
            MissingError: `adapter` names a folder that is not a PEFT adapter.
            InputError: it was tuned on another base.
        """
        adapter = None
        if experiment.adapter not in ("auto", "none"):
            place = Storage(resolve_uri(experiment.adapter))
            folder = place.local_copy("")
            check_adapter(folder, self.model, place.shown())
            adapter = adapter_identity(folder)
        return build(experiment, self.raw, self.model, adapter, self.source.wording(experiment))

    def run(self, pipelines: Sequence[Pipeline], until: str = SCORE) -> None:
        """Make every stage of the pipelines up to `until` that is not there; those that are there are taken.

        Raises:
            RellaError: a stage failed; the message says which and what to do.
        """
        autos = resolved_autos(self.experiment, resolve_auto(self.experiment, self.model))
        self.say("auto      " + " ".join(f"{name}={value}" for name, value in autos.items()))
        wanted: dict[str, Job] = {}
        for pipeline in pipelines:
            for stage in pipeline.stages():
                wanted.setdefault(stage.key, Job(stage, stage.artifact(self.storage), pipeline.experiment, pipeline))
        for name in STAGES[: STAGES.index(until) + 1]:
            self._run_stage(name, [job for job in wanted.values() if job.stage.name == name])
            if name == PREPARE:
                self._check(pipelines, until)

    def _check(self, pipelines: Sequence[Pipeline], until: str) -> None:
        """Refuse, before anything expensive, what could only fail later: too few samples, answers of two tokens."""
        for pipeline in pipelines:
            facts, e = pipeline.prepare.artifact(self.storage).manifest().facts, pipeline.experiment
            check_counts(pipeline, facts, until)
            self._check_wording(e, facts)
        asking = [s for p in pipelines for s in (p.reit, p.score) if s is not None and until in (REIT, SCORE)]
        if any(not stage.artifact(self.storage).is_complete() for stage in asking):
            from rella.lm.loading import load_tokenizer
            from rella.lm.reading import Reader

            e = pipelines[0].experiment
            Reader(load_tokenizer(self.model), self.model, e.prompt, self.source.wording(e)).answers()

    def _run_stage(self, name: str, jobs: Sequence[Job]) -> None:
        missing = []
        for job in jobs:
            self._restart(job)
            if job.artifact.is_complete():
                self.say(f"{name:<9} found  {job.artifact.where()}")
            else:
                missing.append(job)
        if missing:
            self._make(name, missing)

    def _restart(self, job: Job) -> None:
        """Delete what `restart` names, once a job, and never while another driver works on it."""
        wanted = restarted_stages(self.experiment)
        whole = job.stage.name in wanted or "all" in wanted
        if job.stage.key in self._restarted or not (whole or "unfinished" in wanted):
            return
        self._restarted.add(job.stage.key)
        if self.storage.exists(job.artifact.path) and (whole or not job.artifact.is_vouched_for()):
            # Not ended by a finished artifact, as this one may well be.
            with Lease(job.artifact, self._waits, self.say):
                job.artifact.clear()
            self.say(f"{job.stage.name:<9} gone   {job.artifact.where()} (--restart)")

    def _lease(self, job: Job) -> Lease:
        return Lease(job.artifact, self._waits, self.say, job.artifact.is_complete)

    @property
    def _waits(self) -> bool:
        return self.experiment.cluster.on_busy == "wait"

    def _make(self, name: str, jobs: Sequence[Job]) -> None:
        """Make one stage of several pipelines under their leases."""
        if not self._writable:
            self.storage.check_writable()
            self._writable = True
        if name != PREPARE:
            self._connect()
        with ExitStack() as stack:
            # In one order for all drivers: two that want the same artifacts must not wait for each other.
            ordered = sorted(jobs, key=lambda job: job.stage.key)
            leases = {job.stage.key: stack.enter_context(self._lease(job)) for job in ordered}
            # Another driver may have finished some of them while this one waited.
            left = [job for job in jobs if not job.artifact.is_complete()]
            for job in jobs:
                if job not in left:
                    self.say(f"{name:<9} found  {job.artifact.where()}")
            if left:
                self._begin(left)
                started = time.monotonic()
                outcomes = list(_STAGES[name](self, left))
                seconds = time.monotonic() - started
                for job, (parts, facts) in zip(left, outcomes, strict=True):
                    leases[job.stage.key].check()
                    self._finish(job, parts, facts, seconds)
                    self.say(f"{name:<9} made   {job.artifact.where()}")
                self.say(f"{name:<9} took   {seconds:.1f} s")

    def _begin(self, jobs: Sequence[Job]) -> None:
        """Look for room, sweep up after killed writers, and say what the folders are going to hold."""
        need = 0
        for job in jobs:
            if job.stage.name != PREPARE:
                facts = job.pipeline.prepare.artifact(self.storage).manifest().facts
                need += space_needed(job.stage, job.pipeline, facts, self.model.hidden_size)
        self.storage.check_space(need, f"the {jobs[0].stage.name} stage")
        for job in jobs:
            self.storage.sweep(job.artifact.path, SWEEP_SECONDS)
            job.artifact.begin(job.stage.config)

    def _finish(self, job: Job, parts: Sequence[Part], facts: Mapping[str, Json], seconds: float) -> None:
        stage = job.stage
        uses_model = stage.name in (EMBED, REIT, SCORE)
        job.artifact.finish(
            Manifest(
                stage=stage.name,
                version=stage.version,
                key=stage.key,
                dataset=stage.dataset,
                config=stage.config,
                inputs={name: other.path for name, other in stage.inputs.items()},
                identity={**stage.identity, **({"resolved_model": as_json(self.model)} if uses_model else {})},
                parts=list(parts),
                facts={**summed(parts), **facts},
                settings=settings(job.experiment),
                seconds=round(seconds, 3),
                created=now(),
                code=code_version(),
                machine=machine(),
            )
        )

    def _connect(self) -> None:
        from rella.dist.session import check_shared, resources, session

        if not self._connected:
            started = time.monotonic()
            self._open.enter_context(session(self.experiment.cluster))
            check_shared(self.storage)
            # More workers than there are would otherwise show only when a stage asks for them.
            resources(self.experiment.cluster)
            self._connected = True
            self.say(f"{'ray':<9} ready  {time.monotonic() - started:.1f} s")

    def share(self, pipeline: Pipeline, retrieved: bool) -> Shared:
        """Return references to the pipeline's data (and neighbours) in the object store, loaded once a session."""
        from rella.dist.dataset import Shared

        found = pipeline.retrieve if retrieved else None
        name = (pipeline.prepare.key, None if found is None else found.key)
        if name not in self._shared:
            neighbours = None if found is None else found.artifact(self.storage)
            self._shared[name] = Shared.load(pipeline.prepare.artifact(self.storage), neighbours)
        return self._shared[name]


def _prepare(runner: Runner, jobs: Sequence[Job]) -> Iterable[Outcome]:
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


def _embed(runner: Runner, jobs: Sequence[Job]) -> Iterable[Outcome]:
    from rella.dist.embed import embed
    from rella.dist.session import resources

    for job in jobs:
        data = job.pipeline.prepare.artifact(runner.storage)
        items = data.manifest().facts["items"]
        e = job.pipeline.experiment
        wording = runner.source.wording(e)
        parts = embed(job.artifact, data, e, runner.model, wording, items, resources(e.cluster))
        yield parts, {"items": items, "hidden_size": runner.model.hidden_size}


def _pca(runner: Runner, jobs: Sequence[Job]) -> Iterable[Outcome]:
    from rella.dist.embed import project

    for job in jobs:
        pooled = job.pipeline.embed.artifact(runner.storage)
        dim = job.pipeline.experiment.pca_dim
        yield project(job.artifact, pooled, None if dim == "none" else int(dim)), {}


def _retrieve(runner: Runner, jobs: Sequence[Job]) -> Iterable[Outcome]:
    from rella.dist.retrieve import retrieve
    from rella.dist.session import resources

    for job in jobs:
        e, pipeline = job.pipeline.experiment, job.pipeline
        vectors = pipeline.pca.artifact(runner.storage)
        on_cpus = replace(e.cluster, gpu=False)
        yield retrieve(job.artifact, runner.share(pipeline, False), vectors, e, resources(on_cpus))


def _reit(runner: Runner, jobs: Sequence[Job]) -> Iterable[Outcome]:
    from rella.dist.session import resources
    from rella.dist.tune_lm import TuneTask, tune

    tasks = []
    for job in jobs:
        e, retrieved = job.pipeline.experiment, "neighbours" in job.stage.inputs
        shared = runner.share(job.pipeline, retrieved)
        wording, title = runner.source.wording(e), job.stage.slug.partition("-")[2]
        tasks.append(TuneTask(job.artifact, e, shared, wording, title))
    return tune(tasks, runner.model, resources(runner.experiment.cluster), runner.say)


def _score(runner: Runner, jobs: Sequence[Job]) -> Iterable[Outcome]:
    from rella.dist.score import ScoreTask, score
    from rella.dist.session import resources

    tasks = []
    for job in jobs:
        pipeline, e = job.pipeline, job.pipeline.experiment
        adapter: Artifact | str | None = None
        if pipeline.reit is not None:
            adapter = pipeline.reit.artifact(runner.storage)
        elif e.adapter != "none":
            adapter = resolve_uri(e.adapter)
        shared = runner.share(pipeline, "neighbours" in job.stage.inputs)
        tasks.append(ScoreTask(job.artifact, e, shared, runner.source.wording(e), adapter))
    made = score(tasks, runner.model, resources(runner.experiment.cluster))
    return [(parts, {"rows": sum(p.rows for p in parts)}) for parts in made]


_STAGES: dict[str, Callable[[Runner, Sequence[Job]], Iterable[Outcome]]] = {
    PREPARE: _prepare,
    EMBED: _embed,
    PCA: _pca,
    RETRIEVE: _retrieve,
    REIT: _reit,
    SCORE: _score,
}
