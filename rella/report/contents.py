"""What a report shows, before it is a page, Markdown or a figure: tables, charts, heat maps. Plain values, no paths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Value:
    """A measured number, with what it is put beside."""

    value: float
    spread: float | None = None
    """Standard deviation over seeds where there are several, else the bootstrap's standard error over users."""
    seeds: tuple[float, ...] = ()
    """By training seed, where there are several."""
    paper: float | None = None
    """What the paper prints there."""
    star: bool = False
    """Better than the best baseline, by the test that the table's notes name."""

    @property
    def difference(self) -> float | None:
        """Ours minus the paper's."""
        return None if self.paper is None else self.value - self.paper


@dataclass(frozen=True)
class Column:
    """A table's column."""

    key: str
    title: str
    better: Literal["high", "low"] | None = None
    """Which end is marked as the best, if any."""
    form: str = ".4f"
    """Of a number."""


Cell = Value | str | None


@dataclass(frozen=True)
class Row:
    """A table's line."""

    title: str
    cells: Mapping[str, Cell]
    """By the column's key; what is missing is empty."""
    group: str = ""
    """Lines of one group stand together under its name."""
    ranked: bool = True
    """Whether it takes part in the best and second best of a column."""


@dataclass(frozen=True)
class Table:
    """A table of the paper, or a slice of results."""

    name: str
    """`table2`, ...: file names and anchors."""
    title: str
    caption: str
    """Data set, split, rows, model, K, N, seeds."""
    columns: Sequence[Column]
    rows: Sequence[Row]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Point:
    """One measurement of a curve."""

    x: float
    y: float
    spread: float | None = None
    label: str = ""
    """What is said of it beside x and y."""


@dataclass(frozen=True)
class Series:
    """A curve."""

    title: str
    points: Sequence[Point]
    paper: Sequence[Point] = ()
    """The paper's, where it prints them: drawn thin."""
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """Curves over one axis."""

    name: str
    title: str
    caption: str
    x_title: str
    y_title: str
    series: Sequence[Series]
    log_x: bool = False
    diagonal: bool = False
    """Whether y = x is drawn (calibration)."""
    level: tuple[str, float] | None = None
    """A dashed horizontal line, with its name."""
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class HeatRow:
    """A line of coloured rectangles."""

    title: str
    labels: Sequence[str]
    values: Sequence[float]
    """Not negative; the largest of the row has the deepest colour."""


@dataclass(frozen=True)
class Heat:
    """Figure 8: what a model attends to."""

    name: str
    title: str
    caption: str
    rows: Sequence[HeatRow]
    notes: Sequence[str] = ()


Block = Table | Chart | Heat


@dataclass(frozen=True)
class Section:
    """Blocks under one heading."""

    title: str
    text: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Report:
    """One run's page."""

    title: str
    subtitle: str
    facts: Sequence[tuple[str, str]]
    """What was run: name and value."""
    sections: Sequence[Section]
    artifacts: Sequence[tuple[str, str]] = ()
    """What it rests on: name and place."""

    @property
    def blocks(self) -> list[Block]:
        """All of them, in order."""
        return [block for section in self.sections for block in section.blocks]
