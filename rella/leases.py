"""One driver at a time on an artifact, on any storage that lists what was written: no locks, rename or conditional put.

A driver writes a claim, a file of its own in the folder `lease`, and THEN lists the folder. It holds the lease if its
claim is the only live one; else it deletes its claim, waits a random while and tries again. Of two drivers one had
written before the other listed, since both write before they list: they never both see only themselves. This needs a
storage that shows every finished write to every later list and read, as folders, S3, GCS and MinIO do.

Two that see each other both withdraw; the random waits let one through. All look first and do not claim beside a live
claim, so that only those collide that come at once.

A claim is dead when its process is gone from this machine, when its heartbeat has stood still for `EXPIRES` seconds
that this machine spent looking (clocks of machines differ), or when it is unreadable (files appear whole, so nobody is
about to finish it). Whoever finds a dead claim deletes it before holding the lease. Nobody writes a claim twice: the
heartbeat is a second file, so that a beat that was held up for minutes cannot bring back a claim that was judged dead
meanwhile. The holder of a deleted claim has lost the lease and learns it from `Lease.check`. What no storage without
conditional put can prevent is a pause of more than `EXPIRES` between that check and the write that it should guard.
"""

from __future__ import annotations

import json
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from rella.artifacts import LEASES, Artifact, now
from rella.errors import BusyError

HEARTBEAT = 10.0
"""Seconds between two signs of life."""
EXPIRES = 60.0
"""Seconds without one after which a lease is free."""
POLL = 1.0
"""Seconds, at most, between two looks while waiting."""
PATIENCE = 5.0
"""Seconds after which a claim without a heartbeat is spoken of: by then it should have become a lease or be gone."""
BACK_OFF = 10.0
"""Seconds, at most, of the random wait after two claims met."""
LEASE = LEASES
"""The folder of an artifact's claims (`<token>.json`) and their heartbeats (`<token>.beat`)."""


def _here() -> str:
    """This machine since its last start; process numbers mean something within it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    namespace = os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else ""
    return f"{socket.gethostname()}|{boot}|{namespace}"


@dataclass(frozen=True)
class Claim:
    """What one driver has written."""

    body: dict[str, str]
    """token, host, pid, since, beat; empty where it was unreadable."""
    beat: str | None
    """The last heartbeat, as its driver's clock said; None for a driver that does not hold the lease, or not yet."""

    def __str__(self) -> str:
        host = self.body["host"].partition("|")[0]
        return f"{host}, process {self.body['pid']}, since {self.body['since']}"

    def age(self) -> float:
        """Return the seconds since the last sign of life, as far as the two clocks agree."""
        return time.time() - float(self.beat or self.body["beat"])


def is_gone(found: dict[str, str]) -> bool:
    """Return whether a claim's driver is a process of this machine that no longer runs."""
    if found.get("host") != _here():
        return False
    try:
        os.kill(int(found.get("pid", "")), 0)
    except PermissionError:
        # Another user's: it runs. (In /proc it may be hidden.)
        return False
    except (ProcessLookupError, ValueError, OverflowError):
        return True
    return False


def holders(artifact: Artifact) -> list[str]:
    """Return who seems to be at work: host, process and since when.

    Looks once and deletes nothing. Clocks of different machines may disagree by minutes, hence the wide margin.
    """
    claims = [c for c in _claims(artifact).values() if c.body and not is_gone(c.body)]
    return [str(c) for c in claims if c.age() < 10 * EXPIRES]


def is_held(artifact: Artifact) -> bool:
    """Return whether somebody seems to be at work: a claim whose process lives, or that was renewed lately."""
    return bool(holders(artifact))


def sweep(artifact: Artifact) -> None:
    """Delete claims of processes of this machine that are gone: what a driver left that was killed as it finished."""
    # A courtesy: the storage may be one that can only be read.
    with suppress(OSError):
        for token, claim in _claims(artifact).items():
            if claim.body and is_gone(claim.body):
                _delete(artifact, token)


