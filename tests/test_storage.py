"""Storage: whole files or none, on a disk and on a store that knows neither folders nor rename."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pytest

from rella.artifacts import Artifact, Manifest, list_artifacts
from rella.errors import ArtifactError
from rella.leases import LEASE, Lease
from rella.storage import SUBMITTED_JOB, Storage, resolve_uri


class ObjectStore(pafs.FileSystemHandler):
    """Keys and bytes: an object is there when its stream is closed; no rename, no real folders."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.puts: list[str] = []

    def __eq__(self, other: object) -> bool:
        return self is other

    def get_type_name(self) -> str:
        return "objects"

    def normalize_path(self, path: str) -> str:
        return path

    def _info(self, path: str) -> pafs.FileInfo:
        if path in self.objects:
            return pafs.FileInfo(path, pafs.FileType.File, size=len(self.objects[path]))
        if any(name.startswith(f"{path}/") for name in self.objects):
            return pafs.FileInfo(path, pafs.FileType.Directory)
        return pafs.FileInfo(path, pafs.FileType.NotFound)

    def get_file_info(self, paths: list[str]) -> list[pafs.FileInfo]:
        return [self._info(p) for p in paths]

    def get_file_info_selector(self, selector: Any) -> list[pafs.FileInfo]:
        base = f"{selector.base_dir.rstrip('/')}/"
        below = [n.removeprefix(base) for n in self.objects if n.startswith(base)]
        if not below and not selector.allow_not_found:
            raise FileNotFoundError(selector.base_dir)
        folders = {"/".join(n.split("/")[:d]) for n in below for d in range(1, n.count("/") + 1)}
        names = (set(below) | folders) if selector.recursive else {n.split("/")[0] for n in below}
        return [self._info(f"{base}{n}") for n in sorted(names, reverse=True)]

    def open_input_stream(self, path: str) -> pa.NativeFile:
        if path not in self.objects:
            raise FileNotFoundError(path)
        return pa.PythonFile(io.BytesIO(self.objects[path]), mode="r")

    open_input_file = open_input_stream

    def open_output_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        store = self

        class Put(io.BytesIO):
            def close(self) -> None:
                if not self.closed:
                    store.objects[path] = self.getvalue()
                    store.puts.append(path)
                super().close()

        return pa.PythonFile(Put(), mode="w")

    def delete_file(self, path: str) -> None:
        del self.objects[path]

    def delete_dir(self, path: str) -> None:
        for name in [n for n in self.objects if n.startswith(f"{path}/")]:
            del self.objects[name]

    def _refuse(self, *args: Any) -> Any:
        raise NotImplementedError("an object store has no such thing")

    move = copy_file = create_dir = delete_dir_contents = delete_root_dir_contents = open_append_stream = _refuse


def on_objects() -> tuple[Storage, ObjectStore]:
    store, storage = ObjectStore(), Storage("mock:///bucket/rella")
    object.__setattr__(storage, "_fs", pafs.PyFileSystem(store))
    return storage, store


