"""The paper's tables and figures: runs what is missing, and writes the page, Markdown, figures and numbers."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rella.cli import Resolved
from rella.ctr.floor import Floor
from rella.data.facts import TABLE1, checks
from rella.data.selection import Chosen, choose, split_ids
from rella.dist.analyses import complexity_table, figure8, heterogeneity_table
from rella.dist.figures import Figures
from rella.dist.report_setup import ReportSetup
from rella.dist.run import Runner
from rella.metrics import Metrics, evaluate
from rella.paper.experiments import MADE, Exhibit, Line, Run, exhibits, is_paper_s
from rella.paper.numbers import numbers
from rella.report.blocks import Comparison, best_line, block
from rella.report.contents import Block, Chart, Column, Heat, Report, Row, Section, Table, Value
from rella.report.numbers import as_json
from rella.report.slices import Scored, calibration_chart, counts, slice_table
from rella.report.tables import METRICS
from rella.report_config import ReportConfig, chosen_exhibits
from rella.storage import SUBMITTED_JOB


def report(runner: Runner, resolved: Resolved) -> Figures:
    """Make the tables and figures that are asked for.

    Raises:
        RellaError: an unknown name, or a stage failed; the same command goes on where it was.
    """
    started = time.monotonic()
    config = resolved.report or ReportConfig()
    names = chosen_exhibits(config)
    if config.only != "all":
        # Both kinds are in these.
        names = tuple(name for name in names if name not in ("table6", "figure8"))
    own = ReportSetup(runner, resolved, config)
    wanted = exhibits(names, own.maker, config.only)
    names = tuple(n for n in names if n not in MADE or any(e.name == n for e in wanted))
    for exhibit in wanted:
        runner.say(f"report    {exhibit.title}: {len(set(exhibit.runs()))} runs")
    runner.prepare()
    needed = [run for exhibit in wanted for run in exhibit.runs()]
    own.measurements.run([*needed, *own.extra(names)])
    blocks = {name: _made(own, name, wanted) for name in names}
    facts = [
        *own.facts(),
        ("Time", f"{(time.monotonic() - started) / 60:.1f} minutes of this run"),
    ]
    page = Report(
        f"ReLLa on {runner.experiment.dataset}",
        f"Tables and figures of the paper, {'its scale' if is_paper_s(runner.experiment.dataset) else 'a small scale'}",
        facts,
        _sections(blocks, _details(own, names)),
        own.measurements.places(),
    )
    found = _written(page, own.folder)
    if SUBMITTED_JOB in os.environ and not runner.storage.is_local:
        # Nobody looks into the head's folders.
        place = f"reports/{own.folder.name}"
        for file in sorted(f for f in own.folder.rglob("*") if f.is_file()):
            runner.storage.write(f"{place}/{file.relative_to(own.folder)}", file.read_bytes())
        found["page"] = runner.storage.shown(f"{place}/report.html")
        print(found["page"])
    return found


def _made(own: ReportSetup, name: str, wanted: Sequence[Exhibit]) -> Block:
    """Return one table or figure."""
    listed = next((exhibit for exhibit in wanted if exhibit.name == name), None)
    if listed is not None:
        results = {run: own.measurements.measured(run) for run in listed.runs()}
        made = block(listed, results, own.caption(listed), _comparison(own, listed))
        full = [line for line in listed.lines if line.group == "Full-shot"]
        return _with_floor(own, made, full[0].runs[0]) if full and isinstance(made, Table) else made
    if name == "table1":
        return _table1(own)
    if name == "figure8":
        return figure8(own)
    return complexity_table(own) if name == "table6" else heterogeneity_table(own)


def _comparison(own: ReportSetup, exhibit: Exhibit) -> Comparison | None:
    """Test the better few-shot ReLLa against the best baseline, in Table 2."""
    if exhibit.name != "table2":
        return None
    results = {run: own.measurements.measured(run) for run in exhibit.runs()}
    few, full = ([line for line in exhibit.lines if line.group == g] for g in ("Few-shot", "Full-shot"))
    return own.measurements.compared(best_line(few, results), best_line(full, results)) if few and full else None


def _table1(own: ReportSetup) -> Table:
    """Return the data set's counts."""
    e = own.runner.experiment
    facts = own.runner.prepare().manifest().facts
    printed = dict(zip(TABLE1, numbers()["table1"].get(e.dataset, ()), strict=False))
    columns = [Column(name, name.capitalize(), None, ",.0f") for name in TABLE1]
    cells = {name: Value(float(facts[name]), paper=printed.get(name)) for name in TABLE1}
    known = checks(e.dataset, facts, e.data, e.data)
    notes = [f"{sum(c.holds for c in known)} of {len(known)} known facts hold."] if known else []
    return Table("table1", "Table 1: the data set", f"{e.dataset} as prepared", columns, [Row(e.dataset, cells)], notes)


