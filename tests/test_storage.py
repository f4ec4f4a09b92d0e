"""Storage: whole files or none, on a disk and on a store that knows neither folders nor rename."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Never

import pyarrow as pa
import pyarrow.fs as pafs
import pytest

from rella.artifacts import Artifact, Manifest, list_artifacts
from rella.errors import ArtifactError, MissingError, StorageError
from rella.leases import LEASE, Lease
from rella.storage import SUBMITTED_JOB, Storage, resolve_uri
from tests.object_store import on_objects, raised


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
    with pytest.raises(FileNotFoundError) as caught:
        storage.read("a/missing")
    assert isinstance(caught.value, MissingError)
    assert (str(caught.value), caught.value.errno) == (f"{storage.where('a/missing')} is missing", errno.ENOENT)


def test_bytes_are_not_unpacked(storage: Storage) -> None:
    """pyarrow's streams guess a compression from the name unless they are told not to."""
    storage.write("a.gz", b"not gzip")
    assert storage.read("a.gz") == b"not gzip"


def test_a_folder_that_comes_while_it_is_listed_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """pyarrow raises for it, even where a missing folder is allowed."""
    storage, store = on_objects()

    def gone(selector: object) -> Never:
        raise FileNotFoundError(errno.ENOENT, "Cannot list directory")

    monkeypatch.setattr(store, "get_file_info_selector", gone)
    assert storage.list("sample/embed") == []


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
    assert not any(n.endswith(stray.name) or f"/{LEASE}/" in n or "tmp" in n for n in store.objects)
    assert (artifact.local_folder("adapter") / "x.json").read_bytes() == b"{}"


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
    with pytest.raises(StorageError) as caught:
        storage.write("a/b.txt", b"after")
    assert str(caught.value) == (
        f"cannot write {tmp_path}/a/b.txt: the disk is full (No space left on device): "
        "free space there, or give another --storage"
    )
    assert caught.value.errno == 28
    assert storage.read("a/b.txt") == b"before"
    assert os.listdir(tmp_path / "a") == ["b.txt"]


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


SMALL = 2 << 20  # Bytes of the file system that tests fill.