def _path(artifact: Artifact, token: str, kind: str) -> str:
    return f"{artifact.path}/{LEASE}/{token}.{kind}"


def _claims(artifact: Artifact) -> dict[str, Claim]:
    """All claims by token, the unreadable too, but not those that were withdrawn between the listing and the look."""
    found = {}
    # A folder that comes or goes while it is listed shows nothing, and that is safe: a driver that has claimed does not
    # hold the lease unless it finds its own claim.
    for path in artifact.storage.list(f"{artifact.path}/{LEASE}"):
        # The name is split at its first dot: a file that is being written has a longer ending.
        token, _, kind = path.rpartition("/")[2].partition(".")
        if kind == "json" and (data := _read(artifact, path)) is not None:
            found[token] = Claim(_parsed(data, token), _last_beat(artifact, token))
    return found


def _read(artifact: Artifact, path: str) -> bytes | None:
    """The file, or None where there is none (any more)."""
    try:
        return artifact.storage.read(path)
    except FileNotFoundError:
        return None
    except OSError:
        # An object that is deleted while it is read may be any error of its store.
        if artifact.storage.exists(path):
            raise
        return None


def _parsed(data: bytes, token: str) -> dict[str, str]:
    try:
        found = json.loads(data)
        body = {name: str(found[name]) for name in ("token", "host", "pid", "since", "beat")}
        float(body["beat"])
    except (ValueError, KeyError, TypeError):
        return {}
    return body if body["token"] == token else {}


def _last_beat(artifact: Artifact, token: str) -> str | None:
    try:
        beat = (_read(artifact, _path(artifact, token, "beat")) or b"").decode()
        float(beat)
    except ValueError:
        return None
    return beat


def _delete(artifact: Artifact, token: str) -> None:
    for kind in ("json", "beat"):
        # Several drivers may find the same dead claim.
        with suppress(FileNotFoundError):
            artifact.storage.delete(_path(artifact, token, kind))


