"""Table 1 and the known facts: on small data by hand, on the real files as far as they are whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rella.cli import resolve
from rella.config import DataConfig
from rella.data.facts import PAPER, Check, checks, dataset_facts, table1_text
from rella.data.samples import assemble
from rella.data.sources import Source

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"


def facts_of(dataset: str, raw_dir: str | None = None) -> tuple[dict[str, Any], DataConfig]:
    rules = resolve({"dataset": dataset}).experiment.data
    raw = Source(dataset, raw_dir).load(rules)
    return dataset_facts(raw, assemble(raw, rules)), rules


def real(dataset: str) -> tuple[dict[str, Any], DataConfig]:
    folder = SHARED / dataset
    if not folder.is_dir():
        pytest.skip(f"the original files are not in ../shared/data/{dataset}")
    return facts_of(dataset, str(folder))


def test_the_paper_s_figures_agree_with_one_another() -> None:
    for name, paper in PAPER.items():
        known = paper["vocabularies"]
        if name == "ml-25m":
            # Titles and genres together are what is left (their sizes are not printed).
            assert paper["features"] - sum(known.values()) == 58_978
            assert paper["train"] == paper["samples"] * 8 // 10
            assert paper["samples"] == paper["ratings"] - 5 * paper["users"]
        else:
            assert sum(known.values()) == paper["features"]
            assert paper["train"] + paper["valid"] + paper["test"] == paper["samples"]
            assert paper["fields"] == len(known) - 1 + 2


def test_the_sample() -> None:
    facts, rules = facts_of("sample")
    assert facts["fields"] == 10
    assert facts["features"] == sum(facts["vocabularies"].values())
    assert facts["train"] + facts["valid"] + facts["test"] == facts["samples"]
    assert 0 < facts["train_positives"] < facts["train"]
    assert checks("sample", facts, rules, rules) == []
    assert "paper" not in table1_text("sample", facts, [])


def test_every_fact_of_movielens_1m() -> None:
    facts, rules = real("ml-1m")
    found = checks("ml-1m", facts, rules, rules)
    assert len(found) == 18
    assert [check for check in found if not check.holds] == []
    text = table1_text("ml-1m", facts, found)
    assert text.splitlines()[1].split() == ["ml-1m", "6,040", "3,706", "970,009", "10", "16,944"]
    assert "18 of 18 facts of the paper's data hold" in text


def test_what_holds_for_a_part_of_bookcrossing() -> None:
    facts, rules = real("bookcrossing")
    found = checks("bookcrossing", facts, rules, rules)
    holds = {check.name for check in found if check.holds}
    assert holds >= {"users", "fields", "User ID values", "Location values", "Age values", "Rating values"}
    assert facts["samples"] == 1728
    assert (facts["train"], facts["valid"], facts["test"]) == (1399, 155, 174)
    assert "differs: items 33,211, the paper's 271,375" in table1_text("bookcrossing", facts, found)


def test_a_sample_of_bookcrossing_that_the_authors_print() -> None:
    """Their notebook shows 20 rows; of these only user 5585's whole history is in the part that is here."""
    _, rules = real("bookcrossing")
    raw = Source("bookcrossing", str(SHARED / "bookcrossing")).load(rules)
    tables = assemble(raw, rules)
    user = tables.users["user_id"].to_pylist().index("5585")
    sample = next(s for s in tables.samples.to_pylist() if s["user"] == user)
    book = tables.items.slice(sample["item"], 1).to_pylist()[0]
    assert (book["item_id"], sample["end"]) == ("074343627X", 5)
    assert tables.users.slice(user, 1).to_pylist()[0]["age"] == "35-39"


def test_what_holds_for_a_part_of_movielens_25m() -> None:
    facts, rules = real("ml-25m")
    found = checks("ml-25m", facts, rules, rules)
    assert {check.name for check in found if check.holds} == {"fields", "Rating values"}
    assert (facts["ratings"], facts["samples"]) == (100_000, 100_000 - 5 * 757)


def test_other_rules_are_not_compared() -> None:
    rules = DataConfig()
    facts = {**PAPER["ml-1m"], "dropped": {}}
    assert {c.name for c in checks("ml-1m", facts, rules, rules)} >= {"samples", "train"}
    other = checks("ml-1m", facts, replace(rules, min_history=10), rules)
    assert not {c.name for c in other} & {"samples", "train", "valid", "test"}
    assert Check("users", 3, 4).holds is False
