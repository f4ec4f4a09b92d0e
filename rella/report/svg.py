"""Markup with escaped contents, and charts as inline SVG in the page's colours."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from rella.report.contents import Chart, Point, Series
from rella.report.markdown import number, plain

COLOURS = 8
WIDTH, HEIGHT = 460, 290
TOP, RIGHT, BOTTOM = 30, 16, 48
_CHARACTER = 8.2
"""Of a tick's label on a phone, where letters are larger beside the drawing."""

# One fewer than colours: the ninth curve has the first one's colour, but not its marker.
MARKERS = (
    "M-3.8,0a3.8,3.8 0 1,0 7.6,0a3.8,3.8 0 1,0 -7.6,0Z",
    "M-3.5,-3.5H3.5V3.5H-3.5Z",
    "M0,-4.6L4.3,3.4H-4.3Z",
    "M0,-5L4.6,0L0,5L-4.6,0Z",
    "M0,4.6L4.3,-3.4H-4.3Z",
    "M-1.5,-4.5H1.5V-1.5H4.5V1.5H1.5V4.5H-1.5V1.5H-4.5V-1.5H-1.5Z",
    "M-4.6,0L3.4,-4.3V4.3Z",
)


class Raw(str):
    """Markup: everything in it that came from data is escaped already."""


def tag(name: str, *children: str, **attributes: str | float | bool | None) -> Raw:
    """Return an element.

    Args:
        name: of the element.
        children: text, which is escaped, or markup, which is not.
        attributes: underscores become hyphens, a trailing one goes (`class_`); None and False are left out.
    """
    written = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{_attribute(value)}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    return Raw(f"<{name}{written}>{join(children)}</{name}>")


def join(parts: Iterable[str], between: str = "") -> Raw:
    """Return parts behind each other, text among them escaped."""
    return Raw(between.join(part if isinstance(part, Raw) else escape(part) for part in parts))


@dataclass(frozen=True)
class Axis:
    """Where values lie along one side of a chart."""

    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    """Position and label."""
    smallest: float | None = None
    """Of the values above zero, on a logarithmic axis."""

    def position(self, value: float) -> float:
        """Return where a value lies between `low` and `high`; on a logarithmic axis, zero is a step below the rest."""
        if self.smallest is None:
            return value
        return math.log2(value) if value > 0 else math.log2(self.smallest) - 1

    def share(self, value: float) -> float:
        """Return how far along the axis a value lies, from 0 to 1."""
        return (self.position(value) - self.low) / (self.high - self.low)


def axes(chart: Chart) -> tuple[Axis, Axis] | None:
    """Return a chart's x and y axis, or None where it has no points."""
    found = [p for series in chart.series for curve in (series.points, series.paper) for p in finite(curve)]
    if not found:
        return None
    xs = sorted({p.x for p in found})
    ys = [p.y + sign * (p.spread or 0) for p in found for sign in (-1, 1)]
    if chart.level is not None:
        ys.append(chart.level[1])
    if chart.diagonal:
        # One range for both, or y = x would not be where the eye expects it.
        low, high = _padded(min(xs[0], *ys), max(xs[-1], *ys))
        return _linear(low, high), _linear(low, high)
    return _x_axis(xs, chart.log_x), _linear(*_padded(min(ys), max(ys)))


def finite(curve: Iterable[Point]) -> list[Point]:
    """Return the points that can be drawn, from left to right."""
    return sorted((p for p in curve if math.isfinite(p.x) and math.isfinite(p.y)), key=lambda p: p.x)


def chart_svg(chart: Chart) -> Raw:
    """Return a chart's drawing; its colours and lines are the style sheet's, its legend is `legend`."""
    plane = axes(chart)
    if plane is None:
        return tag("p", "No points.", class_="empty")
    across, up = plane
    left = 14 + _CHARACTER * max(len(label) for _, label in up.ticks)
    frame = _Frame(across, up, left)
    marks = [mark for n, series in enumerate(chart.series) for mark in _marks(chart, n, series)]
    return tag(
        "svg",
        *_grid(chart, frame),
        *_guides(chart, frame),
        *(line for n, series in enumerate(chart.series) for line in _lines(n, series, frame)),
        *(_mark(frame, *mark, first=n == 0) for n, mark in enumerate(marks)),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="group",
        aria_label=f"{chart.title}: {chart.y_title} by {chart.x_title}",
        class_="chart",
    )


def legend(chart: Chart) -> Raw:
    """Return what the lines of a chart mean, as a list."""
    items = [
        _item(_sample(n, MARKERS[n % len(MARKERS)], series.dashed), series.title)
        for n, series in enumerate(chart.series)
    ]
    if any(series.paper for series in chart.series):
        items.append(_item(_stroke("paper"), "the paper, in the same colour"))
    if chart.level is not None:
        items.append(_item(_stroke("level"), f"{chart.level[0]} ({plain(chart.level[1])})"))
    if chart.diagonal:
        items.append(_item(_stroke("diagonal"), "y = x"))
    return tag("ul", *items, class_="legend")


@dataclass(frozen=True)
class _Frame:
    across: Axis
    up: Axis
    left: float

    def x(self, value: float) -> float:
        return self.left + self.across.share(value) * (WIDTH - RIGHT - self.left)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - self.up.share(value) * (HEIGHT - BOTTOM - TOP)

    def at(self, position: float) -> float:
        """Of a tick, which is a position already."""
        share = (position - self.across.low) / (self.across.high - self.across.low)
        return self.left + share * (WIDTH - RIGHT - self.left)


def _attribute(value: str | float) -> str:
    if isinstance(value, str):
        return escape(value)
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def _padded(low: float, high: float) -> tuple[float, float]:
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - room, high + room


