"""Leases: one driver at a time, none locked out for good, nothing left behind."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rella import leases
from rella.__main__ import main
from rella.artifacts import Artifact
from rella.errors import BusyError
from rella.leases import LEASE, Lease, is_gone, is_held
from rella.storage import Storage

OTHER_HOST = "elsewhere|boot|ns"
NOBODY = "0" * 32


@pytest.fixture
def artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    monkeypatch.setattr(leases, "HEARTBEAT", 0.02)
    monkeypatch.setattr(leases, "EXPIRES", 30.0)
    # A busy disk may take a second for it, which is many heartbeats here.
    monkeypatch.setattr(os, "fsync", lambda file: None)
    return Artifact(Storage(str(tmp_path)), "sample/embed/toy-000000000000", "0" * 64)


def lease_files(artifact: Artifact) -> list[str]:
    folder = Path(artifact.storage.absolute(f"{artifact.path}/{LEASE}"))
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


def tokens(artifact: Artifact) -> list[str]:
    return [name.removesuffix(".json") for name in lease_files(artifact) if name.endswith(".json")]


def claim(artifact: Artifact, token: str) -> dict[str, str]:
    found: dict[str, str] = json.loads(artifact.storage.read(f"{artifact.path}/{LEASE}/{token}.json"))
    return found


def beat(artifact: Artifact, token: str = "theirs", clock: float = 1.0) -> None:
    artifact.storage.write(f"{artifact.path}/{LEASE}/{token}.beat", str(clock).encode())


def held_by(artifact: Artifact, host: str, pid: int, token: str = "theirs") -> None:
    body = {"token": token, "host": host, "pid": str(pid), "since": "2024-05-13T00:00:00Z", "beat": "1"}
    artifact.storage.write(f"{artifact.path}/{LEASE}/{token}.json", json.dumps(body).encode())
    beat(artifact, token)


def release(artifact: Artifact, token: str = "theirs") -> None:
    artifact.storage.delete(f"{artifact.path}/{LEASE}/{token}.json")
    artifact.storage.delete(f"{artifact.path}/{LEASE}/{token}.beat")


def until(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.005)


@contextmanager
def in_thread(work: Callable[[], Any]) -> Iterator[None]:
    """Run `work` beside the block; it must end by itself after it, and its error is the test's."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield
    thread.join(60)
    assert not thread.is_alive(), "it never ended"
    if errors:
        raise errors[0]


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Fail if somebody else is inside: a witness that knows nothing of leases."""
    witness = folder / "inside"
    os.close(os.open(witness, os.O_CREAT | os.O_EXCL))
    yield
    witness.unlink()


def on_write(monkeypatch: pytest.MonkeyPatch, kind: str, before: Any = None, after: Any = None) -> None:
    """Call `before` and `after` around the landing of every write of a claim (`json`) or heartbeat (`beat`)."""
    write = Storage.write

    def slow(self: Storage, path: str, data: bytes) -> None:
        ours = path.endswith(f".{kind}")
        if ours and before is not None:
            before()
        write(self, path, data)
        if ours and after is not None:
            after()

    monkeypatch.setattr(Storage, "write", slow)


def finished_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_it_is_held_inside_and_gone_after(artifact: Artifact) -> None:
    with Lease(artifact) as lease:
        (token,) = tokens(artifact)
        assert claim(artifact, token)["pid"] == str(os.getpid())
        until(lambda: f"{token}.beat" in lease_files(artifact))
        beat_file = f"{artifact.path}/{LEASE}/{token}.beat"
        first = artifact.storage.read(beat_file)
        until(lambda: artifact.storage.read(beat_file) != first)
        lease.check()
        assert is_held(artifact)
    assert lease_files(artifact) == []
    assert not is_held(artifact)
    time.sleep(0.1)
    assert lease_files(artifact) == [], "the heartbeat went on"
    with pytest.raises(BusyError, match="not held"):
        lease.check()


def test_it_is_released_when_the_work_fails(artifact: Artifact) -> None:
    with pytest.raises(ZeroDivisionError), Lease(artifact):
        1 / 0
    assert lease_files(artifact) == []


def test_a_second_driver_leaves_where_it_shall_not_wait(artifact: Artifact) -> None:
    with Lease(artifact) as first:
        before = tokens(artifact)
        message = rf"{artifact.path} is being made by another driver .*process {os.getpid()}, since {first._since}"
        with pytest.raises(BusyError, match=message):
            Lease(artifact, wait=False).__enter__()
        assert tokens(artifact) == before
        first.check()
    with Lease(artifact, wait=False):
        pass
    assert lease_files(artifact) == []


def test_a_second_driver_waits_until_the_first_is_done(artifact: Artifact) -> None:
    events: list[str] = []

    def second() -> None:
        with Lease(artifact, on_wait=lambda message: events.append("waits")):
            events.append("works")

    with ExitStack() as after, Lease(artifact):
        after.enter_context(in_thread(second))
        until(lambda: events)
        time.sleep(0.3)
        assert events == ["waits"]
        events.append("first done")
    assert events == ["waits", "first done", "works"]
    assert lease_files(artifact) == []


def test_every_holder_is_told_of_once(artifact: Artifact) -> None:
    held_by(artifact, OTHER_HOST, 11, "a")
    said: list[str] = []

    def wait() -> None:
        with Lease(artifact, on_wait=said.append):
            said.append("in")

    with in_thread(wait):
        until(lambda: len(said) == 1)
        for i in range(10):
            beat(artifact, "a", float(i))
            time.sleep(0.01)
        held_by(artifact, OTHER_HOST, 12, "b")
        release(artifact, "a")
        until(lambda: len(said) == 2)
        release(artifact, "b")
    assert [next((p for p in ("process 11", "process 12") if p in s), s) for s in said] == [
        "process 11",
        "process 12",
        "in",
    ]


def test_a_dead_process_s_lease_is_taken_at_once(artifact: Artifact) -> None:
    held_by(artifact, leases._here(), finished_process())
    assert not is_held(artifact)
    assert tokens(artifact) == ["theirs"], "who only looks deletes nothing"
    said: list[str] = []
    with Lease(artifact, wait=False, on_wait=said.append):
        (token,) = tokens(artifact)
        assert claim(artifact, token)["pid"] == str(os.getpid())
    assert said == []
    assert lease_files(artifact) == []


def test_what_a_killed_driver_left_is_swept_and_nothing_else(artifact: Artifact) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    held_by(artifact, leases._here(), ended.pid, "gone")
    held_by(artifact, leases._here(), os.getpid(), "alive")
    held_by(artifact, OTHER_HOST, ended.pid, "elsewhere")
    for _ in range(2):
        leases.sweep(artifact)
        assert lease_files(artifact) == ["alive.beat", "alive.json", "elsewhere.beat", "elsewhere.json"]


def test_the_same_process_number_elsewhere_says_nothing(artifact: Artifact) -> None:
    held_by(artifact, OTHER_HOST, finished_process())
    with pytest.raises(BusyError, match="elsewhere, process"):
        Lease(artifact, wait=False).__enter__()
    assert tokens(artifact) == ["theirs"]


def test_a_living_process_s_lease_is_respected(artifact: Artifact) -> None:
    held_by(artifact, leases._here(), os.getpid())
    with pytest.raises(BusyError):
        Lease(artifact, wait=False).__enter__()
    assert tokens(artifact) == ["theirs"]


def test_who_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    here = leases._here()
    assert is_gone({"host": here, "pid": str(finished_process())})
    assert is_gone({"host": here, "pid": "x"})
    assert is_gone({"host": here, "pid": "9" * 30})
    assert not is_gone({"host": here, "pid": str(os.getpid())})
    assert not is_gone({"host": OTHER_HOST, "pid": str(finished_process())})

    def refuse(pid: int, signal: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    assert not is_gone({"host": here, "pid": "1"}), "another user's process runs"


def test_a_holder_that_dies_while_another_waits(artifact: Artifact) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    held_by(artifact, leases._here(), process.pid)

    def end(message: str) -> None:
        process.communicate(b"\n")

    with Lease(artifact, on_wait=end):
        assert process.returncode is not None
        assert "theirs" not in tokens(artifact)


def test_a_silent_lease_expires(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "EXPIRES", 0.3)
    held_by(artifact, OTHER_HOST, 1)
    start = time.monotonic()
    with Lease(artifact):
        assert time.monotonic() - start >= 0.3
        assert "theirs" not in tokens(artifact)
    assert lease_files(artifact) == []


def test_many_wait_for_a_silent_lease(artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "EXPIRES", 0.5)
    held_by(artifact, OTHER_HOST, 1)

    def work() -> None:
        with Lease(artifact) as lease, alone(tmp_path):
            lease.check()

    with ExitStack() as threads:
        for _ in range(5):
            threads.enter_context(in_thread(work))
    assert lease_files(artifact) == []


def test_an_object_that_goes_while_it_is_read(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """S3 through pyarrow says no more than INTERNAL_FAILURE then."""
    held_by(artifact, OTHER_HOST, 1)

    def read(self: Storage, path: str) -> bytes:
        if gone:
            release(artifact)
        raise OSError("AWS Error INTERNAL_FAILURE during GetObject operation")

    monkeypatch.setattr(Storage, "read", read)
    gone = False
    with pytest.raises(OSError, match="INTERNAL_FAILURE"):
        Lease(artifact)._look()
    gone = True
    assert Lease(artifact)._look() == {}


def test_a_folder_that_comes_while_it_is_listed(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two drivers that start at once on a new artifact: one lists what the other is just making."""
    failed: list[int] = []
    real = Storage.list

    def listed(self: Storage, path: str, recursive: bool = False) -> list[str]:
        if len(failed) < 3:
            failed.append(len(tokens(artifact)))
            return []
        return real(self, path, recursive)

    monkeypatch.setattr(Storage, "list", listed)
    with Lease(artifact) as lease:
        assert failed == [0, 1, 0], "looked, claimed, withdrew, looked again"
        lease.check()


