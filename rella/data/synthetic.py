"""The data set `sample`: a made-up catalogue of movies and made-up users whose taste lasts and whose watching drifts.

A user's stars depend on a taste per genre and per franchise that never changes. What the user watches does change: a
genre that was just watched is avoided for a while, and interests move from phase to phase. So the last few behaviours
seldom share the target's genre while an old one nearly always does, which is the situation that §1 of the paper
describes and that retrieval (§3.2) answers. Everything follows from seeds; nothing is read or downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rella.data.movielens import FIELDS
from rella.data.raw import RawDataset
from rella.data.synthetic_words import AGES, GENRES, OCCUPATIONS, SEQUELS, WORDS
from rella.errors import InputError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

CATALOGUE_SEED = 1994
"""One catalogue for everybody: the stand-in language model was pre-trained on it as a real one was on real movies."""
SAMPLE_SEED = 2024
PRETRAINING_SEED = 77


@dataclass(frozen=True)
class Catalogue:
    """The movies and what is hidden behind their titles; row i of everything is item i."""

    items: pa.Table
    """`item` int32, `item_id` string, `title` string, `genre` string (first listed), `genres` list<string>."""
    genre: Ints
    """(I,) index into `GENRES` of the first listed genre, the one that decides the rating."""
    franchise: Ints
    """(I,) number of the franchise, -1 for a movie of its own."""
    quality: Floats
    """(I,) stars that everybody adds to this movie."""
    popularity: Floats
    """(I,) log weight of being chosen among its genre's movies."""


@dataclass(frozen=True)
class World:
    """How one population rates and watches; the two populations below differ as a benchmark's users do from the web's.

    Lengths are in stars; a raw score of 3.5 or more becomes 4 stars or more.
    """

    centre: float = 3.5
    strictness: float = 0.35
    """Standard deviation over users of the stars that a user adds to every movie."""
    taste: float = 0.95
    """Standard deviation of a user's stars per genre."""
    groups: float = 0.0
    """Standard deviation of the part of the taste that gender and age explain."""
    franchise: float = 0.3
    """Standard deviation of a user's stars per franchise."""
    quality: float = 0.3
    noise: float = 0.6
    fatigue: float = 9.0
    """Movies after which a genre is attractive again."""
    phase: int = 15
    """Movies after which the interests change."""
    shortest: int = 40
    longest: int = 80


SAMPLE_WORLD = World(centre=3.5, strictness=0.9, groups=0.45, franchise=0.45, noise=0.5)
PRETRAINING_WORLD = World(centre=3.55, strictness=0.25, groups=0.0, franchise=0.2)


def sample_dataset(seed: int = SAMPLE_SEED, users: int = 400, world: World = SAMPLE_WORLD) -> RawDataset:
    """Return the data set `sample`: about 60 ratings per user on about 600 movies, rows by user and then time.

    Args:
        seed: of the users, their tastes and their histories; the catalogue has its own.
        users: how many users.
        world: how they rate and watch.

    Raises:
        InputError: `users` is below 1.
    """
    return _dataset(np.random.default_rng([seed, 0]), users, world, "u")


def pretraining_dataset(
    seed: int = PRETRAINING_SEED, users: int = 4000, world: World = PRETRAINING_WORLD
) -> RawDataset:
    """Return the same catalogue seen by other users, for pre-training: other ids, seeds and world than the sample's.

    Args:
        seed: of the users; equal to the sample's seed it still gives other users.
        users: how many users.
        world: how they rate and watch.

    Raises:
        InputError: `users` is below 1.
    """
    return _dataset(np.random.default_rng([seed, 1]), users, world, "p")


