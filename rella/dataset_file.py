"""Your own data set in one YAML file: where the tables are, which columns mean what, how they are put into words.

    name: songs
    interactions: {file: plays.csv, user: listener, item: song, time: played_at, rating: plays}
    items: {file: songs.parquet, id: song, title: name, fields: {artist: artist, genre: genre}}
    users: {file: listeners.csv, id: listener, fields: {country: country}}
    wording: {lead: "The user listened to the following songs in the past:", ...}
    settings: {k: 10, data: {positive_above: 2}}

Files are CSV (`.csv`, `.tsv`, also `.gz`) or Parquet, relative to the YAML file or to `--raw-dir`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from rella.errors import InputError, MissingError
from rella.wording import Wording, check_wording

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,39}")
RESERVED = ("sample", "ml-1m", "ml-25m", "bookcrossing")
"""Names of the data sets that are built in."""


@dataclass(frozen=True)
class InteractionColumns:
    """The table of behaviours, one row each."""

    file: str
    """CSV or Parquet."""
    user: str
    """Column with the user's id."""
    item: str
    """Column with the item's id."""
    time: str | None = None
    """Column with the time: a number, or a date or time as ISO 8601 text or Parquet timestamp. Without it the rows'
    order in the file is their order in time."""
    rating: str | None = None
    """Column with a number that behaviours show: stars, plays, minutes. Without it they show no rating."""
    label: str | None = None
    """Column with 1 and 0 (or true and false); without it a rating above `data.positive_above` is positive. Empty cells
    are behaviours that are no samples."""
    split: str | None = None
    """Column with `train`, `valid` or `test`, for `data.split_by: column`; empty cells are behaviours only."""


@dataclass(frozen=True)
class ItemColumns:
    """The table of items."""

    file: str
    """CSV or Parquet."""
    id: str
    """Column with the item's id."""
    title: str
    """Column with its title."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """More fields, name → column, for sentences and for the ID-based baselines."""


@dataclass(frozen=True)
class UserColumns:
    """The table of users, where there is one."""

    file: str
    """CSV or Parquet."""
    id: str
    """Column with the user's id."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """Profile fields, name → column."""


@dataclass(frozen=True)
class WordingFile:
    """Sentences that differ from the defaults, which follow from the fields; see `rella.wording.Wording`."""

    user: str | None = None
    lead: str | None = None
    behaviour: str | None = None
    question: str | None = None
    note: str | None = None
    instruction: str | None = None
    item: str | None = None
    name: str | None = None
    unit: tuple[str, str] | None = None
    decimals: int = 0
    words: Mapping[str, Mapping[str, Mapping[str, str]]] = field(default_factory=dict)


@dataclass(frozen=True)
class DatasetFile:
    """Everything that a data set's YAML file says."""

    name: str
    """Short name, part of the artifacts' paths: lower case, digits, `-`, `_`, `.`."""
    interactions: InteractionColumns
    items: ItemColumns
    users: UserColumns | None = None
    wording: WordingFile = field(default_factory=WordingFile)
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Values for fields of the experiment (`k`, `shots`, `data.positive_above`, ...); flags win."""

    @property
    def files(self) -> tuple[str, ...]:
        """The tables' files as the YAML names them."""
        tables = (self.interactions, self.items, self.users)
        return tuple(dict.fromkeys(t.file for t in tables if t is not None))

    def columns(self) -> dict[str, Any]:
        """Return what decides how the tables are read, for the key of the first stage."""
        body = asdict(self)
        return {name: body[name] for name in ("interactions", "items", "users")}

    def user_fields(self) -> tuple[str, ...]:
        """Return the names that sentences about the user may use."""
        return tuple(self.users.fields) if self.users is not None else ()

    def item_fields(self) -> tuple[str, ...]:
        """Return the names that sentences about an item may use."""
        return ("item_id", "title", *self.items.fields)

    def words(self) -> Wording:
        """Return the wording: what the file says, over defaults that name every field."""
        given = {n: v for n, v in asdict(self.wording).items() if v is not None}
        profile = self.users.fields if self.users is not None else {}
        rated = self.interactions.rating is not None
        default = {
            "user": " ".join(f"The user's {name} is {{{name}}}." for name in profile),
            "lead": Wording.lead if rated else "The user chose the following items in the past:",
            "behaviour": Wording.behaviour if rated else "{name}",
            "note": "",
            "item": " ".join([Wording.item, *(f"Its {name} is {{{name}}}." for name in self.items.fields)]),
            "unit": None,
        }
        return Wording(**{**default, **given})


