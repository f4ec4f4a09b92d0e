"""Jobs as processes that are killed on purpose, on a folder or an object store, and what they leave."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.fs as pafs

from rella.artifacts import Artifact, list_artifacts
from rella.storage import Storage

ROOT = Path(__file__).resolve().parents[2]

SETTING: dict[str, Any] = {
    "precision": "float32",
    "k": 4,
    "shots": 128,
    "test_rows": 300,
    "data.sample_users": 100,
    "embed.shard_items": 70,
    "retrieve.shard_pairs": 20_000,
    "score.shard_rows": 40,
    "tune.max_epochs": 2,
    "tune.batch_size": 8,
    "tune.micro_batch_rows": 2,
    "tune.learning_rate": 0.01,
    "tune.valid_rows": 40,
    "tune.checkpoint_seconds": 0.0,
    "tune.lora_dropout": 0.0,
}
"""Every stage makes several parts, and tuning takes 32 steps an epoch with a checkpoint at each."""
STAGES = ("prepare", "embed", "pca", "retrieve", "reit", "score")
_STARTED: list[subprocess.Popen[bytes]] = []


def end_all() -> None:
    """Kill what a failed test left: jobs, stopped ones too, and everything below them."""
    for process in _STARTED:
        if process.poll() is None:
            below = psutil.Process(process.pid).children(recursive=True)
            for one in [psutil.Process(process.pid), *below]:
                with suppress(psutil.Error):
                    one.kill()
            process.wait(timeout=10)
    _STARTED.clear()


@dataclass
class Place:
    """A storage that several runs of a job share."""

    uri: str
    model: Path
    environment: Mapping[str, str] = field(default_factory=dict)

    def storage(self) -> Storage:
        return Storage(self.uri)

    def start(self, name: str, *flags: str, under: tuple[str, ...] = (), **changes: Any) -> Running:
        """Start `python jobs/<name>.py` in a process of its own."""
        setting = {**SETTING, **changes}
        words = [f"--{field.replace('_', '-')}={value}" for field, value in setting.items()]
        # There `--model` is the baseline.
        llm = "--lm" if name == "baseline" else "--model"
        command = [*under, sys.executable, f"jobs/{name}.py", "--storage", self.uri, llm, str(self.model)]
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "RELLA_", "AWS_"))}
        handle, log = tempfile.mkstemp(prefix="rella-fault-", suffix=".log")
        process = subprocess.Popen(
            [*command, *words, *flags],
            cwd=ROOT,
            env={**clean, **self.environment},
            stdout=handle,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(handle)
        _STARTED.append(process)
        return Running(process, Path(log))

    def run(self, name: str, *flags: str, **changes: Any) -> Done:
        """Run a job to its end."""
        return self.start(name, *flags, **changes).end()

    def files(self) -> dict[str, datetime]:
        """Path → when it was written, of all files of artifacts but leases."""
        storage = self.storage()
        fs, root = pafs.FileSystem.from_uri(self.uri)
        paths = [p for p in storage.list("", recursive=True) if "/lease/" not in p and not p.startswith(".")]
        found = fs.get_file_info([f"{root.rstrip('/')}/{p}" for p in paths])
        return {p: info.mtime for p, info in zip(paths, found, strict=True) if info.type == pafs.FileType.File}

    def finished(self, stage: str, *parts: str) -> Artifact:
        """The one finished artifact of a stage."""
        found = [
            a for a in list_artifacts(self.storage()) if f"/{stage}/" in a.path and all(p in a.path for p in parts)
        ]
        assert len(found) == 1, [a.path for a in found]
        found[0].verify()
        return found[0]

    def path_of(self, stage: str, what: str) -> str:
        """The first file of a stage whose path holds `what`."""
        return next(p for p in self.storage().list("", recursive=True) if f"/{stage}/" in p and what in p)

    def has(self, stage: str, what: str = "") -> int:
        """How many files of a stage there are whose path holds `what`."""
        return sum(f"/{stage}/" in path and what in path for path in self.storage().list("", recursive=True))


@dataclass(frozen=True)
class Done:
    code: int
    out: str

    @property
    def figures(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.out.strip().splitlines()[-1])
        return found

    def lines(self, stage: str, word: str) -> list[str]:
        """Lines such as `embed     found  <path>`."""
        return [line for line in self.out.splitlines() if line.split()[:2] == [stage, word]]


@dataclass
class Running:
    process: subprocess.Popen[bytes]
    log: Path

    def said(self) -> str:
        """All that it has said so far."""
        return self.log.read_text(errors="replace")

    def end(self, timeout: float = 400) -> Done:
        """Wait for the end."""
        try:
            self.process.wait(timeout)
        finally:
            self.process.kill()
        out = self.said()
        self.log.unlink()
        return Done(self.process.returncode, out)

    def until(self, condition: Callable[[], Any], timeout: float = 200) -> None:
        """Wait for a condition while the job runs."""
        end = time.monotonic() + timeout
        while not condition():
            if self.process.poll() is not None:
                raise AssertionError(f"the job ended first:\n{self.said()}")
            assert time.monotonic() < end, "nothing happened"
            time.sleep(0.02)

    def kill(self) -> Done:
        """SIGKILL for the driver alone; whatever it had started has to notice."""
        below = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        # Ray's workers notice within two seconds, more on a busy machine; idle ones, and two of its agents, which only
        # watch, take up to a minute. One that was about to leave waits ten seconds for an agent to take its metrics.
        _, left = psutil.wait_procs(below, timeout=10)
        if at_work(left):
            _, left = psutil.wait_procs(left, timeout=10)
        busy = at_work(left)
        assert not busy, f"still at work: {busy}"
        for process in left:
            process.kill()
        return Done(-9, self.said())

    def pause(self) -> None:
        """Stop the driver alone, as a machine under pressure would; `signal.SIGCONT` lets it go on."""
        self.process.send_signal(signal.SIGSTOP)

    def workers(self, name: str) -> list[psutil.Process]:
        """Ray workers below the driver whose title holds `name`."""
        below = psutil.Process(self.process.pid).children(recursive=True)
        return [p for p in below if title_of(p).startswith("ray::") and name in title_of(p)]


def title_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def at_work(processes: list[psutil.Process]) -> list[str]:
    """The titles of Ray's workers among processes, without those that have nothing to do."""
    titles = [title_of(p).strip() for p in processes]
    return [t for t in titles if t.startswith("ray::") and "Agent" not in t and t != "ray::IDLE"]


