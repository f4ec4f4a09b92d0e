"""Executes pipelines: finds what is there, makes what is missing, in the order of the stages.

Runs that differ in little share what they can: all missing adapters are trained by one worker group, all missing
scores are computed by one pool.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from rella.artifacts import Artifact, Json, Manifest, Part, now, summed
from rella.baseline_pipeline import BaselinePipeline, build_baseline, build_text, needs_neighbours
from rella.baselines import as_text
from rella.config import Experiment
from rella.dist.checks import check_counts, space_needed
from rella.dist.context import AnyPipeline, Context, Job
from rella.dist.work import WORK
from rella.leases import Lease, sweep
from rella.models import ModelIdentity, adapter_identity, check_adapter
from rella.pipeline import (
    Pipeline,
    as_json,
    build,
    prepare_stage,
    resolve_auto,
    resolved_autos,
    restarted_stages,
    settings,
)
from rella.provenance import code_version, machine
from rella.stages import EMBED, MLM, PCA, PREPARE, REIT, SCORE, STAGES, TEXTCTR, Precision
from rella.storage import Storage, resolve_uri
from rella.wording import check_wording

SWEEP_SECONDS = 600.0
"""Age at which a half-written file is nobody's any more."""


@dataclass
class Runner(Context):
    """Everything that the pipelines of one job share. Ray is not touched before a stage that needs it is missing."""

    _open: ExitStack = field(default_factory=ExitStack, init=False)
    _connected: bool = field(default=False, init=False)
    _restarted: set[str] = field(default_factory=set, init=False)
    _writable: bool = field(default=False, init=False)
    _precision: Precision | None = field(default=None, init=False)

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def beside(self, experiment: Experiment) -> Runner:
        """Return a runner of an experiment on other models and the same data, which need not be loaded again."""
        other = Runner(experiment, self.say)
        other._shared = self._shared
        return other

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

    def baseline(self, experiment: Experiment) -> BaselinePipeline:
        """Return the stages of an experiment's baseline; the LLM is looked at where its vectors are needed.

        Raises:
            InputError: settings that make no baseline.
        """
        if as_text(experiment.baseline.model) is not None:
            wording = self.source.wording(experiment)
            return build_text(experiment, self.raw, self.text_base, self._text_precision(experiment), wording)
        model = self.model if needs_neighbours(experiment) else None
        return build_baseline(experiment, self.raw, model, self.source.wording(experiment))

    def _text_precision(self, experiment: Experiment) -> Precision:
        """Return what `textctr.precision: auto` stands for; the cluster is asked where it matters."""
        asked = experiment.textctr.precision
        if asked != "auto":
            return asked
        from rella.dist.precision import best_precision

        if self._precision is None:
            self.connect()
            self._precision = best_precision(self.experiment.cluster)
            self.say(f"{'auto':<9} textctr.precision={self._precision}")
        return self._precision

    def run(self, pipelines: Sequence[AnyPipeline], until: str = SCORE) -> None:
        """Make every stage of the pipelines up to `until` that is not there; those that are there are taken.

        Raises:
            RellaError: a stage failed; the message says which and what to do.
        """
        if any(isinstance(p, Pipeline) for p in pipelines):
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

    def _check(self, pipelines: Sequence[AnyPipeline], until: str) -> None:
        """Refuse, before anything expensive, what could only fail later: too few samples, answers of two tokens."""
        for pipeline in pipelines:
            facts, e = pipeline.prepare.artifact(self.storage).manifest().facts, pipeline.experiment
            check_counts(pipeline, facts, until)
            self._check_wording(e, facts)
        tuned = [p for p in pipelines if isinstance(p, Pipeline)]
        asking = [s for p in tuned for s in (p.reit, p.score) if s is not None and until in (REIT, SCORE)]
        if any(not stage.artifact(self.storage).is_complete() for stage in asking):
            from rella.lm.loading import load_tokenizer
            from rella.lm.reading import Reader
            from rella.lm.zero_settings import read_settings

            e = tuned[0].experiment
            read_settings(e.tune, e.precision)
            Reader(load_tokenizer(self.model), self.model, e.prompt, self.source.wording(e)).answers()

    def _run_stage(self, name: str, jobs: Sequence[Job]) -> None:
        missing = []
        for job in jobs:
            self._restart(job)
            if job.artifact.is_complete():
                sweep(job.artifact)
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
            self.connect()
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
                outcomes = list(WORK[name](self, left))
                seconds = time.monotonic() - started
                for job, (parts, facts) in zip(left, outcomes, strict=True):
                    leases[job.stage.key].check()
                    self._finish(job, parts, facts, seconds)
                    self.say(f"{name:<9} made   {job.artifact.where()}")
                self.say(f"{name:<9} took   {seconds:.1f} s")

    def _begin(self, jobs: Sequence[Job]) -> None:
        """Look for room, sweep up after killed writers, and say what the folders are going to hold."""
        need, hidden = 0, self.model.hidden_size if jobs[0].stage.name in (EMBED, PCA) else 0
        for job in jobs:
            if job.stage.name != PREPARE:
                facts = job.pipeline.prepare.artifact(self.storage).manifest().facts
                need += space_needed(job.stage, job.pipeline.experiment, facts, hidden)
        self.storage.check_space(need, f"the {jobs[0].stage.name} stage")
        for job in jobs:
            self.storage.sweep(job.artifact.path, SWEEP_SECONDS)
            job.artifact.begin(job.stage.config)

    def _finish(self, job: Job, parts: Sequence[Part], facts: Mapping[str, Json], seconds: float) -> None:
        stage, model = job.stage, self._model_of(job)
        job.artifact.finish(
            Manifest(
                stage=stage.name,
                version=stage.version,
                key=stage.key,
                dataset=stage.dataset,
                config=stage.config,
                inputs={name: other.path for name, other in stage.inputs.items()},
                identity={**stage.identity, **({} if model is None else {"resolved_model": as_json(model)})},
                parts=list(parts),
                facts={**summed(parts), **facts},
                settings=settings(job.experiment),
                seconds=round(seconds, 3),
                created=now(),
                code=code_version(),
                machine=machine(),
            )
        )

    def _model_of(self, job: Job) -> ModelIdentity | None:
        """The pretrained model that a stage computes with."""
        if job.stage.name in (MLM, TEXTCTR):
            return self.text_base
        by_baseline = isinstance(job.found_in, BaselinePipeline) and job.stage.name == SCORE
        return self.model if job.stage.name in (EMBED, REIT, SCORE) and not by_baseline else None

    def connect(self) -> None:
        """Join the cluster, or start one, unless that was done; Ray's tasks can be used from then on."""
        import ray

        from rella.dist.session import check_shared, resources, session

        if not self._connected:
            # One that runs inside another's session has nothing to wait for.
            started, inside = time.monotonic(), ray.is_initialized()
            self._open.enter_context(session(self.experiment.cluster))
            check_shared(self.storage)
            # More workers than there are would otherwise show only when a stage asks for them.
            resources(self.experiment.cluster)
            self._connected = True
            if not inside:
                self.say(f"{'ray':<9} ready  {time.monotonic() - started:.1f} s")
