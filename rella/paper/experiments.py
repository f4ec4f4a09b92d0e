"""Tables 2 to 8 and Figures 1, 6 and 7 as lists of experiments. Pure: nothing is run here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from rella.backbones import BACKBONES
from rella.baselines import TEXT_BASELINES, Baseline, IdBaseline, as_text
from rella.config import DATASETS, LISTS, MODELS, Experiment, History, Values
from rella.errors import InputError
from rella.paper.numbers import K_LIST, Printed, numbers, printed
from rella.pipeline import VARIANTS
from rella.sweep import with_values

ID_BASELINES: tuple[IdBaseline, ...] = get_args(IdBaseline)
TITLES = {
    "deepfm": "DeepFM", "autoint": "AutoInt", "dcnv2": "DCNv2", "gru4rec": "GRU4Rec", "caser": "Caser",
    "sasrec": "SASRec", "din": "DIN", "sim": "SIM", "ctr-bert": "CTR-BERT", "ptab": "PTab", "p5": "P5",
    "falcon-7b": "Falcon-7B", "mistral-7b": "Mistral-7B", "vicuna-7b": "Vicuna-7B", "vicuna-13b": "Vicuna-13B",
    "llama-2-70b-chat": "LLaMA2-70B",
}  # fmt: skip
"""As the paper writes them."""
FEW = ("<1%", "<10%")


@dataclass(frozen=True)
class Scale:
    """What is varied, and over which values."""

    few: tuple[int, ...]
    """N of the few-shot settings."""
    curve: tuple[int, ...]
    """N of Figure 7."""
    lengths: tuple[int, ...]
    """K."""
    dimensions: tuple[int, ...]
    backbones: tuple[str, ...]
    """Models of Tables 4 and 5; the experiment's own is one of them."""
    titles: Values
    """Model → how tables call it."""
    bert: str = "bert-base-uncased"
    t5: str = "t5-base"
    baselines: tuple[Baseline, ...] = (*ID_BASELINES, *TEXT_BASELINES)
    ablated: int = 0
    """N of Tables 3, 7 and 8 and of Figure 6: an index of `few`; the paper's are `< 1%`."""
    text_values: tuple[tuple[str, Any], ...] = ()
    """Fields that the LM-based baselines are given where the scale is a small one."""

    @property
    def n(self) -> int:
        """N where it is not varied."""
        return self.few[min(self.ablated, len(self.few) - 1)]

    def title(self, model: str) -> str:
        """Return how tables call a model."""
        return str(self.titles.get(model, TITLES.get(model, model)))


SMALL_TEXT: tuple[tuple[str, Any], ...] = (
    ("textctr.batch_size", 64), ("textctr.max_epochs", 3), ("textctr.learning_rate", 1e-3),
    ("textctr.max_train_rows", 2048), ("textctr.max_tokens", 256), ("textctr.mlm_batch_size", 64),
    ("textctr.mlm_epochs", 1), ("textctr.mlm_learning_rate", 1e-3), ("textctr.valid_per_epoch", 1),
)  # fmt: skip
"""For models of a few thousand weights on `sample`."""


def paper_scale(dataset: str) -> Scale:
    """Return the paper's values for a data set; for `sample` ones that two cores finish in minutes, without models.

    A data set that the paper has not is taken as MovieLens-1M.
    """
    if dataset == "sample":
        return Scale((128, 512), (64, 128, 256, 512), (2, 4, 6, 8, 10, 12), (64, 32, 16, 8), (), {},
                     ablated=1, text_values=SMALL_TEXT)  # fmt: skip
    lists = LISTS.get(dataset, LISTS["ml-1m"])
    few = (256, 1024) if dataset == "bookcrossing" else (8192, 65536)
    ordered = ("falcon-7b", "mistral-7b", "vicuna-7b", "vicuna-13b", "llama-2-70b-chat")
    assert set(ordered) == set(BACKBONES)
    curve, lengths = (tuple(int(n) for n in lists[name]) for name in ("shots", "k"))
    return Scale(few, curve, lengths, (512, 256, 128, 64), ordered, {})


