"""The figures that the paper prints, by table and row (`numbers.yaml`), to be put beside ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from rella.errors import InputError

K_LIST = (5, 10, 15, 20, 25, 30)
"""Lengths K of Tables 4 and 9."""


@dataclass(frozen=True)
class Printed:
    """A row's metrics in the paper."""

    auc: float
    log_loss: float
    accuracy: float


@cache
def numbers() -> Mapping[str, Any]:
    """Return everything that numbers.yaml holds."""
    found: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "numbers.yaml").read_text(encoding="utf-8"))
    return found


def printed(table: str, *row: str | int) -> Printed:
    """Return the metrics of one row, e.g. `printed("table2", "ml-1m", "full-shot", "SIM")`.

    Raises:
        InputError: there is no such row, with those that there are.
    """
    found: Any = numbers()
    for name in (table, *row):
        if not isinstance(found, Mapping) or name not in found:
            there = ", ".join(map(str, found)) if isinstance(found, Mapping) else "no rows below"
            raise InputError(f"the paper's {table} has no {name!r}: there are {there}")
        found = found[name]
    return Printed(*map(float, found))
