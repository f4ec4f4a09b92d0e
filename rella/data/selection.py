"""Which samples a stage works on: a split, a few-shot set, a seeded subset."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rella.config import Experiment
from rella.data.fewshot import Purpose, few_shot, subset
from rella.data.tables import column
from rella.errors import InputError
from rella.schemas import SPLITS


@dataclass(frozen=True)
class Chosen:
    """Columns of the chosen samples, ascending by id."""

    sample_id: npt.NDArray[np.int64]
    user: npt.NDArray[np.int32]
    item: npt.NDArray[np.int32]
    end: npt.NDArray[np.int32]
    label: npt.NDArray[np.float64]
    """1, 0, or NaN where the label is unknown."""

    def __len__(self) -> int:
        return len(self.sample_id)

    def rows(self, start: int, stop: int) -> Chosen:
        """Return rows [start, stop) as views."""
        cut = slice(start, stop)
        return Chosen(self.sample_id[cut], self.user[cut], self.item[cut], self.end[cut], self.label[cut])


def split_ids(samples: pa.Table, split: str) -> npt.NDArray[np.int64]:
    """Return the ids of one split's samples, ascending."""
    return column(samples.filter(pc.equal(samples.column("split"), split)), "sample_id")


AUTHORS_POOLS = {"bookcrossing": 10_000, "ml-25m": 90_000}
"""Training samples that the authors draw, of which the first N are the few-shot set; 70,000 on other data sets."""


@dataclass(frozen=True)
class SubsetRule:
    """How few-shot sets and subsets are chosen: `data.seed` and `data.subsets`."""

    seed: int
    authors: str | None = None
    """The data set, where its authors' draws are repeated; None for the keyed hash."""

    @staticmethod
    def of(experiment: Experiment) -> SubsetRule:
        """Return the experiment's rule."""
        as_authors = experiment.data.subsets == "authors"
        return SubsetRule(experiment.data.seed, experiment.dataset if as_authors else None)


def split_subset(samples: pa.Table, split: Purpose, n: int | Literal["all"], rule: SubsetRule) -> npt.NDArray[np.int64]:
    """Return the ids of a split's few-shot set (train) or subset of `n`, ascending; nested over `n`.

    Raises:
        InputError: fewer than `n` samples.
    """
    ids = split_ids(samples, split)
    if n != "all" and (split == "train" or (rule.authors == "ml-25m" and split == "test")) and rule.authors is not None:
        return _authors_subset(samples, split, n, rule)
    return few_shot(ids, n, rule.seed) if split == "train" else subset(ids, n, rule.seed, split)


def _authors_subset(samples: pa.Table, split: Purpose, n: int, rule: SubsetRule) -> npt.NDArray[np.int64]:
    """Return the first `n` of the authors' draw from a split in the order in which the split was cut."""
    mine = samples.filter(pc.equal(samples.column("split"), split))
    ids = column(mine, "sample_id")[np.argsort(column(mine, "rank"), kind="stable")]
    pool = 70_000 if split == "test" else AUTHORS_POOLS.get(rule.authors or "", 70_000)
    pool = min(pool, len(ids))
    if not 1 <= n <= pool:
        raise InputError(
            f"{n} {split} samples are asked for, but `data.subsets: authors` draws {pool}; take 1 to {pool}"
        )
    if rule.authors == "ml-25m":
        # pandas' DataFrame.sample(n, random_state=seed).
        drawn = np.random.RandomState(rule.seed).choice(len(ids), size=pool, replace=False)
    else:
        drawn = np.array(random.Random(rule.seed).sample(range(len(ids)), pool))
    return np.sort(ids[drawn[:n]])


def choose(samples: pa.Table, ids: npt.NDArray[np.int64]) -> Chosen:
    """Return the columns of the samples `ids` (ascending).

    Raises:
        InputError: an id that is not among the samples.
    """
    known = column(samples, "sample_id")
    rows = np.searchsorted(known, ids)
    missing = (rows == len(known)) | (known[np.minimum(rows, len(known) - 1)] != ids)
    if missing.any():
        raise InputError(f"sample {ids[int(np.argmax(missing))]} is not in the data set")
    taken = samples.take(pa.array(rows))
    label = column(taken, "label").astype(np.float64)
    return Chosen(column(taken, "sample_id"), column(taken, "user"), column(taken, "item"), column(taken, "end"), label)


def wanted_ids(samples: pa.Table, wanted: str, rule: SubsetRule) -> npt.NDArray[np.int64]:
    """Return the ids that `retrieve.samples` names: `all`, or e.g. `train:2048,valid:2000,test:5000`; ascending.

    Raises:
        InputError: an unknown split, or a count that is no number or too large.
    """
    if wanted == "all":
        return column(samples, "sample_id")
    chosen = []
    for entry in wanted.split(","):
        split, _, count = entry.strip().partition(":")
        if split not in SPLITS or (count and not count.isdigit()):
            raise InputError(f"retrieve.samples {wanted!r}: {entry!r} is not `train`, `valid` or `test` with `:N`")
        purpose: Purpose = split  # type: ignore[assignment]
        chosen.append(split_subset(samples, purpose, int(count) if count else "all", rule))
    return np.unique(np.concatenate(chosen))
