"""Storage and artifacts on an object store: a real S3 server on this machine, every way in which it may fail."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest

from rella import storage as storage_module
from rella.artifacts import Artifact, Manifest, Part, list_artifacts
from rella.errors import ArtifactError, MissingError
from rella.storage import Storage
from tests import object_store as helper
from tests.object_store import ObjectStore, object_store, on_objects, raised

BIG = 12_000_000  # Goes in two parts.
TABLE = pa.table({"item": list(range(50))})


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectStore]:
    with object_store() as started:
        yield started


@pytest.fixture
def store(server: ObjectStore) -> Iterator[ObjectStore]:
    """The server in good health, with nothing in it."""
    Storage(server.uri_of("lab")).delete("rella")
    server.requests()
    yield server
    server.read_only(False)
    server.full(None)
    server.busy(0)


@pytest.fixture
def storage(store: ObjectStore) -> Storage:
    return Storage(store.uri)


def test_files_are_written_read_listed_and_deleted(storage: Storage) -> None:
    assert not storage.exists("a/b/c.txt")
    assert storage.list("") == storage.list("a") == storage.list("a", recursive=True) == []
    for path, data in (("a/b/c.txt", b"one"), ("a/d.txt", b"two!"), ("a/b/e/f.txt", b""), ("ab/é x+%.txt", b"x")):
        storage.write(path, data)
    assert storage.read("a/b/c.txt") == b"one"
    assert storage.read("a/b/e/f.txt") == b""
    assert storage.read("ab/é x+%.txt") == b"x"
    for data in (b"longer than before", b"short", b""):
        storage.write("a/b/c.txt", data)
        assert storage.read("a/b/c.txt") == data
    assert storage.exists("a/b/c.txt")
    assert storage.exists("a/b")
    assert storage.list("") == ["a", "ab"]
    assert storage.list("a") == ["a/b", "a/d.txt"]
    assert storage.list("a", recursive=True) == ["a/b/c.txt", "a/b/e/f.txt", "a/d.txt"]
    assert (storage.size("a"), storage.size("a/d.txt"), storage.size("missing")) == (4, 4, 0)
    storage.delete("a/b")
    storage.delete("a/b")
    storage.delete("ab/é x+%.txt")
    assert storage.list("", recursive=True) == ["a/d.txt"]
    assert not storage.exists("a/b")
    storage.check_writable()
    assert storage.list("", recursive=True) == ["a/d.txt"]
    assert (storage.free(), storage.sweep("", 0), storage.is_local) == (None, 0, False)


def test_a_large_file(storage: Storage) -> None:
    data = os.urandom(20_000_000)
    storage.write("a/big.bin", data)
    assert storage.read("a/big.bin") == data
    assert storage.size("a") == len(data)


def test_a_missing_file_is_its_own_error(storage: Storage) -> None:
    with pytest.raises(MissingError, match=r"^s3://lab/rella/missing\?endpoint_override=\S+ is missing$"):
        storage.read("missing")


def test_a_local_copy_is_downloaded(storage: Storage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    storage.write("adapter/one.json", b"1")
    storage.write("adapter/deep/two.json", b"2")
    first = storage.local_copy("adapter")
    assert (first / "one.json").read_bytes() + (first / "deep/two.json").read_bytes() == b"12"


def test_a_small_file_is_one_put(storage: Storage, store: ObjectStore) -> None:
    storage.write("a/b.txt", b"data")
    # The other is the look at what was kept.
    assert store.requests() == ["PUT /lab/rella/a/b.txt", "HEAD /lab/rella/a/b.txt"]
    Storage(f"{store.uri}&allow_delayed_open=false").write("a/b.txt", b"data")
    assert store.requests()[0] == "POST /lab/rella/a/b.txt?uploads", "what the URI says counts"


def test_many_write_at_once(storage: Storage) -> None:
    def work(number: int) -> bytes:
        for n in range(5):
            storage.write(f"{number}/{n}.txt", f"{number} {n}".encode())
            storage.write("same.txt", str(number).encode() * (9 - n))
        return storage.read(f"{number}/4.txt")

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(work, range(8))) == [f"{n} 4".encode() for n in range(8)]
    assert len(storage.list("", recursive=True)) == 41


@pytest.fixture
def artifact(storage: Storage) -> Artifact:
    key = "0123456789ab" + "c" * 52
    return Artifact(storage, f"sample/score/slug-{key[:12]}", key)


def finished(artifact: Artifact) -> list[Part]:
    parts = [artifact.write_part(TABLE.slice(n * 25, 25), n, 2, facts={"tokens": n + 1}) for n in range(2)]
    artifact.finish(Manifest("score", 1, artifact.key, "sample", {"k": 30}, {}, {}, parts, {"rows": 50}))
    return parts


def test_an_artifact_is_readable_once_it_is_finished(artifact: Artifact) -> None:
    assert artifact.write_part(TABLE, 2, 3) == artifact.good_part(2, 3)
    with pytest.raises(ArtifactError, match=r"unfinished \(no manifest\)"):
        artifact.read()
    parts = finished(artifact)
    assert [artifact.good_part(n, 2) for n in range(2)] == parts
    assert artifact.good_part(2, 3) is None, "not in the manifest"
    assert artifact.read().column("item").to_pylist() == list(range(50))
    assert (artifact.manifest().rows, artifact.manifest().config) == (50, {"k": 30})
    artifact.verify()
    assert [a.path for a in list_artifacts(artifact.storage)] == [artifact.path]


def flipped(data: bytes, place: int) -> bytes:
    changed = bytearray(data)
    changed[place] ^= 0x01
    return bytes(changed)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "a byte in the middle": lambda data: flipped(data, len(data) // 2),
    "a byte of the footer": lambda data: flipped(data, -20),
    "nothing left": lambda data: b"",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_part_is_made_again_and_never_read(artifact: Artifact, damage: str) -> None:
    name = f"{artifact.path}/{finished(artifact)[0].name}"
    artifact.storage.write(name, DAMAGE[damage](artifact.storage.read(name)))
    assert artifact.good_part(0, 2) is None
    assert artifact.good_part(1, 2) is not None
    with pytest.raises(ArtifactError) as caught:
        artifact.read()
    assert f"{artifact.storage.where(name)} does not match the digest in the manifest" in str(caught.value)


def test_a_missing_part(artifact: Artifact) -> None:
    name = f"{artifact.path}/{finished(artifact)[1].name}"
    artifact.storage.delete(name)
    assert artifact.good_part(1, 2) is None
    with pytest.raises(ArtifactError) as caught:
        artifact.verify()
    assert f"{artifact.storage.where(name)} is missing" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data.replace(b'"rows": 25', b'"rows": 35'), "does not match its checksum, it was damaged"),
        (lambda data: flipped(data, 0), "is not a manifest"),
        (lambda data: b"", "is not a manifest"),
    ],
)
def test_a_damaged_manifest_is_an_error_not_unfinished_work(
    artifact: Artifact, change: Callable[[bytes], bytes], said: str
) -> None:
    finished(artifact)
    name = f"{artifact.path}/manifest.json"
    artifact.storage.write(name, change(artifact.storage.read(name)))
    for look in (artifact.is_complete, artifact.read):
        with pytest.raises(ArtifactError) as caught:
            look()
        assert f"{artifact.storage.where(name)} {said}" in str(caught.value)


METHODS: dict[str, Callable[[Storage], object]] = {
    "look for": lambda storage: storage.exists("a/b.txt"),
    "read": lambda storage: storage.read("a/b.txt"),
    "write": lambda storage: storage.write("a/b.txt", b"data"),
    "measure": lambda storage: storage.size("a/b.txt"),
    "delete": lambda storage: storage.delete("a/b.txt"),
    "list": lambda storage: storage.list("a/b.txt"),
}
FREE = "the object store is full: free space there, or give another --storage"
KEYS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile in ~/.aws"
DENIED = f"the object store denies access: set credentials that may read and write ({KEYS})"
UNKNOWN = f"the object store does not know the credentials: set {KEYS}, on all nodes"
NO_BUCKET = "there is no such bucket: create it, or correct bucket and endpoint in --storage"
AWAY = "the object store cannot be reached: check endpoint, network and server"


def explains(message: str, doing: str, what: str, said: str) -> None:
    """Assert that a message is the one line about the fault and one of what the store said, cut."""
    line, quote = message.split("\n")
    assert line == f"cannot {doing}: {what}"
    assert quote.startswith("(AWS Error ")
    assert said in quote
    assert len(quote) <= 202


def test_a_full_store(storage: Storage, store: ObjectStore) -> None:
    storage.write("a/old.bin", b"before")
    store.full(10_000)
    storage.write("a/b.txt", bytes(5000))
    message = raised(lambda: storage.write("a/c.txt", bytes(6000)), errno.ENOSPC)
    explains(message, f"write {storage.where('a/c.txt')}", FREE, "XMinioStorageFull")
    explains(raised(storage.check_writable, errno.ENOSPC), f"write {storage.uri}", FREE, "status 507")
    assert storage.list("", recursive=True) == ["a/b.txt", "a/old.bin"]
    # Room can be made, though not even the mark of an empty folder can be put.
    storage.delete("a/b.txt")
    storage.delete("a")
    assert storage.list("", recursive=True) == []


def test_a_store_that_fills_up_midway_keeps_what_was_there(storage: Storage, store: ObjectStore) -> None:
    storage.write("a.bin", b"before")
    for room in (11_000_000, 0):
        store.full(room)
        message = raised(lambda: storage.write("a.bin", bytes(BIG)), errno.ENOSPC)
        explains(message, f"write {storage.where('a.bin')}", FREE, "XMinioStorageFull")
        raised(lambda: storage.write("new.bin", bytes(BIG)), errno.ENOSPC)
        assert storage.list("", recursive=True) == ["a.bin"]
        assert storage.read("a.bin") == b"before"
    store.full(None)
    storage.write("a.bin", bytes(BIG))
    assert storage.size("a.bin") == BIG


def test_a_store_that_may_only_be_read(storage: Storage, store: ObjectStore) -> None:
    storage.write("a/b.txt", b"data")
    store.read_only(True)
    explains(raised(storage.check_writable, errno.EACCES), f"write {storage.uri}", DENIED, "ACCESS_DENIED")
    for doing in ("write", "delete"):
        message = raised(lambda doing=doing: METHODS[doing](storage), errno.EACCES)  # type: ignore[misc]
        explains(message, f"{doing} {storage.where('a/b.txt')}", DENIED, "ACCESS_DENIED")
    explains(raised(lambda: storage.delete("a"), errno.EACCES), f"delete {storage.where('a')}", DENIED, "ACCESS_DENIED")
    raised(lambda: storage.write("big.bin", bytes(BIG)), errno.EACCES)
    assert storage.list("", recursive=True) == ["a/b.txt"]
    assert storage.read("a/b.txt") == b"data"
    store.read_only(False)
    storage.check_writable()


def test_no_such_bucket(store: ObjectStore) -> None:
    storage = Storage(store.uri_of("no-such-bucket/rella"))
    explains(raised(storage.check_writable, errno.ENOENT), f"write {storage.uri}", NO_BUCKET, "NO_SUCH_BUCKET")
    message = raised(lambda: storage.write("a.bin", bytes(BIG)), errno.ENOENT)
    explains(message, f"write {storage.where('a.bin')}", NO_BUCKET, "NO_SUCH_BUCKET")
    # S3 itself lists nothing, and `rella ls` would find an empty storage.
    message = raised(lambda: storage.list(""), errno.ENOENT)
    assert message == f"cannot list {storage.uri}: {NO_BUCKET}\n(NoSuchBucket: no-such-bucket)"
    with pytest.raises(MissingError):
        storage.read("a.bin")


@pytest.mark.parametrize(
    ("user", "said"),
    [("unknown", "INVALID_ACCESS_KEY_ID"), ("forged", "SIGNATURE_DOES_NOT_MATCH"), ("expired", "ExpiredToken")],
)
def test_wrong_credentials(store: ObjectStore, monkeypatch: pytest.MonkeyPatch, user: str, said: str) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", user)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cret")
    storage = Storage(store.uri)
    explains(raised(storage.check_writable, errno.EACCES), f"write {storage.uri}", UNKNOWN, said)
    for doing, action in METHODS.items():
        message = raised(lambda action=action: action(storage), errno.EACCES)  # type: ignore[misc]
        # Where the answer has no body, the server cannot say why it refuses.
        known = doing in ("write", "list")
        where = f"{doing} {storage.where('a/b.txt')}"
        explains(message, where, UNKNOWN if known else DENIED, said if known else "ACCESS_DENIED")
        assert "s3cret" not in message


def test_no_credentials(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    storage = Storage(store.uri)
    explains(raised(storage.check_writable, errno.EACCES), f"write {storage.uri}", DENIED, "ACCESS_DENIED")


def test_credentials_of_the_uri_count_and_are_never_shown(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    Storage(store.uri.replace("//", "//test:test@")).check_writable()
    storage = Storage(store.uri.replace("//", "//unknown:s3cret%2Fkey@"))
    message = raised(lambda: storage.write("a.txt", b""), errno.EACCES)
    explains(message, f"write {store.uri.replace('//', '//***@').replace('rella', 'rella/a.txt')}", UNKNOWN, "INVALID")
    assert "s3cret" not in message + raised(lambda: storage.read("a.txt"), errno.EACCES)


def test_the_endpoint_of_the_environment_counts(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{store.port}")
    Storage("s3://lab/rella?region=us-east-1").write("a.txt", b"x")
    assert "PUT /lab/rella/a.txt" in store.requests()


@pytest.mark.parametrize("doing", METHODS)
def test_a_server_that_is_gone(doing: str, store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "ATTEMPTS", 1)
    # A port that is closed: bound, and nobody listens.
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        storage = Storage(store.uri_of("lab/rella", closed.getsockname()[1]))
        message = raised(lambda: METHODS[doing](storage), errno.EHOSTUNREACH)
    explains(message, f"{doing} {storage.where('a/b.txt')}", AWAY, "Could not connect to server")


def test_a_busy_server_is_asked_again_not_for_ever(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself pyarrow gives up at the first 503, and tries a server that swallows packets for minutes."""
    monkeypatch.setattr(storage_module, "ATTEMPTS", 2)
    storage = Storage(store.uri)
    store.busy(1)
    storage.write("a.txt", b"data")
    assert store.requests()[:2] == ["PUT /lab/rella/a.txt"] * 2
    store.busy(100)
    message = raised(lambda: storage.write("a.txt", b"other"), errno.EIO)
    assert message.startswith(
        f"cannot write {storage.where('a.txt')}: AWS Error SLOW_DOWN during PutObject operation: "
    )
    assert message.endswith(": check --storage and start the job again, what is finished is kept")
    assert store.requests() == ["PUT /lab/rella/a.txt"] * 2
    store.busy(0)
    assert storage.read("a.txt") == b"data"