def is_dataset_file(dataset: str) -> bool:
    """Return whether `--dataset` names a YAML file and not a data set."""
    return dataset.endswith((".yaml", ".yml"))


def read_dataset_file(path: str) -> DatasetFile:
    """Read and check the description of a data set.

    Raises:
        MissingError: there is no such file.
        InputError: not YAML, an unknown or missing key, a value of the wrong type, a name that cannot be a folder's, or
            a sentence with a placeholder that names no field; each names the file and the key.
    """
    import yaml
    from jsonargparse import ArgumentParser

    file = Path(path).expanduser()
    if not file.is_file():
        raise MissingError(f"--dataset {path}: there is no such file; it describes your own data, see docs/data.md")
    try:
        body = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not YAML: {error}") from error
    if not isinstance(body, dict):
        raise InputError(f"{file}: expected keys such as name, interactions and items; see docs/data.md")
    settings = body.pop("settings", None) or {}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(DatasetFile, nested_key=None, skip={"settings"})
    try:
        init = parser.instantiate(parser.parse_object(body))
    except Exception as error:
        raise InputError(f"{file}: {_first_line(error)}{_meant(str(error))}; see docs/data.md") from error
    # By key: as an attribute `items` would be the namespace's own method.
    found = DatasetFile(
        **{name: init[name] for name in ("name", "interactions", "items", "users", "wording")}, settings=settings
    )
    _check(found, str(file))
    return found


def _meant(message: str) -> str:
    """Return the keys that are close to a quoted word of an error message, as a question."""
    parts = (DatasetFile, InteractionColumns, ItemColumns, UserColumns, WordingFile)
    known = {f.name for part in parts for f in fields(part)}
    quoted = [word.partition(".")[0] for word in re.findall(r"'([\w.-]+)'", message)]
    near = [n for word in quoted if word not in known for n in get_close_matches(word, known, n=2, cutoff=0.7)]
    return f"; did you mean {' or '.join(dict.fromkeys(near))}?" if near else ""


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:4])


def _check(found: DatasetFile, where: str) -> None:
    if not _NAME.fullmatch(found.name) or found.name in RESERVED:
        raise InputError(
            f"{where}: name {found.name!r} must be lower-case letters, digits, `-`, `_` or `.`, at most 40, and none "
            f"of {', '.join(RESERVED)}"
        )
    if not isinstance(found.settings, Mapping):
        raise InputError(f"{where}: settings must be keys and values, e.g. `k: 10`")
    for kind, names, taken in (
        ("users", found.user_fields(), {"user", "user_id", "offset", "count"}),
        ("items", found.item_fields()[2:], {"item", "item_id", "title"}),
    ):
        odd = [name for name in names if not name.isidentifier() or name in taken]
        if odd:
            raise InputError(f"{where}: {kind}.fields: {odd[0]!r} must be a word, and none of {sorted(taken)}")
    if found.interactions.rating is None and found.interactions.label is None:
        raise InputError(
            f"{where}: interactions need a `label` column (1 and 0), or a `rating` column and `data.positive_above` in "
            "settings: without either every sample would have the same label"
        )
    check_wording(found.words(), dict.fromkeys(found.user_fields()), found.item_fields(), where)
