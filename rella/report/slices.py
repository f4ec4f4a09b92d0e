"""Metrics on parts of the test rows, and calibration: where a model is good, and whether its probabilities are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from rella.metrics import auc
from rella.report.contents import Cell, Chart, Column, Point, Row, Series, Table, Value

Ints = npt.NDArray[np.integer]
Floats = npt.NDArray[np.float64]
FEWEST = 10
"""Of each class in a slice whose AUC is shown."""
BINS = 10


@dataclass(frozen=True)
class Scored:
    """Test rows and what is known of them, (S,) each."""

    labels: Ints
    history: Ints
    """Behaviours before the sample."""
    popularity: Ints
    """Training samples of the target item."""
    activity: Ints
    """Training samples of the user."""

    def features(self) -> dict[str, Ints]:
        """Return what rows are cut by."""
        return {
            "History length": self.history,
            "Item popularity (training samples)": self.popularity,
            "User activity (training samples)": self.activity,
        }


def cuts(values: Ints, parts: int = 4) -> list[tuple[str, npt.NDArray[np.bool_]]]:
    """Return names and members of up to `parts` ranges of about equal size; equal values stay together.

    Zero, which is cold for popularity and activity, is a range of its own.
    """
    found = [("0 (cold)", values == 0)] if (values == 0).any() else []
    rest = values[values > 0]
    if not len(rest):
        return found
    values_there = np.unique(rest)
    if len(values_there) > parts:
        values_there = np.unique(np.quantile(rest, np.linspace(0, 1, parts + 1)[:-1], method="lower"))
    edges = np.append(values_there, rest.max() + 1)
    for low, high in pairwise(edges):
        last = int(high) - 1
        name = f"{int(low):,}" if last <= low else f"{int(low):,} to {last:,}"
        found.append((name, (values >= low) & (values < high)))
    return [(name, members) for name, members in found if members.any()]


def slice_table(scored: Scored, models: Mapping[str, Floats], caption: str) -> Table:
    """Return AUC by slice and model; slices with too few of a class are left empty, their rows are counted.

    Args:
        scored: the test rows.
        models: name → (S,) probabilities.
        caption: what was run.
    """
    columns = [Column("rows", "Rows", None, ",.0f"), Column("positive", "Positive", None, ".1%")]
    columns += [Column(name, name, "high") for name in models]
    everything = np.ones(len(scored.labels), dtype=bool)
    parts = [("All rows", "all", everything)]
    for feature, values in scored.features().items():
        parts += [(feature, name, members) for name, members in cuts(values)]
    rows = []
    for group, name, members in parts:
        y = scored.labels[members]
        cells: dict[str, Cell] = {"rows": Value(float(len(y))), "positive": Value(float(y.mean()))}
        if min(int(y.sum()), int(len(y) - y.sum())) >= FEWEST:
            cells |= {model: Value(auc(y, p[members])) for model, p in models.items()}
        rows.append(Row(name, cells, group, ranked=False))
    notes = [f"AUC of slices with at least {FEWEST} rows of each class."]
    return Table("slices", "AUC by slice", caption, columns, rows, notes)


def calibration(labels: Ints, probabilities: Floats) -> tuple[list[Point], float]:
    """Return (mean probability, share of positives) of ten parts of equal size by probability, and ECE.

    ECE: expected calibration error, the parts' mean absolute difference, weighted by their rows.
    """
    order = np.argsort(probabilities, kind="stable")
    parts = [part for part in np.array_split(order, BINS) if len(part)]
    points = []
    for part in parts:
        share = float(labels[part].mean())
        error = float(np.sqrt(share * (1 - share) / len(part)))
        points.append(Point(float(probabilities[part].mean()), share, error, f"{len(part):,} rows"))
    gaps = [abs(point.x - point.y) * len(part) for point, part in zip(points, parts, strict=True)]
    return points, float(sum(gaps) / len(labels))


def calibration_chart(labels: Ints, models: Mapping[str, Floats], caption: str) -> Chart:
    """Return the reliability diagram of several models, with their ECE."""
    series: list[Series] = []
    for name, probabilities in models.items():
        points, error = calibration(labels, probabilities)
        series.append(Series(f"{name} (ECE {error:.3f})", points))
    return Chart("calibration", "Calibration", caption, "mean predicted probability", "share of positives", series,
                 diagonal=True)  # fmt: skip


def counts(values: Ints, known: Sequence[int] | Ints, size: int) -> Ints:
    """Return how often each row's value is among the `known` ones.

    Args:
        values: (S,) ids below `size`.
        known: ids of the training samples.
        size: number of ids.
    """
    return np.bincount(np.asarray(known), minlength=size)[values]
