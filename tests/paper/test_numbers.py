"""The paper's figures are copied right: they agree with each other where the paper prints them twice."""

from __future__ import annotations

from dataclasses import astuple

import pytest

from rella.config import DATASETS
from rella.errors import InputError
from rella.paper.numbers import K_LIST, numbers, printed

PAPER = sorted(set(DATASETS) - {"sample"})


@pytest.mark.parametrize("dataset", PAPER)
def test_the_relative_improvements_follow_from_the_aucs(dataset: str) -> None:
    table = numbers()["table2"][dataset]
    ours = {"zero-shot": table["zero-shot"]["ReLLa (Ours)"][0], "full-shot": table["few-shot"]["ReLLa (<10%)"][0]}
    told = numbers()["relative_improvement"][dataset]
    assert len(told) == 13
    for setting, best in ours.items():
        for model, (auc, _, _) in table[setting].items():
            if model in told:
                assert 100 * (best / auc - 1) == pytest.approx(told[model], abs=0.011), model


@pytest.mark.parametrize("dataset", PAPER)
def test_table_3_repeats_table_2(dataset: str) -> None:
    assert printed("table3", dataset, "ReLLa (Ours)") == printed("table2", dataset, "few-shot", "ReLLa (<1%)")
    zero = "zero-shot"
    assert printed("table3", dataset, "ReLLa (w/o IT)") == printed("table2", dataset, zero, "ReLLa (Ours)")
    assert printed("table3", dataset, "ReLLa (w/o IT & Retrieval)") == printed("table2", dataset, zero, "Vicuna-13B")


def test_the_other_tables_repeat_each_other() -> None:
    for model in ("Falcon-7B", "Mistral-7B", "Vicuna-7B", "Vicuna-13B"):
        aucs = numbers()["table4"][model]
        assert len(aucs) == len(K_LIST)
        # The zero-shot rows of Tables 2 and 5 are those of the best K.
        assert printed("table5", model, "zero-shot").auc == max(aucs)
    assert printed("table5", "SIM", "full-shot") == printed("table2", "ml-1m", "full-shot", "SIM")
    assert printed("table5", "Vicuna-13B", "with ReiT (<10%)") == printed("table2", "ml-1m", "few-shot", "ReLLa (<10%)")
    for table, default in (("table7", 512), ("table8", "cosine")):
        assert printed(table, "few-shot", default) == printed("table3", "ml-1m", "ReLLa (Ours)")
        assert printed(table, "zero-shot", default) == printed("table3", "ml-1m", "ReLLa (w/o IT)")


def test_values_by_hand() -> None:
    assert astuple(printed("table2", "ml-25m", "full-shot", "SIM")) == (0.8344, 0.4724, 0.7822)
    assert numbers()["table1"]["ml-1m"] == [6040, 3706, 970_009, 10, 16_944]
    assert numbers()["table9"]["retrieved"][-1] == 5.32


def test_a_row_that_is_not_there_is_named() -> None:
    with pytest.raises(InputError, match=r"table2 has no 'BERT': there are DeepFM, AutoInt"):
        printed("table2", "ml-1m", "full-shot", "BERT")
