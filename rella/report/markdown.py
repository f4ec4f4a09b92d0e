"""A report as GitHub Markdown, and numbers as a report writes them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from rella.report.contents import Block, Cell, Chart, Column, Heat, Point, Report, Row, Table, Value

Mark = Literal["best", "second", ""]
EMPTY = "–"
LARGEST = 10
_SPECIAL = re.compile(r"([\\`*_\[\]|~$])")
_LEADING = re.compile(r"^(\d+(?=[.)]\s)|(?=[#+=-]))")


def text(report: Report) -> str:
    """Return a report as Markdown; charts and heat maps link to `figures/<name>.svg` beside it."""
    parts = [f"# {escape(report.title)}", _prose(report.subtitle)]
    if report.facts:
        parts.append(pipes(["What", "Value"], [[escape(name), escape(value)] for name, value in report.facts]))
    for section in report.sections:
        parts += [f"## {escape(section.title)}", _prose(section.text)]
        for block in section.blocks:
            parts += _block(block)
    if report.artifacts:
        parts += ["## Artifacts", "\n".join(f"- {escape(name)}: {_code(place)}" for name, place in report.artifacts)]
    return "\n\n".join(part for part in parts if part) + "\n"


def number(value: float, form: str) -> str:
    """Return a number in a column's form, with a proper minus."""
    return format(value, form).replace("-", "−")


def signed(value: float, form: str) -> str:
    """Return a difference in a column's form, always with its sign."""
    # z: a difference that rounds to nothing is not negative.
    return number(value, form if form.startswith(("+", "-", " ")) else f"+z{form}")


