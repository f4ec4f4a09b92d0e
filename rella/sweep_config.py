"""What a sweep's user may set, beside the experiment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rella.baselines import Baseline
from rella.stages import Auto

Method = Literal["reit", Baseline]
Shots = int | Literal["all"]


@dataclass(frozen=True)
class SweepConfig:
    """What a sweep tries, and how (§4.1.4, Appendix C)."""

    method: Method = "reit"
    """`reit`, or a baseline of Table 2."""
    space: str = "grid"
    """`grid`: the paper's choices; `wide`: continuous ranges around them (`reit`); or a YAML file: field of the
    experiment → a list of values, or `{low, high, log}`."""
    shots: tuple[Shots, ...] | Auto = "auto"
    """N to try; `auto`: those of Figure 7, or the experiment's own for other data sets and for baselines."""
    trials: int = 16
    """Settings drawn for each N where the space has a continuous range; a grid is tried whole."""
    seed: int = 0
    """Of what is drawn."""
    early_stopping: bool = False
    """ASHA: after a quarter, half, ... of the validations a trial stops unless it is among the better half of those
    with its N."""
    at_once: int | Auto = "auto"
    """Trials at a time; `auto`: as many groups of `cluster.workers` as the cluster has room for."""
    test: bool = True
    """Whether the best of each N is scored on the test split: the curve of Figure 7."""
    out: str = "auto"
    """Folder for `best-n<N>.yaml` and `sweep.json`; `auto`: `sweeps/<data set>-<method>`, of a submitted job in
    the storage."""
