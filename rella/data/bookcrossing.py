"""BookCrossing from its original dump (`BX-*.csv`: cp1252, fields in double quotes or NULL, `;`, `\\"` for a quote).

The dump's text stays as it is: `&amp;` and `\\"` are part of it, so that vocabularies are those of Table 1.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from rella.data.files import RawFiles
from rella.data.raw import RawDataset
from rella.errors import InputError

FILES = ("BX-Users.csv", "BX-Books.csv", "BX-Book-Ratings.csv")
"""What `read_bookcrossing` needs."""

FIELDS = {
    "User ID": "users.user_id",
    "Location": "users.location",
    "Age": "users.age",
    "ISBN": "items.item_id",
    "Book title": "items.title",
    "Author": "items.author",
    "Publication year": "items.year",
    "Publisher": "items.publisher",
}
"""Table 1's fields."""

UNKNOWN = "unknown"
"""Stands for an age, country, year, author or publisher that is missing or cannot be right."""

COUNTRIES = Path(__file__).resolve().parents[1] / "assets" / "countries.json"
"""Spellings of countries; see its `about`."""

_USERS, _BOOKS, _RATINGS = FILES
_HEADERS = {
    _USERS: ["User-ID", "Location", "Age"],
    _BOOKS: ["ISBN", "Book-Title", "Book-Author", "Year-Of-Publication", "Publisher"],
    _RATINGS: ["User-ID", "ISBN", "Book-Rating"],
}
_IMAGES = ["Image-URL-S", "Image-URL-M", "Image-URL-L"]
"""Further columns that `BX-Books.csv` may have; they are not read."""
_REMEDY = "Repair the row or take the original files (BX-CSV-Dump.zip)."
_STRICT = "`--data.strict false` leaves such rows out and counts them."

# cp1252 leaves five bytes undefined (0x81, 0x8d, 0x8f, 0x90, 0x9d). They become the characters of the same number, as
# in latin-1, so that decoding never fails and every byte stays distinct.
_CHARACTERS = "".join(bytes([byte]).decode("cp1252", "ignore") or chr(byte) for byte in range(256))
# Single bytes that no field holds: the fast parser knows only separators of one byte.
_NULL, _ROW, _BREAK, _CELL = "\x1c", b"\x1d", b"\x1e", b"\x1f"
_UNQUOTED_NULL = re.compile(r'(?<=["L]);NULL(?=;|\n|\Z)')
_ROW_END = re.compile(r'(?<=")\n(?=")')


def read_bookcrossing(files: RawFiles, strict: bool = False) -> RawDataset:
    """Read BookCrossing.

    Every user and every book is kept, rated or not, as in Table 1, except books whose ISBN is not ASCII letters and
    digits. Many ratings are of books that the dump does not list, which is why `strict` is off.

    Args:
        files: the three files, e.g. `locate("bookcrossing", FILES, folder)`.
        strict: whether a rating of an unknown user or book, or a user or book that is listed twice, is an error; else
            it is left out (of two, the second) and counted in `dropped`.

    Returns:
        The ratings (0 to 10) in file order; `timestamp` is the rank in the file, for there is no time. `users`, by
        ascending number: user, user_id, location (the country), age (a bucket). `items`, in file order: item, item_id
        (the ISBN), title, author, year, publisher.

    Raises:
        MissingError: the archive lacks a file.
        InputError: a damaged archive; a wrong header; a malformed row, or one that `strict` refuses; no rating left.
            Names file, row number (the header is row 1), content and remedy.
    """
    dropped: dict[str, int] = {}
    user_ids, users = _parse_users(files, strict, dropped)
    items = _parse_books(files, strict, dropped)
    table = _table(files, _RATINGS)
    rating = _integers(files, _RATINGS, table, "Book-Rating")
    if rating.max() > 10:
        row = int(np.argmax(rating > 10))
        raise _fault(files, _RATINGS, row, f"Book-Rating {rating[row]} is not in 0..10")
    user = pc.index_in(pa.array(_integers(files, _RATINGS, table, "User-ID")), value_set=pa.array(user_ids))
    item = pc.index_in(table.column("ISBN"), value_set=items.column("item_id").combine_chunks())
    keep = _known(files, {"user": user, "book": item.combine_chunks()}, strict, dropped)
    return RawDataset(
        users=users,
        items=items,
        user=user.fill_null(0).to_numpy()[keep],
        item=item.fill_null(0).to_numpy()[keep],
        rating=rating[keep].astype(np.float32),
        timestamp=np.flatnonzero(keep).astype(np.int64),
        fields=FIELDS,
        dropped=dropped,
    )


