"""Runs what the tables and figures need: every missing run once, those of one model together, in one Ray session."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from rella.baselines import as_text
from rella.data.tables import column
from rella.dist.context import AnyPipeline, Job
from rella.dist.figures import estimates, users_of
from rella.dist.run import Runner
from rella.errors import InputError
from rella.metrics import PairedTest, compare_auc_by_users, delong, mcnemar, paired_t
from rella.paper.experiments import Line, Run
from rella.report.blocks import Comparison, Measured

Scores = tuple[npt.NDArray[np.int64], npt.NDArray[np.int8], npt.NDArray[np.float64]]
"""sample_id, label and probability, (S,) each, by ascending sample_id."""


class Measurements:
    """The pipelines of many runs, and what their scores say."""

    def __init__(self, runner: Runner) -> None:
        """Take the job's own runner, on whose model and data most runs are."""
        self.runner = runner
        self._runners: dict[tuple[str, str], Runner] = {self._place(Run(runner.experiment)): runner}
        self._pipelines: dict[Run, AnyPipeline] = {}
        self._measured: dict[Run, Measured] = {}
        self._scores: dict[Run, Scores] = {}

    def _place(self, run: Run) -> tuple[str, str]:
        """Return which pretrained models a run computes with."""
        e = run.experiment
        text = run.baseline and as_text(e.baseline.model) is not None
        return (self.runner.experiment.model if run.baseline else e.model, e.textctr.base if text else "")

    def runner_of(self, run: Run) -> Runner:
        """Return the runner on the run's models."""
        place = self._place(run)
        if place not in self._runners:
            self._runners[place] = self.runner.beside(replace(run.experiment, restart=self.runner.experiment.restart))
        return self._runners[place]

    def pipeline(self, run: Run) -> AnyPipeline:
        """Return the stages of a run of one seed."""
        if run not in self._pipelines:
            runner = self.runner_of(run)
            make = runner.baseline if run.baseline else runner.pipeline
            self._pipelines[run] = make(run.experiment)
        return self._pipelines[run]

    def job(self, run: Run) -> Job:
        """Return the scoring of a run's first seed, for a worker that does something else with its model."""
        pipeline = self.pipeline(run.by_seed()[0])
        return Job(pipeline.score, pipeline.score.artifact(self.runner.storage), pipeline.experiment, pipeline)

    def run(self, runs: Iterable[Run]) -> None:
        """Make what is missing; all adapters of a model are tuned by one group, all its scores by one pool.

        Raises:
            RellaError: a stage failed; the message says which and what to do.
        """
        wanted = dict.fromkeys(one for run in runs for one in run.by_seed())
        places: dict[tuple[str, str], list[Run]] = {}
        for one in wanted:
            places.setdefault(self._place(one), []).append(one)
        left = [one for one in wanted if not self.pipeline(one).score.artifact(self.runner.storage).is_complete()]
        self.runner.say(f"report    {len(wanted)} runs on {len(places)} sets of models, {len(left)} to be made")
        if left:
            # This runner's session is the one that stays; those of the other models are inside it.
            self.runner.connect()
        for mine in places.values():
            self.runner_of(mine[0]).run([self.pipeline(one) for one in mine])

    def measured(self, run: Run) -> Measured:
        """Return a run's metrics by seed."""
        if run not in self._measured:
            found = [estimates(self.runner, self.pipeline(one)) for one in run.by_seed()]
            self._measured[run] = Measured(found)
        return self._measured[run]

    def scores(self, run: Run) -> Scores:
        """Return the scores of a run's first seed."""
        if run not in self._scores:
            table = self.pipeline(run.by_seed()[0]).score.artifact(self.runner.storage).read()
            ids, labels = column(table, "sample_id"), column(table, "label")
            order = np.argsort(ids, kind="stable")
            self._scores[run] = ids[order], labels[order].astype(np.int8), column(table, "probability")[order]
        return self._scores[run]

    def compared(self, ours: Line, baseline: Line) -> Comparison:
        """Return the paired tests of two runs on the same samples.

        Raises:
            InputError: they were not scored on the same samples.
        """
        first, second = self.scores(ours.runs[0]), self.scores(baseline.runs[0])
        if not np.array_equal(first[0], second[0]):
            raise InputError(f"{ours.title} and {baseline.title} were not scored on the same samples")
        users = users_of(self.runner, self.pipeline(ours.runs[0].by_seed()[0]), first[0])
        of_users, _ = compare_auc_by_users(users, first[1], first[2], second[2])
        arrays = (first[1], first[2], second[2])
        tests: Sequence[PairedTest] = (delong(*arrays), of_users, paired_t(*arrays), mcnemar(*arrays))
        return Comparison(ours, baseline, tests)

    def places(self) -> list[tuple[str, str]]:
        """Return name and place of every run's scores and of what made them."""
        found = []
        for run, pipeline in self._pipelines.items():
            stage = pipeline.score
            found.append((f"scores of {_name(run)}", stage.artifact(self.runner.storage).where()))
        return sorted(found)


def _name(run: Run) -> str:
    e = run.experiment
    if run.baseline:
        return f"{e.baseline.model}, N = {e.shots}, K = {e.k}, seed {e.seed}"
    how = f"N = {e.shots}, {e.mix}, seed {e.seed}" if e.adapter == "auto" else "zero-shot"
    return f"{e.model}, {how}, K = {e.k}, {e.history}, {e.distance}, PCA {e.pca_dim}"