def wait_random(most: float, seed: int) -> float:
    """Sleep a random while and return it."""
    seconds = random.Random(seed).uniform(0, most)
    time.sleep(seconds)
    return seconds


def adapter_of(place: Place) -> dict[str, Any]:
    """The one tuned adapter's tensors."""
    from safetensors.torch import load

    artifact = place.finished("reit")
    return load(artifact.storage.read(f"{artifact.path}/adapter/adapter_model.safetensors"))


def steps_of(place: Place, stage: str) -> list[int]:
    """Steps of a stage's checkpoints that are there, ascending."""
    names = [p for p in place.storage().list("", recursive=True) if f"/{stage}/" in p and "/checkpoints/step-" in p]
    return sorted(int(p.rpartition("/step-")[2][:8]) for p in names)


def weights_of(place: Place, stage: str) -> dict[str, Any]:
    """The weights of a stage's one finished artifact."""
    from safetensors.torch import load

    artifact = place.finished(stage)
    names = [p.name for p in artifact.manifest().parts if p.name.endswith(".safetensors")]
    assert len(names) == 1
    return load(artifact.storage.read(f"{artifact.path}/{names[0]}"))


def assert_same_weights(a: Place, b: Place, stage: str, most: float = 1e-6) -> None:
    first, second = weights_of(a, stage), weights_of(b, stage)
    assert first.keys() == second.keys()
    assert max(float((first[n] - second[n]).abs().max()) for n in first) <= most


def assert_same_adapter(a: Place, b: Place, most: float = 1e-6) -> None:
    first, second = adapter_of(a), adapter_of(b)
    assert first.keys() == second.keys()
    assert max(float((first[n] - second[n]).abs().max()) for n in first) <= most
    assert max(float(first[n].abs().max()) for n in first) > 1e-3


def assert_same_scores(a: Place, b: Place, most: float = 1e-6) -> None:
    """The same rows, each once, and the same probabilities."""
    first, second = (p.finished("score").read() for p in (a, b))
    for column in ("sample_id", "label"):
        assert first[column].to_pylist() == second[column].to_pylist()
    assert len(set(first["sample_id"].to_pylist())) == len(first) == SETTING["test_rows"]
    probabilities = [t["probability"].to_numpy() for t in (first, second)]
    np.testing.assert_allclose(*probabilities, rtol=0, atol=most)


def assert_same_tables(a: Place, b: Place) -> None:
    """Data, vectors and neighbours, whatever the parts were cut into."""
    for stage, table in (("prepare", "samples"), ("prepare", "interactions"), ("pca", ""), ("retrieve", "")):
        first, second = (p.finished(stage).read(table).replace_schema_metadata(None) for p in (a, b))
        assert first.equals(second), stage


def copied(source: Place, target: Place, *stages: str) -> Place:
    """Put finished artifacts of these stages where another run starts from."""
    for stage in stages:
        artifact = source.finished(stage)
        for path in source.storage().list(artifact.path, recursive=True):
            target.storage().write(path, source.storage().read(path))
    return target