def age_bucket(age: int | None) -> str:
    """Return one of 11: `under 18`, `18-24`, `25-29`, then five years each, `60+`; `unknown` below 5 and above 100."""
    if age is None or age < 5 or age > 100:
        return UNKNOWN
    if age < 18:
        return "under 18"
    if age < 25:
        return "18-24"
    return "60+" if age >= 60 else f"{age // 5 * 5}-{age // 5 * 5 + 4}"


def country(location: str) -> str:
    """Return the country of a location such as `porto, v.n.gaia, portugal`: what follows the last `, `, under the
    table of spellings. It consists of ASCII letters, digits, blanks and `-.&/()`, and is not empty.
    """
    return _spellings().country(_tidy(location.rpartition(", ")[2]))


def _tidy(written: str) -> str:
    return written.strip().title().replace("!", "").strip(",.").strip()


@dataclass(frozen=True)
class _Spellings:
    """The table of `COUNTRIES`."""

    whole: dict[str, str]
    """Tidy spelling → country."""
    parts: list[tuple[str, str]]
    """Part of a spelling in lower case, country."""
    unknown: re.Pattern[str]

    def country(self, tidy: str) -> str:
        if tidy in self.whole:
            return self.whole[tidy]
        lower = tidy.lower()
        found = next((name for part, name in self.parts if part in lower), None)
        if found is not None:
            return found
        readable = re.fullmatch(r"[A-Za-z0-9 \-.&/()]+", tidy)
        return tidy if readable and not self.unknown.search(tidy) else UNKNOWN


@cache
def _spellings() -> _Spellings:
    table = json.loads(COUNTRIES.read_text("utf-8"))
    return _Spellings(
        whole={_tidy(text): name for name, texts in table["spellings"].items() for text in texts},
        parts=[(text.lower(), name) for name, texts in table["containing"].items() for text in texts],
        unknown=re.compile("|".join(table["unknown"])),
    )


def _body(data: bytes) -> tuple[str, str]:
    """Return the header and what follows: decoded, every field in quotes, `\\n` between the lines."""
    text, _ = codecs.charmap_decode(data, "strict", _CHARACTERS)
    header, _, body = text.replace("\r\n", "\n").replace("\r", "\n").rstrip("\n").partition("\n")
    return header, _UNQUOTED_NULL.sub(f';"{_NULL}"', body)


def _header(files: RawFiles, name: str, header: str) -> list[str]:
    """Return the names of the columns, checked."""
    found = [cell.strip('"') for cell in header.split(";")]
    wanted = _HEADERS[name]
    if found not in ([wanted, wanted + _IMAGES] if name == _BOOKS else [wanted]):
        raise _message(files, name, 1, f"the header {';'.join(wanted)} is missing; the row is", header)
    return found