@dataclass(frozen=True)
class Run:
    """One thing to be measured: an LLM's scores, or a baseline's."""

    experiment: Experiment
    baseline: bool = False

    @property
    def seeded(self) -> bool:
        """Whether training seeds change it."""
        return self.baseline or self.experiment.adapter == "auto"

    def by_seed(self) -> list[Run]:
        """Return the run once for every training seed that is asked for."""
        e = self.experiment
        seeds = range(e.seed, e.seed + (e.seeds if self.seeded else 1))
        return [replace(self, experiment=replace(e, seed=seed, seeds=1)) for seed in seeds]


@dataclass(frozen=True)
class Line:
    """A row of a table or a curve of a figure: a run for each column or point."""

    title: str
    runs: tuple[Run, ...]
    group: str = ""
    paper: tuple[Printed | float | None, ...] = ()
    """Beside each run: all metrics, or AUC alone."""


@dataclass(frozen=True)
class Exhibit:
    """A table or figure of the paper."""

    name: str
    title: str
    form: Literal["metrics", "grid", "curve"]
    """A run's three metrics; AUC by column; AUC over x."""
    lines: tuple[Line, ...]
    x: tuple[int, ...] = ()
    x_title: str = ""
    level: Line | None = None
    """A dashed level of a figure."""

    def runs(self) -> Iterator[Run]:
        """Yield all of them."""
        for line in (*self.lines, *([self.level] if self.level else [])):
            yield from line.runs


