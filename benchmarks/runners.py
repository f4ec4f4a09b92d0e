"""Training processes in alternation, round by round: whatever else a machine is doing meets all of them alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.processes import ROOT
from benchmarks.rounds import MARK


@dataclass
class Runner:
    """One process that trains, by a `Gate`."""

    name: str
    command: Sequence[str]
    folder: Path
    """For what it says besides."""
    threads: int
    """Of torch's operators; loaders' processes and threads come on top."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What it said of itself before its first step, then of its warm-up."""
    seconds: list[float] = field(default_factory=list)
    """Of each round."""
    cpu: list[float] = field(default_factory=list)
    """CPU seconds of each, of all its processes and threads: what a busy machine does not stretch."""
    loss: float = float("nan")
    """Mean over the last round."""
    _process: subprocess.Popen[str] | None = field(default=None, init=False)

    def start(self) -> None:
        """Start it; it gets on with what comes before its first step, and its warm-up."""
        threads = {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        pipe, environment = subprocess.PIPE, os.environ | threads
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self.command, stdin=pipe, stdout=pipe, stderr=log, env=environment, text=True, cwd=ROOT
            )

    def ready(self) -> None:
        """Wait for its warm-up's end, if that has not come already."""
        if not self.facts:
            self.facts = self._hear()
            self.facts |= self._hear()

    def round(self) -> None:
        """Let it run one round."""
        before = self._used()
        self._tell("go")
        found = self._hear()
        self.seconds.append(found["seconds"])
        self.cpu.append(self._used() - before)
        self.loss = found["loss"]

    def stop(self) -> None:
        """Let it leave, where it was started; kill it where it does not."""
        if self._process is None:
            return
        try:
            self._tell("stop")
            self._process.wait(60)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()

    @property
    def _log(self) -> Path:
        return self.folder / f"{self.name}.log"

    def _used(self) -> float:
        assert self._process is not None
        tree = psutil.Process(self._process.pid)
        times = [one.cpu_times() for one in (tree, *tree.children(recursive=True))]
        return float(sum(t.user + t.system for t in times))

    def _tell(self, word: str) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()

    def _hear(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        said: list[str] = []
        for line in self._process.stdout:
            if line.startswith(MARK):
                found: dict[str, Any] = json.loads(line[len(MARK) :])
                return found
            said.append(line)
        self._process.wait()
        tail = "".join([*said[-10:], self._log.read_text(errors="replace")[-3000:]])
        sys.exit(f"{self.name} left with {self._process.returncode}:\n{tail}")


def alternate(runners: Sequence[Runner], rounds: int, rest: float = 0.3) -> None:
    """Run the rounds of all, in turn, another one first in each; after `rest` seconds, in which loaders fill up."""
    for n in range(rounds):
        at = n % len(runners)
        for runner in (*runners[at:], *runners[:at]):
            time.sleep(rest)
            runner.round()
