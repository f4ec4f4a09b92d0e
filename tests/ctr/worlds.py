"""Small data sets for the tests of the CTR models."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rella.baselines import BaselineConfig
from rella.config import DataConfig
from rella.ctr.batches import Batch, Batches, batches_of
from rella.ctr.features import Features, FeatureSpace
from rella.data.samples import assemble
from rella.data.selection import Chosen, choose, split_ids
from rella.data.sources import Source
from rella.data.tables import Histories, Tables

FIELDS = {"User ID": "users.user_id", "Item ID": "items.item_id", "Genre": "items.genre"}


def tables_of(
    histories: list[list[tuple[int, float]]], samples: list[tuple[int, int, int, float]], genres: list[str]
) -> Tables:
    """Return tables of (item, stars) histories by user and (user, item, end, label) samples."""
    count = np.array([len(h) for h in histories], dtype=np.int32)
    flat = [pair for history in histories for pair in history]
    users = {
        "user": np.arange(len(count), dtype=np.int32),
        "user_id": [f"u{n}" for n in range(len(count))],
        "offset": (np.cumsum(count) - count).astype(np.int64),
        "count": count,
    }
    items = {
        "item": np.arange(len(genres), dtype=np.int32),
        "item_id": [f"i{n}" for n in range(len(genres))],
        "title": [f"title {n % 7}" for n in range(len(genres))],
        "genre": genres,
    }
    interactions = {
        "item": np.array([item for item, _ in flat], dtype=np.int32),
        "rating": np.array([stars for _, stars in flat], dtype=np.float32),
        "timestamp": np.arange(len(flat), dtype=np.int64),
    }
    user, item, end, label = (list(c) for c in zip(*samples, strict=True))
    asked = {
        "sample_id": np.arange(len(user), dtype=np.int64) + 10**6,
        "user": np.array(user, dtype=np.int32),
        "item": np.array(item, dtype=np.int32),
        "end": np.array(end, dtype=np.int32),
        "label": pa.array([None if np.isnan(x) else int(x) for x in label], pa.int8()),
        "split": ["train"] * len(user),
    }
    return Tables(pa.table(users), pa.table(items), pa.table(interactions), pa.table(asked))


def random_tables(seed: int, users: int = 9, items: int = 12, longest: int = 25, samples: int = 60) -> Tables:
    """Return a data set of random histories, some of them empty."""
    rng = np.random.default_rng(seed)
    histories = [
        [(int(i), float(s)) for i, s in zip(rng.integers(0, items, n), rng.integers(1, 6, n), strict=True)]
        for n in rng.integers(0, longest, users)
    ]
    asked = []
    for _ in range(samples):
        user = int(rng.integers(users))
        end = int(rng.integers(0, len(histories[user]) + 1))
        asked.append((user, int(rng.integers(items)), end, float(rng.integers(2))))
    return tables_of(histories, asked, [f"g{n % 4}" for n in range(items)])


def everything(tables: Tables) -> Chosen:
    return choose(tables.samples, tables.samples.column("sample_id").to_numpy())


@dataclass(frozen=True)
class World:
    """A prepared data set with what models need of it."""

    tables: Tables
    features: Features
    histories: Histories

    def batches(self, config: BaselineConfig, split: str, k: int) -> Batches:
        samples = choose(self.tables.samples, split_ids(self.tables.samples, split))
        return batches_of(config, self.features, self.histories, samples, k)


@cache
def sample_world(users: int = 60) -> World:
    rules = DataConfig(sample_users=users)
    raw = Source("sample", None).load(rules)
    tables = assemble(raw, rules)
    return World(tables, Features.of(tables, raw.fields), tables.histories())


SPACE = FeatureSpace(count=1 + 30 + 20 + 5, fields=4, item_at=2, first_level=51, levels=5)
UNRATED = FeatureSpace(count=1 + 30 + 20, fields=4, item_at=2, first_level=51, levels=0)


def random_batch(space: FeatureSpace, rows: int, k: int, seed: int, lengths: npt.ArrayLike | None = None) -> Batch:
    """Return a batch of random ids; histories of all lengths, 0 and K among them."""
    import torch

    rng = np.random.default_rng(seed)
    length = np.arange(rows) % (k + 1) if lengths is None else np.asarray(lengths)
    behind = np.arange(k) >= length[:, None]
    items, ratings = rng.integers(31, 51, (rows, k)), rng.integers(1, 6, (rows, k))
    items[behind], ratings[behind] = 0, 0
    fields = rng.integers(1, 31, (rows, space.fields))
    fields[:, space.item_at] = rng.integers(31, 51, rows)
    label = torch.from_numpy(rng.integers(0, 2, rows).astype(np.float32))
    ids = (torch.from_numpy(x.astype(np.int32)) for x in (fields, items, ratings if space.levels else ratings * 0))
    return Batch(*ids, torch.from_numpy(length.astype(np.int64)), label)
