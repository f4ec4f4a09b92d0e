"""Charts and heat maps as files, for papers and slides: SVG and PDF, the same bytes each time."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rella.errors import MissingError
from rella.report.contents import Chart, Heat, Series
from rella.report.html import SCALE, shares
from rella.report.markdown import plain
from rella.report.svg import Axis, axes, finite

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.container import ErrorbarContainer
    from matplotlib.figure import Figure

# Okabe and Ito's, with two that can be told from them.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b0508a", "#b98000", "#3b9fd8", "#444444", "#7a5195")
MARKERS = ("o", "s", "^", "D", "v", "P", "<")
LABEL = 28
"""Characters of a heat map's label."""
ENTRY = 36
"""Characters of a legend's."""

SETTINGS: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.h_pad": 0.07,
    "figure.constrained_layout.w_pad": 0.07,
    "grid.color": "#e1e5ea",
    "legend.frameon": False,
    # Text stays text, and a film's dollar sign is no formula.
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
    "text.parse_math": False,
    # Or names inside the file are drawn by chance.
    "svg.hashsalt": "rella",
}


def save(block: Chart | Heat, folder: Path) -> list[Path]:
    """Write a chart or a heat map.

    Args:
        block: what is drawn; its name is the files'.
        folder: made if it is not there.

    Returns:
        `<name>.svg` and `<name>.pdf` in the folder.

    Raises:
        MissingError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingError("figures need matplotlib: pip install 'rella[report]'") from error
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{block.name}.svg", folder / f"{block.name}.pdf"]
    with matplotlib.rc_context(), warnings.catch_warnings():
        # Letters that the font lacks are boxes in the PDF, and right in the SVG.
        warnings.filterwarnings("ignore", message=r"Glyph \d+")
        # Not the user's matplotlibrc: it would make other bytes.
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        size = (5.2, 3.4) if isinstance(block, Chart) else (7.2, 0.4 + 1.9 * max(1, len(block.rows)))
        figure = Figure(figsize=size, layout="constrained")
        if isinstance(block, Chart):
            _chart(block, figure)
        else:
            _heat(block, figure)
        figure.savefig(paths[0], metadata={"Date": None})
        figure.savefig(paths[1], metadata={"CreationDate": None})
    return paths


def _chart(chart: Chart, figure: Figure) -> None:
    plot = figure.add_subplot()
    plot.set_title(chart.title, loc="left", fontweight="bold")
    plot.set_xlabel(chart.x_title)
    plot.set_ylabel(chart.y_title)
    plot.grid(axis="y")
    plot.set_axisbelow(True)
    plane = axes(chart)
    if plane is None:
        return
    across, up = plane
    drawn: list[tuple[Any, str]] = [
        (_series(plot, across, n, series), series.title) for n, series in enumerate(chart.series)
    ]
    if any(series.paper for series in chart.series):
        lines = plot.plot([], [], color="#5a6470", linewidth=0.8, dashes=(3, 3))
        drawn.append((lines[0], "the paper, in the same colour"))
    if chart.level is not None:
        name, height = chart.level
        line = plot.axhline(height, color="#5a6470", linewidth=1, linestyle=(0, (5, 4)))
        drawn.append((line, f"{name} ({plain(height)})"))
    if chart.diagonal:
        drawn.append((plot.axline((0, 0), slope=1, color="#9aa3ad", linewidth=1, linestyle=":"), "y = x"))
    plot.set_xlim(across.low, across.high)
    plot.set_ylim(up.low, up.high)
    plot.set_xticks([at for at, _ in across.ticks], [label for _, label in across.ticks])
    plot.set_yticks([at for at, _ in up.ticks], [label for _, label in up.ticks])
    _legend(figure, drawn)


def _legend(figure: Figure, drawn: Sequence[tuple[Any, str]]) -> None:
    # A leading underscore would hide an entry.
    names = ["\u200b" + _short(name, ENTRY) if name.startswith("_") else _short(name, ENTRY) for _, name in drawn]
    columns = max(1, min(3, 84 // (6 + max(map(len, names)))))
    figure.set_figheight(3.1 + 0.17 * math.ceil(len(names) / columns))
    figure.legend([line for line, _ in drawn], names, loc="outside lower center", ncols=columns)


def _short(words: str, length: int) -> str:
    return words if len(words) <= length else words[: length - 1] + "…"


def _series(plot: Axes, across: Axis, n: int, series: Series) -> ErrorbarContainer:
    colour = COLOURS[n % len(COLOURS)]
    paper, found = finite(series.paper), finite(series.points)
    if paper:
        xs, ys = [across.position(p.x) for p in paper], [p.y for p in paper]
        plot.plot(xs, ys, color=colour, linewidth=0.8, dashes=(3, 3), marker="o", markersize=2, markerfacecolor="white")
    return plot.errorbar(
        [across.position(p.x) for p in found],
        [p.y for p in found],
        yerr=[p.spread or 0 for p in found] if any(p.spread for p in found) else None,
        color=colour,
        marker=MARKERS[n % len(MARKERS)],
        markersize=4.5,
        markeredgecolor="white",
        markeredgewidth=0.5,
        linewidth=1.6,
        linestyle=(0, (4, 2)) if series.dashed else "-",
        elinewidth=1,
        capsize=2,
    )


def _heat(heat: Heat, figure: Figure) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("rella", [[part / 255 for part in colour] for colour in SCALE])
    figure.suptitle(heat.title, x=0.01, ha="left", fontweight="bold")
    plots: Any = figure.subplots(max(1, len(heat.rows)), squeeze=False)
    for row, (plot,) in zip(heat.rows, plots, strict=False):
        # Rectangles of their own rather than an image: a PDF's stays sharp.
        plot.pcolormesh([shares(row)] if row.values else [[]], cmap=colours, vmin=0, vmax=1, edgecolors="white")
        plot.set_title(row.title, loc="left", fontsize=8.5)
        labels = [_short(label, LABEL) for label in row.labels]
        plot.set_xticks([n + 0.5 for n in range(len(labels))], labels, rotation=90, fontsize=6)
        plot.set_yticks([])
        plot.tick_params(length=0)
        for side in ("left", "bottom"):
            plot.spines[side].set_visible(False)