def _table(files: RawFiles, name: str) -> pa.Table:
    """Return a file's columns as strings, null for an unquoted NULL, by the header's names.

    A field ends at `";"` and a row at `"\\n"`, whatever comes before: quotes inside a field are written `\\"`, so that
    neither occurs there, but a field may end in a single backslash. Line breaks inside a field need no escape.
    """
    header, body = _body(files.read(name))
    names = _header(files, name, header)
    packed = body.encode()
    if not packed:
        raise InputError(f"{files.where(name)}: the file has no row. {_REMEDY}")
    if not (packed.startswith(b'"') and packed.endswith(b'"')):
        raise _shape_fault(files, name, names)
    packed = packed[1:-1].replace(b'"\n"', _ROW).replace(b"\n", _BREAK).replace(_ROW, b"\n").replace(b'";"', _CELL)
    try:
        table = pacsv.read_csv(
            pa.BufferReader(packed),
            read_options=pacsv.ReadOptions(column_names=names),
            parse_options=pacsv.ParseOptions(delimiter=_CELL.decode(), quote_char=False, ignore_empty_lines=False),
            convert_options=pacsv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()),
                include_columns=_HEADERS[name],
                null_values=[_NULL],
                strings_can_be_null=True,
            ),
        )
    except pa.ArrowInvalid as error:
        raise _shape_fault(files, name, names, error) from error
    columns = {column: pc.utf8_trim(table.column(column), "\t") for column in table.column_names}
    if _BREAK in packed:
        columns = {column: pc.replace_substring(cells, _BREAK.decode(), "\n") for column, cells in columns.items()}
    return pa.table(columns)


def _rows(files: RawFiles, name: str) -> list[tuple[int, str]]:
    """Return (row number in the file, text) of every row: the slow way, for messages."""
    rows, line = [], 2
    for row in _ROW_END.split(_body(files.read(name))[1]):
        rows.append((line, row))
        line += 1 + row.count("\n")
    return rows


def _message(files: RawFiles, name: str, line: int, what: str, text: str) -> InputError:
    shown = text.replace(f'"{_NULL}"', "NULL")
    return InputError(f"{files.where(name)}, row {line}: {what}: {shown[:500]!r}. {_REMEDY}")


def _fault(files: RawFiles, name: str, row: int, what: str) -> InputError:
    line, text = _rows(files, name)[row]
    return _message(files, name, line, what, text)


def _refused(files: RawFiles, name: str, row: int, what: str) -> InputError:
    return InputError(f"{_fault(files, name, row, what)} {_STRICT}")


def _shape_fault(files: RawFiles, name: str, names: list[str], error: Exception | None = None) -> InputError:
    """Return the fault of the first row with too few or too many fields, or without its quotes."""
    for line, row in _rows(files, name):
        if row.count('";"') + 1 == len(names) and row[:1] == row[-1:] == '"':
            continue
        # A line without its quotes has drawn its neighbours into one row.
        lines = row.split("\n")
        odd = next((n for n, text in enumerate(lines) if not text[:1] == text[-1:] == '"'), 0)
        columns = lines[odd].count('";"') + 1
        what = f"{columns} columns in double quotes instead of {len(names)} ({';'.join(names)})"
        return _message(files, name, line + odd, what, lines[odd])
    return InputError(f"{files.where(name)}: {error}. {_REMEDY}")


def _integers(files: RawFiles, name: str, table: pa.Table, column: str) -> npt.NDArray[np.int64]:
    """Return a column of non-negative numbers as int64."""
    cells = table.column(column)
    good = pc.match_substring_regex(cells, r"^[0-9]{1,9}$").fill_null(False).to_numpy()
    if not good.all():
        row = int(np.argmin(good))
        raise _fault(files, name, row, f"{column} {cells[row].as_py() or 'NULL'!r} is not an integer")
    return cells.cast(pa.int64()).to_numpy()


def _first(values: pa.Array) -> npt.NDArray[np.bool_]:
    """Return which values have not appeared before."""
    first = np.zeros(len(values), dtype=bool)
    first[np.unique(values.dictionary_encode().indices.to_numpy(), return_index=True)[1]] = True
    return first


def _mapped(column: pa.ChunkedArray, function: Callable[[str | None], str]) -> pa.Array:
    """Return `function` of every cell, called once for each distinct one."""
    encoded = column.combine_chunks().dictionary_encode(null_encoding="encode")
    return pa.array([function(cell) for cell in encoded.dictionary.to_pylist()], pa.string()).take(encoded.indices)


