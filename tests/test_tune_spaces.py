"""The search spaces are those of Appendix C, and their keys are fields of the experiment."""

from __future__ import annotations

import math

import pytest

from rella.config import Experiment, leaves
from tune_spaces import ctr, textctr

IDS = ("deepfm", "autoint", "dcnv2", "gru4rec", "caser", "sasrec", "din", "sim")
TEXTS = ("ctr-bert", "ptab", "p5")
FIELDS = {name for name, _, _ in leaves(Experiment())}

# Embedding sizes × dropout rates × batch sizes × the model's own, counted by hand from Appendix C.1.
SIZES = {
    "ml-1m": {
        "deepfm": 12 * 8, "autoint": 12 * 12, "dcnv2": 12 * 32, "gru4rec": 12 * 27,
        "caser": 12 * 81, "sasrec": 12 * 243, "din": 12 * 27, "sim": 12 * 27,
    },
    "bookcrossing": {
        "deepfm": 18 * 9, "autoint": 18 * 2, "dcnv2": 18 * 27, "gru4rec": 18 * 12,
        "caser": 18 * 54, "sasrec": 18 * 162, "din": 18 * 18, "sim": 18 * 18,
    },
}  # fmt: skip


@pytest.mark.parametrize("dataset", ["ml-1m", "ml-25m", "bookcrossing", "my-songs.yaml"])
@pytest.mark.parametrize("model", IDS)
def test_id_based(dataset: str, model: str) -> None:
    found = ctr.space(dataset, model)
    assert found.keys() <= FIELDS
    sizes = SIZES["bookcrossing" if dataset == "bookcrossing" else "ml-1m"]
    assert math.prod(len(values) for values in found.values()) == sizes[model]
    assert all(len(set(values)) == len(values) for values in found.values())


@pytest.mark.parametrize("model", TEXTS)
def test_lm_based(model: str) -> None:
    found = textctr.space("ml-1m", model)
    assert found.keys() <= FIELDS
    assert found == ({"textctr.learning_rate": (5e-4, 1e-3)} if model == "p5" else {})


def test_unknown_models() -> None:
    for module in (ctr, textctr):
        with pytest.raises(KeyError):
            module.space("ml-1m", "bert4rec")
        assert (module.METRIC, module.MODE) == ("valid_auc", "max")
