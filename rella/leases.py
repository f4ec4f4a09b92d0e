"""One driver at a time on an artifact: a small file with a heartbeat, on any filesystem, without locks or rename."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from rella.artifacts import Artifact, now
from rella.errors import BusyError

HEARTBEAT = 10.0
"""Seconds between two signs of life."""
EXPIRES = 60.0
"""Seconds without one after which a lease is free."""
SETTLE = 0.2
"""Seconds after which two drivers that came at once look whose write stayed."""
LEASE = "lease.json"


def _here() -> str:
    """This machine since its last start; process numbers mean something within it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    namespace = os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else ""
    return f"{socket.gethostname()}|{boot}|{namespace}"


def holder(artifact: Artifact) -> dict[str, str]:
    """Return what the lease file says, or nothing where there is none or it is not readable."""
    try:
        found = json.loads(artifact.storage.read(f"{artifact.path}/{LEASE}"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def is_gone(found: dict[str, str]) -> bool:
    """Return whether a lease's holder is a process of this machine that no longer runs."""
    return found.get("host") == _here() and not Path(f"/proc/{found.get('pid')}").exists()


def is_held(artifact: Artifact) -> bool:
    """Return whether somebody seems to be at work: a lease whose process lives, or that was renewed lately.

    Clocks of different machines may disagree by minutes, hence the wide margin.
    """
    found = holder(artifact)
    return bool(found) and not is_gone(found) and time.time() - float(found.get("beat", 0)) < 10 * EXPIRES


@dataclass
class Lease:
    """Held while it is entered: `with Lease(artifact, wait=True): ...`."""

    artifact: Artifact
    wait: bool = True
    on_wait: Callable[[str], None] = lambda message: None
    finished: Callable[[], bool] = lambda: False
    """Ends the waiting when the other driver has finished the artifact."""
    _token: str = field(default_factory=lambda: uuid.uuid4().hex, init=False)
    _since: str = field(default_factory=now, init=False)
    _stop: threading.Event = field(default_factory=threading.Event, init=False)
    _thread: threading.Thread | None = field(default=None, init=False)

    @property
    def _path(self) -> str:
        return f"{self.artifact.path}/{LEASE}"

    def __enter__(self) -> Lease:
        """Take the lease.

        Raises:
            BusyError: another driver holds it and `wait` is off; names the holder.
        """
        while not self._take():
            if self.finished():
                return self
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            if holder(self.artifact).get("token") == self._token:
                self.artifact.storage.delete(self._path)

    def _take(self) -> bool:
        found = holder(self.artifact)
        if found and not is_gone(found):
            host = found.get("host", "?").partition("|")[0]
            name = f"{host}, process {found.get('pid')}, since {found.get('since')}"
            message = f"{self.artifact.where()} is being made by another driver ({name})"
            if not self.wait:
                raise BusyError(f"{message}: wait for it, or drop `--cluster.on_busy leave`")
            self.on_wait(message)
            if not self._wait_for_silence(found):
                return False
        self._write()
        time.sleep(SETTLE)
        return holder(self.artifact).get("token") == self._token

    def _wait_for_silence(self, seen: dict[str, str]) -> bool:
        """Wait until the heartbeat has stood still for `EXPIRES`, by this machine's own clock: clocks may differ."""
        since = time.monotonic()
        while time.monotonic() - since < EXPIRES:
            time.sleep(min(1.0, HEARTBEAT))
            if self.finished():
                return False
            current = holder(self.artifact)
            if not current or is_gone(current):
                return True
            if current != seen:
                seen, since = current, time.monotonic()
        return True

    def _write(self) -> None:
        body = {
            "token": self._token,
            "host": _here(),
            "pid": str(os.getpid()),
            "since": self._since,
            "beat": str(time.time()),
        }
        self.artifact.storage.write(self._path, json.dumps(body).encode())

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT):
            try:
                if holder(self.artifact).get("token", self._token) != self._token:
                    return  # Taken over while this process could not be heard: never fight for it.
                self._write()
            except OSError:
                # A storage that hiccups for less than EXPIRES loses nothing.
                continue