def test_a_heartbeat_puts_the_expiry_off(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "EXPIRES", 0.5)
    events: list[str] = []

    def second() -> None:
        with Lease(artifact, on_wait=events.append):
            events.append("in")

    with ExitStack() as after, Lease(artifact) as first:
        after.enter_context(in_thread(second))
        until(lambda: events)
        time.sleep(1.2)
        first.check()
        assert len(events) == 1, "told once, and not in"
    assert len(events) == 2


def test_the_heartbeat_of_another_machine_with_another_clock_counts(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "EXPIRES", 0.5)
    held_by(artifact, OTHER_HOST, 1)
    entered: list[bool] = []

    def wait() -> None:
        with Lease(artifact):
            entered.append(True)

    with in_thread(wait):
        for i in range(60):
            beat(artifact, clock=-1e9 + i)
            time.sleep(0.02)
        assert not entered
    assert entered, "it expires when it has fallen silent"


def test_a_pause_of_the_one_who_looks_is_not_the_holder_s(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """A storage that hangs, or a machine that is frozen, stops both: the holder must get the time to be heard again."""
    monkeypatch.setattr(leases, "EXPIRES", 0.2)
    held_by(artifact, OTHER_HOST, 1)
    lease = Lease(artifact)
    assert lease._look()
    time.sleep(0.4)
    assert lease._look()
    assert tokens(artifact) == ["theirs"]


def test_waiting_ends_when_the_work_is_finished(artifact: Artifact) -> None:
    held_by(artifact, OTHER_HOST, 1)
    done: list[bool] = []
    with Lease(artifact, on_wait=lambda message: done.append(True), finished=lambda: bool(done)) as lease:
        # Not taken: there is nothing left to do.
        assert tokens(artifact) == ["theirs"]
        with pytest.raises(BusyError, match=r"not held.*start the same command again"):
            lease.check()
    assert lease_files(artifact) == ["theirs.beat", "theirs.json"], "another driver's lease is not this one's to delete"


BROKEN = [b"", b"{", b"[]", b"null", b"{}", b'"x"', b"\xff", b'{"token": "theirs", "pid": 1}']


@pytest.mark.parametrize("content", BROKEN)
def test_a_claim_that_says_nothing_holds_nobody_up(artifact: Artifact, content: bytes) -> None:
    artifact.storage.write(f"{artifact.path}/{LEASE}/theirs.json", content)
    assert not is_held(artifact)
    with Lease(artifact, wait=False):
        assert "theirs" not in tokens(artifact)
    assert lease_files(artifact) == []


def test_a_file_that_is_being_written_is_no_claim(artifact: Artifact) -> None:
    artifact.storage.write(f"{artifact.path}/{LEASE}/theirs.json.tmp-01234567", b"{")
    with Lease(artifact, wait=False):
        pass
    assert lease_files(artifact) == ["theirs.json.tmp-01234567"]


def test_is_held_goes_by_the_last_heartbeat(artifact: Artifact) -> None:
    held_by(artifact, OTHER_HOST, 1)
    assert not is_held(artifact), "silent since 1970"
    beat(artifact, clock=time.time() - 2 * leases.EXPIRES)
    assert is_held(artifact), "clocks may disagree"
    beat(artifact, clock=time.time() - 11 * leases.EXPIRES)
    assert not is_held(artifact)
    assert tokens(artifact) == ["theirs"]


def test_many_threads_one_at_a_time(artifact: Artifact, tmp_path: Path) -> None:
    entered: list[int] = []

    def work(number: int) -> None:
        for _ in range(5):
            with Lease(artifact) as lease, alone(tmp_path):
                entered.append(number)
                time.sleep(random.uniform(0, 0.003))
                lease.check()

    with ExitStack() as threads:
        for number in range(6):
            threads.enter_context(in_thread(partial(work, number)))
    assert sorted(entered) == sorted(list(range(6)) * 5)
    assert lease_files(artifact) == []


PROCESS = """
import os, random, sys, time
from rella import leases
from rella.artifacts import Artifact
from rella.leases import Lease
from rella.storage import Storage

leases.HEARTBEAT = 0.02
folder, path = sys.argv[1:]
artifact = Artifact(Storage(folder), path)
print("ready", flush=True)
input()
for _ in range(8):
    with Lease(artifact) as lease:
        witness = os.open(f"{folder}/inside", os.O_CREAT | os.O_EXCL)
        time.sleep(random.uniform(0, 0.003))
        lease.check()
        os.close(witness)
        os.unlink(f"{folder}/inside")
    time.sleep(random.uniform(0, 0.003))
print("done")
"""


def test_many_processes_one_at_a_time(artifact: Artifact, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROCESS, str(tmp_path), artifact.path]
    root, pipe = Path(__file__).parents[1], subprocess.PIPE
    processes = [subprocess.Popen(command, text=True, cwd=root, stdin=pipe, stdout=pipe, stderr=pipe) for _ in range(4)]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        for process in processes:
            out, err = process.communicate(timeout=60)
            assert (out, err) == ("done\n", "")
    finally:
        for process in processes:
            process.kill()
    assert lease_files(artifact) == []


def test_slow_writers_are_never_two(artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, who wrote late overwrote what the other had read back already."""

    def dawdle() -> None:
        time.sleep(random.choice([0.0, random.uniform(0, 0.05)]))

    on_write(monkeypatch, "json", before=dawdle, after=dawdle)
    entered: list[int] = []

    def work(number: int) -> None:
        for _ in range(3):
            with Lease(artifact) as lease, alone(tmp_path):
                entered.append(number)
                time.sleep(random.uniform(0, 0.03))
                lease.check()

    with ExitStack() as threads:
        for number in range(4):
            threads.enter_context(in_thread(partial(work, number)))
    assert len(entered) == 12
    assert lease_files(artifact) == []


@pytest.mark.parametrize("wait", [True, False])
def test_two_that_see_each_other_withdraw_and_try_again(
    wait: bool, artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrote: list[bool] = []
    saw: list[int] = []
    inside: list[bool] = []
    left: list[bool] = []
    both = threading.Barrier(2)
    look = Lease._look

    def meet() -> None:
        wrote.append(True)
        if len(wrote) <= 4:
            both.wait(60)

    def meet_after_look(lease: Lease) -> Any:
        found = look(lease)
        if lease._token is not None and len(saw) < 2:
            saw.append(len(found))
            both.wait(60)
        return found

    # Nobody writes before both have looked, nobody looks again before both have written or seen less than both saw.
    on_write(monkeypatch, "json", before=meet, after=meet)
    monkeypatch.setattr(Lease, "_look", meet_after_look)

    def work() -> None:
        try:
            with Lease(artifact, wait), alone(tmp_path):
                inside.append(True)
        except BusyError:
            left.append(True)

    with in_thread(work):
        work()
    assert saw == [2, 2]
    assert len(inside) + len(left) == 2
    assert inside, "they left because of each other"
    assert not (wait and left)
    assert lease_files(artifact) == []


@pytest.mark.parametrize("place", ["told", "pause", "finished"])
def test_an_interrupt_while_waiting_leaves_nothing(
    place: str, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_by(artifact, OTHER_HOST, 1)

    def interrupt(*args: object) -> Any:
        raise KeyboardInterrupt

    lease = Lease(artifact)
    if place == "told":
        lease.on_wait = interrupt
    elif place == "finished":
        lease.finished = interrupt
    else:
        monkeypatch.setattr(time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        lease.__enter__()
    assert tokens(artifact) == ["theirs"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("place", ["written", "listed", "started"])
def test_an_error_while_claiming_leaves_nothing(
    place: str, error: type[BaseException], artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise error("now")

    if place == "written":
        on_write(monkeypatch, "json", after=fail)
    elif place == "started":
        monkeypatch.setattr(threading.Thread, "start", fail)
    else:
        on_write(monkeypatch, "json", after=lambda: monkeypatch.setattr(Storage, "list", fail))
    with pytest.raises(error):
        Lease(artifact).__enter__()
    assert lease_files(artifact) == []


def test_a_paused_holder_that_was_taken_over(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "EXPIRES", 0.3)
    go_on, paused = threading.Event(), threading.Event()
    looked: list[float | None] = []
    silence = Lease._silence

    def pause(lease: Lease, token: str) -> float | None:
        if threading.current_thread() is first._thread and paused.is_set():
            assert go_on.wait(60)
            looked.append(silence(lease, token))
            return looked[-1]
        return silence(lease, token)

    monkeypatch.setattr(Lease, "_silence", pause)
    first = Lease(artifact)
    with first:
        (old,) = tokens(artifact)
        until(lambda: f"{old}.beat" in lease_files(artifact))
        first.check()
        paused.set()
        with Lease(artifact) as second:
            (new,) = tokens(artifact)
            assert new != old
            message = r"was lost: this process could not be heard for \d+ s and another driver took over; start the"
            with pytest.raises(BusyError, match=message):
                first.check()
            go_on.set()
            assert first._thread is not None
            first._thread.join(60)
            assert not first._thread.is_alive(), "nobody needs its heartbeat any more"
            assert looked[-1] is not None
            assert old not in {name.partition(".")[0] for name in lease_files(artifact)}
            with pytest.raises(BusyError, match="was lost"):
                first.check()
            first.__exit__(None, None, None)
            assert tokens(artifact) == [new]
            second.check()
    assert lease_files(artifact) == []


def test_a_heartbeat_that_lands_too_late_brings_nothing_back(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The storage holds up a write that the holder began while its claim was still there."""
    monkeypatch.setattr(leases, "EXPIRES", 0.3)
    go_on, stuck = threading.Event(), threading.Event()

    def hang() -> None:
        if threading.current_thread() is first._thread:
            stuck.set()
            assert go_on.wait(60)

    for kind in ("json", "beat"):
        on_write(monkeypatch, kind, before=hang)
    first = Lease(artifact)
    with first:
        (old,) = tokens(artifact)
        assert stuck.wait(60)
        with Lease(artifact) as second:
            (new,) = tokens(artifact)
            go_on.set()
            assert first._thread is not None
            first._thread.join(60)
            assert tokens(artifact) == [new] != [old]
            with pytest.raises(BusyError, match="was lost"):
                first.check()
            second.check()
            third = Lease(artifact, wait=False)
            with pytest.raises(BusyError):
                third.__enter__()
    assert lease_files(artifact) == []


def test_a_driver_judged_dead_before_it_looked_does_not_hold(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []

    def judge() -> None:
        written.extend(tokens(artifact))
        if len(written) == 1:
            release(artifact, written[0])

    on_write(monkeypatch, "json", after=judge)
    with Lease(artifact) as lease:
        assert tokens(artifact) == written[1:]
        assert len(written) == 2
        lease.check()


def test_check_looks_at_the_storage_itself(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "HEARTBEAT", 60.0)
    with Lease(artifact) as lease:
        lease.check()
        artifact.storage.delete(artifact.path)
        with pytest.raises(BusyError, match=rf"{artifact.path} was lost: somebody deleted its file"):
            lease.check()


def test_a_storage_that_hiccups_does_not_end_the_heartbeat(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    failed: list[str] = []
    healthy: list[float] = []
    write, exists = Storage.write, Storage.exists

    def failing_write(self: Storage, path: str, data: bytes) -> None:
        if len(failed) < 3 and path.endswith(".beat"):
            failed.append("write")
            raise OSError(5, "Input/output error")
        write(self, path, data)

    def failing_exists(self: Storage, path: str) -> bool:
        if 3 <= len(failed) < 6 and path.endswith(".json"):
            failed.append("exists")
            raise OSError(5, "Input/output error")
        return exists(self, path)

    monkeypatch.setattr(Storage, "write", failing_write)
    monkeypatch.setattr(Storage, "exists", failing_exists)
    with Lease(artifact) as lease:
        (token,) = tokens(artifact)
        until(lambda: f"{token}.beat" in lease_files(artifact))
        assert failed == ["write"] * 3 + ["exists"] * 3
        lease.check()
        healthy.append(lease._heard)
        until(lambda: lease._heard > healthy[0])
    assert lease_files(artifact) == []


@pytest.mark.parametrize("error", [None, ZeroDivisionError])
def test_a_storage_that_fails_at_the_end_hides_nothing(
    error: type[Exception] | None, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Storage, path: str) -> None:
        raise OSError(5, "Input/output error")

    with ExitStack() as outcome:
        if error is not None:
            outcome.enter_context(pytest.raises(error))
        with Lease(artifact), monkeypatch.context() as broken:
            broken.setattr(Storage, "delete", fail)
            lease = Lease(Artifact(artifact.storage, "sample/embed/other-000000000000"))
            with lease:
                if error is not None:
                    raise error
    # Its process lives, but nothing is heard of it any more.
    monkeypatch.setattr(leases, "EXPIRES", 0.2)
    assert len(tokens(lease.artifact)) == 1
    with Lease(lease.artifact):
        pass
    assert lease_files(lease.artifact) == lease_files(artifact) == []


def test_clean_leaves_what_a_driver_works_on(
    artifact: Artifact, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # One beat and no more, which might fall into the deletion.
    monkeypatch.setattr(leases, "HEARTBEAT", 60.0)
    artifact.write_file("parts/some", b"x")
    command = ["--storage", artifact.storage.uri, "clean", artifact.path, "--yes"]
    with Lease(artifact) as lease:
        until(lambda: len(lease_files(artifact)) == 2)
        assert main(command) == 1
        assert f"process {os.getpid()}" in (said := capsys.readouterr().err)
        assert "--force" in said
        lease.check()
        assert main([*command, "--force"]) == 0
        with pytest.raises(BusyError, match="clean --force"):
            lease.check()
    artifact.write_file("parts/some", b"x")
    assert main(command) == 0
    assert not artifact.storage.exists(artifact.path)


def test_clean_looks_again_after_the_question(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact.write_file("parts/some", b"x")

    with ExitStack() as lease:

        def answer(question: str) -> str:
            lease.enter_context(Lease(artifact))
            return "y"

        monkeypatch.setattr("builtins.input", answer)
        assert main(["--storage", artifact.storage.uri, "clean", artifact.path]) == 1
        assert artifact.storage.exists(f"{artifact.path}/parts/some")


def test_a_claim_that_comes_to_nothing_is_spoken_of_in_the_end(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its driver was stopped between claiming and looking: the one that waits must say for what."""
    monkeypatch.setattr(leases, "PATIENCE", 0.2)
    monkeypatch.setattr(leases, "EXPIRES", 0.6)
    monkeypatch.setattr(leases, "HEARTBEAT", 0.05)
    held_by(artifact, OTHER_HOST, 1)
    artifact.storage.delete(f"{artifact.path}/{LEASE}/theirs.beat")
    told: list[str] = []
    with Lease(artifact, on_wait=told.append):
        assert len(told) == 1
        assert "elsewhere, process 1" in told[0]
