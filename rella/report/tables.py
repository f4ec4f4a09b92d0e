"""Tables in the paper's form, as text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rella.metrics import BootstrapEstimates

METRICS = ("auc", "log_loss", "accuracy")
TITLES = {"auc": "AUC", "log_loss": "Log Loss", "accuracy": "ACC"}


@dataclass(frozen=True)
class Row:
    """One line of Table 3: a variant with one bootstrap per training seed."""

    title: str
    runs: Sequence[BootstrapEstimates]

    def values(self, metric: str) -> list[float]:
        """Return the metric by seed."""
        return [getattr(run, metric).value for run in self.runs]

    def mean(self, metric: str) -> float:
        """Return the mean over seeds."""
        return float(np.mean(self.values(metric)))

    def cell(self, metric: str) -> str:
        """Return the mean with its spread: over seeds where there are several, else the bootstrap's over users."""
        values = self.values(metric)
        spread = float(np.std(values, ddof=1)) if len(values) > 1 else getattr(self.runs[0], metric).standard_error
        return f"{self.mean(metric):.4f} ±{spread:.4f}"


def table3(rows: Sequence[Row], caption: str) -> str:
    """Return Table 3 (§4.5) for one data set; the best value of each column is starred, the second underlined."""
    marks = {metric: _marks([row.mean(metric) for row in rows], metric) for metric in METRICS}
    cells = [[row.title, *(row.cell(m) + marks[m][n] for m in METRICS)] for n, row in enumerate(rows)]
    header = ["Model Variant", *(TITLES[m] for m in METRICS)]
    widths = [max(len(line[c]) for line in [header, *cells]) for c in range(len(header))]
    lines = [
        "  ".join(f"{text:<{w}}" for text, w in zip(line, widths, strict=True)).rstrip() for line in [header, *cells]
    ]
    rule = "-" * max(map(len, lines))
    return "\n".join([caption, rule, lines[0], rule, *lines[1:], rule, "* best, _ second best of a column"])


def _marks(values: Sequence[float], metric: str) -> list[str]:
    goodness = -np.asarray(values) if metric == "log_loss" else np.asarray(values)
    # Equal values share their mark.
    first, *rest = np.unique(goodness)[::-1]
    return ["*" if g == first else "_" if rest and g == rest[0] else " " for g in goodness]
