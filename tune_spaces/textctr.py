"""Appendix C.2: what the paper chooses the settings of the LM-based baselines from. Only P5 has a choice."""

from __future__ import annotations

METRIC = "valid_auc"
MODE = "max"


def space(dataset: str, model: str) -> dict[str, tuple[float, ...]]:
    """Return the choices for one baseline, by field of the experiment; the same on every data set.

    Args:
        dataset: any.
        model: `ctr-bert`, `ptab` or `p5`.

    Raises:
        KeyError: no such LM-based baseline.
    """
    known: dict[str, dict[str, tuple[float, ...]]] = {
        "ctr-bert": {},
        "ptab": {},
        "p5": {"textctr.learning_rate": (5e-4, 1e-3)},
    }
    return known[model]