@dataclass
class Lease:
    """Held while it is entered: `with Lease(artifact, wait=True) as lease: ...; lease.check(); ...`."""

    artifact: Artifact
    wait: bool = True
    on_wait: Callable[[str], None] = lambda message: None
    """Told once of every driver that is waited for."""
    finished: Callable[[], bool] = lambda: False
    """Ends the waiting when the other driver has finished the artifact; then nothing is held."""
    _since: str = field(default_factory=now, init=False)
    _token: str | None = field(default=None, init=False)
    """Names the claim while there is one; new at every try, so that a deleted claim stays deleted."""
    _heard: float = field(default=0.0, init=False)
    """When the last sign of life that was written began to be written."""
    _lost: float | None = field(default=None, init=False)
    """Seconds without a sign of life after which the claim was found deleted."""
    _seen: dict[str, tuple[Claim, float]] = field(default_factory=dict, init=False)
    """The claims of the last look and for how many seconds each has stood still."""
    _looked: float = field(default=0.0, init=False)
    _told: str = field(default="", init=False)
    _stop: threading.Event = field(default_factory=threading.Event, init=False)
    _thread: threading.Thread | None = field(default=None, init=False)

    def __enter__(self) -> Lease:
        """Take the lease, or none if `finished` says so after a wait.

        Raises:
            BusyError: another driver holds it and `wait` is off; names the holder.
            OSError: the storage failed; no claim is left unless its deletion failed too.
        """
        tries = 0
        while True:
            others = self._look()
            if others:
                self._tell(others.values())
                pause = min(POLL, HEARTBEAT) * random.uniform(0.5, 1.0)
            else:
                started = time.monotonic()
                if self._try():
                    return self
                # As long as a try takes on this storage, and longer where many drivers want the lease.
                tries += 1
                pause = random.uniform(0.0, min(BACK_OFF, 2 ** min(tries, 10) * (time.monotonic() - started)))
            time.sleep(pause)
            if self.finished():
                return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        try:
            if self._thread is not None:
                self._thread.join()
        finally:
            # An error of the storage would hide the work's own; the claim that it leaves expires.
            with suppress(OSError):
                self._withdraw()
            self._token = None

    def check(self) -> None:
        """Verify, on the storage, that the lease is still held; to be called before what only its holder may write.

        Raises:
            BusyError: the lease was lost, or never held since the other driver finished the artifact.
        """
        where, again = self.artifact.where(), "start the same command again, it takes what the other driver has made"
        if self._token is None:
            raise BusyError(f"the lease on {where} is not held: {again}")
        silence = self._silence(self._token)
        if silence is not None:
            why = "somebody deleted its file (`python -m rella clean --force` does)"
            if silence >= EXPIRES:
                why = f"this process could not be heard for {silence:.0f} s and another driver took over"
            raise BusyError(f"the lease on {where} was lost: {why}; {again}")

    def _look(self) -> dict[str, Claim]:
        """Delete the dead claims and return the live ones by token."""
        # At most a heartbeat per look: if this process or the storage stood still, so may have the others' heartbeats.
        passed = min(HEARTBEAT, time.monotonic() - self._looked)
        claims, before, self._seen = _claims(self.artifact), self._seen, {}
        self._looked = time.monotonic()
        for token, claim in claims.items():
            last, still = before.get(token, (None, 0.0))
            still = still + passed if claim == last else 0.0
            if not claim.body or is_gone(claim.body) or still >= EXPIRES:
                _delete(self.artifact, token)
            else:
                self._seen[token] = (claim, still)
        return {token: claim for token, (claim, _) in self._seen.items()}

    def _tell(self, others: Iterable[Claim]) -> None:
        claim = min(others, key=lambda c: c.beat is None)
        message = f"{self.artifact.where()} is being made by another driver ({claim})"
        if not self.wait:
            raise BusyError(f"{message}: wait for it, or drop `--cluster.on_busy leave`")
        # One without a heartbeat may be withdrawn in a moment.
        _, still = self._seen[claim.body["token"]]
        if (claim.beat is not None or still >= PATIENCE) and claim.body["token"] != self._told:
            self._told = claim.body["token"]
            self.on_wait(message)

    def _try(self) -> bool:
        """Claim, look, and start the heartbeat if there is no other; else withdraw."""
        self._token = uuid.uuid4().hex
        try:
            self._claim(self._token)
            # Its own must be there: a driver that was paused right here may have been judged dead.
            if set(self._look()) == {self._token}:
                self._lost = None
                self._stop.clear()
                self._thread = threading.Thread(target=self._beat, args=(self._token,), daemon=True)
                self._thread.start()
                return True
            self._withdraw()
        except BaseException:  # Also an interrupt.
            self._stop.set()
            with suppress(OSError):
                self._withdraw()
            raise
        return False

    def _claim(self, token: str) -> None:
        self._heard = time.monotonic()
        body = {
            "token": token,
            "host": _here(),
            "pid": str(os.getpid()),
            "since": self._since,
            "beat": str(time.time()),
        }
        self.artifact.storage.write(_path(self.artifact, token, "json"), json.dumps(body).encode())

    def _withdraw(self) -> None:
        if self._token is not None:
            _delete(self.artifact, self._token)
        self._token = None

    def _beat(self, token: str) -> None:
        while True:
            # A storage that hiccups for less than EXPIRES loses nothing.
            with suppress(OSError):
                if self._silence(token) is not None:
                    return
                started = time.monotonic()
                # Always as long: an object store may be read by the length that was there a moment before.
                self.artifact.storage.write(_path(self.artifact, token, "beat"), f"{time.time():.6f}".encode())
                self._heard = started
            if self._stop.wait(HEARTBEAT):
                return

    def _silence(self, token: str) -> float | None:
        """Look for the claim; return how long this process had not been heard if it was deleted. Once lost is lost."""
        if self._lost is None and not self.artifact.storage.exists(_path(self.artifact, token, "json")):
            self._lost = time.monotonic() - self._heard
        return self._lost