def _linear(low: float, high: float) -> Axis:
    return Axis(low, high, _round_ticks(low, high))


def _x_axis(xs: Sequence[float], log: bool) -> Axis:
    smallest = min((x for x in xs if x > 0), default=None) if log else None
    where = Axis(0, 1, (), smallest)
    low, high = _padded(where.position(xs[0]), where.position(xs[-1]))
    whole = len(xs) <= 16 and all(x == int(x) for x in xs)
    if smallest is not None or whole:
        return Axis(low, high, [(where.position(x), plain(x)) for x in xs], smallest)
    return _linear(low, high)


def _round_ticks(low: float, high: float) -> list[tuple[float, str]]:
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * size for size in (1, 2, 2.5, 5, 10) if power * size >= raw * 0.999)
    places = next((p for p in range(12) if math.isclose(step * 10**p, round(step * 10**p), rel_tol=1e-6)), 12)
    ends = math.ceil(low / step), math.floor(high / step)
    return [(n * step, number(n * step, f"z,.{places}f")) for n in range(ends[0], ends[1] + 1)]


def _grid(chart: Chart, frame: _Frame) -> Iterator[Raw]:
    floor, end = HEIGHT - BOTTOM, WIDTH - RIGHT
    for position, label in frame.up.ticks:
        y = frame.y(position)
        yield tag("line", x1=frame.left, x2=end, y1=y, y2=y, class_="grid")
        yield tag("text", label, x=frame.left - 7, y=y, dy="0.32em", text_anchor="end")
    yield tag("line", x1=frame.left, x2=end, y1=floor, y2=floor, class_="axis")
    told = -math.inf
    for position, label in frame.across.ticks:
        x, half = frame.at(position), _CHARACTER * len(label) / 2
        yield tag("line", x1=x, x2=x, y1=floor, y2=floor + 4, class_="axis")
        if x - half > told + 4:
            yield tag("text", label, x=x, y=floor + 18, text_anchor="middle")
            told = x + half
    yield tag("text", f"{chart.x_title} →", x=end, y=HEIGHT - 8, text_anchor="end", class_="name")
    yield tag("text", f"↑ {chart.y_title}", x=4, y=14, class_="name")


def _guides(chart: Chart, frame: _Frame) -> Iterator[Raw]:
    if chart.level is not None:
        y = frame.y(chart.level[1])
        yield tag("line", x1=frame.left, x2=WIDTH - RIGHT, y1=y, y2=y, class_="level")
    if chart.diagonal:
        low, high = frame.across.low, frame.across.high
        ends = {"x1": frame.x(low), "x2": frame.x(high), "y1": frame.y(low), "y2": frame.y(high)}
        yield tag("line", **ends, class_="diagonal")


def _lines(n: int, series: Series, frame: _Frame) -> Iterator[Raw]:
    colour = f"s{n % COLOURS}"
    for curve, kind in ((series.paper, "paper"), (series.points, "dashed" if series.dashed else "solid")):
        corners = " ".join(f"{frame.x(p.x):.1f},{frame.y(p.y):.1f}" for p in finite(curve))
        if corners:
            yield tag("polyline", points=corners, class_=f"curve {kind} {colour}")
    for p in finite(series.points):
        if p.spread:
            x, high, low = frame.x(p.x), frame.y(p.y + p.spread), frame.y(p.y - p.spread)
            path = f"M{x:.1f},{high:.1f}V{low:.1f}M{x - 3:.1f},{high:.1f}h6M{x - 3:.1f},{low:.1f}h6"
            yield tag("path", d=path, class_=f"whisker {colour}")


def _marks(chart: Chart, n: int, series: Series) -> Iterator[tuple[Point, str, str, str]]:
    colour = f"s{n % COLOURS}"
    shape = MARKERS[n % len(MARKERS)]
    for p in finite(series.paper):
        yield p, _tip(chart, f"{series.title}, paper", p), MARKERS[0], f"mark paper {colour}"
    for p in finite(series.points):
        yield p, _tip(chart, series.title, p), shape, f"mark {colour}"


def _mark(frame: _Frame, point: Point, tip: str, shape: str, kind: str, *, first: bool) -> Raw:
    return tag(
        "g",
        tag("title", tip),
        tag("circle", r=9, class_="hit"),
        tag("path", d=shape),
        transform=f"translate({frame.x(point.x):.1f},{frame.y(point.y):.1f})",
        class_=kind,
        role="img",
        tabindex=0 if first else -1,
    )


def _tip(chart: Chart, title: str, point: Point) -> str:
    spread = "" if point.spread is None else f" ±{plain(point.spread)}"
    measured = f"{chart.x_title} {plain(point.x)}, {chart.y_title} {plain(point.y)}{spread}"
    return "\n".join(line for line in (title, measured, point.label) if line)


def _item(sample: Raw, words: str) -> Raw:
    return tag("li", sample, words)


def _sample(n: int, shape: str, dashed: bool) -> Raw:
    colour = f"s{n % COLOURS}"
    line = tag("line", x1=1, x2=31, y1=7, y2=7, class_=f"curve {'dashed' if dashed else 'solid'} {colour}")
    dot = tag("g", tag("path", d=shape), transform="translate(16,7)", class_=f"dot {colour}")
    return tag("svg", line, dot, viewBox="0 0 32 14", aria_hidden="true")


def _stroke(kind: str) -> Raw:
    line = tag("line", x1=1, x2=31, y1=7, y2=7, class_=f"curve {kind}" if kind == "paper" else kind)
    return tag("svg", line, viewBox="0 0 32 14", aria_hidden="true")
