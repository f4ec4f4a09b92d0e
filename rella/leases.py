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

HEARTBEAT = 10.0
"""Seconds between two signs of life."""
EXPIRES = 60.0
"""Seconds without one after which a lease is free."""
SETTLE = 0.2
"""Seconds after which two drivers that came at once look whose write stayed."""
LEASE = "lease.json"


class BusyError(RuntimeError):
    """Another driver works on the same artifact."""


def _here() -> str:
    """This machine since its last start; process numbers mean something within it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    namespace = os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else ""
    return f"{socket.gethostname()}|{boot}|{namespace}"


@dataclass
class Lease:
    """Held while it is entered: `with Lease(artifact, wait=True): ...`."""

    artifact: Artifact
    wait: bool = True
    on_wait: Callable[[str], None] = lambda message: None
    finished: Callable[[], bool] = lambda: False
    """Ends the waiting when the other driver has finished the artifact."""
    _token: str = field(default_factory=lambda: uuid.uuid4().hex, init=False)
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
            if self._holder().get("token") == self._token:
                self.artifact.storage.delete(self._path)

    def _take(self) -> bool:
        holder = self._holder()
        if holder and not self._is_gone(holder):
            name = (
                f"{holder.get('host', '?').partition('|')[0]}, process {holder.get('pid')}, since {holder.get('since')}"
            )
            message = f"{self.artifact.where()} is being made by another driver ({name})"
            if not self.wait:
                raise BusyError(f"{message}: wait for it, or drop `--cluster.on_busy leave`")
            self.on_wait(message)
            if not self._wait_for_silence(holder):
                return False
        self._write()
        time.sleep(SETTLE)
        return self._holder().get("token") == self._token

    def _is_gone(self, holder: dict[str, str]) -> bool:
        """Whether the holder is a process of this machine that no longer runs."""
        return holder.get("host") == _here() and not Path(f"/proc/{holder.get('pid')}").exists()

    def _wait_for_silence(self, holder: dict[str, str]) -> bool:
        """Wait until the heartbeat has stood still for `EXPIRES`, by this machine's own clock: clocks may differ."""
        seen, since = holder, time.monotonic()
        while time.monotonic() - since < EXPIRES:
            time.sleep(min(1.0, HEARTBEAT))
            if self.finished():
                return False
            current = self._holder()
            if not current or self._is_gone(current):
                return True
            if current != seen:
                seen, since = current, time.monotonic()
        return True

    def _holder(self) -> dict[str, str]:
        try:
            found = json.loads(self.artifact.storage.read(self._path))
        except (FileNotFoundError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self) -> None:
        body = {
            "token": self._token,
            "host": _here(),
            "pid": str(os.getpid()),
            "since": now(),
            "beat": str(time.time()),
        }
        self.artifact.storage.write(self._path, json.dumps(body).encode())

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT):
            try:
                self._write()
            except OSError:
                # A storage that hiccups for less than EXPIRES loses nothing.
                continue