def mounted(*options: str) -> None:
    done = subprocess.run(["mount", *options], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"file systems cannot be mounted here: {done.stderr.strip()}")


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of its own, which is soon full."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted("-t", "tmpfs", "-o", f"size={SMALL}", "tmpfs", str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_keeps_what_was_there_and_no_rest(small: Path) -> None:
    storage = Storage(str(small / "rella"))
    storage.write("a/b.txt", b"before")
    message = raised(lambda: storage.write("a/b.txt", bytes(2 * SMALL)), errno.ENOSPC)
    remedy = "free space there, or give another --storage"
    assert message == f"cannot write {small}/rella/a/b.txt: the disk is full (No space left on device): {remedy}"
    assert storage.read("a/b.txt") == b"before"
    assert os.listdir(small / "rella/a") == ["b.txt"]
    (small / "filler").write_bytes(bytes(storage.free() or 0))
    assert raised(storage.check_writable, errno.ENOSPC).startswith(f"cannot write {small}/rella: the disk is full (")
    assert os.listdir(small / "rella") == ["a"]
    (small / "filler").unlink()
    storage.check_writable()
    storage.write("a/b.txt", bytes(SMALL // 2))
    assert storage.size("a") == SMALL // 2


def test_room_is_looked_for_before_the_work(small: Path) -> None:
    storage = Storage(str(small / "not/yet/there"))
    assert storage.free() == SMALL
    storage.check_space(SMALL, "the embed stage")
    message = raised(lambda: storage.check_space(5_000_000_000, "the embed stage"), errno.ENOSPC)
    assert message == (
        f"{small}/not/yet/there has too little room: the embed stage needs 5.0 GB, 2.1 MB are free: "
        "free space there, or give another --storage"
    )
    assert not (small / "not").exists()


def test_a_read_only_file_system_is_refused_before_the_work(small: Path) -> None:
    storage = Storage(str(small))
    storage.write("a/b.txt", b"data")
    left = small / "a/c.txt.tmp-0123abcd"
    left.write_bytes(b"half")
    mounted("-o", "remount,ro", str(small))
    why = "the file system is read-only (Read-only file system): mount it writable, or give another --storage"
    assert raised(storage.check_writable, errno.EROFS) == f"cannot write {small}: {why}"
    assert raised(lambda: storage.write("x/y.txt", b""), errno.EROFS) == f"cannot write {small}/x/y.txt: {why}"
    assert raised(lambda: storage.write("a/b.txt", b""), errno.EROFS) == f"cannot write {small}/a/b.txt: {why}"
    assert raised(lambda: storage.delete("a/b.txt"), errno.EROFS) == f"cannot delete {small}/a/b.txt: {why}"
    assert raised(lambda: storage.delete("a"), errno.EROFS) == f"cannot delete {small}/a: {why}"
    assert raised(lambda: storage.sweep("a", -1), errno.EROFS) == f"cannot sweep {small}/a: {why}"
    assert raised(Storage(str(small / "new")).check_writable, errno.EROFS) == f"cannot write {small}/new: {why}"
    assert (storage.read("a/b.txt"), storage.list("a"), storage.size("a")) == (b"data", ["a/b.txt"], 4)


def test_a_writable_storage_is_left_as_it_was(storage: Storage) -> None:
    storage.check_writable()
    assert storage.list("", recursive=True) == []


def test_a_file_is_no_storage(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in ("file", "file/below", "file/below/that"):
        message = raised(lambda place=place: Storage(str(tmp_path / place)), errno.ENOTDIR)  # type: ignore[misc]
        assert message == (
            f"cannot use {tmp_path}/{place}: a file, not a folder, is there (Not a directory: {tmp_path}/file): "
            "give a folder, or a URI such as s3://bucket/rella"
        )
    storage = Storage(str(tmp_path))
    for code, path in ((errno.EEXIST, "file/x"), (errno.ENOTDIR, "file/x/y")):
        message = raised(lambda path=path: storage.write(path, b""), code)  # type: ignore[misc]
        assert message.startswith(f"cannot write {tmp_path}/{path}: a file, not a folder, is there (")
        assert message.endswith("): move it, or give another --storage")
    assert f": {tmp_path}/file" in message
    assert raised(lambda: storage.read("file/x"), errno.ENOTDIR).startswith(f"cannot read {tmp_path}/file/x: a file")
    assert not storage.exists("file/x")
    assert storage.list("file") == []


FOLDER_FAULTS = {
    errno.EDQUOT: "the disk is full (Disk quota exceeded): free space there, or give another --storage",
    errno.EACCES: "the permissions forbid it (Permission denied): change them, or give another --storage",
    errno.EPERM: "the permissions forbid it (Operation not permitted): change them, or give another --storage",
    errno.EIO: "the disk or network mount fails (Input/output error): check it",
    errno.ESTALE: "the disk or network mount fails (Stale file handle): check it",
    errno.EMFILE: "Too many open files: check --storage and start the job again, what is finished is kept",
}


@pytest.mark.parametrize("code", FOLDER_FAULTS, ids=errno.errorcode.get)
def test_every_fault_of_a_folder_has_its_remedy(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise OSError(code, "in other words")

    monkeypatch.setattr(os, "fsync", fail)
    # What cleans up fails too: the first error is the one that is told.
    monkeypatch.setattr(Path, "unlink", lambda *args, **options: os.mkdir("/dev/null/x"))
    message = raised(lambda: Storage(str(tmp_path)).write("a.txt", b"x"), code)
    assert message == f"cannot write {tmp_path}/a.txt: {FOLDER_FAULTS[code]}"


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("foo://x/y", "cannot use foo://x/y: Unrecognized filesystem type in URI: foo://x/y: give a folder, or a URI"),
        ("s3:///x", "cannot use s3:///x: Missing bucket name in S3 URI: give a folder, or a URI such as s3://"),
        ("s3://KEY:s3cr/et@lab/x", "cannot use s3://***@lab/x: Cannot parse URI: 's3://***@lab/x' due to"),
        ("s3://KEY:s3cret@lab/x?y=1&region=a", "cannot use s3://***@lab/x?y=1&region=a: Unexpected query parameter"),
        ("s3://lab/x?secret_key=s3cret&region=a", "cannot use s3://lab/x?secret_key=***&region=a: Unexpected query"),
    ],
)
def test_a_uri_that_does_not_do(uri: str, said: str) -> None:
    message = raised(lambda: Storage(uri), errno.EINVAL)
    assert message.startswith(said)
    assert "s3cr" not in message


def test_left_overs_are_no_files_and_are_swept(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    for name in ("a/b.txt", "a/c/d.txt", "a/x.tmp-0123456", "a/x.tmp-012345678", "a/y.tmp-0123456g"):
        storage.write(name, b"file")
    files = storage.list("", recursive=True)
    old, young = tmp_path / "a/c/d.txt.tmp-00ff00ff", tmp_path / "a/b.txt.tmp-12345678"
    outside = tmp_path / "other.txt.tmp-12345678"
    for path in (old, young, outside):
        path.write_bytes(b"half")
    for path in (old, outside):
        os.utime(path, (time.time() - 100,) * 2)
    assert storage.list("", recursive=True) == files
    assert storage.list("") == ["a"]
    assert storage.list("a/c") == ["a/c/d.txt"]
    assert storage.size("a") == 4 * len(files)
    assert storage.sweep("a", 200) == 0
    assert storage.sweep("a", 50) == 1
    assert (old.exists(), young.exists(), outside.exists()) == (False, True, True)
    assert storage.sweep("", 50) == 1
    assert storage.sweep("missing", 0) == 0
    assert storage.list("", recursive=True) == files
    assert on_objects()[0].sweep("", 0) == 0


def test_a_copy_that_finds_no_room(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(small))
    storage, _ = on_objects()
    storage.write("adapter/weights.bin", bytes(2 * SMALL))
    message = raised(lambda: storage.local_copy("adapter"), errno.ENOSPC)
    assert message.startswith(f"cannot copy mock:///bucket/rella/adapter/weights.bin to {small}/rella-")
    assert message.endswith(
        "/weights.bin: the disk is full (No space left on device): "
        "set TMPDIR to a folder that can be written and has space"
    )


@pytest.mark.parametrize(
    ("doing", "action"),
    [
        ("look for", lambda storage: storage.exists("a/b")),
        ("read", lambda storage: storage.read("a/b")),
        ("write", lambda storage: storage.write("a/b", b"")),
        ("list", lambda storage: storage.list("a/b")),
        ("measure", lambda storage: storage.size("a/b")),
        ("delete", lambda storage: storage.delete("a/b")),
        ("list", lambda storage: storage.local_copy("a/b")),
    ],
)
def test_every_method_explains_itself(doing: str, action: Callable[[Storage], object]) -> None:
    storage, store = on_objects()
    store.fault = OSError("Something else\n" + "went wrong " * 100)
    message = raised(lambda: action(storage), errno.EIO)
    assert message.startswith(f"cannot {doing} mock:///bucket/rella/a/b: Something else went wrong went wrong")
    assert message.endswith(" …: check --storage and start the job again, what is finished is kept")
    assert len(message) < 330
    store.fault = PermissionError(errno.EACCES, "Permission denied")
    assert ": the permissions forbid it (Permission denied): " in raised(lambda: action(storage), errno.EACCES)


def test_file_names_are_no_faults() -> None:
    storage, store = on_objects()
    store.fault = OSError("cannot do 'x/AccessDenied/NoSuchBucket'")
    assert "check --storage and start the job again" in raised(lambda: storage.exists("x"), errno.EIO)


def test_what_is_busy_is_deleted_in_the_end() -> None:
    storage, store = on_objects()
    for path in ("a/b.txt", "a/c.txt"):
        storage.write(path, b"x")
    store.stays = 2
    storage.delete("a")
    assert store.objects == {}
    storage.write("a/b.txt", b"x")
    store.stays = 100
    message = raised(lambda: storage.delete("a"), errno.EIO)
    assert message.startswith("cannot delete mock:///bucket/rella/a: Directory not empty: check --storage")


def test_what_somebody_else_deleted_meanwhile_is_deleted() -> None:
    storage, store = on_objects()
    storage.write("a.txt", b"x")

    def faster(path: str) -> None:
        del store.objects[path]
        raise FileNotFoundError(errno.ENOENT, path)

    store.delete_file = faster  # type: ignore[method-assign]
    storage.delete("a.txt")
    assert store.objects == {}


def test_a_file_that_goes_while_it_is_measured_has_no_size(monkeypatch: pytest.MonkeyPatch) -> None:
    storage, store = on_objects()
    storage.write("a/b.txt", b"one")
    storage.write("a/c.txt", b"three")
    look = store.get_file_info_selector

    def vanish(selector: Any) -> list[pafs.FileInfo]:
        found = look(selector)
        del store.objects["bucket/rella/a/b.txt"]
        return found

    monkeypatch.setattr(store, "get_file_info_selector", vanish)
    assert storage.size("a") == 5


def test_an_object_store_is_not_asked_for_room() -> None:
    storage, _ = on_objects()
    assert storage.free() is None
    storage.check_space(1 << 60, "the embed stage")
