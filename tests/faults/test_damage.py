"""Broken files, read-only and full storages, clusters that are too small: named, and mended by the same command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.faults.harness import (
    STAGES,
    Done,
    Place,
    adapter_of,
    assert_same_adapter,
    assert_same_scores,
    assert_same_tables,
    copied,
)
from tests.object_store import ObjectStore

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1500)]


def message(done: Done) -> str:
    """The one message of a job that ended with something that the user can mend."""
    assert done.code == 1, done.out
    assert "Traceback" not in done.out
    lines = done.out.splitlines()
    start = max(n for n, line in enumerate(lines) if line.startswith(("embed: ", "retrieve: ", "reit: ", "score: ")))
    said = lines[start:]
    assert len(said) <= 6, f"more than a few lines: {said}"
    print("\n".join(said))
    return "\n".join(said)


def damaged(data: bytes, how: str) -> bytes:
    middle = len(data) // 2
    return b"" if how == "empty" else data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]


@pytest.mark.parametrize(
    ("stage", "what", "how"),
    [("pca", "/parts/", "flipped"), ("prepare", "/parts/samples", "empty"), ("pca", "manifest.json", "flipped")],
)
def test_a_damaged_file_of_a_finished_artifact(
    stage: str, what: str, how: str, place: Callable[[str], Place], untouched: Place
) -> None:
    here = copied(untouched, place("damage"), "prepare", "embed", "pca")
    storage, path = here.storage(), here.path_of(stage, what)
    whole = storage.read(path)
    storage.write(path, damaged(whole, how))
    said = message(here.run("retrieve"))
    assert path in said
    assert f"--restart {stage}" in said
    # Either remedy of the message.
    again = here.run("retrieve", "--restart", stage)
    assert again.code == 0, again.out
    assert again.lines(stage, "gone")
    storage.write(path, whole)
    assert here.run("retrieve").code == 0
    assert_same_tables(here, untouched)


def test_damaged_parts_of_unfinished_work_are_made_again(place: Callable[[str], Place], untouched: Place) -> None:
    here = copied(untouched, place("unfinished"), *STAGES[:5])
    job = here.start("reit", "--variants", "ours")
    job.until(lambda: here.has("score", "/parts/") >= 3)
    job.kill()
    storage = here.storage()
    parts = sorted(p for p in here.files() if "/score/" in p and "/parts/" in p)[:2]
    for path, how in zip(parts, ("flipped", "empty"), strict=True):
        storage.write(path, damaged(storage.read(path), how))
    done = here.run("reit", "--variants", "ours")
    assert done.code == 0, done.out
    assert_same_scores(here, untouched)


def test_a_damaged_checkpoint_is_passed_over(place: Callable[[str], Place], untouched: Place) -> None:
    here = copied(untouched, place("checkpoint"), *STAGES[:4])
    job = here.start("reit", "--variants", "ours")
    job.until(lambda: here.has("reit", "/checkpoints/step-0000001") >= 2)
    job.kill()
    storage = here.storage()
    newest = max(p for p in here.files() if "/checkpoints/" in p)
    storage.write(newest, damaged(storage.read(newest), "flipped"))
    done = here.run("reit", "--variants", "ours")
    assert done.code == 0, done.out
    resumed = here.finished("reit").manifest().facts["resumed_at"]
    print(f"newest {newest[-36:]}, went on at {resumed}")
    assert resumed == [int(newest.rpartition("/step-")[2][:8]) - 1]
    assert_same_adapter(here, untouched)


class Disk:
    """A storage that can be made read-only and full, and mended again."""

    def __init__(self, kind: str, folder: Path, server: ObjectStore) -> None:
        self.kind, self.folder, self.server = kind, folder, server

    def lock(self, on: bool) -> None:
        if self.kind == "s3":
            self.server.read_only(on)
            return
        subprocess.run(["mount", "-o", f"remount,{'ro' if on else 'rw'}", str(self.folder)], check=True)

    def fill(self) -> None:
        if self.kind == "s3":
            self.server.full(0)
            return
        # Unbuffered: what a buffer holds back would fail once more when the file is closed.
        with (self.folder / "filler").open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(b"x" * 4096)

    def empty(self) -> None:
        if self.kind == "s3":
            self.server.full(None)
        else:
            (self.folder / "filler").unlink()


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs root, to mount a small tmpfs")
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=False)
    if mounted.returncode:
        pytest.skip("mounting is not permitted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


@pytest.fixture
def disk(kind: str, model_folder: Path, tmp_path: Path, server: ObjectStore) -> Iterator[tuple[Place, Disk]]:
    if kind == "s3":
        place = Place(server.uri_of(f"lab/{tmp_path.name}-disk"), model_folder, server.environment)
        yield place, Disk(kind, tmp_path, server)
        server.read_only(False)
        server.full(None)
        return
    with small_disk(tmp_path / "disk", "40m"):
        yield Place(str(tmp_path / "disk"), model_folder), Disk(kind, tmp_path / "disk", server)


def test_a_storage_that_is_read_only(disk: tuple[Place, Disk], untouched: Place) -> None:
    here, device = disk
    copied(untouched, here, "prepare")
    device.lock(True)
    said = message(here.run("embed"))
    assert "cannot write" in said
    assert ("denies access" if device.kind == "s3" else "read-only") in said
    assert str(here.uri).partition("?")[0] in said
    device.lock(False)
    job = here.start("embed")
    job.until(lambda: here.has("embed", "/parts/") >= 1)
    device.lock(True)
    said = message(job.end())
    assert "cannot write" in said
    device.lock(False)
    done = here.run("embed")
    assert done.code == 0, done.out


def test_a_disk_that_fills_up(disk: tuple[Place, Disk], untouched: Place) -> None:
    here, device = disk
    copied(untouched, here, "prepare")
    job = here.start("embed")
    job.until(lambda: here.has("embed", "/parts/") >= 1)
    device.fill()
    said = message(job.end())
    assert "full" in said
    assert "free space there, or give another --storage" in said
    device.empty()
    done = here.run("embed")
    assert done.code == 0, done.out
    left = [p.name for p in device.folder.rglob("*.tmp-*")]
    assert left == []


def test_a_disk_that_fills_up_while_tuning(disk: tuple[Place, Disk], untouched: Place) -> None:
    """An error that would come again ends the job: it is not tried `max_failures` times."""
    here, device = disk
    copied(untouched, here, *STAGES[:4])
    job = here.start("reit", "--variants", "ours")
    job.until(lambda: here.has("reit", "/checkpoints/step-0000001"))
    device.fill()
    filled = time.monotonic()
    said = message(job.end())
    print(f"ended {time.monotonic() - filled:.1f} s after the disk was full")
    assert "full" in said
    assert "/checkpoints/step-" in said or "/adapter/" in said
    assert time.monotonic() - filled < 90
    device.empty()
    done = here.run("reit", "--variants", "ours")
    assert done.code == 0, done.out
    assert here.finished("reit").manifest().facts["resumed_at"]
    assert_same_adapter(here, untouched)


def test_a_disk_that_is_too_small_is_refused_at_once(model_folder: Path, tmp_path: Path, untouched: Place) -> None:
    with small_disk(tmp_path / "disk", "24m"):
        here = copied(untouched, Place(str(tmp_path / "disk"), model_folder), "prepare")
        (tmp_path / "disk" / "filler").write_bytes(b"x" * 12_000_000)
        said = message(here.run("embed"))
        assert "has too little room: the embed stage needs 16.1 MB" in said
        assert "free space there, or give another --storage" in said
        assert here.has("embed") == 0
        (tmp_path / "disk" / "filler").unlink()
        done = here.run("embed")
        assert done.code == 0, done.out


def test_more_workers_than_the_cluster_has(place: Callable[[str], Place], untouched: Place) -> None:
    here = copied(untouched, place("workers"), "prepare")
    said = message(here.run("embed", "--cluster.workers", "99"))
    assert "cluster.workers 99: needs 99 CPUs where the cluster has" in said
    assert here.has("embed", "/parts/") == 0
    assert here.run("embed").code == 0


def test_an_adapter_of_another_base(place: Callable[[str], Place], untouched: Place) -> None:
    here = copied(untouched, place("adapter"), *STAGES[:4])
    adapter_of(untouched)
    source = untouched.finished("reit")
    for path in source.storage.list(f"{source.path}/adapter"):
        here.storage().write(f"mine/{path.rpartition('/')[2]}", source.storage.read(path))
    base = json.loads(here.storage().read("mine/rella_base.json"))
    here.storage().write("mine/rella_base.json", json.dumps(base | {"digest": "0" * 64, "name": "another"}).encode())
    mine = here.storage().where("mine")
    said = message(here.run("score", "--adapter", mine))
    assert f"adapter {mine} was tuned on another (000000000000), not on toy" in said
    here.storage().write("mine/rella_base.json", json.dumps(base).encode())
    done = here.run("score", "--adapter", mine)
    assert done.code == 0, done.out
