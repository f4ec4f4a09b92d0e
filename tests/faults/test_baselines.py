"""SIGKILL of a training worker or of the driver while a baseline is fitted: it goes on, with the same weights."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from rella.cli import resolve
from rella.textctr.small import save_bert, texts_of
from tests.faults.harness import (
    Done,
    Place,
    Running,
    assert_same_scores,
    assert_same_weights,
    steps_of,
)

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]

SEED = int(os.environ.get("RELLA_FAULT_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)
"""Decides the moments and the victims; printed, so that a failure can be had again."""

GRU4REC: dict[str, Any] = {
    "shots": 1000,
    "baseline.model": "gru4rec",
    "baseline.batch_size": 2,
    "baseline.max_epochs": 4,
    "baseline.patience": "null",
    "baseline.checkpoint_seconds": 0.0,
}
"""500 steps an epoch, with a state at every report of progress (20 steps) and after each validation.

All runs are so long that no worker ends in the seconds it takes to notice that the driver is gone: its result would be
taken as it is then, and nothing would have to go on.
"""
TEXT: dict[str, Any] = {
    "shots": 128,
    "textctr.max_tokens": 128,
    "textctr.batch_size": 8,
    "textctr.max_epochs": 15,
    "textctr.learning_rate": 1e-3,
    "textctr.checkpoint_seconds": 0.0,
}
"""16 steps an epoch, with a state at each."""
MLM: dict[str, Any] = {"textctr.mlm_batch_size": 8, "textctr.mlm_epochs": 15, "textctr.mlm_learning_rate": 1e-3}


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = texts_of(resolve({"data.sample_users": 100, "k": 4}).experiment, 100)
    return save_bert(tmp_path_factory.mktemp("models") / "small-bert", texts, 1000, spread=0.05)


@pytest.fixture(scope="session")
def settings(bert: Path) -> dict[str, dict[str, Any]]:
    """Baseline → its flags."""
    text = {**TEXT, "textctr.base": bert}
    return {
        "gru4rec": GRU4REC,
        "ctr-bert": {**text, "baseline.model": "ctr-bert"},
        "ptab": {**text, **MLM, "baseline.model": "ptab"},
    }


Whole = Callable[[str], Place]


@pytest.fixture(scope="session")
def whole(settings: dict[str, dict[str, Any]], model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Return the undisturbed run of a baseline, made once."""
    made: dict[str, Place] = {}

    def get(model: str) -> Place:
        if model not in made:
            place = Place(str(tmp_path_factory.mktemp(f"whole-{model}")), model_folder)
            done = place.start("baseline", **settings[model]).end(900)
            assert done.code == 0, done.out
            made[model] = place
        return made[model]

    return get


def trained(model: str) -> str:
    return "baseline" if model == "gru4rec" else "textctr"


def started(here: Place, stage: str, at: int, flags: dict[str, Any]) -> Running:
    """A job that has trained `at` steps of a stage, at least."""
    job = here.start("baseline", **flags)
    # Two groups of workers may have to start before.
    job.until(lambda: max(steps_of(here, stage), default=0) >= at, timeout=600)
    return job


def check_resumed(here: Place, whole: Place, stage: str, at: int, done: Done) -> None:
    """It went on from a state, did each step once, and ended where an undisturbed run ends."""
    assert done.code == 0, done.out
    facts, undisturbed = here.finished(stage).manifest().facts, whole.finished(stage).manifest().facts
    print(f"{stage}: killed at step {at} or later of {facts['steps']} (RELLA_FAULT_SEED={SEED}), {facts['resumed_at']}")
    assert len(facts["resumed_at"]) == 1
    assert at <= facts["resumed_at"][0] < facts["steps"]
    assert facts["losses"] == undisturbed["losses"]
    assert facts["best_step"] == undisturbed["best_step"]
    assert_same_weights(here, whole, stage)
    assert not steps_of(here, stage)


@pytest.mark.parametrize(("model", "most"), [("gru4rec", 900), ("ctr-bert", 40)])
def test_a_training_worker_is_killed_in_the_middle_of_an_epoch(
    model: str, most: int, settings: dict[str, dict[str, Any]], place: Callable[[str], Place], whole: Whole
) -> None:
    """The job goes on by itself."""
    here, undisturbed, stage = place(f"worker-{model}"), whole(model), trained(model)
    at = random.Random(SEED).randrange(3, most)
    job = started(here, stage, at, settings[model])
    workers = job.workers("TrainWorker") or job.workers("RayTrain")
    assert workers, [p.cmdline() for p in psutil.Process(job.process.pid).children(recursive=True)]
    random.Random(SEED).choice(workers).send_signal(signal.SIGKILL)
    check_resumed(here, undisturbed, stage, at, job.end(900))
    assert_same_scores(here, undisturbed)


@pytest.mark.parametrize(("model", "most"), [("gru4rec", 900), ("ctr-bert", 40)])
def test_the_driver_is_killed_and_the_same_command_finishes(
    model: str, most: int, settings: dict[str, dict[str, Any]], place: Callable[[str], Place], whole: Whole
) -> None:
    here, undisturbed, stage = place(f"driver-{model}"), whole(model), trained(model)
    at = random.Random(SEED + 1).randrange(3, most)
    started(here, stage, at, settings[model]).kill()
    data = here.finished("prepare").manifest()
    done = here.run("baseline", **settings[model])
    check_resumed(here, undisturbed, stage, at, done)
    assert done.lines("prepare", "found")
    assert here.finished("prepare").manifest() == data
    assert_same_scores(here, undisturbed)


def test_the_driver_is_killed_in_both_stages_of_ptab(
    settings: dict[str, dict[str, Any]], place: Callable[[str], Place], whole: Whole
) -> None:
    """Each goes on by itself, and the further pre-training is not done twice."""
    here, undisturbed, flags = place("ptab"), whole("ptab"), settings["ptab"]
    started(here, "mlm", 10, flags).kill()
    started(here, "textctr", 10, flags).kill()
    encoder = here.finished("mlm").manifest()
    done = here.start("baseline", **flags).end(900)
    assert done.lines("mlm", "found")
    assert here.finished("mlm").manifest() == encoder
    for stage in ("mlm", "textctr"):
        check_resumed(here, undisturbed, stage, 10, done)
    assert_same_scores(here, undisturbed)
