"""What a training tells the driver on its way."""

from __future__ import annotations

from typing import Any

import pytest

from rella.dist.telling import Telling
from rella.lm.checkpoints import Course
from rella.lm.tuning import Progress


class Handle:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.at: list[tuple[int, int, int]] = []
        self.records: list[tuple[int, dict[str, float]]] = []

    def report_at(self, source: int, rows: int, note: str, found: int) -> None:
        self.at.append((source, rows, found))

    def follow(self, number: int, records: list[tuple[int, dict[str, float]]]) -> None:
        self.records += records


def at(step: int, course: Course) -> Progress:
    course.losses += [0.7] * (step - len(course.losses))
    course.rows = 8 * step
    return Progress(course.rows, 800, 0.7, 1e-3, 1, step, 1.0, course)


@pytest.mark.parametrize(("resumed_at", "found"), [([], 0), ([10], 80), ([10, 30], 240)])
def test_what_an_earlier_run_has_done_is_told_apart(
    resumed_at: list[int], found: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    handle: Any = Handle()
    telling, course = Telling(handle, 3, "reit"), Course(resumed_at=resumed_at)
    telling(at(40, course))
    telling(at(60, course))
    assert handle.at == [(3, 320, found), (3, 480, found)]
    # Every step's loss goes to the trackers, those of before as well.
    assert [step for step, values in handle.records if "train/loss" in values] == list(range(1, 61))