def plain(value: float) -> str:
    """Return a number that has no form: whole ones whole, others to about four digits after the point."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value):
        return f"{int(value):,}".replace("-", "−")
    size = abs(value)
    if size < 1e-3:
        return number(value, ".3g")
    return number(value, f",.{max(0, 4 - (len(str(int(size))) if size >= 1 else 0))}f")


def marks(rows: Iterable[Row], column: Column) -> dict[str, Mark]:
    """Return which printed numbers of a column are the best and the second best among its ranked lines.

    By what is printed, so that numbers which look the same share their mark; empty where there is nothing to compare.
    """
    cells = [row.cells.get(column.key) for row in rows if row.ranked]
    values = [cell.value for cell in cells if isinstance(cell, Value) and math.isfinite(cell.value)]
    if column.better is None or len(values) < 2:
        return {}
    ordered = sorted(values, reverse=column.better == "high")
    first, *rest = dict.fromkeys(number(value, column.form) for value in ordered)
    found: dict[str, Mark] = {first: "best"}
    if rest:
        found[rest[0]] = "second"
    return found


def by_seed(table: Table) -> list[list[str]]:
    """Return line, column and the numbers by training seed of every cell that has them."""
    return [
        [row.title, column.title, ", ".join(number(seed, column.form) for seed in cell.seeds)]
        for row in table.rows
        for column in table.columns
        if isinstance(cell := row.cells.get(column.key), Value) and cell.seeds
    ]


def key(table: Table, bold: str, underlined: str, star: str) -> list[str]:
    """Return what the signs in a table mean, as sentences; those that it does not use are left out.

    Args:
        table: whose cells are looked at.
        bold: the word, as the best is written.
        underlined: the word, as the second best is written.
        star: the sign.
    """
    cells = [cell for row in table.rows for cell in row.cells.values() if isinstance(cell, Value)]
    said = {
        f"{bold} is a column's best, {underlined} its second best.": any(marks(table.rows, c) for c in table.columns),
        f"{star} Better than the best baseline, by the test in the notes.": any(cell.star for cell in cells),
        "± Standard deviation over seeds where there are several, else bootstrap standard error over users.": any(
            cell.spread is not None for cell in cells
        ),
        "Second line: what the paper prints, and ours minus it.": any(cell.paper is not None for cell in cells),
    }
    return [sentence for sentence, used in said.items() if used]


def points(chart: Chart) -> tuple[list[str], list[list[str]]]:
    """Return a chart's points as a table's header and lines: a column a curve where the curves share their x."""
    curves = [
        (title, curve)
        for series in chart.series
        for title, curve in ((series.title, series.points), (f"{series.title}, paper", series.paper))
        if curve
    ]
    every = sorted({point.x for _, curve in curves for point in curve})
    single = all(len({point.x for point in curve}) == len(curve) for _, curve in curves)
    if single and len(every) <= max((len(curve) for _, curve in curves), default=0):
        at = [{point.x: _measured(point) for point in curve} for _, curve in curves]
        header = [chart.x_title, *(title for title, _ in curves)]
        return header, [[plain(x), *(curve.get(x, EMPTY) for curve in at)] for x in every]
    lines = [[title, plain(point.x), _measured(point)] for title, curve in curves for point in curve]
    return ["Curve", chart.x_title, chart.y_title], lines


def escape(words: str) -> str:
    """Return words that Markdown shows as they are, on one line."""
    flat = " ".join(words.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(r"\\\1", flat)


def pipes(header: Sequence[str], lines: Iterable[Sequence[str]], right: Iterable[int] = ()) -> str:
    """Return a pipe table.

    Args:
        header: already escaped, as the lines are.
        lines: as long as the header.
        right: columns whose numbers stand at the right.
    """
    flush = set(right)
    rule = ["---:" if n in flush else "---" for n in range(len(header))]
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, rule, *lines])


def _opening(words: str) -> str:
    # At the start of a line, these would begin a heading or a list.
    return _LEADING.sub(r"\1\\", escape(words))


def _measured(point: Point) -> str:
    spread = "" if point.spread is None else f" ±{plain(point.spread)}"
    return plain(point.y) + spread + (f" ({point.label})" if point.label else "")


def _block(block: Block) -> Iterator[str]:
    yield f"### {escape(block.title)}"
    yield _prose(block.caption)
    match block:
        case Table():
            yield from _table(block)
        case Chart():
            yield _image(block)
            header, lines = points(block)
            yield pipes([escape(h) for h in header], [[escape(cell) for cell in line] for line in lines])
        case Heat():
            yield _image(block)
            yield _largest(block)
    yield "\n".join(f"- {_opening(note)}" for note in block.notes)


def _image(block: Chart | Heat) -> str:
    return f"![{escape(block.title)}](figures/{block.name}.svg)"


def _table(table: Table) -> Iterator[str]:
    best = {column.key: marks(table.rows, column) for column in table.columns}
    lines: list[list[str]] = []
    for group, rows in grouped(table.rows):
        if group:
            lines.append([f"**{escape(group)}**", *("" for _ in table.columns)])
        for row in rows:
            cells = [_cell(row.cells.get(c.key), c, best[c.key] if row.ranked else {}) for c in table.columns]
            lines.append([escape(row.title), *cells])
    header = ["", *(escape(column.title) for column in table.columns)]
    yield pipes(header, lines, [n for n, column in enumerate(table.columns, 1) if numeric(table, column)])
    yield " ".join(key(table, "**Bold**", "<ins>underlined</ins>", r"\*"))
    if seeds := by_seed(table):
        lines = [[escape(word) for word in line] for line in seeds]
        yield "<details><summary>By training seed</summary>"
        yield pipes(["Line", "Column", "By seed"], lines)
        yield "</details>"


def grouped(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Return the lines by group, in the order in which the groups appear."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.group, []).append(row)
    return list(found.items())


def numeric(table: Table, column: Column) -> bool:
    """Return whether a column holds numbers: some, or nothing else."""
    cells = [cell for row in table.rows if (cell := row.cells.get(column.key))]
    return not cells or any(isinstance(cell, Value) for cell in cells)


def _cell(cell: Cell, column: Column, best: dict[str, Mark]) -> str:
    if not isinstance(cell, Value):
        return escape(cell) if cell else EMPTY
    shown = number(cell.value, column.form)
    match best.get(shown, ""):
        case "best":
            words = f"**{shown}**"
        case "second":
            words = f"<ins>{shown}</ins>"
        case _:
            words = shown
    words += r"\*" if cell.star else ""
    if cell.spread is not None:
        words += f" ±{number(cell.spread, column.form)}"
    if cell.paper is not None and cell.difference is not None:
        gap = signed(cell.difference, column.form)
        words += f"<br><sub>paper {number(cell.paper, column.form)}, {gap}</sub>"
    return words


def _largest(heat: Heat) -> str:
    lines = []
    for row in heat.rows:
        ranked = sorted(zip(row.values, row.labels, strict=True), key=lambda pair: -pair[0])
        lines += [[escape(row.title), escape(label), plain(value)] for value, label in ranked[:LARGEST]]
    return pipes(["Row", "Label", "Value"], lines, [2])


def _prose(words: str) -> str:
    return "\n\n".join(_opening(paragraph) for paragraph in re.split(r"\n\s*\n", words) if paragraph.strip())


def _code(place: str) -> str:
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", place)), default=0))
    pad = " " if "`" in place else ""
    return f"{fence}{pad}{' '.join(place.split())}{pad}{fence}"
