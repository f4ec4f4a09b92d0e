"""One's own data: formats, times, labels, splits, ids, wording; what is wrong is in tests/jobs/test_bad_input.py."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
import yaml

from rella.cli import resolve
from rella.config import DataConfig
from rella.data.custom import read_own
from rella.data.files import locate
from rella.data.raw import RawDataset, field_count, field_vocabularies
from rella.data.samples import assemble
from rella.data.sources import Source
from rella.dataset_file import DatasetFile, read_dataset_file
from rella.prompts import item_text, prompt_text

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "songs" / "songs.yaml"

PLAYS = pa.table(
    {
        "who": ["007", "10", "007", "9", "9"],
        "what": ["b", "a", "a", "b", "a"],
        "at": [50, 40, 30, 20, 10],
        "n": [3.0, 1.0, 2.5, 4.0, 0.0],
        "liked": ["1", "0", None, "true", "False"],
        "part": ["train", None, "test", "valid", "TRAIN"],
    }
)
SONGS = pa.table({"id": ["b", "a"], "name": ["Song B", None], "tags": ["x", None]})
PEOPLE = pa.table({"id": ["9", "10", "007"], "land": ["Chile", None, "Ghana"]})


def write(folder: Path, kind: str = "csv", **tables: pa.Table) -> None:
    for name, table in {"plays": PLAYS, "songs": SONGS, "people": PEOPLE, **tables}.items():
        if kind == "parquet":
            pq.write_table(table, folder / f"{name}.parquet")
            continue
        options = pacsv.WriteOptions(delimiter="\t" if "tsv" in kind else ",", quoting_style="needed")
        sink = pa.BufferOutputStream()
        pacsv.write_csv(table, sink, options)
        text = sink.getvalue().to_pybytes()
        (folder / f"{name}.{kind}").write_bytes(gzip.compress(text) if kind.endswith(".gz") else text)


def describe(folder: Path, kind: str = "csv", users: bool = True, **changes: Any) -> DatasetFile:
    body: dict[str, Any] = {
        "name": "own",
        "interactions": {"file": f"plays.{kind}", "user": "who", "item": "what", "time": "at", "rating": "n"},
        "items": {"file": f"songs.{kind}", "id": "id", "title": "name", "fields": {"tags": "tags"}},
    }
    if users:
        body["users"] = {"file": f"people.{kind}", "id": "id", "fields": {"land": "land"}}
    body["interactions"] |= changes
    (folder / "own.yaml").write_text(yaml.safe_dump(body))
    return read_dataset_file(str(folder / "own.yaml"))


def read(folder: Path, described: DatasetFile, strict: bool = True) -> RawDataset:
    return read_own(described, locate("own", described.files, folder), strict)


@pytest.mark.parametrize("kind", ["csv", "tsv", "csv.gz", "parquet"])
def test_every_format_gives_the_same(tmp_path: Path, kind: str) -> None:
    write(tmp_path, kind)
    raw = read(tmp_path, describe(tmp_path, kind))
    # Ids are text: 007 stays 007, and where all are numbers their order is that of the numbers.
    assert raw.users.to_pydict() == {
        "user": [0, 1, 2],
        "user_id": ["007", "9", "10"],
        "land": ["Ghana", "Chile", "unknown"],
    }
    assert raw.items.to_pydict() == {
        "item": [0, 1],
        "item_id": ["a", "b"],
        "title": ["", "Song B"],
        "tags": ["unknown", "x"],
    }
    assert raw.user.tolist() == [0, 2, 0, 1, 1]
    assert raw.item.tolist() == [1, 0, 0, 1, 0]
    assert raw.rating.tolist() == [3.0, 1.0, 2.5, 4.0, 0.0]
    assert raw.timestamp.tolist() == [50, 40, 30, 20, 10]
    assert (raw.label, raw.split, raw.rated, raw.dropped) == (None, None, True, {})
    assert field_vocabularies(raw) == {
        "User ID": 3, "land": 3, "Item ID": 2, "Title": 2, "tags": 2, "Rating": 5,
    }  # fmt: skip
    assert field_count(raw) == 7
    assert [raw.user.dtype, raw.item.dtype, raw.rating.dtype, raw.timestamp.dtype] == ["i4", "i4", "f4", "i8"]


def test_labels_splits_and_no_ratings(tmp_path: Path) -> None:
    write(tmp_path)
    raw = read(tmp_path, describe(tmp_path, rating=None, label="liked", split="part"))
    assert raw.label is not None
    assert raw.split is not None
    assert raw.label.tolist() == [1, 0, -1, 1, 0]
    assert raw.split.tolist() == [0, -1, 2, 1, 0]
    assert not raw.rated
    assert raw.rating.tolist() == [0.0] * 5
    assert "Rating" not in field_vocabularies(raw)
    assert field_count(raw) == 6
    tables = assemble(raw, DataConfig(split_by="column", min_history=0))
    tables.validate()
    found = {(s["user"], s["item"]): (s["label"], s["split"]) for s in tables.samples.to_pylist()}
    assert found == {(0, 1): (1, "train"), (1, 1): (1, "valid"), (1, 0): (0, "train")}


@pytest.mark.parametrize(
    "times",
    [
        pa.array(["2026-01-05", "2026-01-04", "2026-01-03", "2026-01-02", "2026-01-01"]),
        pa.array([f"2026-01-01T00:00:0{n}" for n in (5, 4, 3, 2, 1)]),
        pa.array([5, 4, 3, 2, 1], pa.timestamp("ms", tz="Europe/Berlin")),
        pa.array(["2026-01-01T05:00:00Z", *(f"2026-01-01T0{n}:00:00+01:00" for n in (5, 4, 3, 2))]),
        pa.array([0.5, 0.4, 0.3, 0.2, 0.1]),
        pa.array([5, 4, 3, 2, 1], pa.int16()),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_times_in_many_forms_have_one_order(tmp_path: Path, times: pa.Array, kind: str) -> None:
    write(tmp_path, kind, plays=PLAYS.set_column(2, "at", times))
    raw = read(tmp_path, describe(tmp_path, kind))
    assert np.argsort(raw.timestamp).tolist() == [4, 3, 2, 1, 0]


def test_a_time_that_is_none(tmp_path: Path) -> None:
    times = pa.array(["2026-01-05", "yesterday", "2026-01-03", "2026-01-02", "2026-01-01"])
    write(tmp_path, plays=PLAYS.set_column(2, "at", times))
    with pytest.raises(
        ValueError, match=r"plays\.csv, row 3: column 'at' is 'yesterday', which is no number or time as ISO 8601"
    ):
        read(tmp_path, describe(tmp_path))


def test_a_column_that_changes_its_kind_far_down(tmp_path: Path) -> None:
    """Types are not guessed from the first rows: a half star after a million whole ones is a number too."""
    many = 60_000
    plays = pa.table(
        {"who": ["9"] * many, "what": ["a"] * many, "at": list(range(many)), "n": ["3"] * (many - 1) + ["2.5"],
         "other": ["1"] * (many - 1) + ["x"]}
    )  # fmt: skip
    write(tmp_path, plays=plays)
    raw = read(tmp_path, describe(tmp_path))
    assert raw.rating[-1] == 2.5
    text = (tmp_path / "plays.csv").read_text()
    (tmp_path / "plays.csv").write_text(text.replace("2.5", "many"))
    with pytest.raises(ValueError, match=rf"plays\.csv, row {many + 1}: column 'n' is 'many', which is no number"):
        read(tmp_path, describe(tmp_path))


def test_without_time_the_file_s_order_counts(tmp_path: Path) -> None:
    write(tmp_path)
    assert read(tmp_path, describe(tmp_path, time=None)).timestamp.tolist() == [0, 1, 2, 3, 4]


def test_without_a_table_of_users(tmp_path: Path) -> None:
    write(tmp_path)
    raw = read(tmp_path, describe(tmp_path, users=False))
    assert raw.users.to_pydict() == {"user": [0, 1, 2], "user_id": ["007", "9", "10"]}


def test_unknown_ids_are_counted_where_that_is_allowed(tmp_path: Path) -> None:
    write(tmp_path, people=PEOPLE.slice(0, 2), songs=SONGS.slice(0, 1))
    described = describe(tmp_path)
    with pytest.raises(
        ValueError, match=r"plays\.csv, row 2: user '007' is not in the table of users\. .* \(2 in all\)"
    ):
        read(tmp_path, described)
    raw = read(tmp_path, described, strict=False)
    assert (len(raw.user), raw.users["user_id"].to_pylist()) == (1, ["9", "10"])
    assert raw.dropped == {"interactions of unknown users": 2, "interactions of unknown items": 3}


def test_lists_are_joined(tmp_path: Path) -> None:
    songs = SONGS.set_column(2, "tags", pa.array([["x", "y"], []], pa.list_(pa.string())))
    write(tmp_path, "parquet", songs=songs)
    assert read(tmp_path, describe(tmp_path, "parquet")).items["tags"].to_pylist() == ["", "x, y"]


def test_a_damaged_parquet_file(tmp_path: Path) -> None:
    write(tmp_path, "parquet")
    described = describe(tmp_path, "parquet")
    (tmp_path / "plays.parquet").write_bytes((tmp_path / "plays.parquet").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"plays\.parquet: not a readable Parquet file"):
        read(tmp_path, described)


def test_the_default_wording_names_every_field(tmp_path: Path) -> None:
    write(tmp_path)
    wording = describe(tmp_path).words()
    assert item_text(wording, {"title": "T", "tags": "x"}) == "Here is an item. Its title is T. Its tags is x."
    assert prompt_text(wording, {"land": "Chile"}, ["A", "B"], [3, 12], "C").split("\n") == [
        "The user's land is Chile.",
        "The user chose the following items in the past, and rated them:",
        "['0. A (3)', '1. B (12)']",
        "Based on the items the user has chosen, deduce if the user will like the item ***C***.",
        "You should ONLY tell me yes or no.",
    ]
    bare = describe(tmp_path, users=False, rating=None, label="liked").words()
    assert prompt_text(bare, {}, ["A"], [0.0], "C").split("\n")[:2] == [
        "The user chose the following items in the past:",
        "['0. A']",
    ]


def test_the_file_is_a_layer_of_the_configuration() -> None:
    resolved = resolve({"dataset": str(EXAMPLE), "k": 5})
    e = resolved.experiment
    assert (e.dataset, e.dataset_file, e.k, e.shots, e.data.positive_above) == ("songs", str(EXAMPLE), 5, 256, 2.0)
    assert resolved.sources["shots"] == f"data set {EXAMPLE}"


def test_a_split_column_counts_unless_it_is_said_otherwise(tmp_path: Path) -> None:
    write(tmp_path)
    describe(tmp_path, split="part")
    file = tmp_path / "own.yaml"
    assert resolve({"dataset": str(file)}).experiment.data.split_by == "column"
    file.write_text(file.read_text() + "settings: {data: {split-by: user, min-history: 3}}\n")
    rules = resolve({"dataset": str(file)}).experiment.data
    assert (rules.split_by, rules.min_history) == ("user", 3)


def test_the_example_s_keys_follow_its_content(tmp_path: Path) -> None:
    for file in EXAMPLE.parent.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    here, there = Source("songs", None, str(EXAMPLE)), Source("songs", None, str(tmp_path / "songs.yaml"))
    assert here.identity() == there.identity()
    assert set(here.identity()) == {"plays.csv", "songs.csv", "listeners.csv", "columns"}
    elsewhere = Source("songs", str(EXAMPLE.parent), str(tmp_path / "songs.yaml"))
    assert elsewhere.identity() == here.identity()
    with (tmp_path / "plays.csv").open("a") as file:
        file.write("l001,s001,2026-01-01T00:00:00,3\n")
    assert there.identity() != here.identity()
    text = (tmp_path / "songs.yaml").read_text()
    (tmp_path / "songs.yaml").write_text(text.replace("Here is a song.", "This is a song."))
    changed = Source("songs", str(EXAMPLE.parent), str(tmp_path / "songs.yaml"))
    assert changed.identity() == here.identity(), "words are no part of how the tables are read"
