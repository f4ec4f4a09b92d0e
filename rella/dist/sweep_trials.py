"""A sweep's trials on Ray Tune, each of which trains on Ray Train's workers.

What a trial makes is an artifact like any other: a sweep that is started again takes finished trials from there and
goes on with the others from their checkpoints, whatever became of Tune's own records.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray

from rella.artifacts import Artifact, Json
from rella.baseline_pipeline import BaselinePipeline
from rella.baselines import as_text
from rella.cli import Resolved
from rella.config import Experiment
from rella.dist.by_shots import ByShots
from rella.dist.context import AnyPipeline
from rella.dist.figures import output_folder
from rella.dist.remote_progress import RemoteProgress
from rella.dist.run import Runner
from rella.dist.session import explained, resources
from rella.errors import STOPPED, ClusterError, RellaError, WorkerError
from rella.pipeline import Stage
from rella.progress import Bar
from rella.sweep import Finished, Trial
from rella.sweep_config import Method, SweepConfig

POLL_SECONDS = 0.5
TRIALS = "trials.jsonl"
"""A line for every trial that has ended, whatever becomes of the sweep."""


@dataclass(frozen=True)
class Work:
    """What a trial's process needs."""

    experiments: Sequence[Experiment]
    """The trials', with places that do not depend on the process."""
    method: Method
    stops: Any
    """Handle of `_Stops`."""


@dataclass(frozen=True)
class Sweep:
    """One sweep's trials, and what is known of them."""

    runner: Runner
    config: SweepConfig
    resolved: Resolved
    trials: Sequence[Trial]
    pipelines: Sequence[AnyPipeline]

    @property
    def folder(self) -> Path:
        """Where its files go."""
        name = f"sweeps/{self.runner.experiment.dataset}-{self.config.method}"
        return output_folder(self.config.out, name, self.runner.storage)

    def artifact(self, number: int) -> Artifact:
        """Return what a trial makes."""
        return trained_stage(self.pipelines[number]).artifact(self.runner.storage)

    @property
    def keys(self) -> dict[str, int]:
        """What is trained, and the first trial that needs it."""
        found: dict[str, int] = {}
        for number, pipeline in enumerate(self.pipelines):
            found.setdefault(trained_stage(pipeline).key, number)
        return found

    def left(self) -> list[int]:
        """Return the trials that have to run: neither finished nor, with early stopping, stopped before."""
        gone = self.stopped() if self.config.early_stopping else {}
        return [n for key, n in self.keys.items() if key not in gone and not self.artifact(n).is_complete()]

    def ended(self, number: int, last: Mapping[str, Json], early: bool) -> None:
        """Keep a line about a trial that finished, or that early stopping ended; one that was broken off has none."""
        if not early and not self.artifact(number).is_complete():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        line = {
            "key": trained_stage(self.pipelines[number]).key,
            "trial": str(self.trials[number]),
            "stopped": early,
            **last,
        }
        with (self.folder / TRIALS).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def stopped(self) -> dict[str, dict[str, Json]]:
        """Return what the lines say of stopped trials, by key; half a line of a killed sweep is no line."""
        file, found = self.folder / TRIALS, {}
        for line in file.read_text().splitlines() if file.is_file() else ():
            with suppress(ValueError):
                said = json.loads(line)
                if said["stopped"]:
                    found[said["key"]] = said
        return found

    def finished(self, number: int) -> Finished:
        """Return a trial's best validation and times."""
        trial, artifact = self.trials[number], self.artifact(number)
        if not artifact.is_complete():
            said = self.stopped()[trained_stage(self.pipelines[number]).key]
            return Finished(trial, {"auc": said["valid_auc"], "step": said["step"]}, stopped=True)
        facts = artifact.manifest().facts
        best = next(v for v in facts["valid"] if v["step"] == facts["best_step"])
        return Finished(trial, best, facts["seconds_training"], artifact=artifact.where())


def pipeline_of(runner: Runner, config: SweepConfig, experiment: Experiment) -> AnyPipeline:
    """Return the stages of a trial."""
    return runner.pipeline(experiment) if config.method == "reit" else runner.baseline(experiment)


def trained_stage(pipeline: AnyPipeline) -> Stage:
    """Return the stage that a trial makes."""
    if isinstance(pipeline, BaselinePipeline):
        return pipeline.baseline
    if pipeline.reit is None:
        raise RuntimeError("a sweep of an experiment that tunes nothing")
    return pipeline.reit


# --- trials ---------------------------------------------------------------------------------------------------------


