"""Artifacts: whole or not readable, damage is noticed wherever it is, the same content gives the same bytes."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rella.artifacts import (
    Artifact,
    Manifest,
    Part,
    canonical_json,
    digest,
    list_artifacts,
    now,
    summed,
)
from rella.errors import ArtifactError
from rella.provenance import code_version, machine
from rella.storage import Storage

KEY = "0123456789ab" + "c" * 52
PATH = f"sample/score/slug-{KEY[:12]}"
TABLE = pa.table({"sample_id": pa.array(range(50), pa.int64()), "text": [f"é{n}" for n in range(50)]})


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return Artifact(Storage(str(tmp_path)), PATH, KEY)


def manifest(parts: list[Part], **changes: Any) -> Manifest:
    facts = {"rows": sum(p.rows for p in parts)}
    return replace(Manifest("score", 1, KEY, "sample", {"k": 30}, {}, {}, parts, facts=facts), **changes)


def file_of(artifact: Artifact, name: str) -> Path:
    return Path(artifact.storage.absolute(f"{artifact.path}/{name}"))


def flipped(data: bytes, place: int, mask: int) -> bytes:
    changed = bytearray(data)
    changed[place] ^= mask
    return bytes(changed)


class Served:
    """What the storage reads from one path, without the disk's time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
        self.whole = self.data = path.read_bytes()
        real = Storage.read

        def read(storage: Storage, name: str) -> bytes:
            return self.data if storage.absolute(name) == str(path) else real(storage, name)

        monkeypatch.setattr(Storage, "read", read)


def finished(artifact: Artifact, shards: int = 2) -> list[Part]:
    parts = [artifact.write_part(TABLE.slice(n * 25, 25), n, shards, facts={"tokens": n + 1}) for n in range(shards)]
    artifact.finish(manifest(parts))
    return parts


def test_canonical_json_is_one_text() -> None:
    value = {"b": [1, 2.5, None, True], "a": {"é": "“x”\n", "Z": 1e-3}, "c": (1, 2)}
    assert canonical_json(value) == '{"a":{"Z":0.001,"é":"“x”\\n"},"b":[1,2.5,null,true],"c":[1,2]}'
    assert canonical_json({"x": 1, "y": 2}) == canonical_json({"y": 2, "x": 1})
    assert canonical_json(1) != canonical_json(1.0)
    assert digest({"a": 1}) == hashlib.sha256(b'{"a":1}').hexdigest()
    assert digest({"a": 1}) == "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json(math.nan)
    with pytest.raises(TypeError):
        canonical_json({"a": {1, 2}})


def test_a_finished_artifact_is_read_in_shard_order(artifact: Artifact) -> None:
    parts = [artifact.write_part(TABLE.slice(n * 25, 25), n, 2) for n in (1, 0)]
    artifact.finish(manifest(parts))
    assert artifact.is_complete()
    assert artifact.read().replace_schema_metadata(None).equals(TABLE)
    assert artifact.read(columns=["text"]).schema.names == ["text"]
    assert artifact.manifest().rows == 50
    assert [p.name for p in parts] == ["parts/part-00001-of-00002.parquet", "parts/part-00000-of-00002.parquet"]
    artifact.verify()


def test_named_tables_are_kept_apart(artifact: Artifact) -> None:
    other = pa.table({"x": [1, 2]})
    artifact.finish(manifest([artifact.write_part(TABLE, 0, 1, "samples"), artifact.write_part(other, 0, 1, "users")]))
    assert artifact.read("users").column("x").to_pylist() == [1, 2]
    assert len(artifact.read("samples")) == 50
    for missing in ("", "user", "parts"):
        with pytest.raises(ArtifactError, match="has no table"):
            artifact.read(missing)


def test_the_manifest_makes_it_readable(artifact: Artifact) -> None:
    assert not artifact.is_complete()
    with pytest.raises(ArtifactError, match=f"{PATH} is missing: run the job"):
        artifact.read()
    part = artifact.write_part(TABLE, 0, 1)
    assert not artifact.is_complete()
    for read in (artifact.read, artifact.manifest, artifact.verify, lambda: artifact.local_folder("parts")):
        with pytest.raises(ArtifactError, match="unfinished \\(no manifest\\)"):
            read()
    artifact.finish(manifest([part]))
    assert artifact.is_complete()


