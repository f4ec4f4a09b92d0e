"""A synthetic MovieLens-25M, faithful in shape, for benchmarks and stress tests.

Numbers of users, items and ratings, the unevenness of users and items, half stars, sessions, awkward titles and the two
files are the original's; tastes are not: ratings are independent of genres. Everything follows from a seed.

    python -m rella.data.synthetic25m --out DIR [--seed N] [--users N]
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numba
import numpy as np
import numpy.typing as npt

from rella.data.movielens25m import FILES
from rella.data.synthetic25m_shape import (
    BIAS,
    EXACT_BELOW,
    ML_25M,
    QUALITY,
    Ints,
    Items,
    Shape,
    Tables,
    alias_table,
    deal,
    draw,
    fit,
    item_counts,
    movie_ids,
    score_bounds,
    stream,
    user_sizes,
)
from rella.data.synthetic_words import WORDS
from rella.digests import cache_folder
from rella.errors import InputError, RellaError, StorageError

SEED = 25
"""The default seed."""
VERSION = 1
"""Raise it when the same seed gives other files: what is cached is then made again."""

GENRES = {
    "Action": 12,
    "Adventure": 7,
    "Animation": 5,
    "Children": 5,
    "Comedy": 27,
    "Crime": 9,
    "Documentary": 9,
    "Drama": 41,
    "Fantasy": 4,
    "Film-Noir": 1,
    "Horror": 10,
    "IMAX": 1,
    "Musical": 2,
    "Mystery": 5,
    "Romance": 12,
    "Sci-Fi": 6,
    "Thriller": 14,
    "War": 3,
    "Western": 2,
}
"""In the order in which a movie's genres are listed: roughly how often each is."""
NO_GENRES = "(no genres listed)"
_GENRES_LISTED = (0.08, 0.38, 0.31, 0.16, 0.05, 0.02)
"""Shares of the movies with 0, 1 ... 5 genres."""

_PATTERNS = (
    ["{a} {n}"] * 24
    + ["{a} {n}, The"] * 20
    + ["{n} of the {o}"] * 14
    + ["{n}'s {o}"] * 12
    + ["{a} {n} and {o}"] * 20
    + ["{n}, the {o}, and the {b} One", "{a} {n}: The {o}", "{b} {n}, A", "{n}! {o}? {n}!"] * 2
    + ['"{a} {n}" and the {o}', "{n}, The (Été {b}, L')"]
)
"""Names of movies, a hundred: `a` and `b` are adjectives, `n` and `o` nouns. Some need a CSV's quotes."""
_SERIES = 40
"""Every so many names is the start of a series."""
_YEARS = (1915, 2019)

