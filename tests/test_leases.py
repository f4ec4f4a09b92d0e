"""Leases: one driver at a time, none locked out for good, nothing left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rella import leases
from rella.artifacts import Artifact
from rella.errors import BusyError
from rella.leases import LEASE, Lease
from rella.storage import Storage

OTHER_HOST = "elsewhere|boot|ns"


@pytest.fixture
def artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    monkeypatch.setattr(leases, "HEARTBEAT", 0.02)
    monkeypatch.setattr(leases, "SETTLE", 0.02)
    monkeypatch.setattr(leases, "EXPIRES", 30.0)
    return Artifact(Storage(str(tmp_path)), "sample/embed/toy-000000000000", "0" * 64)


def lease_file(artifact: Artifact) -> Path:
    return Path(artifact.storage.absolute(f"{artifact.path}/{LEASE}"))


def holder(artifact: Artifact) -> dict[str, str]:
    found: dict[str, str] = json.loads(lease_file(artifact).read_text())
    return found


def held_by(artifact: Artifact, host: str, pid: int) -> None:
    body = {"token": "theirs", "host": host, "pid": str(pid), "since": "2024-05-13T00:00:00Z", "beat": "1"}
    artifact.storage.write(f"{artifact.path}/{LEASE}", json.dumps(body).encode())


def until(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.005)


def finished_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_it_is_held_inside_and_gone_after(artifact: Artifact) -> None:
    with Lease(artifact):
        assert holder(artifact)["pid"] == str(os.getpid())
        first = holder(artifact)["beat"]
        until(lambda: holder(artifact)["beat"] != first)
    assert not lease_file(artifact).exists()
    time.sleep(0.1)
    assert not lease_file(artifact).exists(), "the heartbeat went on"


def test_it_is_released_when_the_work_fails(artifact: Artifact) -> None:
    with pytest.raises(ZeroDivisionError), Lease(artifact):
        1 / 0
    assert not lease_file(artifact).exists()


def test_a_second_driver_leaves_where_it_shall_not_wait(artifact: Artifact) -> None:
    with Lease(artifact) as first:
        with pytest.raises(
            BusyError, match=rf"{artifact.path} is being made by another driver .*process {os.getpid()}"
        ):
            Lease(artifact, wait=False).__enter__()
        assert holder(artifact)["token"] == first._token
    with Lease(artifact, wait=False):
        pass
    assert not lease_file(artifact).exists()


def test_a_second_driver_waits_until_the_first_is_done(artifact: Artifact) -> None:
    events: list[str] = []

    def second() -> None:
        with Lease(artifact, on_wait=lambda message: events.append("waits")):
            events.append("works")

    with Lease(artifact):
        thread = threading.Thread(target=second)
        thread.start()
        until(lambda: events)
        time.sleep(0.2)
        assert events == ["waits"]
        events.append("first done")
    thread.join(10)
    assert events == ["waits", "first done", "works"]
    assert not lease_file(artifact).exists()


def test_a_dead_process_s_lease_is_taken_at_once(artifact: Artifact) -> None:
    held_by(artifact, leases._here(), finished_process())
    said: list[str] = []
    start = time.monotonic()
    with Lease(artifact, wait=False, on_wait=said.append):
        assert holder(artifact)["pid"] == str(os.getpid())
    assert time.monotonic() - start < 5
    assert said == []


def test_the_same_process_number_elsewhere_says_nothing(artifact: Artifact) -> None:
    held_by(artifact, OTHER_HOST, finished_process())
    with pytest.raises(BusyError, match="elsewhere, process"):
        Lease(artifact, wait=False).__enter__()
    assert holder(artifact)["token"] == "theirs"


def test_a_living_process_s_lease_is_respected(artifact: Artifact) -> None:
    held_by(artifact, leases._here(), os.getpid())
    with pytest.raises(BusyError):
        Lease(artifact, wait=False).__enter__()


def test_a_holder_that_dies_while_another_waits(artifact: Artifact) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    held_by(artifact, leases._here(), process.pid)

    def end(message: str) -> None:
        process.communicate(b"\n")

    with Lease(artifact, on_wait=end):
        assert process.returncode is not None
        assert holder(artifact)["pid"] == str(os.getpid())


def test_a_silent_lease_expires(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "EXPIRES", 0.3)
    held_by(artifact, OTHER_HOST, 1)
    start = time.monotonic()
    with Lease(artifact):
        assert time.monotonic() - start >= 0.3
        assert holder(artifact)["token"] != "theirs"
    assert not lease_file(artifact).exists()


def test_a_heartbeat_puts_the_expiry_off(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "EXPIRES", 0.7)
    events: list[str] = []
    with Lease(artifact):
        thread = threading.Thread(
            target=lambda: [Lease(artifact).__enter__().__exit__(None, None, None), events.append("")]
        )
        thread.start()
        time.sleep(1.5)
        assert events == []
    thread.join(10)
    assert events == [""]


def test_waiting_ends_when_the_work_is_finished(artifact: Artifact) -> None:
    held_by(artifact, OTHER_HOST, 1)
    done: list[bool] = []
    with Lease(artifact, on_wait=lambda message: done.append(True), finished=lambda: bool(done)):
        # Not taken: there is nothing left to do.
        assert holder(artifact)["token"] == "theirs"
    assert holder(artifact)["token"] == "theirs", "another driver's lease is not this one's to delete"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"{}"])
def test_a_lease_file_that_says_nothing_holds_nobody_up(artifact: Artifact, content: bytes) -> None:
    artifact.storage.write(f"{artifact.path}/{LEASE}", content)
    with Lease(artifact, wait=False):
        assert holder(artifact)["pid"] == str(os.getpid())
    assert not lease_file(artifact).exists()


def test_of_two_that_come_at_once_one_gets_it(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "SETTLE", 0.2)
    inside, most, lock = [0], [0], threading.Lock()

    def work() -> None:
        with Lease(artifact):
            with lock:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
            time.sleep(0.1)
            with lock:
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert (most[0], inside[0]) == (1, 0)
    assert not lease_file(artifact).exists()
