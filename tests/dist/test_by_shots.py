"""Early stopping compares trials of equal N only, and asks them to end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from rella.dist.by_shots import ByShots


@dataclass(frozen=True)
class FakeTrial:
    number: int

    @property
    def trial_id(self) -> str:
        return f"t{self.number}"

    @property
    def config(self) -> dict[str, Any]:
        return {"number": self.number}


def scheduler(shots: list[Any]) -> tuple[ByShots, list[FakeTrial], list[int]]:
    stopped: list[int] = []
    made = ByShots(shots, 16, stopped.append)
    assert made.set_search_properties("valid_auc", "max")
    assert not made.set_search_properties("loss", "min")
    trials = [FakeTrial(n) for n in range(len(shots))]
    for trial in trials:
        made.on_trial_add(None, trial)
    return made, trials, stopped


def tell(made: ByShots, trial: FakeTrial, validations: int, auc: float) -> None:
    said = made.on_trial_result(None, trial, {"validations": validations, "valid_auc": auc})
    assert said == "CONTINUE", "Tune itself must end no trial"


def test_the_worse_half_of_one_n_is_asked_to_end() -> None:
    made, trials, stopped = scheduler([64, 64, 64, 64])
    for trial, auc in zip(trials, (0.8, 0.7, 0.9, 0.6), strict=True):
        tell(made, trial, 1, auc)
    assert not stopped, "nothing is judged before two validations"
    for trial, auc in zip(trials, (0.8, 0.7, 0.9, 0.6), strict=True):
        tell(made, trial, 2, auc)
    assert 2 not in stopped
    assert {1, 3} <= set(stopped)


def test_more_shots_do_not_end_fewer() -> None:
    """Every trial of N = 512 is better than any of N = 8: with one ranking for all these would end."""
    made, trials, stopped = scheduler([512, 512, 8, 8, "all"])
    for trial, auc in zip(trials, (0.90, 0.91, 0.60, 0.61, 0.5), strict=True):
        tell(made, trial, 2, auc)
    assert 3 not in stopped
    assert 4 not in stopped
    assert 2 not in stopped, "the first of its N at a rung has nothing to be compared with"


@pytest.mark.parametrize("end", ["complete", "error", "remove"])
def test_a_trial_that_ended_is_forgotten(end: str) -> None:
    made, (first, second), stopped = scheduler([8, 8])
    tell(made, first, 2, 0.9)
    if end == "complete":
        made.on_trial_complete(None, first, {"validations": 16, "valid_auc": 0.9})
    else:
        getattr(made, f"on_trial_{end}")(None, first)
    tell(made, second, 2, 0.5)
    assert stopped == [1], "what it said before still counts"


def test_the_last_validation_ends_nobody() -> None:
    made, (trial,), stopped = scheduler([8])
    for n in range(1, 17):
        tell(made, trial, n, 0.5)
    assert not stopped