Note = Callable[[str], None]
"""Called when a step is done, with its name."""
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Ratings:
    """The ratings of a population or of a sub-sample of it, ordered by user and then item."""

    user_id: Ints
    """(U,) int64, ascending, from 1 to the size of the population."""
    movie_id: Items
    """(I,) int32, ascending: the movieIds of the items that the whole population rates."""
    offsets: Ints
    """(U + 1,) int64: user k has the rows offsets[k] to offsets[k + 1]."""
    item: Items
    """(R,) int32, row of `movie_id`."""
    half_stars: npt.NDArray[np.int8]
    """(R,) int8, from 1 (0.5 stars) to 10 (5.0)."""
    timestamp: Ints
    """(R,) int64 seconds since the epoch."""

    @property
    def pairs(self) -> int:
        """The sum over users of n(n - 1)/2: pairs of a target and a behaviour before it."""
        sizes = np.diff(self.offsets)
        return int((sizes * (sizes - 1) // 2).sum())


def ml25m_shape(
    seed: int = SEED, users: int | None = None, shape: Shape = ML_25M, note: Note = lambda step: None
) -> Ratings:
    """Draw the ratings.

    Args:
        seed: of everything.
        users: how many users to keep, all where it is None. A user has the same ratings in every sub-sample, and a
            smaller one's users are among a larger one's.
        shape: of the whole population.
        note: is told of every step.

    Raises:
        InputError: a negative seed, no or too many users, or a shape that cannot be had.
    """
    users = shape.users if users is None else users
    if not 1 <= users <= shape.users:
        raise InputError(f"{users} users: there are 1 to {shape.users}")
    sizes = stream(seed, 0).permutation(user_sizes(shape))
    tables, movie_id = _tables(seed, shape, sizes, note)
    kept = np.sort(stream(seed, 1).permutation(shape.users)[:users])
    offsets = np.concatenate([[0], np.cumsum(sizes[kept])])
    rows = int(offsets[-1])
    item, half_stars, timestamp = np.empty(rows, np.int32), np.empty(rows, np.int8), np.empty(rows, np.int64)
    draw(tables, kept, offsets, item, half_stars, timestamp)
    note(f"drew {rows:,} ratings")
    return Ratings(kept + 1, movie_id, offsets, item, half_stars, timestamp)


def _tables(seed: int, shape: Shape, sizes: Ints, note: Note) -> tuple[Tables, Items]:
    """Return what the draw needs to know of the whole population, and the movieIds of the rated items."""
    counts = item_counts(shape)
    weight, expected = fit(sizes, counts)
    note(f"fitted the weights of {shape.items:,} items")
    start, dealt = deal(stream(seed, 2), sizes, counts, expected)
    note(f"dealt out {len(dealt):,} ratings of rare items")
    # One rating of each frequent item is dealt out; its weight stands for the others.
    weight = (weight * (counts - 1) / counts)[counts >= EXACT_BELOW]
    ids, rated = movie_ids(stream(seed, 5), shape)
    # Ids grew with the years and ratings gather: what is popular tends to have a low one.
    age = np.log(np.arange(1, shape.items + 1)) + stream(seed, 3).gumbel(scale=1.5, size=shape.items)
    rng = stream(seed, 4)
    noise, bound = score_bounds(shape)
    tables = Tables(
        weight,
        *alias_table(weight),
        place=np.argsort(age, kind="stable").astype(np.int32),
        quality=QUALITY * rng.standard_normal(shape.items),
        start=start,
        dealt=dealt,
        word=rng.integers(1 << 64, size=shape.users, dtype=np.uint64),
        bias=BIAS * rng.standard_normal(shape.users),
        noise=noise,
        bound=bound,
    )
    return tables, ids[rated].astype(np.int32)


def movie_rows(seed: int = SEED, shape: Shape = ML_25M) -> list[tuple[int, str, str]]:
    """Return movieId, title and genres of all listed movies, by movieId; titles repeat for `shape.twins` pairs only.

    Raises:
        InputError: a negative seed.
    """
    ids, rated = movie_ids(stream(seed, 5), shape)
    rng = stream(seed, 6)
    titles = _titles(rng, shape.listed)
    pairs = rng.choice(rated, (shape.twins, 2), replace=False)
    for one, other in pairs.tolist():
        titles[other] = titles[one]
    return list(zip(ids.tolist(), titles, _genres(rng, shape.listed), strict=True))


def _titles(rng: np.random.Generator, count: int) -> list[str]:
    """Return different titles with their years; about one in ten continues a series, a few years later."""
    adjectives = [word for words, _ in WORDS.values() for word in words]
    nouns = [word for _, words in WORDS.values() for word in words]
    titles: dict[str, None] = {}
    series: list[tuple[str, int, int]] = []
    first, last = _YEARS
    for kind, a, b, n, o, year in rng.integers(1 << 30, size=(count, 6)).tolist():
        at = a % len(series) if series and b % 10 == 0 else -1
        if at >= 0 and series[at][2] < last - 5:
            base, part, when = series[at]
            part, when = part + 1, when + 1 + year % 5
            series[at] = (base, part, when)
            head, comma, rest = base.partition(",")
            name = f"{head} {part}{comma}{rest}"  # Lost Temple 2, The
        else:
            pattern, when = _PATTERNS[kind % len(_PATTERNS)], first + year % (last - first + 1)
            words = [w[i % len(w)] for w, i in ((adjectives, a), (adjectives, b), (nouns, n), (nouns, o))]
            name = pattern.format(**dict(zip("abno", words, strict=True)))
            if len(titles) % _SERIES == 0:
                series.append((name, 1, when))
        while (title := f"{name} ({when})") in titles:
            when = when + 1 if when < last else first
        titles[title] = None
    return list(titles)


def _genres(rng: np.random.Generator, count: int) -> list[str]:
    """Return `A|B|C`, different genres in the order of `GENRES`, for each movie."""
    keys = np.log(list(GENRES.values())) + rng.gumbel(size=(count, len(GENRES)))
    rank = np.argsort(np.argsort(-keys, axis=1), axis=1)
    listed = rank < rng.choice(len(_GENRES_LISTED), size=count, p=_GENRES_LISTED)[:, None]
    return ["|".join(g for g, on in zip(GENRES, row, strict=True) if on) or NO_GENRES for row in listed.tolist()]


def write_ml25m(
    folder: Path | str,
    seed: int = SEED,
    users: int | None = None,
    shape: Shape = ML_25M,
    note: Note = lambda step: None,
) -> Path:
    """Write `movies.csv` (all movies) and `ratings.csv` (those of `users` users) as the original has them.

    The folder appears when both files are complete.

    Args:
        folder: where to; it must not exist yet, or be empty.
        seed: of everything.
        users: how many users to keep, see `ml25m_shape`.
        shape: of the whole population.
        note: is told of every step.

    Returns:
        The folder.

    Raises:
        InputError: the folder has something in it; or see `ml25m_shape`.
        StorageError: the files cannot be written.
    """
    folder = Path(folder).expanduser()
    _refuse_taken(folder)
    part = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:12]}")
    try:
        part.mkdir(parents=True)
        movies, ratings = (part / name for name in FILES)
        with movies.open("w", encoding="utf-8", newline="") as text:
            table = csv.writer(text, lineterminator="\n")
            table.writerow(("movieId", "title", "genres"))
            table.writerows(movie_rows(seed, shape))
        note(f"wrote {shape.listed:,} movies")
        found = ml25m_shape(seed, users, shape, note)
        with ratings.open("wb") as file:
            _write_ratings(file, found)
        note(f"wrote {len(found.item):,} ratings of {len(found.user_id):,} users, {found.pairs:,} pairs")
        _refuse_taken(folder)  # another process may have been first
        part.rename(folder)
    except OSError as error:
        if isinstance(error, RellaError):
            raise
        raise StorageError(f"{folder}: cannot be written ({error}); name another folder or make room") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _refuse_taken(folder: Path) -> None:
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder}: there is something already; name a folder that does not exist or remove it")


