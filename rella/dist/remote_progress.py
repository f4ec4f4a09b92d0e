"""Progress from wherever the work runs: rows, lines, validations and errors, gathered by one actor a session."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rella.errors import STOPPED, StoppedError
from rella.progress import Bar
from rella.tracking import Follower

POLL_SECONDS = 0.5

Record = tuple[int, dict[str, float]]
"""A step and what is known after it."""


@ray.remote(num_cpus=0)
class _Counter:
    """Adds up what workers report; the driver looks at it now and then. One serves a whole session."""

    def __init__(self) -> None:
        self.start(0)

    def start(self, topic: int) -> None:
        self.topic, self.done, self.free, self.note = topic, 0, 0, ""
        self.at: dict[int, int] = {}
        self.lines: list[str] = []
        self.measured: list[dict[str, float]] = []
        self.followed: list[tuple[int, int, dict[str, float]]] = []
        self.gone = 0
        self.stopped = False
        self.failed: dict[str, Any] | None = None

    def add(self, topic: int, rows: int, note: str, free: bool) -> None:
        # A straggler of the stage before must not move this one's bar.
        if topic == self.topic:
            self.done += rows
            self.free += rows * free
            self.note = note or self.note

    def set(self, topic: int, source: int, rows: int, note: str, found: int) -> None:
        if topic == self.topic:
            # What a group that starts again finds was done while this bar ran.
            self.free += found if source not in self.at else 0
            self.at[source] = rows
            self.note = note or self.note

    def end(self, topic: int, source: int, rows: int) -> None:
        if topic == self.topic:
            self.free += rows - self.at.get(source, 0)
            self.at[source] = rows

    def tell(self, topic: int, line: str) -> None:
        # Many workers learn the same.
        if topic == self.topic and line not in self.lines:
            self.lines.append(line)

    def measure(self, topic: int, metrics: dict[str, float]) -> bool:
        # A group that starts again validates some steps again.
        if topic == self.topic and all(metrics["step"] > m["step"] for m in self.measured[-1:]):
            self.measured.append(metrics)
        return self.stopped

    def follow(self, topic: int, number: int, records: list[Record]) -> None:
        if topic == self.topic:
            self.followed += [(number, *record) for record in records]

    def news(self, known: int) -> list[tuple[int, int, dict[str, float]]]:
        # What the driver has heard is not kept: a run over all of MovieLens-25M has hundreds of thousands of steps.
        del self.followed[: known - self.gone]
        self.gone = known
        return self.followed

    def stop(self) -> None:
        self.stopped = True

    def measures(self, known: int) -> list[dict[str, float]]:
        return self.measured[known:]

    def look(self) -> tuple[int, str, int]:
        return self.done + sum(self.at.values()), self.note, self.free

    def heard(self, known: int) -> list[str]:
        return self.lines[known:]

    def fail(self, topic: int, failed: dict[str, Any]) -> None:
        if topic == self.topic and self.failed is None:
            self.failed = failed

    def failure(self) -> dict[str, Any] | None:
        return self.failed


@dataclass(frozen=True)
class ProgressHandle:
    """What workers get: the counter, and which stage's bar they move."""

    counter: Any
    topic: int

    def report(self, rows: int, note: str = "") -> None:
        """Say that `rows` more are done; returns at once."""
        self.counter.add.remote(self.topic, rows, note, False)

    def kept(self, rows: int) -> None:
        """Say that `rows` are there from before: they move the bar, and are no part of the rate."""
        self.counter.add.remote(self.topic, rows, "", True)

    def report_at(self, source: int, rows: int, note: str = "", found: int = 0) -> None:
        """Say that `rows` of a source are done in all: fit for work that may start again; returns at once.

        Of these `found` were there from before, and are no part of the rate.
        """
        self.counter.set.remote(self.topic, source, rows, note, found)

    def end_at(self, source: int, rows: int) -> None:
        """Say that a source has come to its end, of `rows` in all: what it has not done is no part of the rate."""
        self.counter.end.remote(self.topic, source, rows)

    def say(self, line: str) -> None:
        """Have the driver print a line, once however many workers say it."""
        ray.get(self.counter.tell.remote(self.topic, line))

    def measure(self, step: int, metrics: Mapping[str, float]) -> None:
        """Tell what a validation after `step` said.

        Raises:
            StoppedError: the training is to end here.
        """
        if ray.get(self.counter.measure.remote(self.topic, {**metrics, "step": step})):
            raise StoppedError(STOPPED)

    def follow(self, number: int, records: Sequence[Record]) -> None:
        """Tell a run's (step, values) for the driver's trackers; returns at once."""
        self.counter.follow.remote(self.topic, number, list(records))

    def fail(self, failed: dict[str, Any]) -> None:
        """Keep the first error (from `failure`) that starting again would not mend."""
        ray.get(self.counter.fail.remote(self.topic, failed))

    def failure(self) -> dict[str, Any] | None:
        """Return that error, if there is one."""
        found: dict[str, Any] | None = ray.get(self.counter.failure.remote())
        return found


