"""MovieLens-25M from its original files (`movies.csv`, `ratings.csv`; UTF-8, commas, a header, RFC 4180's quotes)."""

from __future__ import annotations

import csv
import re

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from rella.data.files import RawFiles
from rella.data.raw import RawDataset
from rella.errors import InputError

FILES = ("movies.csv", "ratings.csv")
"""What `read_ml25m` needs."""

FIELDS = {
    "User ID": "users.user_id",
    "Movie ID": "items.item_id",
    "Movie title": "items.title",
    "Movie genre": "items.genre",
}
"""Table 1's fields."""

_MOVIES, _RATINGS = FILES
_MOVIE_COLUMNS = ["movieId", "title", "genres"]
_RATING_COLUMNS = ["userId", "movieId", "rating", "timestamp"]
_REMEDY = "Repair the row or take the original files (ml-25m.zip of https://grouplens.org/datasets/movielens/25m/)."
_INTEGER = re.compile(r"-?\d{1,18}")
_PLAIN = re.compile(rb"\d{1,9},(\d{1,9}),(?:0\.5|[1-4]\.[05]|5\.0),\d{1,18}\r?\n?")
"""A row as the original file has it: most rows can be passed over without a closer look."""
_BOM = b"\xef\xbb\xbf"
_BLOCK = 4 << 20
"""Bytes of `ratings.csv` that are parsed at once."""

Columns = dict[str, npt.NDArray[np.generic]]


def read_ml25m(files: RawFiles, strict: bool = True) -> RawDataset:
    """Read MovieLens-25M, or part of it in the same format.

    Users are those that rate, items the movies that somebody rated (59,047 of 62,423), each in the order of their
    original (numeric) ids. The ratings are streamed: memory is that of columns, at most about 50 bytes a rating.

    Args:
        files: the two files, e.g. `locate("ml-25m", FILES, folder)`.
        strict: whether a rating of a movie that is not listed is an error; else it is left out and counted in
            `dropped`.

    Returns:
        The ratings in file order. `users`: user, user_id; there are no profiles. `items`: item, item_id, title, genre
        (the first listed), genres (list of strings).

    Raises:
        MissingError: the archive lacks a file.
        InputError: a damaged archive; a wrong header; a row that is malformed or, if `strict`, points to an unknown
            movie; no rating left. Names file, row number (the header is row 1), content and remedy.
    """
    movie_ids, movies = _parse_movies(files)
    columns = _parse_ratings(files)
    movie = pc.index_in(pa.array(columns.pop("movieId")), value_set=pa.array(movie_ids))
    dropped = {}
    if movie.null_count:
        if strict:
            raise _rating_fault(files, listed=frozenset(movie_ids.tolist()))
        dropped["ratings of unknown movies"] = movie.null_count
        keep = movie.is_valid().to_numpy(zero_copy_only=False)
        columns = {name: column[keep] for name, column in columns.items()}
        movie = movie.drop_null()
    if not len(movie):
        raise InputError(f"{files.where(_RATINGS)}: no rating of a movie of {_MOVIES}. {_REMEDY}")

    rated = np.bincount(movie.to_numpy(), minlength=len(movie_ids)) > 0
    user = pa.array(columns.pop("userId"))
    user_ids = np.sort(user.unique().to_numpy())
    return RawDataset(
        users=_numbered("user", user_ids, pa.table({})),
        items=_numbered("item", movie_ids[rated], movies.filter(pa.array(rated)).combine_chunks()),
        user=pc.index_in(user, value_set=pa.array(user_ids)).to_numpy(),
        item=(np.cumsum(rated) - 1).astype(np.int32)[movie.to_numpy()],
        rating=columns["rating"].astype(np.float32, copy=False),
        timestamp=columns["timestamp"].astype(np.int64, copy=False),
        fields=FIELDS,
        dropped=dropped,
    )


def _numbered(name: str, ids: npt.NDArray[np.int32], more: pa.Table) -> pa.Table:
    """Return the table `name` (row number), `name`_id (the ids as text), then the columns of `more`."""
    fields = [pa.field(name, pa.int32(), nullable=False), pa.field(f"{name}_id", pa.string(), nullable=False)]
    columns = [pa.array(np.arange(len(ids), dtype=np.int32)), pa.array(ids).cast(pa.string())]
    return pa.table([*columns, *more.columns], schema=pa.schema([*fields, *more.schema]))


def _fault(where: str, row: int, what: str) -> InputError:
    return InputError(f"{where}, row {row}: {what}. {_REMEDY}")


def _header_fault(where: str, found: str, wanted: list[str]) -> InputError:
    return _fault(where, 1, f"the header {','.join(wanted)} is missing; the row is {found[:200]!r}")


def _movie_rows(files: RawFiles) -> list[tuple[int, list[str]]]:
    """Return (row number in the file, the three cells) of every movie."""
    where, data = files.where(_MOVIES), files.read(_MOVIES)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start].split(b"\n")
        line = before[-1] + data[error.start :].partition(b"\n")[0]
        raise _fault(where, len(before), f"not UTF-8: {line[:200]!r}") from error
    # `splitlines` would end a line at characters that a title may hold.
    lines = text.removesuffix("\n").split("\n")
    reader = csv.reader((f"{line}\n" for line in lines), strict=True)
    rows, start = [], 1
    try:
        for cells in reader:
            if cells:
                rows.append((start, cells))
            start = reader.line_num + 1
    except csv.Error as error:
        raise _fault(where, start, f"{error}: {lines[start - 1][:200]!r}") from error
    if not rows or rows[0][1] != _MOVIE_COLUMNS:
        raise _header_fault(where, lines[0], _MOVIE_COLUMNS)
    return rows[1:]