def _write_ratings(file: BinaryIO, ratings: Ratings, rows: int = 1 << 20) -> None:
    """Write a header and all ratings, about `rows` at a time."""
    file.write(b"userId,movieId,rating,timestamp\n")
    first = 0
    while first < len(ratings.user_id):
        start = ratings.offsets[first]
        last = max(first + 1, int(np.searchsorted(ratings.offsets, start + rows, side="right")) - 1)
        block = slice(start, ratings.offsets[last])
        user = np.repeat(ratings.user_id[first:last], np.diff(ratings.offsets[first : last + 1]))
        movie = ratings.movie_id[ratings.item[block]]
        text = np.empty(len(user) * 64, np.uint8)
        size = _lines(user, movie, ratings.half_stars[block], ratings.timestamp[block], text)
        file.write(text[:size].data)
        first = last


@numba.njit(cache=True, nogil=True)
def _digits(text: Bytes, at: int, value: int, end: int) -> int:  # pragma: no cover - compiled
    """Write a number and the character `end` at `at`; return where they stop."""
    size, rest = 1, value // 10
    while rest:
        size += 1
        rest //= 10
    for i in range(at + size - 1, at - 1, -1):
        text[i] = 48 + value % 10
        value //= 10
    text[at + size] = end
    return at + size + 1


@numba.njit(cache=True, nogil=True)
def _lines(
    user: Ints, movie: Items, half_stars: npt.NDArray[np.int8], timestamp: Ints, text: Bytes
) -> int:  # pragma: no cover - compiled
    """Write a line for each rating; return the number of bytes."""
    at = 0
    for row in range(user.size):
        at = _digits(text, at, user[row], 44)
        at = _digits(text, at, np.int64(movie[row]), 44)
        at = _digits(text, at, np.int64(half_stars[row] // 2), 46)
        at = _digits(text, at, np.int64(half_stars[row] % 2 * 5), 44)
        at = _digits(text, at, timestamp[row], 10)
    return at


def cached_ml25m(
    seed: int = SEED, users: int | None = None, shape: Shape = ML_25M, note: Note = lambda step: None
) -> Path:
    """Return a folder with the two files below the cache folder, written there by the first call.

    Args:
        seed: of everything.
        users: how many users to keep, see `ml25m_shape`.
        shape: of the whole population.
        note: is told of every step.

    Raises:
        InputError: see `ml25m_shape`.
        StorageError: the files cannot be written.
    """
    kind = hashlib.sha256(repr((VERSION, shape)).encode()).hexdigest()[:8]
    folder = cache_folder() / "synthetic" / f"ml25m-{kind}-seed{seed}-users{shape.users if users is None else users}"
    if not folder.is_dir():
        try:
            write_ml25m(folder, seed, users, shape, note)
        except (InputError, StorageError):
            if not folder.is_dir():  # else another process made it meanwhile
                raise
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and write the files; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m rella.data.synthetic25m", description=(__doc__ or "").partition("\n\n    ")[0]
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write, new or empty")
    parser.add_argument("--seed", type=int, default=SEED, metavar="N", help="of everything (default: %(default)s)")
    parser.add_argument(
        "--users", type=int, metavar="N", help=f"only so many of the {ML_25M.users:,} users, with all their ratings"
    )
    options = parser.parse_args(arguments)
    before = time.perf_counter()

    def note(step: str) -> None:
        nonlocal before
        now = time.perf_counter()
        print(f"{now - before:6.1f} s  {step}", file=sys.stderr, flush=True)
        before = now

    try:
        write_ml25m(options.out, options.seed, options.users, note=note)
    except RellaError as error:
        print(f"rella: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