def test_the_server_ends_with_the_process_that_started_it() -> None:
    # Its standard input closes when that process ends, however it ends.
    command = [sys.executable, helper.__file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline().strip().isdigit()
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(timeout=10) == 0


def test_a_write_that_fails_midway_leaves_no_torn_object() -> None:
    storage, store = on_objects()
    store.breaks = ["write"]
    message = raised(lambda: storage.write("a.txt", b"0123456789"), errno.ENOSPC)
    assert message.startswith("cannot write mock:///bucket/rella/a.txt: the disk is full (No space left on device): ")
    assert store.puts == ["bucket/rella/a.txt"], "closing published the half of it"
    assert store.objects == {}


@pytest.mark.parametrize("breaks", [["close"], ["write", "close"]])
def test_what_was_there_stays_where_nothing_was_put(breaks: list[str]) -> None:
    storage, store = on_objects()
    storage.write("a.txt", b"before")
    store.breaks = breaks
    raised(lambda: storage.write("a.txt", b"0123456789"), errno.ENOSPC)
    assert storage.read("a.txt") == b"before"


@pytest.mark.parametrize("kept", [3, 0, None])
def test_an_object_that_was_not_kept_whole_is_deleted(kept: int | None) -> None:
    storage, store = on_objects()
    store.keep = lambda data: None if kept is None else data[:kept]
    message = raised(lambda: storage.write("a.txt", b"0123456789"), errno.EIO)
    assert message == (
        f"cannot write mock:///bucket/rella/a.txt: the object store kept {kept or 0} of 10 bytes: "
        "check --storage and start the job again, what is finished is kept"
    )
    assert store.objects == {}


def test_an_object_of_another_writer_is_not_ours_to_delete() -> None:
    """Two drivers may write one file in the same moment; sizes differ then, and nothing is torn."""
    storage, store = on_objects()
    for theirs in (b"theirs", b"theirs, which is longer"):
        store.keep = lambda data, theirs=theirs: theirs  # type: ignore[misc]
        storage.write("a.txt", b"0123456789")
        assert storage.read("a.txt") == theirs


def test_an_object_is_put_once_under_its_own_name() -> None:
    storage, store = on_objects()
    storage.write("a/b.txt", b"data")
    assert store.puts == ["bucket/rella/a/b.txt"]