def _numbered(name: str, columns: dict[str, pa.Array]) -> pa.Table:
    """Return a table of text columns behind the row number `name`."""
    length = len(next(iter(columns.values())))
    fields = [pa.field(name, pa.int32(), nullable=False)]
    fields += [pa.field(column, pa.string(), nullable=False) for column in columns]
    return pa.table([pa.array(np.arange(length, dtype=np.int32)), *columns.values()], schema=pa.schema(fields))


def _parse_users(files: RawFiles, strict: bool, dropped: dict[str, int]) -> tuple[npt.NDArray[np.int64], pa.Table]:
    """Return the (U,) user numbers, ascending, and the users table in that order."""
    table = _table(files, _USERS)
    numbers = _integers(files, _USERS, table, "User-ID")
    stated = np.flatnonzero(table.column("Age").is_valid().to_numpy())
    digits = pc.match_substring_regex(table.column("Age").take(pa.array(stated)), r"^[0-9]{1,9}$").to_numpy()
    if not digits.all():
        raise _fault(files, _USERS, int(stated[np.argmin(digits)]), "Age is neither an integer nor NULL")
    ids, first = np.unique(numbers, return_index=True)
    if len(ids) < len(numbers):
        if strict:
            row = int(np.argmin(_first(pa.array(numbers))))
            raise _refused(files, _USERS, row, f"user {numbers[row]} appears for the second time")
        dropped["users listed a second time"] = len(numbers) - len(ids)
    table = table.take(pa.array(first))
    # Only what follows the last comma matters, and has few distinct values.
    places = pc.replace_substring_regex(table.column("Location").fill_null(""), r"(?s)^.*, ", "")
    columns = {
        "user_id": pa.array(ids).cast(pa.string()),
        "location": _mapped(places, lambda place: country(place or "")),
        "age": _mapped(table.column("Age"), lambda age: age_bucket(None if age is None else int(age))),
    }
    return ids, _numbered("user", columns)


def _parse_books(files: RawFiles, strict: bool, dropped: dict[str, int]) -> pa.Table:
    """Return the items table."""
    table = _table(files, _BOOKS)
    isbn = table.column("ISBN").combine_chunks()
    good = pc.match_substring_regex(isbn, r"^[0-9A-Za-z]+$").fill_null(False).to_numpy(zero_copy_only=False)
    if not good.all():
        dropped["books whose ISBN is not letters and digits"] = int((~good).sum())
    again = good & ~_first(isbn)
    if again.any():
        if strict:
            row = int(np.argmax(again))
            raise _refused(files, _BOOKS, row, f"book {isbn[row].as_py()} appears for the second time")
        dropped["books listed a second time"] = int(again.sum())
    table = table.filter(pa.array(good & ~again))
    columns = {
        "item_id": table.column("ISBN").combine_chunks(),
        "title": table.column("Book-Title").fill_null("").combine_chunks(),
        "author": _mapped(table.column("Book-Author"), _named),
        "year": _mapped(table.column("Year-Of-Publication"), lambda year: year if year and len(year) == 4 else UNKNOWN),
        "publisher": _mapped(table.column("Publisher"), _named),
    }
    return _numbered("item", columns)


def _named(cell: str | None) -> str:
    return UNKNOWN if cell is None or cell.lower() == "n/a" else cell


def _known(files: RawFiles, rows: dict[str, pa.Array], strict: bool, dropped: dict[str, int]) -> npt.NDArray[np.bool_]:
    """Return which ratings, as a mask (R,), have a user and a book, and count the others in `dropped`."""
    keep = np.ones(len(rows["user"]), dtype=bool)
    for name, found in rows.items():
        unknown = keep & found.is_null().to_numpy(zero_copy_only=False)
        if not unknown.any():
            continue
        if strict:
            row = int(np.argmax(unknown))
            raise _refused(files, _RATINGS, row, f"the {name} is not in {_USERS if name == 'user' else _BOOKS}")
        keep &= ~unknown
        dropped[f"ratings of unknown {name}s"] = int(unknown.sum())
    if not keep.any():
        raise InputError(f"{files.where(_RATINGS)}: no rating has a user of {_USERS} and a book of {_BOOKS}. {_REMEDY}")
    return keep