def test_the_manifest_comes_last(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    real = Storage.write

    def note(self: Storage, path: str, data: bytes) -> None:
        written.append(path.removeprefix(f"{PATH}/"))
        real(self, path, data)

    monkeypatch.setattr(Storage, "write", note)
    finished(artifact)
    assert written == ["parts/part-00000-of-00002.parquet", "parts/part-00001-of-00002.parquet", "manifest.json"]


def test_finishing_drops_what_the_manifest_does_not_list(artifact: Artifact) -> None:
    artifact.write_part(TABLE, 2, 3)
    artifact.write_part(TABLE, 0, 1, "other")
    kept = artifact.write_part(TABLE, 0, 1)
    file_of(artifact, "parts/part-00000-of-00001.parquet.tmp-1234abcd").write_bytes(b"half")
    adapter = artifact.write_file("adapter/adapter_model.safetensors", b"weights")
    artifact.finish(manifest([kept, adapter]))
    root = file_of(artifact, "")
    assert sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()) == [
        "adapter/adapter_model.safetensors",
        "manifest.json",
        "parts/part-00000-of-00001.parquet",
    ]


def test_the_manifest_says_everything(artifact: Artifact) -> None:
    part = artifact.write_part(TABLE, 0, 1, facts={"tokens": 7})
    whole = manifest(
        [part],
        inputs={"data": "sample/prepare/samples-000000000000"},
        identity={"model": "d" * 64},
        settings={"cluster.workers": 2},
        seconds=1.5,
        created=now(),
        code=code_version(),
        machine=machine(),
    )
    artifact.finish(whole)
    found = artifact.manifest()
    assert found == whole
    assert found.parts[0] == part
    assert set(found.machine) == {"host", "system", "cpus", "python"}
    assert found.code["libraries"]["pyarrow"] == pa.__version__


