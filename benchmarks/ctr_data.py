"""The data of benchmarks/ctr.py: files in MovieLens-1M's format and shape, our stored form, and what peers start from.

A peer starts from the same training samples with the same ids: per field an id from 1 (0 is the padding), the user's
behaviours once, and how many of them a sample may see. What it makes of that is its own stored form.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri

from rella.artifacts import Artifact, Json, Manifest
from rella.config import DataConfig
from rella.ctr.features import Features
from rella.data.movielens import AGES, OCCUPATIONS
from rella.data.samples import assemble
from rella.data.selection import Chosen, choose, split_ids
from rella.data.sources import Source
from rella.data.tables import Tables
from rella.storage import Storage, resolve_uri

USERS, ITEMS, RATINGS, LONGEST, SHORTEST = 6040, 3706, 1_000_209, 2314, 20
"""MovieLens-1M's; its users are from 3,439 zip codes."""
ZIP_CODES = 3439
GENRES = (
    *("Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy"),
    *("Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)
TABLES = ("users", "items", "interactions", "samples")
SEED = 1

Ints = npt.NDArray[np.int64]


def write_raw(folder: Path, users: int = USERS) -> None:
    """Write `users.dat`, `movies.dat` and `ratings.dat` of made-up users; with all 6,040 there are 1,000,209 ratings.

    A user's number of ratings is a shifted log-normal's quantile, a movie's chance falls with its rank, and a rating is
    the user's and the movie's mean and noise: there is something to learn, as much as in the original.
    """
    rng = np.random.default_rng(SEED)
    folder.mkdir(parents=True, exist_ok=True)
    count = _user_sizes(rng, users)
    weight = -1.0 * np.log(np.arange(ITEMS) + 60.0)[rng.permutation(ITEMS)]
    items = [np.argsort(-(weight + rng.gumbel(size=ITEMS)))[:n] for n in count.tolist()]
    item, user = np.concatenate(items), np.repeat(np.arange(users), count)
    mean = 3.6 + rng.normal(0, 0.45, users)[user] + rng.normal(0, 0.6, ITEMS)[item]
    stars = np.clip(np.rint(mean + rng.normal(0, 0.9, len(item))), 1, 5).astype(np.int64)
    start = np.sort(rng.integers(956_703_932, 1_046_454_590, users))[::-1]
    time = start[user] + rng.integers(0, 7200, len(item))
    genre = rng.choice(GENRES, (ITEMS, 2))
    sizes = (len(AGES), len(OCCUPATIONS), ZIP_CODES)
    age, job, code = (rng.permutation(np.arange(users) % n).tolist() for n in sizes)
    firsts = list(AGES)
    _write(
        folder / "users.dat",
        [f"{n + 1}::{'FM'[n % 2]}::{firsts[age[n]]}::{job[n]}::{code[n]:05d}" for n in range(users)],
    )
    _write(folder / "movies.dat", [f"{n + 1}::Film {n} (1999)::{a}|{b}" for n, (a, b) in enumerate(genre.tolist())])
    rows = np.stack([user + 1, item + 1, stars, time], axis=1).tolist()
    _write(folder / "ratings.dat", [f"{u}::{i}::{s}::{t}" for u, i, s, t in rows])


def _user_sizes(rng: np.random.Generator, users: int) -> Ints:
    """Return how many ratings each user has, of MovieLens-1M's mean."""
    quantile = ndtri((np.arange(users) + 0.5) / users)
    beyond = np.exp(1.2 * quantile)
    wanted = round(RATINGS * users / USERS) - SHORTEST * users
    for _ in range(50):  # What the longest may not have goes to the others.
        beyond = np.minimum(beyond * (wanted / beyond.sum()), LONGEST - SHORTEST)
    count = np.floor(beyond).astype(np.int64)
    count[: wanted - count.sum()] += 1
    return SHORTEST + rng.permutation(count)


def _write(file: Path, lines: list[str]) -> None:
    file.write_bytes("\n".join([*lines, ""]).encode("latin-1"))


@dataclass(frozen=True)
class Prepared:
    """Our stored form, read."""

    tables: Tables
    features: Features

    def samples(self, split: str) -> Chosen:
        """Return the samples of one split."""
        return choose(self.tables.samples, split_ids(self.tables.samples, split))


def _artifact(folder: Path) -> Artifact:
    return Artifact(Storage(resolve_uri(str(folder))), "ml-1m/prepare/benchmark")


def prepare(raw_dir: Path, folder: Path) -> None:
    """Make our stored form as the first stage of every job does."""
    raw = Source("ml-1m", str(raw_dir)).load(DataConfig())
    tables, artifact = assemble(raw, DataConfig()), _artifact(folder)
    tables.validate()
    parts = [artifact.write_part(getattr(tables, name), 0, 1, name) for name in TABLES]
    facts: dict[str, Json] = {"field_columns": dict(raw.fields)}
    artifact.finish(Manifest("prepare", 1, "", "ml-1m", {}, {}, {}, parts, facts))


def read(folder: Path) -> Prepared:
    """Read our stored form."""
    artifact = _artifact(folder)
    tables = Tables(**{name: artifact.read(name).combine_chunks() for name in TABLES})
    fields = artifact.manifest().facts["field_columns"]
    assert isinstance(fields, dict)
    return Prepared(tables, Features.of(tables, {name: str(place) for name, place in fields.items()}))


def export(prepared: Prepared, folder: Path, k: int) -> None:
    """Write what a peer starts from: arrays of the training samples, and `peer.json`."""
    features, samples = prepared.features, prepared.samples("train")
    histories = prepared.tables.histories()
    firsts = np.cumsum([1, *features.sizes])
    users = features.user_fields.shape[1]
    of_user, of_item = features.user_fields - firsts[:users] + 1, features.item_fields - firsts[users:][:-2] + 1
    start = histories.offset[samples.user]
    arrays = {
        "fields": np.concatenate([of_user[samples.user], of_item[samples.item]], axis=1),
        "start": start,
        "end": start + samples.end,
        "label": samples.label,
        "item": of_item[histories.item, features.item_at],
        "rating": features.level,
    }
    folder.mkdir(parents=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array.astype(np.int64))
    names = [re.sub(r"\W+", "_", name).lower() for name in features.names]
    facts = {"names": names, "sizes": features.sizes, "item_at": features.space.item_at, "k": k}
    (folder / "peer.json").write_text(json.dumps(facts) + "\n")
