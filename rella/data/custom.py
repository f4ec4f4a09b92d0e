"""One's own data: the tables that a YAML file describes, read from CSV or Parquet and checked row by row."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from rella.data.files import RawFiles
from rella.data.raw import RawDataset
from rella.dataset_file import DatasetFile, InteractionColumns
from rella.errors import InputError
from rella.schemas import SPLITS

_CSV = re.compile(r"\.(csv|tsv|txt)(\.gz)?$")
_INTEGER = re.compile(r"-?\d{1,18}")
_LABELS = {"1": 1, "0": 0, "true": 1, "false": 0, "1.0": 1, "0.0": 0, "yes": 1, "no": 0}
_PARTS = {name: n for n, name in enumerate(SPLITS)}


@dataclass(frozen=True)
class _Table:
    """Columns of one file, with what errors need to name it."""

    data: pa.Table
    where: str
    header: int
    """Rows before the first one: 1 in CSV, so that an error names the line that an editor shows."""

    def fault(self, row: int, what: str, remedy: str) -> InputError:
        return InputError(f"{self.where}, row {row + 1 + self.header}: {what}. {remedy}")

    def text(self, column: str) -> pa.ChunkedArray:
        """Return a column as strings, nulls kept; lists joined with commas."""
        found = self.data.column(column)
        if pa.types.is_list(found.type) or pa.types.is_large_list(found.type):
            return pc.binary_join(found.cast(pa.list_(pa.string())), ", ")
        return found.cast(pa.string())

    def ids(self, column: str) -> pa.ChunkedArray:
        """Return a column of ids as strings; an empty one is an error."""
        found = self.text(column)
        empty = pc.or_kleene(pc.is_null(found), pc.equal(found, ""))
        row = _first(empty.to_numpy())
        if row is not None:
            raise self.fault(row, f"column {column!r} is empty", "Every row needs an id.")
        return found


def read_own(described: DatasetFile, files: RawFiles, strict: bool = True) -> RawDataset:
    """Read the data set that a YAML file describes.

    Users and items are numbered by their ids: as numbers where all of them are, else as text.

    Args:
        described: files, columns and fields.
        files: where the files lie.
        strict: whether an interaction of an unknown user or item is an error; else it is left out and counted.

    Returns:
        The interactions in file order. `users` and `items` have the described fields as text, null as `unknown`.

    Raises:
        InputError: a missing column, an empty or repeated id, a value that is no number, time, label or split; names
            file, row, column and remedy.
    """
    items = _entities(
        described.items.file,
        described.items.id,
        "item",
        {"title": described.items.title, **described.items.fields},
        files,
    )
    c = described.interactions
    wanted = [c.user, c.item, *(n for n in (c.time, c.rating, c.label, c.split) if n is not None)]
    table = _read(files, c.file, wanted)
    if described.users is not None:
        users = _entities(described.users.file, described.users.id, "user", described.users.fields, files)
    else:
        users = _numbered(pa.table({"user_id": pc.unique(table.ids(c.user).combine_chunks())}), "user")
    rows = {
        kind: _rows_of(table, column, known.column(f"{kind}_id"), kind, strict)
        for kind, column, known in (("user", c.user, users), ("item", c.item, items))
    }
    kept = (rows["user"] >= 0) & (rows["item"] >= 0)
    dropped = {f"interactions of unknown {kind}s": int((found < 0).sum()) for kind, found in rows.items()}
    count = table.data.num_rows
    return RawDataset(
        users=users,
        items=items,
        user=rows["user"][kept],
        item=rows["item"][kept],
        rating=_ratings(table, c)[kept],
        timestamp=_times(table, c.time)[kept] if c.time is not None else np.arange(count)[kept],
        label=None if c.label is None else _coded(table, c.label, _LABELS, "1 or 0")[kept],
        split=None if c.split is None else _coded(table, c.split, _PARTS, ", ".join(SPLITS))[kept],
        rated=c.rating is not None,
        fields=_fields(described),
        dropped={reason: n for reason, n in dropped.items() if n},
    )


def _fields(described: DatasetFile) -> dict[str, str]:
    user = {name: f"users.{name}" for name in (described.users.fields if described.users is not None else ())}
    item = {name: f"items.{name}" for name in described.items.fields}
    return {"User ID": "users.user_id", **user, "Item ID": "items.item_id", "Title": "items.title", **item}


def _read(files: RawFiles, name: str, columns: Sequence[str]) -> _Table:
    """Read some columns of a file; those of a CSV file as text, so that id 007 stays 007 and nothing is guessed."""
    columns, where = list(dict.fromkeys(columns)), files.where(name)
    if name.endswith((".parquet", ".pq")):
        with files.open(name) as file:
            try:
                _need(columns, pq.read_schema(file).names, where)
                file.seek(0)
                return _Table(pq.read_table(file, columns=columns), where, 0)
            except pa.ArrowInvalid as error:
                raise InputError(f"{where}: not a readable Parquet file ({error}). Write it again.") from error
    kind = _CSV.search(name)
    if kind is None:
        raise InputError(f"{where}: files are .csv, .tsv (also .gz) or .parquet")
    parse = pacsv.ParseOptions(delimiter="," if kind[1] == "csv" else "\t", newlines_in_values=True)
    convert = pacsv.ConvertOptions(
        column_types=dict.fromkeys(columns, pa.string()), strings_can_be_null=True, null_values=["", "NULL", "null"]
    )
    # One thread: with several the parser does not know the number of the row that it stumbles over.
    read = pacsv.ReadOptions(use_threads=False)
    try:
        with _text(files, name, kind[2]) as source, pacsv.open_csv(source, read, parse, convert) as opened:
            _need(columns, opened.schema.names, where)
        convert.include_columns = columns
        with _text(files, name, kind[2]) as source:
            return _Table(pacsv.read_csv(source, read, parse, convert), where, 1)
    except (pa.ArrowInvalid, EOFError, OSError) as error:
        remedy = "Save the file as UTF-8" if "UTF8" in str(error) else "Repair the row; there must be a header row"
        raise InputError(f"{where}: {error}. {remedy}.") from error


@contextmanager
def _text(files: RawFiles, name: str, packed: str | None) -> Iterator[Any]:
    with files.open(name) as file:
        yield pa.CompressedInputStream(file, "gzip") if packed else file


def _need(columns: Sequence[str], there: Sequence[str], where: str) -> None:
    missing = [name for name in columns if name not in there]
    if missing and len(there) == 1 and re.search("[,;|\t]", there[0]):
        raise InputError(
            f"{where}: the header {there[0]!r} is one column; .csv files are separated by commas, .tsv files by tabs. "
            "Save it with that separator."
        )
    if missing:
        raise InputError(
            f"{where}: no column {missing[0]!r}; there are {', '.join(there)}. Correct it in the YAML file."
        )


def _entities(file: str, identifier: str, kind: str, fields: Mapping[str, str], files: RawFiles) -> pa.Table:
    """Return the users or items: `<kind>`, `<kind>_id` and the fields as text, in the order of their ids."""
    table = _read(files, file, [identifier, *fields.values()])
    ids = table.ids(identifier)
    first = pc.index_in(ids, pc.unique(ids.combine_chunks())).to_numpy()
    _, again = np.unique(first, return_index=True)
    if len(again) < len(ids):
        row = int(np.setdiff1d(np.arange(len(ids)), again)[0])
        raise table.fault(row, f"{kind} {ids[row].as_py()!r} appears for the second time", "Ids must be unique.")
    columns = {f"{kind}_id": ids}
    for name, column in fields.items():
        columns[name] = pc.fill_null(table.text(column), "" if name == "title" else "unknown")
    return _numbered(pa.table(columns), kind)


def _numbered(table: pa.Table, kind: str) -> pa.Table:
    """Sort by id and put the row number in front."""
    ids: list[str] = table.column(f"{kind}_id").to_pylist()
    numeric = all(_INTEGER.fullmatch(i) for i in ids)
    order = sorted(range(len(ids)), key=lambda n: (int(ids[n]) if numeric else 0, ids[n]))
    table = table.take(pa.array(order, pa.int64())).combine_chunks()
    schema = pa.schema([pa.field(name, pa.string(), nullable=False) for name in table.schema.names])
    number = pa.array(np.arange(len(ids), dtype=np.int32))
    return table.cast(schema).add_column(0, pa.field(kind, pa.int32(), nullable=False), number)


def _rows_of(table: _Table, column: str, known: pa.ChunkedArray, kind: str, strict: bool) -> npt.NDArray[np.int32]:
    """Return the (R,) row in `known` of every id, -1 where it is unknown and that is allowed."""
    ids = table.ids(column)
    found = pc.fill_null(pc.index_in(ids, known.combine_chunks()), -1).to_numpy().astype(np.int32)
    row = _first(found < 0)
    if strict and row is not None:
        remedy = f"Add it, or leave such rows out with --data.strict false ({int((found < 0).sum())} in all)."
        raise table.fault(row, f"{kind} {ids[row].as_py()!r} is not in the table of {kind}s", remedy)
    return found


def _ratings(table: _Table, c: InteractionColumns) -> npt.NDArray[np.float32]:
    if c.rating is None:
        return np.zeros(table.data.num_rows, dtype=np.float32)
    try:
        found = table.data.column(c.rating).cast(pa.float64()).to_numpy()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        wrong, cell = _not_a_number(table.text(c.rating).to_pylist())
        raise table.fault(wrong, f"column {c.rating!r} is {cell!r}, which is no number", "Correct the cell.") from error
    row = _first(~np.isfinite(found))
    if row is not None:
        raise table.fault(row, f"column {c.rating!r} is empty or no number", "Every row needs its rating.")
    return found.astype(np.float32)


def _not_a_number(cells: Sequence[str | None]) -> tuple[int, str | None]:
    """Return the first cell that is no number, and its row."""
    for row, cell in enumerate(cells):
        try:
            float(cell or "0")
        except ValueError:
            return row, cell
    return 0, cells[0]


def _times(table: _Table, column: str) -> npt.NDArray[np.int64]:
    """Return (R,) times: whole numbers as they are, all else in microseconds; only their order counts."""
    found = table.data.column(column)
    row = _first(pc.is_null(found).to_numpy())
    if row is not None:
        raise table.fault(
            row, f"column {column!r} is empty", "Every row needs a time, or leave `time` out of the file."
        )
    kinds = [found.type] if not pa.types.is_string(found.type) else [pa.int64(), pa.float64(), *_MOMENTS]
    for kind in kinds:
        try:
            return _as_time(found.cast(kind))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            continue
    row = _first_of_another_kind(found, kinds)
    raise table.fault(
        row,
        f"column {column!r} is {found[row].as_py()!r}, which is no number or time as ISO 8601 like those before it",
        "Write times as 2026-01-31T12:30:00, as 2026-01-31 or as seconds.",
    )


def _first_of_another_kind(found: pa.ChunkedArray, kinds: Sequence[pa.DataType]) -> int:
    """Return the row of the first cell that cannot be read as the first cell can."""

    def reads(row: int, kind: pa.DataType) -> bool:
        try:
            found.slice(row, 1).cast(kind)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            return False
        return True

    kind = next((kind for kind in kinds if reads(0, kind)), None)
    return 0 if kind is None else next(row for row in range(len(found)) if not reads(row, kind))


_MOMENTS = (pa.timestamp("us"), pa.timestamp("us", tz="UTC"))


def _as_time(found: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    if pa.types.is_integer(found.type):
        return found.cast(pa.int64()).to_numpy()
    if pa.types.is_floating(found.type):
        return np.round(found.to_numpy() * 1e6).astype(np.int64)
    return found.cast(pa.timestamp("us", tz=getattr(found.type, "tz", None))).cast(pa.int64()).to_numpy()


def _coded(table: _Table, column: str, codes: Mapping[str, int], allowed: str) -> npt.NDArray[np.int8]:
    """Return the (R,) code of every cell, -1 where it is empty."""
    cells = pc.utf8_lower(table.text(column))
    found = pc.fill_null(pc.index_in(cells, pa.array(list(codes))), -1).to_numpy()
    wrong = (found < 0) & ~pc.is_null(cells).to_numpy()
    row = _first(wrong)
    if row is not None:
        raise table.fault(row, f"column {column!r} is {cells[row].as_py()!r}", f"It may be {allowed}, or empty.")
    return np.append(np.array(list(codes.values())), -1)[found].astype(np.int8)


def _first(wrong: npt.NDArray[np.bool_]) -> int | None:
    return int(np.argmax(wrong)) if wrong.any() else None
