"""From measured runs to the tables and charts of a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rella.metrics import BootstrapEstimates, PairedTest, relative_improvement
from rella.paper.experiments import Exhibit, Line, Run
from rella.paper.numbers import Printed, numbers
from rella.report.contents import Cell, Chart, Column, Point, Row, Series, Table, Value
from rella.report.tables import METRICS, TITLES

LEVEL = 0.001
"""Of the paper's `*` (Table 2)."""


@dataclass(frozen=True)
class Measured:
    """What a run's scores say, by training seed."""

    seeds: Sequence[BootstrapEstimates]

    def mean(self, metric: str) -> float:
        """Return the mean over seeds."""
        return float(np.mean(self._values(metric)))

    def spread(self, metric: str) -> float:
        """Return the standard deviation over seeds; of one seed the bootstrap's standard error over users."""
        values = self._values(metric)
        return float(np.std(values, ddof=1) if len(values) > 1 else getattr(self.seeds[0], metric).standard_error)

    def value(self, metric: str, paper: float | None = None, star: bool = False) -> Value:
        """Return a table's cell."""
        values = self._values(metric)
        return Value(self.mean(metric), self.spread(metric), tuple(values) if len(values) > 1 else (), paper, star)

    def _values(self, metric: str) -> list[float]:
        return [getattr(seed, metric).value for seed in self.seeds]


Results = Mapping[Run, Measured]
METRIC_COLUMNS = (
    Column("auc", TITLES["auc"], "high"),
    Column("log_loss", TITLES["log_loss"], "low"),
    Column("accuracy", TITLES["accuracy"], "high"),
)


@dataclass(frozen=True)
class Comparison:
    """ReLLa against the best baseline on the same samples (Table 2)."""

    ours: Line
    baseline: Line
    tests: Sequence[PairedTest]

    @property
    def significant(self) -> bool:
        """Whether ours has the higher AUC by DeLong's test at the paper's level."""
        found = next(t for t in self.tests if t.test == "delong")
        return found.difference > 0 and found.p_value < LEVEL

    def note(self) -> str:
        """Return what was tested, with every test's difference and p."""
        names = {"delong": "DeLong", "bootstrap_users": "bootstrap over users", "paired_t": "paired t",
                 "mcnemar": "McNemar"}  # fmt: skip
        said = "; ".join(f"{TITLES[t.metric]} {t.difference:+.4f}, {names[t.test]} p = {t.p_value:.2g}"
                         for t in self.tests)  # fmt: skip
        what = "*: higher AUC" if self.significant else "No *: not a higher AUC"
        return (
            f"{what} at p < {LEVEL} by DeLong's test, {self.ours.title} against the best baseline, "
            f"{self.baseline.title}, on the same samples (first seed): {said}."
        )


def best_line(lines: Sequence[Line], results: Results) -> Line:
    """Return the line of the highest AUC."""
    return max(lines, key=lambda line: results[line.runs[0]].mean("auc"))


def metrics_table(exhibit: Exhibit, results: Results, caption: str, comparison: Comparison | None = None) -> Table:
    """Return a table of the three metrics; Table 2 has `Rel.Impr` of the best few-shot ReLLa over each row as well.

    Args:
        exhibit: of form `metrics`.
        results: of all its runs.
        caption: what was run.
        comparison: for Table 2.
    """
    tuned = any(line.group == "Few-shot" for line in exhibit.lines)
    improving = _improvement(exhibit, results) if exhibit.name == "table2" and tuned else None
    columns = [*METRIC_COLUMNS, *([Column("rel_impr", "Rel.Impr", None, ".2%")] if improving else [])]
    starred = comparison.ours if comparison is not None and comparison.significant else None
    rows = []
    for line in exhibit.lines:
        measured, paper = results[line.runs[0]], line.paper[0] if line.paper else None
        cells: dict[str, Cell] = {}
        for m in METRICS:
            theirs = getattr(paper, m) if isinstance(paper, Printed) else None
            cells[m] = measured.value(m, theirs, star=m == "auc" and line is starred)
        if improving and (found := improving(line)) is not None:
            cells["rel_impr"] = found
        rows.append(Row(line.title, cells, line.group))
    notes = [comparison.note()] if comparison else []
    if improving:
        notes.append("Rel.Impr: AUC of the better few-shot ReLLa over the row's, minus one (Table 2).")
    return Table(exhibit.name, exhibit.title, caption, columns, rows, notes)


def _improvement(exhibit: Exhibit, results: Results) -> Callable[[Line], Value | None]:
    ours = best_line([line for line in exhibit.lines if line.group == "Few-shot"], results)
    dataset = ours.runs[0].experiment.dataset
    known: Mapping[str, float] = numbers()["relative_improvement"].get(dataset, {})

    def found(line: Line) -> Value | None:
        if line.title.startswith("ReLLa"):
            return None
        gain = relative_improvement(results[ours.runs[0]].mean("auc"), results[line.runs[0]].mean("auc"))
        paper = known.get(line.title)
        return Value(gain, paper=None if paper is None else paper / 100)

    return found


def grid_table(exhibit: Exhibit, results: Results, caption: str) -> Table:
    """Return AUC by row and column (Table 4)."""
    columns = [Column(str(x), f"{exhibit.x_title} = {x}", "high") for x in exhibit.x]
    rows = [
        Row(line.title, {str(x): results[run].value("auc", _auc(line, n))
                         for n, (x, run) in enumerate(zip(exhibit.x, line.runs, strict=True))})
        for line in exhibit.lines
    ]  # fmt: skip
    return Table(exhibit.name, exhibit.title, caption, columns, rows)


def chart(exhibit: Exhibit, results: Results, caption: str) -> Chart:
    """Return AUC as curves (Figures 1, 6, 7)."""
    series = []
    for line in exhibit.lines:
        points = [Point(x, results[run].mean("auc"), results[run].spread("auc"))
                  for x, run in zip(exhibit.x, line.runs, strict=True)]  # fmt: skip
        paper = [Point(x, auc) for n, x in enumerate(exhibit.x) if (auc := _auc(line, n)) is not None]
        series.append(Series(line.title, points, paper))
    level = None if exhibit.level is None else (exhibit.level.title, results[exhibit.level.runs[0]].mean("auc"))
    return Chart(exhibit.name, exhibit.title, caption, exhibit.x_title, "AUC", series, exhibit.x_title == "N",
                 level=level)  # fmt: skip


def _auc(line: Line, n: int) -> float | None:
    paper = line.paper[n] if line.paper else None
    return paper.auc if isinstance(paper, Printed) else paper


def block(exhibit: Exhibit, results: Results, caption: str, comparison: Comparison | None = None) -> Table | Chart:
    """Return a table or figure of the paper."""
    if exhibit.form == "metrics":
        return metrics_table(exhibit, results, caption, comparison)
    return grid_table(exhibit, results, caption) if exhibit.form == "grid" else chart(exhibit, results, caption)
