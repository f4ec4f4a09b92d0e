"""MovieLens-1M from its original files (`users.dat`, `movies.dat`, `ratings.dat`; latin-1, `::` between the fields)."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as pacsv

from rella.data.raw import RawDataset

FILES = ("users.dat", "movies.dat", "ratings.dat")
"""What `read_ml1m` needs."""

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

Reader = Callable[[str], tuple[bytes, str]]


def read_ml1m(folder_or_zip: Path) -> RawDataset:
    """Read MovieLens-1M.

    Users and items are numbered in the order of their original (numeric) ids. Every user of `users.dat` is kept; of the
    movies only those that somebody rated, as in Table 1 (3,706 of 3,883).

    Args:
        folder_or_zip: a folder with the three files, a folder with `ml-1m/` or `ml-1m.zip`, or the archive itself.

    Returns:
        The ratings in file order. `users`: user, user_id, gender, age, occupation, zipcode. `items`: item, item_id,
        title, genre (the first listed), genres (list of strings).

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a row is malformed or points to an unknown user or movie; names file, row number and remedy.
    """
    read = _reader(Path(folder_or_zip))
    user_ids, users = _parse_users(*read("users.dat"))
    movie_ids, movies = _parse_movies(*read("movies.dat"))
    data, where = read("ratings.dat")
    columns = _parse_ratings(data, where)
    user = _rows_of(columns["user"], user_ids, where, "user", "users.dat")
    movie = _rows_of(columns["movie"], movie_ids, where, "movie", "movies.dat")

    rated = np.bincount(movie, minlength=len(movie_ids)) > 0
    items = movies.filter(pa.array(rated))
    items = items.add_column(
        0, pa.field("item", pa.int32(), nullable=False), pa.array(np.arange(len(items), dtype="i4"))
    )
    item_of_movie = (np.cumsum(rated) - 1).astype(np.int32)
    return RawDataset(
        users=users,
        items=items.combine_chunks(),
        user=user.astype(np.int32),
        item=item_of_movie[movie],
        rating=columns["rating"].astype(np.float32),
        timestamp=columns["timestamp"],
    )


def field_vocabularies(raw: RawDataset) -> dict[str, int]:
    """Return how many distinct values each field of the ID-based baselines has, by the paper's name of the field.

    `Rating` counts the levels that occur: ratings of the history are features too. On MovieLens-1M the sizes are 6040,
    2, 7, 21, 3439, 3706, 3706, 18 and 5, in all 16,944 features (Table 1). The history's items share `Movie ID`.
    """
    user_fields = {
        "User ID": "user_id",
        "Gender": "gender",
        "Age": "age",
        "Occupation": "occupation",
        "Zipcode": "zipcode",
    }
    item_fields = {"Movie ID": "item_id", "Title": "title", "Genre": "genre"}
    sizes = {field: len(raw.users.column(column).unique()) for field, column in user_fields.items()}
    sizes |= {field: len(raw.items.column(column).unique()) for field, column in item_fields.items()}
    return sizes | {"Rating": len(np.unique(raw.rating))}


def _reader(path: Path) -> Reader:
    """Return name → (bytes, where they come from) for the folder or archive `path`."""
    if path.is_dir():
        folders = [folder for folder in (path, path / "ml-1m") if (folder / FILES[-1]).is_file()]
        if folders:
            return lambda name: _read_file(folders[0] / name)
        if not (path / "ml-1m.zip").is_file():
            raise FileNotFoundError(
                f"{path}: neither {', '.join(FILES)} nor ml-1m/ nor ml-1m.zip is in this folder. "
                "Name the folder that holds them, or the archive, with --raw-dir."
            )
        path = path / "ml-1m.zip"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file or folder. Name a folder with {', '.join(FILES)}, or ml-1m.zip, with --raw-dir."
        )
    return lambda name: _read_member(path, name)


def _read_file(path: Path) -> tuple[bytes, str]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: the file is missing. {path.parent} must hold {', '.join(FILES)}.")
    return path.read_bytes(), str(path)


def _read_member(path: Path, name: str) -> tuple[bytes, str]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = [m for m in archive.namelist() if Path(m).name == name]
            if not members:
                raise FileNotFoundError(f"{path}: no {name} in the archive, which must hold {', '.join(FILES)}.")
            return archive.read(members[0]), f"{path}/{members[0]}"
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: not a readable zip archive ({error}). Delete it and download it again.") from error


def _rows(data: bytes, where: str, columns: str) -> list[list[str]]:
    """Return the cells of every line; only `\\n` ends a line (latin-1's NEL would end one for `str.splitlines`)."""
    lines = data.rstrip(b"\r\n").split(b"\n")
    rows = [line.removesuffix(b"\r").decode("latin-1").split("::") for line in lines]
    width = columns.count("::") + 1
    bad = next((n for n, row in enumerate(rows) if len(row) != width), None)
    if bad is not None:
        raise _fault(where, bad, f"{len(rows[bad])} columns instead of {width} ({columns}): {'::'.join(rows[bad])!r}")
    return rows


def _fault(where: str, row: int, what: str) -> ValueError:
    return ValueError(f"{where}, row {row + 1}: {what}. {_REMEDY}")


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


def _rating_fault(data: bytes, where: str, error: Exception) -> ValueError:
    """Return the fault of the first malformed line: the fast parser does not say where it stopped."""
    if not data:
        return ValueError(f"{where}: the file has no rating. {_REMEDY}")
    for row, line in enumerate(data.split(b"\n")):
        cells = line.removesuffix(b"\r").split(b"::")
        text = line.removesuffix(b"\r").decode("latin-1")
        if len(cells) != 4:
            return _fault(where, row, f"{len(cells)} columns instead of 4 ({_RATING_COLUMNS}): {text!r}")
        if not all(_INTEGER.fullmatch(cell) for cell in cells):
            return _fault(where, row, f"a column is not an integer ({_RATING_COLUMNS}): {text!r}")
    return ValueError(f"{where}: {error}. {_REMEDY}")


def _rows_of(
    ids: npt.NDArray[np.int64], known: npt.NDArray[np.int64], where: str, name: str, file: str
) -> npt.NDArray[np.int64]:
    """Return the row in `known` (ascending) of every id."""
    rows = np.minimum(np.searchsorted(known, ids), len(known) - 1)
    wrong = np.flatnonzero(known[rows] != ids)
    if len(wrong):
        raise _fault(where, int(wrong[0]), f"{name} {ids[wrong[0]]} is not in {file}")
    return rows