def _details(own: ReportSetup, names: Sequence[str]) -> list[Block]:
    """Return slices and calibration of the base, ReLLa and the best baseline; with Table 2 alone."""
    if "table2" not in names or own.config.only != "all":
        return []
    exhibit = own.maker.table2()
    results = {run: own.measurements.measured(run) for run in exhibit.runs()}
    best = best_line([line for line in exhibit.lines if line.group == "Full-shot"], results)
    lines = [Line(f"{own.scale.title(own.runner.experiment.model)} (zero-shot)", (own.base(),)), best,
             Line("ReLLa (few-shot)", (own.ours(),))]  # fmt: skip
    models = {line.title: own.measurements.scores(line.runs[0])[2] for line in lines}
    scored = Rows.of(own, own.base()).described(own.measurements.scores(own.base())[1])
    return [slice_table(scored, models, own.caption()), calibration_chart(scored.labels, models, own.caption())]


@dataclass(frozen=True)
class Rows:
    """The scored rows and the training split, by the prepared data set."""

    scored: Chosen
    train: Chosen
    sizes: dict[str, int]
    """Number of users and items."""

    @staticmethod
    def of(own: ReportSetup, run: Run) -> Rows:
        """Read them for a run."""
        data = own.measurements.pipeline(run.by_seed()[0]).prepare.artifact(own.runner.storage)
        samples, sizes = data.read("samples"), {n: data.read(n, [n[:-1]]).num_rows for n in ("users", "items")}
        ids, _, _ = own.measurements.scores(run)
        return Rows(choose(samples, ids), choose(samples, split_ids(samples, "train")), sizes)

    def described(self, labels: npt.NDArray[np.int8]) -> Scored:
        """Return what slices are cut by."""
        popularity = counts(self.scored.item, self.train.item, self.sizes["items"])
        activity = counts(self.scored.user, self.train.user, self.sizes["users"])
        return Scored(labels, self.scored.end, popularity, activity)

    def floor(self) -> Metrics:
        """Return the metrics of what no model may fall below: shrunk means of user and item from the training rows."""
        found, _ = Floor.fit(self.train, self.sizes["users"], self.sizes["items"]).predict(self.scored)
        return evaluate(self.scored.label, found)


def _with_floor(own: ReportSetup, table: Table, run: Run) -> Table:
    """Return Table 2 with the floor among the full-shot rows."""
    found = Rows.of(own, run).floor()
    cells = {m: Value(getattr(found, m)) for m in METRICS}
    row = Row("Floor (shrunk means of user and item)", cells, "Full-shot", ranked=False)
    last = max(n for n, one in enumerate(table.rows) if one.group == "Full-shot")
    return replace(table, rows=[*table.rows[: last + 1], row, *table.rows[last + 1 :]])


def _sections(blocks: dict[str, Block], details: Sequence[Block]) -> list[Section]:
    tables = [b for name, b in blocks.items() if name.startswith("table")]
    drawn = [b for name, b in blocks.items() if name.startswith("figure")]
    found = [
        Section("Tables", "Ours, and where the paper has a number, the paper's and the difference.", tables),
        Section("Figures", "", drawn),
        Section("Where it is good", "The same scores by slice, and whether probabilities are what they say.", details),
    ]
    return [section for section in found if section.blocks]


def _written(page: Report, folder: Path) -> Figures:
    from rella.report import figures, html, markdown

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.html").write_text(html.page(page), encoding="utf-8")
    (folder / "report.md").write_text(markdown.text(page), encoding="utf-8")
    (folder / "results.json").write_text(json.dumps(as_json(page), indent=1) + "\n")
    drawn = [b for b in page.blocks if isinstance(b, Chart | Heat)]
    for one in drawn:
        figures.save(one, folder / "figures")
    tables = [b.name for b in page.blocks if isinstance(b, Table)]
    print(
        f"\n{folder / 'report.html'}\n{folder / 'report.md'}\n{folder / 'figures'}: {len(drawn)} figures as SVG and PDF"
    )
    return {"tables": tables, "figures": [b.name for b in drawn], "page": str(folder / "report.html"),
            "results": str(folder / "results.json")}  # fmt: skip
