"""Early stopping that compares trials of equal N only: with more shots every setting looks better."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler

from rella.sweep_config import Shots

GRACE, REDUCTION = 2, 2
"""The first comparison comes after two validations, the next after four, ...; the better half goes on."""


class ByShots(FIFOScheduler):
    """One ASHA for each N, which asks trials to end instead of having Tune end them.

    Tune would kill a trial's process, and the placement group of its training would stay where no dashboard runs.

    Args:
        shots: N of every trial, by its number.
        validations: that a trial makes at most.
        stop: is given the number of a trial that is to end.
    """

    def __init__(self, shots: Sequence[Shots], validations: int, stop: Callable[[int], None]) -> None:
        super().__init__()
        self._shots, self._stop = list(shots), stop
        # A trial ends by itself: stopped after its last validation it would not write what it made.
        self._each = {
            n: AsyncHyperBandScheduler(
                "validations", "valid_auc", "max", max(validations, GRACE), GRACE, REDUCTION, stop_last_trials=False
            )
            for n in self._shots
        }

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:  # noqa: ANN401
        """Accept Tune's metric, which every ASHA has already."""
        return (metric, mode) == ("valid_auc", "max")

    def _own(self, trial: Any) -> Any:  # noqa: ANN401 - Ray is untyped here
        return self._each[self._shots[trial.config["number"]]]

    def on_trial_add(self, controller: Any, trial: Any) -> None:  # noqa: ANN401
        """Hand the trial to its N's."""
        self._own(trial).on_trial_add(controller, trial)

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:  # noqa: ANN401
        """Ask the trial to end where its N's says so."""
        if self._own(trial).on_trial_result(controller, trial, result) == TrialScheduler.STOP:
            self._stop(trial.config["number"])
        continues: str = TrialScheduler.CONTINUE
        return continues

    def on_trial_complete(self, controller: Any, trial: Any, result: dict[str, Any]) -> None:  # noqa: ANN401
        """Tell its N's."""
        self._own(trial).on_trial_complete(controller, trial, result)

    def on_trial_error(self, controller: Any, trial: Any) -> None:  # noqa: ANN401
        """Forget it."""
        self._own(trial).on_trial_remove(controller, trial)

    def on_trial_remove(self, controller: Any, trial: Any) -> None:  # noqa: ANN401
        """Forget it."""
        self._own(trial).on_trial_remove(controller, trial)