@pytest.fixture(params=["disk", "objects"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return Storage(str(tmp_path)) if request.param == "disk" else on_objects()[0]


def test_files_are_written_read_listed_and_deleted(storage: Storage) -> None:
    assert not storage.exists("a/b/c.txt")
    assert storage.list("") == storage.list("a") == storage.list("a", recursive=True) == []
    for path, data in (("a/b/c.txt", b"one"), ("a/d.txt", b"two!"), ("a/b/e/f.txt", b""), ("ab/x.txt", b"x")):
        storage.write(path, data)
    assert storage.read("a/b/c.txt") == b"one"
    assert storage.read("a/b/e/f.txt") == b""
    storage.write("a/b/c.txt", b"longer than before")
    storage.write("a/b/c.txt", b"short")
    assert storage.read("a/b/c.txt") == b"short"
    assert storage.exists("a/b/c.txt")
    assert storage.exists("a/b")
    assert storage.list("a") == ["a/b", "a/d.txt"]
    assert storage.list("") == ["a", "ab"]
    assert storage.list("a", recursive=True) == ["a/b/c.txt", "a/b/e/f.txt", "a/d.txt"]
    assert (storage.size("a"), storage.size("a/d.txt"), storage.size("missing")) == (9, 4, 0)
    storage.delete("a/b")
    storage.delete("a/b")
    storage.delete("ab/x.txt")
    assert storage.list("a", recursive=True) == ["a/d.txt"]
    assert not storage.exists("ab/x.txt")


def test_a_missing_file_is_its_own_error(storage: Storage) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read("missing")


def test_bytes_are_not_unpacked(storage: Storage) -> None:
    """pyarrow's streams guess a compression from the name unless they are told not to."""
    storage.write("a.gz", b"not gzip")
    assert storage.read("a.gz") == b"not gzip"


def test_artifacts_and_leases_need_no_rename() -> None:
    storage, store = on_objects()
    artifact = Artifact(storage, "sample/embed/toy-0123456789ab", "0123456789ab")
    table = pa.table({"item": [1, 2, 3]})
    with Lease(artifact, wait=False):
        assert storage.exists(f"{artifact.path}/{LEASE}")
        stray = artifact.write_part(table, 0, 2)
        part = artifact.write_part(table, 0, 1)
        assert artifact.good_part(0, 1) == part
        with pytest.raises(ArtifactError, match="unfinished"):
            artifact.read()
        adapter = artifact.write_file("adapter/x.json", b"{}")
        artifact.finish(Manifest("embed", 1, artifact.key, "sample", {}, {}, {}, [part, adapter]))
    assert artifact.read().column("item").to_pylist() == [1, 2, 3]
    assert [p.path for p in list_artifacts(storage)] == [artifact.path]
    assert not any(n.endswith((stray.name, LEASE)) or "tmp" in n for n in store.objects)
    assert (artifact.local_folder("adapter") / "x.json").read_bytes() == b"{}"


def test_an_object_is_put_once_under_its_own_name() -> None:
    storage, store = on_objects()
    storage.write("a/b.txt", b"data")
    assert store.puts == ["bucket/rella/a/b.txt"]


def test_a_local_copy_follows_what_it_copies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    storage, _ = on_objects()
    storage.write("adapter/one.json", b"1")
    storage.write("adapter/deep/two.json", b"2")
    first = storage.local_copy("adapter")
    assert (first / "one.json").read_bytes() + (first / "deep/two.json").read_bytes() == b"12"
    assert storage.local_copy("adapter") == first
    storage.write("adapter/one.json", b"3")
    second = storage.local_copy("adapter")
    assert second != first
    assert ((second / "one.json").read_bytes(), (first / "one.json").read_bytes()) == (b"3", b"1")


def test_a_disk_needs_no_copy(tmp_path: Path) -> None:
    assert Storage(str(tmp_path)).local_copy("adapter") == tmp_path / "adapter"
    assert Storage(str(tmp_path)).is_local
    assert not on_objects()[0].is_local


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_what_was_there(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(str(tmp_path))
    storage.write("a/b.txt", b"before")

    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*{"fsync": (os, "fsync"), "replace": (Path, "replace")}[step], fail)
    with pytest.raises(OSError, match=r"cannot write .*/a/b\.txt: .*No space left") as caught:
        storage.write("a/b.txt", b"after")
    assert caught.value.errno == 28
    assert storage.read("a/b.txt") == b"before"
    assert storage.list("a") == ["a/b.txt"]


def test_where_artifacts_go_unless_it_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RELLA_STORAGE", raising=False)
    monkeypatch.delenv(SUBMITTED_JOB, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert resolve_uri(None) == f"{tmp_path}/rella"
    assert resolve_uri("~/there") == f"{tmp_path}/there"
    assert resolve_uri("there") == f"{tmp_path}/there"
    assert resolve_uri("s3://bucket/rella/") == "s3://bucket/rella"
    monkeypatch.setenv("RELLA_STORAGE", "/from/environment")
    assert resolve_uri(None) == "/from/environment"
    assert resolve_uri("/given") == "/given"


def test_a_submitted_job_refuses_a_relative_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SUBMITTED_JOB, "{}")
    for ok in ("/absolute", "s3://bucket/x", "~/home"):
        assert resolve_uri(ok)
    with pytest.raises(ValueError, match="storage 'out' is relative"):
        resolve_uri("out")
    monkeypatch.setenv("RELLA_STORAGE", "out")
    with pytest.raises(ValueError, match="give an absolute path or a URI"):
        resolve_uri(None)


def test_workers_open_their_own_connection(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    again = pickle.loads(pickle.dumps(storage))
    storage.write("a.txt", b"1")
    assert again == storage
    assert again.read("a.txt") == b"1"
    assert storage.where("a.txt") == f"{tmp_path}/a.txt"
    assert storage.where("") == str(tmp_path)
