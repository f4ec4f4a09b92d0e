"""What a report is made of: its scale, its runs and what their scores say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rella.cli import Resolved
from rella.dist.figures import output_folder
from rella.dist.measure import Measurements
from rella.dist.run import Runner
from rella.paper.experiments import SMALL_TEXT, TITLES, Exhibit, Maker, Run, Scale, paper_scale
from rella.provenance import code_version, machine
from rella.report_config import ReportConfig, check_report, chosen_exhibits

STAND_IN = (
    "Backbones and text models marked (small) are small models of the paper's architectures with random weights: they "
    "run through the same code and know nothing: what they score without tuning means nothing."
)
ORIGIN = {"flag", "file", "preset", "call"}


class ReportSetup:
    """What one report is made of."""

    def __init__(self, runner: Runner, resolved: Resolved, config: ReportConfig) -> None:
        """Settle the scale: the user's values, else the paper's, else small ones.

        Raises:
            InputError: an unknown table, or values of which there have to be others.
        """
        check_report(config)
        self.runner, self.config = runner, config
        given = frozenset(n for n, source in resolved.sources.items() if source.split()[0] in ORIGIN)
        self.small: list[str] = []
        self.scale = self._scale()
        self.maker = Maker(runner.experiment, self.scale, given)
        self.measurements = Measurements(runner)

    def _scale(self) -> Scale:
        e, config = self.runner.experiment, self.config
        scale = paper_scale(e.dataset)
        if e.model == "tiny":
            scale = self._small(scale)
        names = ("few", "curve", "lengths", "dimensions", "backbones", "baselines")
        chosen: dict[str, Any] = {name: getattr(config, name) for name in names}
        scale = replace(scale, **{name: value for name, value in chosen.items() if value != "auto"})
        if config.text_bases != "auto":
            scale = replace(scale, bert=config.text_bases[0], t5=config.text_bases[-1])
        if e.model not in scale.backbones:
            scale = replace(scale, backbones=(*scale.backbones, e.model))
        most = self.runner.model.hidden_size
        return replace(scale, dimensions=tuple(d for d in scale.dimensions if d <= most))

    def _small(self, scale: Scale) -> Scale:
        """Put small models in the place of the paper's where the experiment's own is one."""
        from rella.lm.loading import quiet_libraries
        from rella.lm.stand_ins import SMALL, stand_in, text_stand_ins

        names, config = chosen_exhibits(self.config), self.config
        with quiet_libraries():
            if config.backbones == "auto" and {"table2", "table4", "table5"} & set(names):
                self.small = [str(stand_in(name)) for name in SMALL]
                titles = {path: f"{TITLES[name]} (small)" for path, name in zip(self.small, SMALL, strict=True)}
                # Where Vicuna-13B stands in the paper's tables.
                ordered = (*self.small[:3], "tiny", *self.small[3:])
                scale = replace(scale, backbones=ordered, titles={**titles, "tiny": "tiny"})
            if config.text_bases == "auto" and "table2" in names and config.only != "llm":
                bert, t5 = map(str, text_stand_ins(self.runner.experiment))
                self.small += [bert, t5]
                scale = replace(scale, bert=bert, t5=t5, text_values=SMALL_TEXT)
        return scale

    @property
    def folder(self) -> Path:
        """Where the page goes."""
        e = self.runner.experiment
        return output_folder(self.config.out, f"reports/{e.dataset}-{Path(e.model).name}", self.runner.storage)

    # --- the runs that analyses look at ---

    def base(self) -> Run:
        """The LLM as it is, on the most recent behaviours."""
        return self.maker.zero(self.runner.experiment.model, "recent")

    def zero(self) -> Run:
        """ReLLa without tuning."""
        return self.maker.zero(self.runner.experiment.model, "retrieved")

    def ours(self) -> Run:
        """ReLLa tuned on the larger N."""
        return self.maker.few(self.scale.few[-1])

    def extra(self, names: Sequence[str]) -> list[Run]:
        """Return the runs that no list of experiments has."""
        found = []
        if {"figure8", "table2"} & set(names) and self.config.only == "all":
            found += [self.base(), self.zero(), self.ours()]
        if "table6" in names:
            found += [self.ours(), self.maker.fitted("sim")]
        return found

    def caption(self, exhibit: Exhibit | None = None) -> str:
        """Return what was run: data set, split, rows, model, K, N, seeds."""
        e = self.runner.experiment
        run = self.base() if exhibit is None else next(iter(exhibit.runs()))
        rows = self.measurements.pipeline(run.by_seed()[0]).score.artifact(self.runner.storage).manifest().rows
        which = "all" if e.test_rows == "all" else "a seeded subset"
        spread = f"over {e.seeds} training seeds" if e.seeds > 1 else "bootstrap over users, 1 training seed"
        k = "" if exhibit is not None and exhibit.x_title == "K" else f", K = {e.k}"
        return (
            f"{e.dataset}, {e.score.split} split, {rows:,} rows ({which}); {self.scale.title(e.model)}{k}; "
            f"best step on {e.tune.select_on}; ± {spread}"
        )

    def facts(self) -> list[tuple[str, str]]:
        """Return what was run, for the page's head."""
        e, here, code = self.runner.experiment, machine(), code_version()
        found = [
            ("Data set", e.dataset),
            ("Model", f"{self.scale.title(e.model)} ({self.runner.model.digest[:12]})"),
            ("K", str(e.k)),
            ("N", ", ".join(f"{n:,}" for n in self.scale.few)),
            ("Training seeds", str(e.seeds)),
            ("Precision", e.precision),
            ("Machine", f"{here['cpus']} CPUs, {here['system']}"),
            ("Code", f"rella {code['rella']}" + (f", {code['commit']}" if code["commit"] else "")),
        ]
        return [*found, ("Note", STAND_IN)] if self.small else found