@cache
def catalogue(seed: int = CATALOGUE_SEED) -> Catalogue:
    """Return the movies of `sample`, the same on every call."""
    rng = np.random.default_rng([seed, 2])
    rows: list[tuple[str, int, int]] = []
    franchises = 0
    for genre in range(len(GENRES)):
        names = _names(rng, genre)
        for name in names[:5]:
            rows += [(title, genre, franchises) for title in _instalments(rng, name)]
            franchises += 1
        rows += [(f"{_article(rng, name)} ({rng.integers(1940, 2001)})", genre, -1) for name in names[5:]]
    # A few movies are listed twice under different ids, as in MovieLens.
    rows += [rows[i] for i in rng.choice(len(rows), 14, replace=False)]
    rows = [rows[i] for i in rng.permutation(len(rows))]
    genre_of = np.array([row[1] for row in rows])
    second = np.where(rng.random(len(rows)) < 0.3, (genre_of + rng.integers(1, len(GENRES), len(rows))) % 10, -1)
    twin: dict[str, int] = {}
    first = np.array([twin.setdefault(row[0], i) for i, row in enumerate(rows)])
    second = second[first]
    items = pa.table(
        {
            "item": pa.array(np.arange(len(rows)), pa.int32()),
            "item_id": [f"m{i + 1:04d}" for i in range(len(rows))],
            "title": [row[0] for row in rows],
            "genre": [GENRES[g] for g in genre_of],
            "genres": pa.array(
                [[GENRES[g]] + ([GENRES[s]] if s >= 0 else []) for g, s in zip(genre_of, second, strict=True)],
                pa.list_(pa.string()),
            ),
        }
    )
    quality = rng.standard_normal(len(rows))[first]
    franchise = np.array([row[2] for row in rows])
    popularity = rng.normal(0.0, 0.8, len(rows)) + 0.8 * (franchise >= 0)
    return Catalogue(items, genre_of, franchise, quality, popularity)


def _names(rng: np.random.Generator, genre: int) -> list[str]:
    """Return about fifty different names in the words of one genre."""
    adjectives, nouns = WORDS[GENRES[genre]]
    names: dict[str, None] = {}
    while len(names) < 45:
        adjective = adjectives[rng.integers(len(adjectives))]
        noun, other = (nouns[i] for i in rng.choice(len(nouns), 2, replace=False))
        plain = f"{adjective} {noun}"
        if len(names) < 5:  # franchises
            names[plain] = None
            continue
        patterns = (plain, plain, f"{noun} of the {other}", f"{noun}'s {other}", f"{adjective} {noun} and {other}")
        names[patterns[rng.integers(len(patterns))]] = None
    return list(names)


def _instalments(rng: np.random.Generator, name: str) -> list[str]:
    """Return the titles of one franchise, three to five of them, in the order of their years."""
    years = rng.integers(1960, 1985) + np.cumsum(rng.integers(1, 5, 5))
    count = int(rng.integers(3, 6))
    return [f"{pattern.format(name)} ({year})" for pattern, year in zip(SEQUELS[:count], years, strict=False)]


def _article(rng: np.random.Generator, name: str) -> str:
    """Return the name, sometimes with MovieLens' article at the end."""
    return f"{name}, The" if rng.random() < 0.25 else name


def _dataset(rng: np.random.Generator, users: int, world: World, prefix: str) -> RawDataset:
    if users < 1:
        raise InputError(f"a data set needs at least 1 user, not {users}")
    movies = catalogue()
    profile, group_taste = _profiles(rng, users, world)
    counts = rng.integers(world.shortest, world.longest + 1, users)
    taste = group_taste + np.sqrt(max(world.taste**2 - world.groups**2, 0.0)) * rng.standard_normal(group_taste.shape)
    watched = _watch(rng, taste, int(counts.max()), world, movies)
    user, position = np.nonzero(np.arange(watched.shape[1])[None, :] < counts[:, None])
    item = watched[user, position]
    rating = _rate(rng, user, item, taste, world, movies)
    return RawDataset(
        users=pa.table(
            {
                "user": pa.array(np.arange(users), pa.int32()),
                "user_id": [f"{prefix}{i + 1:05d}" for i in range(users)],
                **profile,
            }
        ),
        items=movies.items,
        user=user.astype(np.int32),
        item=item.astype(np.int32),
        rating=rating.astype(np.float32),
        timestamp=_times(rng, counts),
        fields=FIELDS,
    )


