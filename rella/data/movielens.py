"""MovieLens-1M from its original files (`users.dat`, `movies.dat`, `ratings.dat`; latin-1, `::` between the fields)."""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as pacsv

from rella.data.files import RawFiles
from rella.data.raw import RawDataset
from rella.errors import InputError

FILES = ("users.dat", "movies.dat", "ratings.dat")
"""What `read_ml1m` needs."""

FIELDS = {
    "User ID": "users.user_id",
    "Gender": "users.gender",
    "Age": "users.age",
    "Job": "users.occupation",
    "Zipcode": "users.zipcode",
    "Movie ID": "items.item_id",
    "Movie title": "items.title",
    "Movie genre": "items.genre",
}
"""Table 1's fields."""

GENDERS = {"F": "female", "M": "male"}
"""Code in `users.dat` → the word of the prompt."""

AGES = {
    "1": "Under 18",
    "18": "18-24",
    "25": "25-34",
    "35": "35-44",
    "45": "45-49",
    "50": "50-55",
    "56": "56+",
}
"""Code in `users.dat` (a bucket's first year) → the bucket."""

OCCUPATIONS = (
    "other",
    "academic/educator",
    "artist",
    "clerical/admin",
    "college/grad student",
    "customer service",
    "doctor/health care",
    "executive/managerial",
    "farmer",
    "homemaker",
    "K-12 student",
    "lawyer",
    "programmer",
    "retired",
    "sales/marketing",
    "scientist",
    "self-employed",
    "technician/engineer",
    "tradesman/craftsman",
    "unemployed",
    "writer",
)
"""By code in `users.dat`: the names of the data set's README ('"other" or not specified' as `other`)."""

_USER_COLUMNS = "UserID::Gender::Age::Occupation::Zip-code"
_MOVIE_COLUMNS = "MovieID::Title::Genres"
_RATING_COLUMNS = "UserID::MovieID::Rating::Timestamp"
_REMEDY = "Repair the row or take the original files (ml-1m.zip of https://grouplens.org/datasets/movielens/1m/)."
_INTEGER = re.compile(rb"\s*-?\d{1,18}\s*")
_CELL = b"\x1f"
"""A single byte that no field holds: the fast parser knows only separators of one byte."""


def read_ml1m(files: RawFiles, strict: bool = True) -> RawDataset:
    """Read MovieLens-1M.

    Users and items are numbered in the order of their original (numeric) ids. Every user of `users.dat` is kept; of the
    movies only those that somebody rated, as in Table 1 (3,706 of 3,883).

    Args:
        files: where `FILES` lie.
        strict: whether a rating of an unknown user or movie is an error; otherwise it is left out and counted.

    Returns:
        The ratings in file order. `users`: user, user_id, gender, age, occupation, zipcode. `items`: item, item_id,
        title, genre (the first listed), genres (list of strings).

    Raises:
        MissingError: a file is missing.
        InputError: a row is malformed or, if `strict`, points to an unknown user or movie; names file, row number and
            remedy.
    """
    user_ids, users = _parse_users(files.read("users.dat"), files.where("users.dat"))
    movie_ids, movies = _parse_movies(files.read("movies.dat"), files.where("movies.dat"))
    where = files.where("ratings.dat")
    columns = _parse_ratings(files.read("ratings.dat"), where)
    keep, dropped = _known(columns, {"user": user_ids, "movie": movie_ids}, where, strict)
    if dropped:
        columns = {name: column[keep] for name, column in columns.items()}
    movie = np.searchsorted(movie_ids, columns["movie"])

    rated = np.bincount(movie, minlength=len(movie_ids)) > 0
    items = movies.filter(pa.array(rated))
    items = items.add_column(
        0, pa.field("item", pa.int32(), nullable=False), pa.array(np.arange(len(items), dtype="i4"))
    )
    item_of_movie = (np.cumsum(rated) - 1).astype(np.int32)
    return RawDataset(
        users=users,
        items=items.combine_chunks(),
        user=np.searchsorted(user_ids, columns["user"]).astype(np.int32),
        item=item_of_movie[movie],
        rating=columns["rating"].astype(np.float32),
        timestamp=columns["timestamp"],
        fields=FIELDS,
        dropped=dropped,
    )


def _rows(data: bytes, where: str, columns: str) -> list[list[str]]:
    """Return the cells of every line; only `\\n` ends a line (latin-1's NEL would end one for `str.splitlines`)."""
    lines = data.rstrip(b"\r\n").split(b"\n")
    rows = [line.removesuffix(b"\r").decode("latin-1").split("::") for line in lines]
    width = columns.count("::") + 1
    bad = next((n for n, row in enumerate(rows) if len(row) != width), None)
    if bad is not None:
        raise _fault(where, bad, f"{len(rows[bad])} columns instead of {width} ({columns}): {'::'.join(rows[bad])!r}")
    return rows


def _fault(where: str, row: int, what: str) -> InputError:
    return InputError(f"{where}, row {row + 1}: {what}. {_REMEDY}")


def _ids(cells: list[str], where: str, name: str) -> npt.NDArray[np.int64]:
    """Return a table's ids as int64, all different."""
    bad = next((n for n, cell in enumerate(cells) if not _INTEGER.fullmatch(cell.encode())), None)
    if bad is not None:
        raise _fault(where, bad, f"{name} {cells[bad]!r} is not an integer")
    ids = np.array(cells, dtype=np.int64)
    _, first = np.unique(ids, return_index=True)
    if len(first) < len(ids):
        repeated = int(np.setdiff1d(np.arange(len(ids)), first)[0])
        raise _fault(where, repeated, f"{name} {cells[repeated]} appears for the second time")
    return ids


