"""In a process that trains: a round of steps when the parent says so, then a report (see benchmarks/runners.py).

Standard library only: the process may be another environment's.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

MARK = "@@ "
"""A line of a process's output that is meant for us."""
Batch = TypeVar("Batch")


class Finished(Exception):
    """No more rounds are wanted: leave the training loop."""


@dataclass
class Gate:
    """After a warm-up, and after every round, says how long it took and waits."""

    warm_up: int
    """Steps before the first round."""
    steps: int
    """Steps of a round."""
    losses: list[Any] = field(default_factory=list)
    """What the loop appends a step's loss to, a number or a scalar on any device."""
    _started: float = field(default_factory=time.perf_counter)

    def after(self, done: int) -> None:
        """Report and wait where `done` steps, and all that they wrote to a card, end a round.

        Raises:
            Finished: no more rounds are wanted.
        """
        if done < self.warm_up or (done - self.warm_up) % self.steps:
            return
        seconds, losses = time.perf_counter() - self._started, [float(x) for x in self.losses]
        self.losses.clear()
        tenth = losses[: max(1, len(losses) // 10)]
        report = {"seconds": seconds, "loss": sum(losses) / len(losses), "first_loss": sum(tenth) / len(tenth)}
        say(report)
        if sys.stdin.readline().strip() != "go":
            raise Finished
        self._started = time.perf_counter()

    def through(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches of a loop that asks for the next one when a step is over."""
        rest = iter(batches)
        for done in itertools.count():
            self.after(done)
            batch = next(rest, None)
            if batch is None:
                return
            yield batch


def say(what: Mapping[str, Any]) -> None:
    """Hand figures to the parent."""
    sys.stdout.write(f"\n{MARK}{json.dumps(what)}\n")
    sys.stdout.flush()