def test_any_flipped_byte_of_a_part_is_noticed_by_readers(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    part = finished(artifact)[0]
    served = Served(monkeypatch, file_of(artifact, part.name))
    for place in range(0, len(served.whole), 7):
        served.data = flipped(served.whole, place, 1)
        with pytest.raises(ArtifactError, match=r"part-00000-of-00002\.parquet does not match the digest"):
            artifact.read()
    served.data = served.whole
    artifact.verify()


@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_any_flipped_byte_of_a_part_is_noticed_by_a_rerun(
    artifact: Artifact, mask: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The footer too, whose bytes no page checksum covers: names, row counts, facts."""
    small = pa.table({"sample_id": pa.array([1, 2, 3], pa.int64())})
    part = artifact.write_part(small, 0, 1, facts={"tokens": 7})
    served = Served(monkeypatch, file_of(artifact, part.name))
    for place in range(len(served.whole)):
        served.data = flipped(served.whole, place, mask)
        assert artifact.good_part(0, 1) is None, place
    served.data = served.whole
    assert artifact.good_part(0, 1) == part


def _cut(keep: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: (path.write_bytes(keep(path.read_bytes())), None)[1]


DAMAGE: dict[str, Callable[[Path], None]] = {
    "empty": _cut(lambda data: b""),
    "first half": _cut(lambda data: data[: len(data) // 2]),
    "last byte missing": _cut(lambda data: data[:-1]),
    "one byte more": _cut(lambda data: data + b"\0"),
    "zeros": _cut(lambda data: bytes(len(data))),
    "not Parquet": _cut(lambda data: b"PAR1" + b"x" * (len(data) - 8) + b"PAR1"),
    "no seal": lambda path: pq.write_table(TABLE.slice(0, 25), path),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_part_is_made_again_and_never_read(artifact: Artifact, damage: str) -> None:
    part = finished(artifact)[0]
    assert artifact.good_part(0, 2) == part
    DAMAGE[damage](file_of(artifact, part.name))
    assert artifact.good_part(0, 2) is None
    assert artifact.good_part(1, 2) is not None
    with pytest.raises(ArtifactError, match="does not match the digest"):
        artifact.read()


def test_a_missing_part(artifact: Artifact) -> None:
    part = finished(artifact)[0]
    file_of(artifact, part.name).unlink()
    assert artifact.good_part(0, 2) is None
    with pytest.raises(ArtifactError, match="is missing: put it back, or start the job again with --restart score"):
        artifact.read()


def test_a_part_of_another_key_is_made_again(artifact: Artifact) -> None:
    part = artifact.write_part(TABLE, 0, 1)
    other = Artifact(artifact.storage, artifact.path, KEY[:12] + "d" * 52)
    assert artifact.good_part(0, 1) == part
    assert other.good_part(0, 1) is None
    # Another number of shards is another part.
    assert artifact.good_part(0, 2) is None
    assert artifact.good_part(0, 1, "other") is None


def test_a_good_part_s_entry_is_the_one_that_was_written(artifact: Artifact) -> None:
    written = artifact.write_part(TABLE, 3, 4, "users", {"tokens": 12, "dropped": 0})
    assert artifact.good_part(3, 4, "users") == written
    assert (written.rows, written.facts) == (50, {"tokens": 12, "dropped": 0})
    assert written.bytes == file_of(artifact, written.name).stat().st_size
    assert written.sha256 == hashlib.sha256(file_of(artifact, written.name).read_bytes()).hexdigest()


def test_a_text_that_looks_like_a_seal_does_no_harm(artifact: Artifact) -> None:
    texts = pa.table({"text": ["rella-sha256:" + "0" * 64, "rella-sha256:" + "a" * 64]})
    part = artifact.write_part(texts, 0, 1)
    assert artifact.good_part(0, 1) == part
    artifact.finish(manifest([part]))
    assert artifact.read().column("text").to_pylist() == texts.column("text").to_pylist()


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    stores = [Artifact(Storage(str(tmp_path / name)), PATH, KEY) for name in "ab"]
    first, second = (a.write_part(TABLE, 0, 1, facts={"x": 1, "y": 2}) for a in stores)
    assert first == second
    # However the table was put together.
    pieces = pa.concat_tables([TABLE.slice(0, 7), TABLE.slice(7)]).combine_chunks()
    assert stores[0].write_part(pieces, 0, 1, facts={"y": 2, "x": 1}) == first
    assert stores[0].write_part(TABLE.slice(1), 0, 1).sha256 != first.sha256


def test_a_part_is_plain_parquet(artifact: Artifact) -> None:
    part = artifact.write_part(TABLE, 0, 1)
    found = pq.read_table(file_of(artifact, part.name), page_checksum_verification=True)
    assert found.replace_schema_metadata(None).equals(TABLE)
    assert found.schema.metadata[b"rella.key"] == KEY.encode()


def test_any_flipped_byte_of_the_manifest_is_noticed(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    finished(artifact)
    served = Served(monkeypatch, file_of(artifact, "manifest.json"))
    right, survivors = artifact.manifest(), 0
    for place in range(len(served.whole)):
        served.data = flipped(served.whole, place, 0x01)
        try:
            found = artifact.manifest()
        except ArtifactError:
            continue
        # Only the blanks between the values may change (to others that JSON allows): they carry nothing.
        assert found == right
        assert served.whole[place : place + 1].isspace()
        survivors += 1
    assert survivors < len(served.whole) / 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "", "is not a manifest"),
        (lambda text: text[: len(text) // 2], "is not a manifest"),
        (lambda text: "[]", "is not a manifest"),
        (lambda text: "{}", "is not a manifest"),
        (lambda text: "null", "is not a manifest"),
        (lambda text: text.replace('"rows": 25', '"rows": 26'), "damaged or edited"),
        (lambda text: text.replace('"k": 30', '"k": 31'), "damaged or edited"),
    ],
)
def test_a_damaged_manifest_is_an_error_not_unfinished_work(
    artifact: Artifact, change: Callable[[str], str], message: str
) -> None:
    finished(artifact)
    path = file_of(artifact, "manifest.json")
    assert change(path.read_text()) != path.read_text()
    path.write_text(change(path.read_text()))
    for look in (artifact.is_complete, artifact.manifest, artifact.read):
        with pytest.raises(ArtifactError, match=message):
            look()


def test_a_manifest_of_another_format_or_key(artifact: Artifact) -> None:
    parts = finished(artifact)
    artifact.finish(manifest(parts, format=2))
    with pytest.raises(ArtifactError, match="has format 2, this version reads 1"):
        artifact.read()
    artifact.finish(manifest(parts, key=KEY[:12] + "f" * 52))
    with pytest.raises(ArtifactError, match="is of key 0123456789ab, expected 0123456789ab"):
        artifact.is_complete()
    # Opened by its path alone, whatever key it has is right.
    assert Artifact(artifact.storage, artifact.path).is_complete()


def test_local_folder_checks_every_file(artifact: Artifact) -> None:
    files = [artifact.write_file(f"adapter/{n}", n.encode()) for n in ("config.json", "weights.safetensors")]
    beside = artifact.write_file("adapters.json", b"{}")
    artifact.finish(manifest([*files, beside]))
    folder = artifact.local_folder("adapter")
    assert {p.name: p.read_text() for p in folder.iterdir()} == {
        "config.json": "config.json",
        "weights.safetensors": "weights.safetensors",
    }
    file_of(artifact, "adapter/weights.safetensors").write_bytes(b"Weights.safetensors")
    with pytest.raises(ArtifactError, match=r"adapter/weights\.safetensors is missing or does not match"):
        artifact.local_folder("adapter")
    file_of(artifact, "adapter/weights.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"adapter/weights\.safetensors is missing or does not match"):
        artifact.local_folder("adapter")


def test_artifacts_are_listed_finished_or_not(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    assert list(list_artifacts(storage)) == []
    paths = [f"{d}/{s}/slug-{n:012x}" for n, (d, s) in enumerate([("ml-1m", "reit"), ("sample", "embed")])]
    for path in paths:
        Artifact(storage, path, KEY).write_part(TABLE, 0, 1)
    (tmp_path / "stray.txt").write_text("x")
    (tmp_path / "sample" / "embed" / "notes").mkdir()
    (tmp_path / "sample" / "stray.txt").write_text("x")
    assert [a.path for a in list_artifacts(storage)] == paths


def test_facts_are_summed_by_name() -> None:
    parts = [Part("a", 1, 1, "", {"x": 1, "y": 0.5}), Part("b", 1, 1, ""), Part("c", 1, 1, "", {"x": 2})]
    assert summed(parts) == {"x": 3, "y": 0.5}
    assert summed([]) == {}


def test_json_survives_the_manifest(artifact: Artifact) -> None:
    part = artifact.write_part(TABLE, 0, 1)
    artifact.finish(manifest([part], config={"data.split": (8, 1, 1), "k": 30}, facts={"valid": [{"auc": 0.5}]}))
    found = json.loads(file_of(artifact, "manifest.json").read_text())
    assert found["config"] == {"data.split": [8, 1, 1], "k": 30}
    assert artifact.manifest().facts == {"valid": [{"auc": 0.5}]}


def test_an_unfinished_folder_says_what_it_will_hold(artifact: Artifact) -> None:
    artifact.begin({"k": 30, "mix": "mixed"})
    artifact.begin({"k": 30, "mix": "mixed"})
    said = json.loads(file_of(artifact, "stage.json").read_text())
    assert said == {"key": KEY, "config": {"k": 30, "mix": "mixed"}}
    artifact.finish(manifest([artifact.write_part(TABLE, 0, 1)]))
    assert not file_of(artifact, "stage.json").exists()


def test_a_folder_taken_by_another_configuration_is_refused(artifact: Artifact) -> None:
    """The names hold 12 digits of the key; two that agree in those must not mix their parts."""
    Artifact(artifact.storage, artifact.path, KEY[:12] + "d" * 52).begin({"k": 20, "mix": "mixed", "split": (8, 1, 1)})
    with pytest.raises(ArtifactError, match=r"another configuration \(k 20 there, 30 here\).*rella clean"):
        artifact.begin({"k": 30, "mix": "mixed", "split": (8, 1, 1)})
    file_of(artifact, "stage.json").write_bytes(b"{damaged")
    artifact.begin({"k": 30})
    assert json.loads(file_of(artifact, "stage.json").read_text())["key"] == KEY


def test_finishing_drops_checkpoints_and_keeps_the_lease(artifact: Artifact) -> None:
    old = artifact.write_part(TABLE, 0, 3)
    for name in ("checkpoints/step-1.safetensors", "result.json", "lease/token.json"):
        artifact.write_file(name, b"x")
    adapter = artifact.write_file("adapter/weights.bin", b"w")
    artifact.finish(manifest([artifact.write_part(TABLE, 0, 1), adapter]))
    left = {p.relative_to(file_of(artifact, "")).as_posix() for p in file_of(artifact, "").rglob("*") if p.is_file()}
    assert left == {"manifest.json", "parts/part-00000-of-00001.parquet", "adapter/weights.bin", "lease/token.json"}
    assert old.name not in left


def test_clearing_leaves_the_lease_alone(artifact: Artifact) -> None:
    finished(artifact)
    artifact.write_file("lease/token.json", b"x")
    assert artifact.is_vouched_for()
    artifact.clear()
    assert not artifact.is_vouched_for()
    assert [p.name for p in file_of(artifact, "").rglob("*") if p.is_file()] == ["token.json"]


def test_a_damaged_manifest_vouches_for_nothing(artifact: Artifact) -> None:
    finished(artifact)
    file_of(artifact, "manifest.json").write_bytes(b"")
    assert not artifact.is_vouched_for()


def test_a_file_that_holds_the_same_already_is_not_written_again(artifact: Artifact) -> None:
    file = Path(artifact.storage.absolute(f"{artifact.path}/x.bin"))
    first = artifact.write_file("x.bin", b"one")
    before = file.stat().st_ino
    assert artifact.write_file("x.bin", b"one") == first
    assert file.stat().st_ino == before, "a rename would have put another file there"
    assert artifact.write_file("x.bin", b"two") != first
    assert file.read_bytes() == b"two"
    file.unlink()
    artifact.write_file("x.bin", b"two")
    assert file.read_bytes() == b"two"