def _decode(cells: list[str], words: dict[str, str], where: str, name: str) -> list[str]:
    bad = next((n for n, cell in enumerate(cells) if cell not in words), None)
    if bad is not None:
        raise _fault(where, bad, f"{name} {cells[bad]!r} is none of {list(words)}")
    return [words[cell] for cell in cells]


def _parse_users(data: bytes, where: str) -> tuple[npt.NDArray[np.int64], pa.Table]:
    """Return the (U,) user ids, ascending, and the users table in that order."""
    ids, gender, age, occupation, zipcode = (list(c) for c in zip(*_rows(data, where, _USER_COLUMNS), strict=True))
    numbers = _ids(ids, where, "user")
    occupations = {str(code): name for code, name in enumerate(OCCUPATIONS)}
    text = {
        "user_id": [str(number) for number in numbers],
        "gender": _decode(gender, GENDERS, where, "gender"),
        "age": _decode(age, AGES, where, "age"),
        "occupation": _decode(occupation, occupations, where, "occupation"),
        "zipcode": zipcode,
    }
    order = np.argsort(numbers)
    schema = pa.schema([pa.field(name, pa.string(), nullable=False) for name in text])
    table = pa.table(text, schema=schema).take(pa.array(order))
    row = pa.array(np.arange(len(order), dtype=np.int32))
    return numbers[order], table.add_column(0, pa.field("user", pa.int32(), nullable=False), row)


def _parse_movies(data: bytes, where: str) -> tuple[npt.NDArray[np.int64], pa.Table]:
    """Return the (M,) movie ids, ascending, and a table item_id, title, genre, genres in that order."""
    ids, title, listed = (list(c) for c in zip(*_rows(data, where, _MOVIE_COLUMNS), strict=True))
    numbers = _ids(ids, where, "movie")
    genres = [cell.split("|") for cell in listed]
    bad = next((n for n, names in enumerate(genres) if not all(names)), None)
    if bad is not None:
        raise _fault(where, bad, f"an empty genre in {listed[bad]!r}")
    text = {"item_id": [str(number) for number in numbers], "title": title, "genre": [names[0] for names in genres]}
    fields = [pa.field(name, pa.string(), nullable=False) for name in text]
    fields.append(pa.field("genres", pa.list_(pa.string()), nullable=False))
    order = np.argsort(numbers)
    return numbers[order], pa.table(text | {"genres": genres}, schema=pa.schema(fields)).take(pa.array(order))


def _parse_ratings(data: bytes, where: str) -> dict[str, npt.NDArray[np.int64]]:
    """Return the columns user, movie, rating (1 to 5), timestamp as (R,) int64, in file order."""
    data = data.rstrip(b"\r\n")
    names = ["user", "movie", "rating", "timestamp"]
    try:
        table = pacsv.read_csv(
            pa.BufferReader(data.replace(b"::", _CELL)),
            read_options=pacsv.ReadOptions(column_names=names),
            parse_options=pacsv.ParseOptions(delimiter=_CELL.decode(), quote_char=False, ignore_empty_lines=False),
            convert_options=pacsv.ConvertOptions(column_types=dict.fromkeys(names, pa.int64()), null_values=[]),
        )
    except pa.ArrowInvalid as error:
        raise _rating_fault(data, where, error) from error
    columns = {name: table.column(name).to_numpy() for name in names}
    wrong = np.flatnonzero((columns["rating"] < 1) | (columns["rating"] > 5))
    if len(wrong):
        raise _fault(where, int(wrong[0]), f"rating {columns['rating'][wrong[0]]} is not in 1..5")
    return columns


def _rating_fault(data: bytes, where: str, error: Exception) -> InputError:
    """Return the fault of the first malformed line: the fast parser does not say where it stopped."""
    if not data:
        return InputError(f"{where}: the file has no rating. {_REMEDY}")
    for row, line in enumerate(data.split(b"\n")):
        cells = line.removesuffix(b"\r").split(b"::")
        text = line.removesuffix(b"\r").decode("latin-1")
        if len(cells) != 4:
            return _fault(where, row, f"{len(cells)} columns instead of 4 ({_RATING_COLUMNS}): {text!r}")
        if not all(_INTEGER.fullmatch(cell) for cell in cells):
            return _fault(where, row, f"a column is not an integer ({_RATING_COLUMNS}): {text!r}")
    return InputError(f"{where}: {error}. {_REMEDY}")


def _known(
    columns: dict[str, npt.NDArray[np.int64]], listed: dict[str, npt.NDArray[np.int64]], where: str, strict: bool
) -> tuple[npt.NDArray[np.bool_], dict[str, int]]:
    """Return which ratings, as a mask (R,), have a user and a movie that are `listed` (ascending), and the count of
    the others by reason.
    """
    keep = np.ones(len(columns["rating"]), dtype=bool)
    dropped = {}
    for name, known in listed.items():
        ids = columns[name]
        unknown = keep & (known[np.minimum(np.searchsorted(known, ids), len(known) - 1)] != ids)
        if not unknown.any():
            continue
        if strict:
            row = int(np.argmax(unknown))
            what = f"{name} {ids[row]} is not in {name}s.dat"
            raise InputError(
                f"{_fault(where, row, what)} `--data.strict false` leaves such ratings out and counts them."
            )
        keep &= ~unknown
        dropped[f"ratings of unknown {name}s"] = int(unknown.sum())
    if not keep.any():
        raise InputError(f"{where}: no rating has a user of users.dat and a movie of movies.dat. {_REMEDY}")
    return keep, dropped
