"""SIGKILL of a worker or of the driver, at any moment of any stage: nothing is lost, doubled or done again."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import numpy as np
import psutil
import pytest

from rella.artifacts import Artifact
from tests.faults.harness import (
    STAGES,
    Place,
    assert_same_adapter,
    assert_same_scores,
    assert_same_tables,
    copied,
    wait_random,
)

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1500)]

SEED = int(os.environ.get("RELLA_FAULT_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)
"""Decides the moments; printed, so that a failure can be had again."""
MOMENTS = {"prepare": 0.1, "embed": 9.0, "pca": 0.6, "retrieve": 3.0, "reit": 25.0, "score": 4.0}
"""Seconds after a stage began within which its driver is killed: about as long as it takes."""
UPSTREAM = ("prepare", "embed", "pca", "retrieve")


def whole_parts(place: Place) -> dict[str, datetime]:
    """The parts that are there and when they were written; a half-written file is none."""
    return {p: t for p, t in place.files().items() if "/parts/" in p and p.endswith(".parquet")}


def is_finished(place: Place, stage: str) -> bool:
    return place.has(stage, "manifest.json") > 0


def test_the_driver_is_killed_in_every_stage(place: Callable[[str], Place], untouched: Place) -> None:
    """One storage, six kills, one after the other; then the same command finishes."""
    here, seen, inside = place("driver"), dict[str, datetime](), []
    print(f"RELLA_FAULT_SEED={SEED}")
    for number, stage in enumerate(STAGES):
        job = here.start("reit", "--variants", "ours")
        job.until(lambda stage=stage: here.has(stage, "/lease/") or is_finished(here, stage))
        waited = wait_random(MOMENTS[stage], SEED + number)
        assert job.process.poll() is None, job.end().out
        job.kill()
        parts = whole_parts(here)
        inside += [] if is_finished(here, stage) else [stage]
        print(f"{stage}: killed {waited:.2f} s after it began, {len(parts)} parts are there, in it: {stage in inside}")
        redone = {p for p, when in seen.items() if parts.get(p) != when}
        assert not redone, f"written again or lost: {sorted(redone)}"
        seen |= parts
    assert len(inside) >= 3, "the moments were too late to tell anything"
    last = here.run("reit", "--variants", "ours")
    assert last.code == 0, last.out
    parts = whole_parts(here)
    assert {p: parts.get(p) for p in seen} == seen
    for stage in UPSTREAM:
        assert last.lines(stage, "found"), last.out
    assert_same_tables(here, untouched)
    assert_same_adapter(here, untouched)
    assert_same_scores(here, untouched)
    left = [p for p in here.storage().list("", recursive=True) if "checkpoints" in p or "/lease/" in p or "tmp" in p]
    assert left == []


@pytest.mark.parametrize("stage", ["embed", "retrieve", "score"])
def test_some_parts_were_there_and_are_kept(stage: str, place: Callable[[str], Place], untouched: Place) -> None:
    """Killed when several parts are done and several are not."""
    before = STAGES[: STAGES.index(stage)]
    here = copied(untouched, place(stage), *before)
    job = here.start("reit", "--variants", "ours")
    job.until(lambda: here.has(stage, "/parts/") >= 2)
    job.kill()
    done = {p: t for p, t in whole_parts(here).items() if f"/{stage}/" in p}
    all_parts = len(untouched.finished(stage).manifest().parts)
    print(f"{stage}: {len(done)} of {all_parts} parts were done")
    assert 2 <= len(done) < all_parts
    last = here.run("reit", "--variants", "ours")
    assert last.code == 0, last.out
    after = whole_parts(here)
    assert {p: after.get(p) for p in done} == done
    assert len(here.finished(stage).manifest().parts) == all_parts
    assert_same_tables(here, untouched)
    assert_same_scores(here, untouched)


@pytest.mark.parametrize("stage", ["embed", "score"])
def test_an_actor_dies_and_its_shard_is_done_by_another(
    stage: str, place: Callable[[str], Place], untouched: Place
) -> None:
    here = copied(untouched, place(f"actor-{stage}"), *STAGES[: STAGES.index(stage)])
    job = here.start("reit", "--variants", "ours")
    job.until(lambda: here.has(stage, "/parts/") >= 1)
    victims = job.workers("MapWorker")
    assert victims, [p.cmdline() for p in psutil.Process(job.process.pid).children(recursive=True)]
    victims[0].send_signal(signal.SIGKILL)
    done = job.end()
    assert done.code == 0, done.out
    assert_same_tables(here, untouched)
    assert_same_scores(here, untouched)


def checkpoints(place: Place) -> list[int]:
    """Steps of the states that are there."""
    names = [p for p in place.storage().list("", recursive=True) if "/checkpoints/" in p]
    return sorted(int(p.rpartition("/step-")[2][:8]) for p in names)


@pytest.fixture
def tuning(place: Callable[[str], Place], untouched: Place) -> Place:
    """Everything is there but the adapter and the scores."""
    return copied(untouched, place("tuning"), *UPSTREAM)


def resumed_at(artifact: Artifact) -> list[int]:
    found: list[int] = artifact.manifest().facts["resumed_at"]
    return found


def test_a_training_worker_is_killed_in_the_middle_of_an_epoch(tuning: Place, untouched: Place) -> None:
    """The job goes on by itself, with the same adapter in the end."""
    job = tuning.start("reit", "--variants", "ours")
    at = random.Random(SEED).randrange(3, 60)
    job.until(lambda: max(checkpoints(tuning), default=0) >= at)
    workers = job.workers("TrainWorker") or job.workers("RayTrain")
    assert workers, [p.cmdline() for p in psutil.Process(job.process.pid).children(recursive=True)]
    random.Random(SEED).choice(workers).send_signal(signal.SIGKILL)
    done = job.end()
    assert done.code == 0, done.out
    steps = resumed_at(tuning.finished("reit"))
    print(f"killed at step {at} or later of 64 (RELLA_FAULT_SEED={SEED}), went on at {steps}")
    assert len(steps) == 1
    assert steps[0] >= at
    assert_same_adapter(tuning, untouched)
    assert_same_scores(tuning, untouched)


@pytest.mark.parametrize(("first", "then", "stage"), [(2, 1, 3), (1, 2, 1)])
def test_the_driver_is_killed_and_another_number_of_workers_goes_on(
    first: int, then: int, stage: int, tuning: Place, untouched: Place
) -> None:
    """And under another ZeRO stage."""
    job = tuning.start("reit", "--variants", "ours", **{"cluster.workers": first})
    job.until(lambda: max(checkpoints(tuning), default=0) >= 20)
    job.kill()
    done = tuning.run("reit", "--variants", "ours", **{"cluster.workers": then, "tune.zero_stage": stage})
    assert done.code == 0, done.out
    artifact = tuning.finished("reit")
    assert resumed_at(artifact)[0] >= 20
    assert artifact.manifest().facts["workers"] == then
    whole = untouched.finished("reit").manifest().facts
    np.testing.assert_allclose(artifact.manifest().facts["losses"], whole["losses"], rtol=0, atol=1e-5)
    assert artifact.manifest().facts["best_step"] == whole["best_step"]
    assert_same_adapter(tuning, untouched, most=2e-3)


@pytest.fixture
def four(model_folder: Path, tmp_path: Path) -> Iterator[Place]:
    """A storage for jobs that join a cluster of four CPUs, which outlives their drivers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"RAY_ADDRESS": f"127.0.0.1:{port}", "RAY_AUTH_MODE": "disabled"}
    command = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--head",
        "--block",
        "--num-cpus=4",
        f"--port={port}",
    ]
    command += [f"--port={port}", "--node-ip-address=127.0.0.1", "--include-dashboard=false", "--disable-usage-stats"]
    log = (tmp_path / "ray.log").open("w")
    ray = subprocess.Popen(command, env={**os.environ, **environment}, stdout=log, stderr=log, start_new_session=True)
    try:
        end = time.monotonic() + 60
        while "Ray runtime started" not in (tmp_path / "ray.log").read_text():
            assert ray.poll() is None, (tmp_path / "ray.log").read_text()
            assert time.monotonic() < end
            time.sleep(0.2)
        yield Place(str(tmp_path / "storage"), model_folder, environment)
    finally:
        below = psutil.Process(ray.pid).children(recursive=True)
        ray.terminate()
        psutil.wait_procs([psutil.Process(ray.pid), *below], timeout=20)
        for process in (p for p in below if p.is_running()):
            process.kill()
        ray.kill()


def test_two_workers_become_four(four: Place, untouched: Place) -> None:
    """On a cluster that stays when the driver is killed, as users have it."""
    copied(untouched, four, *UPSTREAM)
    job = four.start("reit", "--variants", "ours", **{"cluster.workers": 2})
    job.until(lambda: max(checkpoints(four), default=0) >= 20)
    job.kill()
    done = four.run("reit", "--variants", "ours", **{"cluster.workers": 4})
    assert done.code == 0, done.out
    facts, whole = four.finished("reit").manifest().facts, untouched.finished("reit").manifest().facts
    assert facts["resumed_at"][0] >= 20
    assert (facts["workers"], whole["workers"]) == (4, 2)
    np.testing.assert_allclose(facts["losses"], whole["losses"], rtol=0, atol=1e-5)
    assert_same_adapter(four, untouched, most=2e-3)