def _profiles(rng: np.random.Generator, users: int, world: World) -> tuple[dict[str, Any], Floats]:
    """Return the profile columns and the (U, G) stars per genre that gender and age explain."""
    female, age = rng.random(users) < 0.4, rng.integers(0, len(AGES), users)
    occupation, zipcode = rng.integers(0, len(OCCUPATIONS), users), rng.integers(1000, 99999, users)
    columns = {
        "gender": ["female" if f else "male" for f in female],
        "age": [AGES[a] for a in age],
        "occupation": [OCCUPATIONS[o] for o in occupation],
        "zipcode": [f"{z:05d}" for z in zipcode],
    }
    # Which group likes which genre is part of the world, not of one seed's users: the catalogue's seed decides.
    fixed = np.random.default_rng([CATALOGUE_SEED, 3])
    by_gender, by_age = fixed.standard_normal(len(GENRES)), fixed.standard_normal((2, len(GENRES)))
    old = (age >= len(AGES) // 2).astype(np.int64)
    taste = (np.where(female, 1.0, -1.0)[:, None] * by_gender + by_age[old]) / np.sqrt(2.0)
    return columns, world.groups * taste


def _watch(rng: np.random.Generator, taste: Floats, length: int, world: World, movies: Catalogue) -> Ints:
    """Return (U, length) items in the order in which each user watches them, none twice.

    Each step draws a genre from the phase's interests, damped by how lately the user watched it, and then the next of
    that genre's movies in the user's own random order.
    """
    users, genres = taste.shape
    order, offset = _orders(rng, users, movies)
    available = np.diff(np.append(offset, len(movies.genre)))
    seen = np.zeros((users, genres), np.int64)
    last = -rng.integers(1, 2 * genres, (users, genres))
    everyone = np.arange(users)
    watched = np.empty((users, length), np.int64)
    interest = np.empty((users, genres))
    for step in range(length):
        if step % world.phase == 0:
            interest = 0.6 * rng.standard_normal((users, genres)) + 0.15 * taste
        rested = 1.0 / (1.0 + np.exp(-(step - last - world.fatigue) / 0.8))
        weight = np.exp(interest) * (rested + 0.02) * (seen < available)
        cumulative = np.cumsum(weight, axis=1)
        drawn = rng.random(users) * cumulative[:, -1]
        genre = np.minimum((cumulative <= drawn[:, None]).sum(axis=1), genres - 1)
        watched[:, step] = order[everyone, offset[genre] + seen[everyone, genre]]
        seen[everyone, genre] += 1
        last[everyone, genre] = step
    return watched


def _orders(rng: np.random.Generator, users: int, movies: Catalogue) -> tuple[Ints, Ints]:
    """Return each user's order of the movies, (U, I) grouped by genre, and where each genre starts, (G,).

    Sorting popularity plus Gumbel noise draws without replacement in proportion to popularity.
    """
    keys = movies.popularity + rng.gumbel(size=(users, len(movies.genre)))
    order = np.lexsort((-keys, np.broadcast_to(movies.genre, keys.shape)), axis=1)
    return order, np.searchsorted(np.sort(movies.genre), np.arange(len(GENRES)))


def _rate(rng: np.random.Generator, user: Ints, item: Ints, taste: Floats, world: World, movies: Catalogue) -> Floats:
    """Return (R,) stars from 1 to 5."""
    bias = world.strictness * rng.standard_normal(len(taste))
    loyalty = world.franchise * rng.standard_normal((len(taste), int(movies.franchise.max()) + 1))
    franchise = movies.franchise[item]
    score = (
        world.centre
        + bias[user]
        + taste[user, movies.genre[item]]
        + np.where(franchise >= 0, loyalty[user, franchise], 0.0)
        + world.quality * movies.quality[item]
        + world.noise * rng.standard_normal(len(user))
    )
    return np.clip(np.floor(score + 0.5), 1, 5)


def _times(rng: np.random.Generator, counts: Ints) -> npt.NDArray[np.int64]:
    """Return (R,) seconds, increasing within a user, to the minute so that some are equal between users.

    Everybody starts in the first fifth of ten years and stops in the last quarter: a split by time cuts through nearly
    every history, and late ratings come with long histories.
    """
    span = 10 * 365 * 86400
    start, stop = span * rng.uniform(0.0, 0.2, len(counts)), span * rng.uniform(0.75, 1.0, len(counts))
    user = np.repeat(np.arange(len(counts)), counts)
    gaps = rng.exponential(size=len(user)) + 0.05
    total = np.cumsum(gaps)
    before = np.append(0.0, total)[np.cumsum(counts) - counts]
    after = total[np.cumsum(counts) - 1]
    share = (total - before[user]) / (after - before)[user]
    minutes = (start[user] + share * (stop - start)[user]) / 60
    return 788_918_400 + 60 * minutes.astype(np.int64)
