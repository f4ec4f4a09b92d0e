"""Runs a command and watches it: wall seconds, peak memory of its whole process tree, last line of its output."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
EVERY = 0.1
"""Seconds between two looks at the memory, at least."""
SHARE = 0.03
"""Of the time that looking may take: the kernel counts every page, and gigabytes of shared memory have many."""


@dataclass(frozen=True)
class Measured:
    """One process from start to end."""

    seconds: float
    pss: int
    """Peak sum over the tree, in bytes: memory that processes share counts once."""
    lines: list[str]

    @property
    def last(self) -> str:
        """The last line of its output."""
        return self.lines[-1].strip()


def measure(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Measured:
    """Run a command in the repository's folder; its failure ends the benchmark, with what it said."""
    started, peak = time.perf_counter(), 0
    pipe = subprocess.PIPE
    process = psutil.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(process.stdout), daemon=True)
    reader.start()
    while process.poll() is None:
        looked = time.perf_counter()
        peak = max(peak, _pss(process))
        _wait(process, max(EVERY, (time.perf_counter() - looked) / SHARE))
    seconds = time.perf_counter() - started
    reader.join(timeout=5)
    if process.returncode:
        sys.exit(f"{' '.join(command)} left with {process.returncode}:\n{''.join(lines[-30:])}")
    return Measured(seconds, peak, lines)


def _wait(process: psutil.Popen, seconds: float) -> None:
    with suppress(psutil.TimeoutExpired):
        process.wait(seconds)


def _pss(process: psutil.Process) -> int:
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += one.memory_full_info().pss
        except psutil.Error:
            continue
    return total