def _parse_movies(files: RawFiles) -> tuple[npt.NDArray[np.int32], pa.Table]:
    """Return the (M,) movie ids, ascending, and a table title, genre, genres in that order."""
    where = files.where(_MOVIES)
    rows: dict[int, tuple[str, list[str]]] = {}
    for row, cells in _movie_rows(files):
        if len(cells) != len(_MOVIE_COLUMNS):
            raise _fault(where, row, f"{len(cells)} columns instead of 3 ({','.join(_MOVIE_COLUMNS)}): {cells!r}")
        number, title, listed = cells
        if not _INTEGER.fullmatch(number) or abs(int(number)) >= 1 << 31:
            raise _fault(where, row, f"movieId {number!r} is not an integer: {cells!r}")
        if int(number) in rows:
            raise _fault(where, row, f"movie {number} appears for the second time: {cells!r}")
        genres = listed.split("|")
        if not all(genres):
            raise _fault(where, row, f"an empty genre in {listed!r}: {cells!r}")
        rows[int(number)] = (title, genres)
    if not rows:
        raise InputError(f"{where}: the file has no movie. {_REMEDY}")
    ids = sorted(rows)
    titles, genres_of = zip(*(rows[number] for number in ids), strict=True)
    schema = pa.schema(
        [
            pa.field("title", pa.string(), nullable=False),
            pa.field("genre", pa.string(), nullable=False),
            pa.field("genres", pa.list_(pa.string()), nullable=False),
        ]
    )
    columns = {"title": titles, "genre": [genres[0] for genres in genres_of], "genres": genres_of}
    return np.array(ids, dtype=np.int32), pa.table(columns, schema=schema)


def _parse_ratings(files: RawFiles) -> Columns:
    """Return userId and movieId (R,) int32, rating (R,) float32 and timestamp (R,) int64, in file order."""
    # Parsed as float64: in float32 a rating of 3.50000001 would pass for 3.5.
    types = dict(zip(_RATING_COLUMNS, (pa.int32(), pa.int32(), pa.float64(), pa.int64()), strict=True))
    parts: dict[str, list[npt.NDArray[np.generic]]] = {name: [] for name in types}
    try:
        with (
            files.open(_RATINGS) as stream,
            pacsv.open_csv(
                stream,
                read_options=pacsv.ReadOptions(block_size=_BLOCK),
                convert_options=pacsv.ConvertOptions(column_types=types, null_values=[]),
            ) as reader,
        ):
            if reader.schema.names != _RATING_COLUMNS:
                raise _header_fault(files.where(_RATINGS), ",".join(reader.schema.names), _RATING_COLUMNS)
            for batch in reader:
                rating = batch.column("rating").to_numpy()
                levels = rating * 2
                if not ((levels == np.rint(levels)) & (levels >= 1) & (levels <= 10)).all():
                    raise pa.ArrowInvalid("a rating is not a half star")
                for name in types:
                    found = rating.astype(np.float32) if name == "rating" else batch.column(name).to_numpy()
                    parts[name].append(found)
    except pa.ArrowInvalid as error:
        raise _rating_fault(files, error) from error
    if not parts["rating"]:
        raise InputError(f"{files.where(_RATINGS)}: the file has no rating. {_REMEDY}")
    # One column at a time, so that only one exists twice.
    return {name: np.concatenate(parts.pop(name)) for name in types}


def _rating_fault(files: RawFiles, error: Exception | None = None, listed: frozenset[int] | None = None) -> InputError:
    """Return the fault of the first row that is malformed, or whose movie is not `listed`.

    The file is read once more, line by line: the fast parser neither says where it stopped nor checks the levels.
    """
    where = files.where(_RATINGS)
    with files.open(_RATINGS) as stream:
        first = stream.readline().removeprefix(_BOM).decode("utf-8", "replace").rstrip("\r\n")
        if [name.strip('"') for name in first.split(",")] != _RATING_COLUMNS:
            return _header_fault(where, first, _RATING_COLUMNS)
        for row, line in enumerate(stream, start=2):
            plain = _PLAIN.fullmatch(line)
            if plain and (listed is None or int(plain[1]) in listed):
                continue
            text = line.decode("utf-8", "replace").rstrip("\r\n")
            if not text:
                continue
            cells = [cell.strip().strip('"') for cell in text.split(",")]
            what = _wrong(cells)
            if what:
                return _fault(where, row, f"{what}: {text!r}")
            if listed is not None and int(cells[1]) not in listed:
                fault = _fault(where, row, f"movie {cells[1]} is not in {_MOVIES}: {text!r}")
                return InputError(f"{fault} `--data.strict false` leaves such ratings out and counts them.")
    return InputError(f"{where}: {error}. {_REMEDY}")


def _wrong(cells: list[str]) -> str | None:
    """Return what is wrong with a row of `ratings.csv`, None for nothing."""
    if len(cells) != len(_RATING_COLUMNS):
        return f"{len(cells)} columns instead of 4 ({','.join(_RATING_COLUMNS)})"
    for name, cell in zip(_RATING_COLUMNS, cells, strict=True):
        if name == "rating":
            continue
        if not _INTEGER.fullmatch(cell) or (name != "timestamp" and abs(int(cell)) >= 1 << 31):
            return f"{name} {cell!r} is not an integer"
    try:
        levels = float(cells[2]) * 2
    except ValueError:
        levels = 0.0
    if levels not in range(1, 11):
        return f"rating {cells[2]!r} is none of 0.5, 1.0, 1.5 … 5.0"
    return None