class RemoteProgress:
    """A bar on the driver that workers anywhere move through `.handle`."""

    _counter: Any = None
    _topics = 0

    def __init__(self, title: str, total: int, unit: str, follower: Follower | None = None) -> None:
        cls, self._follower = type(self), follower
        if cls._counter is None:
            # On the driver's own node: a counter that goes with another one would end work that could go on without it.
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
            cls._counter = _Counter.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
        cls._topics += 1
        self.handle = ProgressHandle(cls._counter, cls._topics)
        self._title, self._total, self._unit = title, total, unit
        self._printed = self._heard = 0
        self._stop = threading.Event()

    @classmethod
    def measures(cls, known: int) -> list[dict[str, float]]:
        """Return this process's stage's validations behind the first `known`; none before a stage began."""
        if cls._counter is None:
            return []
        found: list[dict[str, float]] = ray.get(cls._counter.measures.remote(known))
        return found

    @classmethod
    def stop(cls) -> None:
        """End this process's training at its next validation."""
        if cls._counter is not None:
            ray.get(cls._counter.stop.remote())

    @classmethod
    def forget(cls) -> None:
        """Drop the session's counter, which dies with the session."""
        cls._counter = None

    def __enter__(self) -> RemoteProgress:
        self.handle.counter.start.remote(self.handle.topic)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        # Long enough for a tracker on another machine.
        self._thread.join(timeout=10 if self._follower is None else 60)

    def _watch(self) -> None:
        with Bar(self._title, self._total, self._unit) as bar:
            while not self._stop.wait(POLL_SECONDS):
                self._look(bar)
            self._look(bar)
        if self._follower is not None:
            self._follower.close()

    def _look(self, bar: Bar) -> None:
        try:
            counter = self.handle.counter
            done, lines = ray.get([counter.look.remote(), counter.heard.remote(self._printed)], timeout=5)
            for line in lines:
                bar.say(line)
            self._printed += len(lines)
            bar.to(*done)
            if self._follower is not None:
                news = ray.get(counter.news.remote(self._heard), timeout=5)
                self._heard += len(news)
                self._track(bar, news)
        except ray.exceptions.RayError:
            # Progress is a courtesy: a lost counter must not end the work.
            time.sleep(POLL_SECONDS)

    def _track(self, bar: Bar, news: Sequence[tuple[int, int, dict[str, float]]]) -> None:
        try:
            for number, step, values in news:
                self._follower.take(number, step, values)  # type: ignore[union-attr]
        except Exception as error:
            # Whatever a tracker's library raises: curves are a courtesy too, and are in the artifacts all the same.
            bar.say(f"tracking  ended: {type(error).__name__}: {error}")
            self._follower = None
