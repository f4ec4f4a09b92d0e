"""Splits, few-shot sets and subsets as columns of samples."""

from __future__ import annotations

import random

import numpy as np
import pyarrow as pa
import pytest

from rella.config import DataConfig, Experiment
from rella.data.fewshot import few_shot, subset
from rella.data.selection import SubsetRule, choose, split_ids, split_subset, wanted_ids
from rella.errors import InputError
from rella.schemas import SAMPLES

ROWS = 300
RNG = np.random.default_rng(0)
IDS = np.sort(RNG.choice(10_000, ROWS, replace=False))
SPLIT = RNG.choice(["train", "valid", "test"], ROWS, p=[0.6, 0.2, 0.2])
LABEL = RNG.integers(0, 2, ROWS)
TABLE = pa.table(
    [
        pa.array(IDS),
        pa.array(RNG.integers(0, 50, ROWS), pa.int32()),
        pa.array(RNG.integers(0, 90, ROWS), pa.int32()),
        pa.array(RNG.integers(5, 40, ROWS), pa.int32()),
        pa.array(LABEL, pa.int8(), mask=np.arange(ROWS) % 10 == 3),
        pa.array(SPLIT),
    ],
    schema=pa.schema([f.with_nullable(True) for f in SAMPLES]),
)


def test_a_split_s_ids() -> None:
    for split in ("train", "valid", "test"):
        assert split_ids(TABLE, split).tolist() == IDS[split == SPLIT].tolist()
    assert len(split_ids(TABLE, "other")) == 0


def test_subsets_are_the_few_shot_sets_of_their_split() -> None:
    train, test = split_ids(TABLE, "train"), split_ids(TABLE, "test")
    assert split_subset(TABLE, "train", 40, SubsetRule(42)).tolist() == few_shot(train, 40, 42).tolist()
    assert split_subset(TABLE, "test", 20, SubsetRule(42)).tolist() == subset(test, 20, 42, "test").tolist()
    assert split_subset(TABLE, "test", "all", SubsetRule(1)).tolist() == test.tolist()
    assert set(split_subset(TABLE, "valid", 10, SubsetRule(3))) < set(split_subset(TABLE, "valid", 11, SubsetRule(3)))
    assert (
        split_subset(TABLE, "valid", 10, SubsetRule(3)).tolist()
        != split_subset(TABLE, "valid", 10, SubsetRule(4)).tolist()
    )
    with pytest.raises(ValueError, match=f"999 test samples are asked for, but there are {len(test)}"):
        split_subset(TABLE, "test", 999, SubsetRule(1))


RANKED = TABLE.append_column("rank", pa.array(np.random.default_rng(1).permutation(ROWS), pa.int32()))


def in_order(split: str) -> list[int]:
    mine = split == SPLIT
    return IDS[mine][np.argsort(RANKED.column("rank").to_numpy()[mine])].tolist()


def test_the_authors_few_shot_sets_are_python_s_random_sample() -> None:
    train = in_order("train")
    drawn = random.Random(42).sample(range(len(train)), len(train))
    for n in (1, 10, 40):
        found = split_subset(RANKED, "train", n, SubsetRule(42, "ml-1m"))
        assert found.tolist() == sorted(train[i] for i in drawn[:n])
    # All is all, and the parts that the authors do not draw from are the keyed hash's.
    assert split_subset(RANKED, "train", "all", SubsetRule(42, "ml-1m")).tolist() == sorted(train)
    assert split_subset(RANKED, "test", 9, SubsetRule(42, "ml-1m")).tolist() == (
        split_subset(RANKED, "test", 9, SubsetRule(42)).tolist()
    )
    with pytest.raises(ValueError, match=r"`data\.subsets: authors` draws"):
        split_subset(RANKED, "train", 9999, SubsetRule(42, "ml-1m"))


def test_the_authors_movielens_25m_is_drawn_by_pandas() -> None:
    import pandas as pd

    for split in ("train", "test"):
        ordered = pd.DataFrame({"id": in_order(split)})
        drawn = ordered.sample(n=len(ordered), random_state=42)["id"].tolist()
        found = split_subset(RANKED, split, 10, SubsetRule(42, "ml-25m"))
        assert found.tolist() == sorted(drawn[:10])


