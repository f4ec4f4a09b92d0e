"""§4.1.4: what the paper chooses ReiT's settings from, and wider ranges around it."""

from __future__ import annotations

from rella.config import CHOICES, LISTS

METRIC = "valid_auc"
MODE = "max"


def space(dataset: str, model: str = "reit") -> dict[str, tuple[float, ...]]:
    """Return the paper's choices by field of the experiment: learning rate, batch size, and N where Figure 7 has them.

    Args:
        dataset: its N are those of Figure 7; of another data set N is left to the experiment.
        model: `reit`.
    """
    del model
    shots = {"shots": LISTS[dataset]["shots"]} if dataset in LISTS else {}
    return {**CHOICES, **shots}


def wide(dataset: str, model: str = "reit") -> dict[str, tuple[float, ...] | dict[str, float | bool]]:
    """Return ranges from which trials are drawn: learning rates over two decades, LoRA's dropout, more batch sizes.

    Args:
        dataset: as in `space`.
        model: `reit`.
    """
    return {
        **space(dataset, model),
        "tune.batch_size": (64, 128, 256),
        "tune.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
        "tune.lora_dropout": {"low": 0.0, "high": 0.2},
    }
