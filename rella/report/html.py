"""A report as one HTML page that holds all it needs: no network, no scripts or fonts from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import resources
from pathlib import Path

from rella.report.contents import Block, Cell, Chart, Column, Heat, HeatRow, Report, Section, Table, Value
from rella.report.markdown import EMPTY, Mark, by_seed, grouped, key, marks, number, numeric, plain, points, signed
from rella.report.svg import Raw, chart_svg, legend, tag

SCALE = ((255, 251, 204), (217, 240, 163), (120, 198, 121), (35, 132, 67), (0, 80, 44))
"""Of heat maps, from nothing to the largest value of a row."""


def page(report: Report) -> str:
    """Return a report as an HTML page; whatever comes from the report is escaped."""
    names = _Names()
    anchors = [
        (names.new(section.title), [names.new(block.name) for block in section.blocks]) for section in report.sections
    ]
    body = tag(
        "body",
        tag("button", "Dark", type="button", id="theme", hidden=True),
        tag(
            "div",
            _header(report),
            _contents(report, anchors),
            tag(
                "main",
                *(_section(s, *at) for s, at in zip(report.sections, anchors, strict=True)),
                *_artifacts(report),
            ),
            class_="page",
        ),
        tag("div", id="tip", role="tooltip", hidden=True),
    )
    return f"<!DOCTYPE html>\n{tag('html', _head(report.title), body, lang='en')}\n"


def shade(share: float) -> tuple[int, int, int]:
    """Return a heat map's colour for a share of the row's largest value, as red, green and blue."""
    at = min(max(share, 0.0), 1.0) * (len(SCALE) - 1)
    n = min(int(at), len(SCALE) - 2)
    red, green, blue = (round(a + (b - a) * (at - n)) for a, b in zip(SCALE[n], SCALE[n + 1], strict=True))
    return red, green, blue


def shares(row: HeatRow) -> list[float]:
    """Return a heat map's values as shares of the row's largest; those that are not numbers count nothing."""
    finite = [value if math.isfinite(value) else 0.0 for value in row.values]
    top = max(finite, default=0.0)
    return [value / top if top > 0 else 0.0 for value in finite]


class _Names:
    """Anchors that are all different."""

    def __init__(self) -> None:
        self.taken: set[str] = {"theme", "tip", "artifacts"}

    def new(self, words: str) -> str:
        base = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-") or "part"
        name, n = base, 1
        while name in self.taken:
            n += 1
            name = f"{base}-{n}"
        self.taken.add(name)
        return name


@cache
def _asset(name: str) -> Raw:
    return Raw((resources.files("rella.report") / "assets" / name).read_text("utf-8"))


def _head(title: str) -> Raw:
    script = _asset("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return tag(
        "head",
        Raw('<meta charset="utf-8">'),
        Raw(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        Raw('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Raw('<meta name="color-scheme" content="light dark">'),
        tag("title", title),
        # Without it, browsers ask the server for one.
        Raw('<link rel="icon" href="data:,">'),
        tag("style", _asset("report.css")),
        tag("script", script),
    )


def _header(report: Report) -> Raw:
    facts = [tag("div", tag("dt", name), tag("dd", value)) for name, value in report.facts]
    return tag(
        "header",
        tag("h1", report.title),
        *([tag("p", report.subtitle, class_="subtitle")] if report.subtitle else []),
        *([tag("dl", *facts, class_="facts")] if facts else []),
    )


def _contents(report: Report, anchors: Sequence[tuple[str, Sequence[str]]]) -> Raw:
    items = []
    for section, (at, below) in zip(report.sections, anchors, strict=True):
        blocks = [tag("li", tag("a", b.title, href=f"#{a}")) for b, a in zip(section.blocks, below, strict=True)]
        items.append(tag("li", tag("a", section.title, href=f"#{at}"), *([tag("ol", *blocks)] if blocks else [])))
    if report.artifacts:
        items.append(tag("li", tag("a", "Artifacts", href="#artifacts")))
    return tag("nav", tag("h2", "Contents"), tag("ol", *items), aria_label="Contents")


def _section(section: Section, anchor: str, below: Sequence[str]) -> Raw:
    drawn: list[Raw] = []
    beside: list[Raw] = []
    for block, at in zip(section.blocks, below, strict=True):
        # Charts that follow each other stand side by side.
        if isinstance(block, Chart):
            beside.append(_figure(block, at))
            continue
        drawn += [tag("div", *beside, class_="charts")] if beside else []
        beside = []
        drawn.append(_figure(block, at))
    drawn += [tag("div", *beside, class_="charts")] if beside else []
    return tag("section", tag("h2", section.title), *_paragraphs(section.text), *drawn, id=anchor)


def _paragraphs(words: str, kind: str | None = None) -> list[Raw]:
    return [tag("p", part.strip(), class_=kind) for part in re.split(r"\n\s*\n", words) if part.strip()]


def _figure(block: Block, anchor: str) -> Raw:
    match block:
        case Table():
            kind, inside = "table", _table(block)
        case Chart():
            kind, inside = "chart", _chart(block)
        case Heat():
            kind, inside = "heat", _heat(block)
    caption = tag("figcaption", tag("h3", block.title), *_paragraphs(block.caption))
    notes = [tag("ul", *(tag("li", note) for note in block.notes), class_="notes")] if block.notes else []
    return tag("figure", caption, *inside, *notes, id=anchor, class_=kind)


def _chart(chart: Chart) -> Iterator[Raw]:
    yield legend(chart)
    yield tag("div", chart_svg(chart), class_="drawing")
    header, lines = points(chart)
    yield _fold("Numbers", header, lines, chart.title)


def _fold(summary: str, header: Sequence[str], lines: Sequence[Sequence[str]], title: str) -> Raw:
    head = tag("thead", tag("tr", *(tag("th", name, scope="col") for name in header)))
    body = tag("tbody", *(tag("tr", *(tag("td", cell) for cell in line)) for line in lines))
    table = _scrolled(tag("table", head, body, class_="plain"), f"{title}: {summary.lower()}")
    return tag("details", tag("summary", summary), table)


def _scrolled(table: Raw, title: str) -> Raw:
    return tag("div", table, class_="scroll", role="region", aria_label=title, tabindex=0)


def _table(table: Table) -> Iterator[Raw]:
    best = {column.key: marks(table.rows, column) for column in table.columns}
    kinds = {column.key: "number" if numeric(table, column) else "text" for column in table.columns}
    heads = [
        tag(
            "th",
            column.title,
            scope="col",
            class_=kinds[column.key],
            data_sort=kinds[column.key],
            data_better=column.better,
            aria_sort="none",
        )
        for column in table.columns
    ]
    corner = tag("th", "", scope="col", data_sort="text", data_name="Line", aria_sort="none")
    bodies = []
    for group, rows in grouped(table.rows):
        lines = [_group(group, len(table.columns) + 1)] if group else []
        for row in rows:
            cells = [
                _cell(row.cells.get(c.key), c, best[c.key] if row.ranked else {}, kinds[c.key]) for c in table.columns
            ]
            kind = None if row.ranked else "unranked"
            lines.append(tag("tr", tag("th", row.title, scope="row"), *cells, class_=kind))
        bodies.append(tag("tbody", *lines))
    yield _scrolled(tag("table", tag("thead", tag("tr", corner, *heads)), *bodies, class_="sortable"), table.title)
    if said := key(table, "<b>Bold</b>", "<u>underlined</u>", "*"):
        # Nothing in these sentences is the report's.
        yield tag("p", Raw(" ".join(said)), class_="key")
    if seeds := by_seed(table):
        yield _fold("By training seed", ["Line", "Column", "By seed"], seeds, table.title)


def _group(name: str, width: int) -> Raw:
    return tag("tr", tag("th", tag("span", name), scope="rowgroup", colspan=width), class_="group")


def _cell(cell: Cell, column: Column, best: dict[str, Mark], kind: str) -> Raw:
    if not isinstance(cell, Value):
        return tag("td", cell or EMPTY, class_=kind if cell else f"{kind} empty")
    shown = number(cell.value, column.form)
    mark = best.get(shown, "")
    parts: list[str] = [tag({"best": "b", "second": "u", "": "span"}[mark], shown)]
    if cell.star:
        parts.append(tag("sup", "*", class_="star"))
    if cell.spread is not None:
        parts += [" ", tag("small", f"±{number(cell.spread, column.form)}", class_="spread")]
    if cell.paper is not None and cell.difference is not None:
        gap = tag("span", signed(cell.difference, column.form), class_="difference")
        parts.append(tag("small", f"paper {number(cell.paper, column.form)} ", gap, class_="paper"))
    # The number itself, not a form's digits: lines that print the same still have an order.
    exact = repr(float(cell.value)) if math.isfinite(cell.value) else None
    return tag("td", *parts, class_=f"{kind} {mark}".strip(), data_value=exact)


def _heat(heat: Heat) -> Iterator[Raw]:
    first = True
    for row in heat.rows:
        cells = []
        for label, value, share in zip(row.labels, row.values, shares(row), strict=True):
            cells.append(_heat_cell(label, value, share, first))
            first = False
        strip = tag("ol", *cells, class_="cells", aria_label=row.title)
        yield tag("div", tag("h4", row.title), tag("div", strip, class_="scroll"), class_="heatrow")
    yield tag("p", "0 ", tag("span", class_="scale"), " the row's largest value", class_="key")


def _heat_cell(label: str, value: float, share: float, first: bool) -> Raw:
    red, green, blue = shade(share)
    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 108
    tip = f"{label}\n{plain(value)}"
    return tag(
        "li",
        tag("span", label),
        style=f"background:#{red:02x}{green:02x}{blue:02x}",
        class_="cell deep" if dark else "cell",
        title=tip,
        tabindex=0 if first else -1,
    )


def _place(place: str) -> Raw:
    """Return where an artifact lies; a folder of this machine opens from the page, an object store's URI is text."""
    shown = tag("code", place)
    return tag("a", shown, href=Path(place).as_uri()) if place.startswith("/") else shown


def _artifacts(report: Report) -> Iterator[Raw]:
    if report.artifacts:
        items = [tag("div", tag("dt", name), tag("dd", _place(place))) for name, place in report.artifacts]
        yield tag("section", tag("h2", "Artifacts"), tag("dl", *items, class_="artifacts"), id="artifacts")