def run_trials(own: Sweep, numbers: Sequence[int], at_once: int) -> None:
    """Run trials, `at_once` at a time.

    Raises:
        ClusterError: a trial failed, or Tune was interrupted.
    """
    from ray import tune

    runner, config = own.runner, own.config
    os.environ |= {"RAY_CHDIR_TO_TRIAL_DIR": "0", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0"}
    stops = _Stops.remote()  # type: ignore[attr-defined]
    work = Work([_placed(runner, trial.experiment) for trial in own.trials], config.method, stops)
    # A share of a node's own resource in place of CPUs, which belong to the workers; it keeps trials on the driver's
    # node, where the data set's files and paths are.
    here = {f"node:{ray.util.get_node_ip_address()}": 0.0001}
    name, scheduler = f"sweep-{time.time_ns()}", None
    if config.early_stopping:
        most = max(_validations(e, config) for e in work.experiments)
        scheduler = ByShots([t.shots for t in own.trials], most, lambda number: ray.get(stops.ask.remote(number)))
    with Bar("sweep", len(numbers), "trials") as bar:
        results = tune.Tuner(
            tune.with_resources(tune.with_parameters(_trial, work=work), here),
            param_space={"number": tune.grid_search(list(numbers))},
            tune_config=tune.TuneConfig(
                metric="valid_auc",
                mode="max",
                max_concurrent_trials=min(at_once, len(numbers)),
                scheduler=scheduler,
            ),
            run_config=tune.RunConfig(
                name=name, storage_path=runner.storage.where(".ray"), verbose=0, callbacks=[_callback(own, bar, stops)]
            ),
        ).fit()
    runner.storage.delete(f".ray/{name}")
    faults = [str(r.error) for r in results if r.error is not None]
    if faults:
        said = sorted({fault.strip().splitlines()[-1].removeprefix("RuntimeError: ") for fault in faults})
        raise ClusterError(
            f"{len(faults)} of {len(numbers)} trials failed; the same command goes on with them: " + "; ".join(said[:3])
        )
    if undone := own.left():
        raise ClusterError(f"{len(undone)} trials are not finished; the same command goes on with them")


def _validations(experiment: Experiment, config: SweepConfig) -> int:
    """Return how many validations a trial makes at most."""
    if config.method == "reit":
        return experiment.tune.max_epochs * experiment.tune.valid_per_epoch
    one = experiment.textctr if as_text(config.method) is not None else experiment.baseline
    return one.max_epochs * one.valid_per_epoch


def _callback(own: Sweep, bar: Bar, stops: Any) -> Any:  # noqa: ANN401 - a Callback, whose module takes a second to load
    from ray.tune import Callback

    class Told(Callback):
        done = 0

        def __reduce__(self) -> tuple[Any, ...]:
            # Tune keeps a copy for a restart of its own, which nothing here uses.
            return Callback, ()

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:  # noqa: ANN401
            number, last = trial.config["number"], trial.last_result or {}
            kept = {key: last[key] for key in ("valid_auc", "step", "validations") if key in last}
            early = ray.get(stops.asked.remote(number)) and not own.artifact(number).is_complete()
            own.ended(number, kept, early)
            self.done += 1
            auc = f"valid AUC {kept['valid_auc']:.4f}" if "valid_auc" in kept else "no validation"
            bar.say(f"  {own.trials[number]}: {auc}{' (stopped early)' if early else ''}")
            bar.to(self.done)

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:  # noqa: ANN401
            bar.say(f"  {own.trials[trial.config['number']]}: failed")

    return Told()


def room_for_trials(runner: Runner, config: SweepConfig) -> int:
    """Return how many trials run at a time.

    Raises:
        ClusterError: not one fits; says what is missing.
    """
    runner.connect()
    cluster = runner.experiment.cluster
    group, have = resources(cluster), ray.cluster_resources()
    room = min(int(have.get(name, 0) // (need * group.workers)) for name, need in group.per_worker().items())
    if room < 1:
        raise ClusterError(f"a trial's {group.workers} workers do not fit the cluster; lower --cluster.workers")
    if config.at_once == "auto":
        return room
    if config.at_once > room:
        each = ", ".join(f"{need * group.workers:g} {name}" for name, need in group.per_worker().items())
        raise ClusterError(
            f"--sweep.at-once {config.at_once}: a trial takes {each}, so the cluster has room for {room}: lower it, or "
            "--cluster.workers"
        )
    return config.at_once


def _placed(runner: Runner, experiment: Experiment) -> Experiment:
    raw = experiment.raw_dir
    return replace(
        experiment,
        storage=runner.storage.uri,
        raw_dir=raw if raw is None or "://" in raw else str(Path(raw).expanduser().absolute()),
        restart="none",
    )


@ray.remote(num_cpus=0)
class _Stops:
    """Which trials early stopping wants to end."""

    def __init__(self) -> None:
        self.numbers: set[int] = set()

    def ask(self, number: int) -> None:
        self.numbers.add(number)

    def asked(self, number: int) -> bool:
        return number in self.numbers


@ray.remote(num_cpus=0, max_concurrency=2)
class _Driver:
    """What makes a trial's adapter or baseline, beside the process that Tune talks to.

    Tune gives that process a placement group, in which everything that it starts itself would have to fit.
    """

    def run(self, experiment: Experiment, method: Method) -> str:
        """Make it; return what went wrong, or nothing."""
        try:
            with Runner(experiment, say=lambda line: None) as runner:
                pipeline = pipeline_of(runner, SweepConfig(method=method), experiment)
                runner.run([pipeline], until=trained_stage(pipeline).name)
        except Exception as error:
            known = explained(error)
            if isinstance(known, WorkerError) and STOPPED in str(known):
                return ""
            return str(known) if isinstance(known, RellaError) else f"{type(known).__name__}: {known}"
        return ""

    def measures(self, known: int) -> list[dict[str, float]]:
        """Return the validations behind the first `known`."""
        return RemoteProgress.measures(known)

    def stop(self) -> None:
        """End the training at its next validation."""
        RemoteProgress.stop()


def _trial(config: dict[str, Any], work: Work) -> None:
    """A trial: one adapter or baseline, its validations told to Tune as they come."""
    from ray import tune
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    driver, number = _Driver.options(scheduling_strategy=here).remote(), config["number"]  # type: ignore[attr-defined]
    running, told, ended = driver.run.remote(work.experiments[number], work.method), 0, False
    while not ended:
        ended = bool(ray.wait([running], timeout=POLL_SECONDS)[0])
        for metrics in ray.get(driver.measures.remote(told)):
            told += 1
            tune.report({"valid_auc": metrics["auc"], "validations": told, **metrics})
        if not ended and ray.get(work.stops.asked.remote(number)):
            ray.get(driver.stop.remote())
    if fault := ray.get(running):
        raise RuntimeError(fault)