class Maker:
    """Makes exhibits from what they have in common."""

    def __init__(self, base: Experiment, scale: Scale, given: frozenset[str] = frozenset()) -> None:
        """Take what all share.

        Args:
            base: experiment with data set, model, K and everything that is not varied.
            scale: what is.
            given: fields that the user has set, which a model's own values do not replace.
        """
        self.base = replace(base, history="retrieved", mix="mixed", adapter="auto")
        self.scale, self.given = scale, given
        if base.adapter != "auto":
            raise InputError(f"--adapter {base.adapter}: a report tunes its adapters; leave it out")

    # --- runs ---

    def of_model(self, model: str) -> Experiment:
        """Return the base on another LLM, with that one's own values."""
        if model == self.base.model:
            return self.base
        own = {n: v for n, v in MODELS.get(model, {}).items() if n not in self.given}
        return with_values(replace(self.base, model=model, revision=None), own)

    def zero(self, model: str, history: History, k: int | None = None) -> Run:
        """Return a zero-shot run."""
        e = self.of_model(model)
        return Run(replace(e, adapter="none", history=history, k=k or e.k))

    def few(self, n: int, model: str | None = None, **changes: Any) -> Run:  # noqa: ANN401 - fields of Experiment
        """Return ReLLa tuned on N shots."""
        return Run(replace(self.of_model(model or self.base.model), shots=n, **changes))

    def fitted(self, name: Baseline, n: int | Literal["all"] = "all", k: int | None = None) -> Run:
        """Return a baseline, full-shot unless N is given."""
        values: dict[str, Any] = {"baseline.model": name, "shots": n, "k": k or self.base.k}
        text = as_text(name)
        if text is not None:
            base = self.scale.t5 if name == "p5" else self.scale.bert
            small = dict(self.scale.text_values)
            own = {f"textctr.{field}": v for field, v in TEXT_BASELINES[text].items() if field != "base"}
            values |= {**own, **small, "textctr.base": base}
        return Run(
            with_values(self.base, {n: v for n, v in values.items() if n not in self.given or "." not in n}), True
        )

    # --- the paper's figures ---

    def number(self, table: str, *row: str | int) -> Printed | None:
        """Return the metrics that the paper prints, or None for what it has not."""
        try:
            return printed(table, *row)
        except InputError:
            return None

    def on_ml_1m(self, table: str, *row: str | int) -> Printed | None:
        """Return what a table has that the paper prints for MovieLens-1M alone."""
        return self.number(table, *row) if self.base.dataset == "ml-1m" else None

    # --- tables ---

    def table2(self) -> Exhibit:
        """Overall performance (§4.2)."""
        dataset, model = self.base.dataset, self.base.model

        def paper(group: str, row: str) -> tuple[Printed | None]:
            return (self.number("table2", dataset, group, row),)

        lines = [
            Line(self.scale.title(m), (self.zero(m, "recent"),), "Zero-shot", paper("zero-shot", TITLES.get(m, m)))
            for m in dict.fromkeys((*(b for b in self.scale.backbones if b == "vicuna-7b"), model))
        ]
        ours = "ReLLa (Ours)"
        lines.append(Line(ours, (self.zero(model, "retrieved"),), "Zero-shot", paper("zero-shot", ours)))
        lines += [
            Line(TITLES.get(b, b), (self.fitted(b),), "Full-shot", paper("full-shot", TITLES.get(b, b)))
            for b in self.scale.baselines
        ]
        lines += [
            Line(f"ReLLa ({label}, N = {n:,})", (self.few(n),), "Few-shot", paper("few-shot", f"ReLLa ({label})"))
            for n, label in zip(self.scale.few, FEW, strict=False)
        ]
        return Exhibit("table2", "Table 2: overall performance", "metrics", tuple(lines))

    def table3(self) -> Exhibit:
        """Ablations (§4.5)."""
        base = replace(self.base, shots=self.scale.n)
        lines = (
            Line(v.title, (Run(v.apply(base)),), paper=(self.number("table3", base.dataset, v.title),))
            for v in VARIANTS.values()
        )
        return Exhibit("table3", f"Table 3: ablations, N = {base.shots:,}", "metrics", tuple(lines))

    def table4(self) -> Exhibit:
        """Backbones in zero-shot by K (Appendix D.1)."""
        lines = []
        for model in self.scale.backbones:
            known = numbers()["table4"].get(TITLES.get(model, "")) if self.base.dataset == "ml-1m" else None
            paper = tuple(known[K_LIST.index(k)] if known and k in K_LIST else None for k in self.scale.lengths)
            runs = tuple(self.zero(model, "recent", k) for k in self.scale.lengths)
            lines.append(Line(self.scale.title(model), runs, paper=paper))
        return Exhibit(
            "table4", "Table 4: zero-shot AUC of backbones by K", "grid", tuple(lines), self.scale.lengths, "K"
        )

    def table5(self) -> Exhibit:
        """SUBR and ReiT on other backbones (Appendix D.1)."""
        labels = list(zip(self.scale.few, FEW, strict=False))
        lines = [
            Line(f"few-shot ({x}, N = {n:,})", (self.fitted("sim", n),), "SIM",
                 (self.on_ml_1m("table5", "SIM", f"few-shot ({x})"),))
            for n, x in labels
        ]  # fmt: skip
        lines.append(Line("full-shot", (self.fitted("sim"),), "SIM", (self.on_ml_1m("table5", "SIM", "full-shot"),)))
        for model in (m for m in self.scale.backbones if "70b" not in m):
            group, known = self.scale.title(model), TITLES.get(model, model)
            made = [("zero-shot", "zero-shot", self.zero(model, "recent"))]
            made.append(("with SUBR", "with SUBR", self.zero(model, "retrieved")))
            made += [(f"with ReiT ({x}, N = {n:,})", f"with ReiT ({x})", self.few(n, model)) for n, x in labels]
            lines += [Line(t, (run,), group, (self.on_ml_1m("table5", known, row),)) for t, row, run in made]
        return Exhibit("table5", "Table 5: SUBR and ReiT with other backbones", "metrics", tuple(lines))

    def table7(self) -> Exhibit:
        """Dimensions that PCA keeps (Appendix D.3)."""
        values = [(d, {"pca_dim": d}, str(d)) for d in self.scale.dimensions]
        return Exhibit("table7", "Table 7: dimensions after PCA", "metrics", tuple(self._varied("table7", values)))

    def table8(self) -> Exhibit:
        """Similarity of item vectors (Appendix D.3)."""
        names = {"cosine": "Cosine", "l2": "L2", "l1": "L1"}
        values = [(d, {"distance": d}, title) for d, title in names.items()]
        return Exhibit(
            "table8", "Table 8: similarity of item vectors", "metrics", tuple(self._varied("table8", values))
        )

    def _varied(self, table: str, values: Sequence[tuple[Any, dict[str, Any], str]]) -> Iterator[Line]:
        n = self.scale.n
        for group, key in (("Zero-shot", "zero-shot"), (f"Few-shot, N = {n:,}", "few-shot")):
            for value, changes, title in values:
                e = replace(self.base, **changes, adapter="auto" if key == "few-shot" else "none", shots=n)
                yield Line(title, (Run(e),), group, (self.on_ml_1m(table, key, value),))

    # --- figures ---

    def _sim(self) -> Line:
        paper = self.number("table2", self.base.dataset, "full-shot", "SIM")
        points = tuple(paper.auc if paper and k == self.base.k else None for k in self.scale.lengths)
        return Line("SIM (full-shot)", tuple(self.fitted("sim", k=k) for k in self.scale.lengths), paper=points)

    def _zero(self) -> Line:
        model = self.base.model
        known = numbers()["table4"].get(TITLES.get(model, "")) if self.base.dataset == "ml-1m" else None
        points = tuple(known[K_LIST.index(k)] if known and k in K_LIST else None for k in self.scale.lengths)
        runs = tuple(self.zero(model, "recent", k) for k in self.scale.lengths)
        return Line(f"{self.scale.title(model)} (zero-shot)", runs, paper=points)

    def figure1(self) -> Exhibit:
        """Lifelong sequential behaviour incomprehension (§1)."""
        return Exhibit("figure1", "Figure 1: AUC by length of the behaviour sequence", "curve",
                       (self._sim(), self._zero()), self.scale.lengths, "K")  # fmt: skip

    def figure6(self) -> Exhibit:
        """AUC by K (§4.3)."""
        n = self.scale.n
        paper = self.number("table2", self.base.dataset, "few-shot", "ReLLa (<1%)")
        points = tuple(paper.auc if paper and k == self.base.k else None for k in self.scale.lengths)
        ours = Line(f"ReLLa (few-shot, N = {n:,})", tuple(self.few(n, k=k) for k in self.scale.lengths), paper=points)
        return Exhibit("figure6", "Figure 6: AUC by length of the behaviour sequence", "curve",
                       (self._sim(), self._zero(), ours), self.scale.lengths, "K")  # fmt: skip

    def figure7(self) -> Exhibit:
        """AUC by N (§4.4)."""
        curve, dataset = self.scale.curve, self.base.dataset
        rella = [self.number("table2", dataset, "few-shot", f"ReLLa ({x})") for x in FEW]
        sim = [self.on_ml_1m("table5", "SIM", f"few-shot ({x})") for x in FEW]

        def points(known: Sequence[Printed | None]) -> tuple[float | None, ...]:
            by_n = dict(zip(self.scale.few, known, strict=False))
            return tuple(p.auc if (p := by_n.get(n)) is not None else None for n in curve)

        lines = (
            Line("ReLLa", tuple(self.few(n) for n in curve), paper=points(rella)),
            Line("SIM", tuple(self.fitted("sim", n) for n in curve), paper=points(sim)),
        )
        level = Line("SIM (full-shot)", (self.fitted("sim"),))
        return Exhibit("figure7", "Figure 7: AUC by number of shots", "curve", lines, curve, "N", level)


MADE = ("table2", "table3", "table4", "table5", "table7", "table8", "figure1", "figure6", "figure7")
"""What a list of experiments gives; the others are facts of the data or analyses."""


def exhibits(names: Sequence[str], maker: Maker, only: Literal["all", "baselines", "llm"] = "all") -> list[Exhibit]:
    """Return the tables and figures of `names` that are lists of experiments, with the lines of one kind or all."""
    made: list[Exhibit] = [getattr(maker, name)() for name in names if name in MADE]
    if only == "all":
        return made
    kept = [replace(e, lines=tuple(n for n in e.lines if n.runs[0].baseline == (only == "baselines"))) for e in made]
    return [e for e in kept if e.lines]


def is_paper_s(dataset: str) -> bool:
    """Return whether the paper prints figures for a data set."""
    return dataset in DATASETS and dataset != "sample"
