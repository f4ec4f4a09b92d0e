"""What a report's user may set, beside the experiment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rella.baselines import Baseline
from rella.errors import InputError
from rella.stages import Auto

TABLES = tuple(f"table{n}" for n in range(1, 10))
FIGURES = ("figure1", "figure6", "figure7", "figure8")
EXHIBITS = (*TABLES, *FIGURES)
"""What can be asked for, in the page's order."""


@dataclass(frozen=True)
class ReportConfig:
    """Which of the paper's tables and figures, and at what scale; `auto` is the paper's for the data set."""

    what: tuple[str, ...] = ("all",)
    """`table1` ... `table9`, `figure1`, `figure6`, `figure7`, `figure8`, or `all`; also without a flag, in front."""
    few: tuple[int, ...] | Auto = "auto"
    """N of the two few-shot settings of Tables 2 and 5, e.g. 8192 and 65536 (`< 1%`, `< 10%`)."""
    curve: tuple[int, ...] | Auto = "auto"
    """N of Figure 7."""
    lengths: tuple[int, ...] | Auto = "auto"
    """K of Tables 4 and 9 and of Figures 1 and 6."""
    dimensions: tuple[int, ...] | Auto = "auto"
    """Dimensions of Table 7; those above the model's hidden size are left out."""
    backbones: tuple[str, ...] | Auto = "auto"
    """LLMs of Tables 2, 4 and 5: names or folders; `auto`: the paper's five, or with `tiny` small models of the same
    architectures with random weights."""
    text_bases: tuple[str, ...] | Auto = "auto"
    """BERT and T5 of CTR-BERT, PTab and P5; `auto`: the paper's, or with `tiny` small ones with random weights."""
    baselines: tuple[Baseline, ...] | Auto = "auto"
    """Baselines of Table 2; `auto`: all eleven."""
    only: Literal["all", "baselines", "llm"] = "all"
    """Rows and curves that are run: `all`, the `baselines` alone (no GPU is needed), or those of an `llm` alone."""
    batches: int = 50
    """Table 6: timed batches, after five to warm up."""
    out: str = "auto"
    """Folder of the page, the Markdown and the figures; `auto`: `reports/<data set>-<model>`, of a submitted
    job in the storage."""


def chosen_exhibits(config: ReportConfig) -> tuple[str, ...]:
    """Return the names of what is asked for, in the page's order.

    Raises:
        InputError: an unknown name, with the known ones.
    """
    asked = [name.strip().lower().replace(" ", "") for name in config.what]
    if unknown := [name for name in asked if name not in (*EXHIBITS, "all")]:
        raise InputError(f"report: unknown {', '.join(unknown)}; there are {', '.join(EXHIBITS)} and all")
    return tuple(name for name in EXHIBITS if name in asked or "all" in asked)


def check_report(config: ReportConfig) -> None:
    """Verify the lists of values.

    Raises:
        InputError: names the flag, and what it takes.
    """
    for name in ("few", "curve", "lengths", "dimensions", "backbones", "baselines", "text_bases"):
        values = getattr(config, name)
        most = {"few": 2, "text_bases": 2}.get(name)
        wrong = values != "auto" and (not values or (most is not None and len(values) > most))
        if wrong or (values != "auto" and any(isinstance(v, int) and v < 1 for v in values)):
            takes = f"one or two values, as [{'8192, 65536' if name == 'few' else 'bert-base-uncased, t5-base'}]"
            raise InputError(
                f"--report.{name.replace('_', '-')} {list(values)}: "
                + (f"takes {takes}" if most else "takes a list of at least one value, numbers above 0")
            )