def test_the_experiment_s_rule() -> None:
    assert SubsetRule.of(Experiment(dataset="ml-1m")) == SubsetRule(42, None)
    authors = Experiment(dataset="ml-1m", data=DataConfig(seed=7, subsets="authors"))
    assert SubsetRule.of(authors) == SubsetRule(7, "ml-1m")


def test_chosen_columns_belong_together() -> None:
    rows = np.array([0, 3, 7, 299])
    chosen = choose(TABLE, IDS[rows])
    assert chosen.sample_id.tolist() == IDS[rows].tolist()
    for name in ("user", "item", "end"):
        assert getattr(chosen, name).tolist() == TABLE.column(name).to_numpy()[rows].tolist()
        assert getattr(chosen, name).dtype == np.int32
    assert np.isnan(chosen.label).tolist() == [False, True, False, False]
    assert chosen.label[[0, 2, 3]].tolist() == LABEL[[0, 7, 299]].tolist()
    assert len(chosen) == 4


def test_rows_of_the_chosen_are_views() -> None:
    chosen = choose(TABLE, IDS)
    part = chosen.rows(10, 13)
    assert part.sample_id.tolist() == IDS[10:13].tolist()
    assert part.end.base is not None
    assert np.shares_memory(part.user, chosen.user)
    assert len(chosen.rows(298, 400)) == 2


@pytest.mark.parametrize("missing", [-1, 10_001])
def test_an_unknown_sample_is_named(missing: int) -> None:
    asked = np.sort(np.append(IDS[:3], missing))
    with pytest.raises(InputError, match=f"sample {missing} is not in the data set"):
        choose(TABLE, asked)


def test_an_id_between_two_others_is_unknown() -> None:
    gap = int(next(i for i in range(int(IDS[0]), 10_000) if i not in set(IDS.tolist())))
    with pytest.raises(InputError, match=f"sample {gap} "):
        choose(TABLE, np.array([gap]))


def test_choosing_nothing() -> None:
    assert len(choose(TABLE, np.zeros(0, np.int64))) == 0


@pytest.mark.parametrize(
    "samples", [TABLE, TABLE.slice(17, 100), pa.concat_tables([TABLE.slice(0, 9), TABLE.slice(9)])]
)
def test_tables_in_slices_and_chunks(samples: pa.Table) -> None:
    ids = samples.column("sample_id").to_numpy()
    chosen = choose(samples, ids[[1, 20, 99]])
    assert chosen.user.tolist() == samples.column("user").to_numpy()[[1, 20, 99]].tolist()


def test_what_retrieval_is_asked_for() -> None:
    assert wanted_ids(TABLE, "all", SubsetRule(1)).tolist() == IDS.tolist()
    assert wanted_ids(TABLE, "test", SubsetRule(1)).tolist() == IDS[SPLIT == "test"].tolist()
    found = wanted_ids(TABLE, "train:40, test:20", SubsetRule(42))
    assert (np.diff(found) > 0).all()
    assert set(found) == set(split_subset(TABLE, "train", 40, SubsetRule(42))) | set(
        split_subset(TABLE, "test", 20, SubsetRule(42))
    )
    # The same split twice, once whole: no sample twice.
    assert wanted_ids(TABLE, "valid:5,valid", SubsetRule(1)).tolist() == split_ids(TABLE, "valid").tolist()


@pytest.mark.parametrize(
    "wanted", ["", "everything", "train:", "train:x", "train:-1", "train:1.5", "test:1e3", "train;test", "all,test"]
)
def test_what_retrieval_cannot_be_asked_for(wanted: str) -> None:
    if wanted == "train:":
        # A colon without a number asks for the whole split.
        assert len(wanted_ids(TABLE, wanted, SubsetRule(1))) == (SPLIT == "train").sum()
        return
    with pytest.raises(ValueError, match=r"retrieve\.samples"):
        wanted_ids(TABLE, wanted, SubsetRule(1))


def test_too_many_are_an_error() -> None:
    with pytest.raises(ValueError, match="99999 valid samples are asked for"):
        wanted_ids(TABLE, "valid:99999", SubsetRule(1))
    with pytest.raises(ValueError, match="0 train samples are asked for"):
        wanted_ids(TABLE, "train:0", SubsetRule(1))
