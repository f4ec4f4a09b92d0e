"""Digests of large files, remembered by path, size and time of change, so that 26 GB of weights are read once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder for what can be made again: `$XDG_CACHE_HOME/rella`, else `~/.cache/rella`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rella"


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's content as 64 hex digits.

    Raises:
        OSError: the file cannot be read.
    """

    def compute() -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return remembered(path, "sha256", compute)


def remembered(path: Path, what: str, compute: Callable[[], str]) -> str:
    """Return `compute()` for `path`, from the cache where the file has not changed; small files are not cached."""
    state = path.stat()
    if state.st_size < 16 << 20:
        return compute()
    memory = cache_folder() / "digests.json"
    name = f"{path.resolve()}|{state.st_size}|{state.st_mtime_ns}|{what}"
    try:
        known = json.loads(memory.read_text())
    except (OSError, ValueError):
        known = {}
    if name not in known:
        known[name] = compute()
        try:
            memory.parent.mkdir(parents=True, exist_ok=True)
            partial = memory.with_suffix(f".tmp-{os.getpid()}")
            partial.write_text(json.dumps(known))
            partial.replace(memory)
        except OSError:
            pass  # A cache that cannot be written costs time, not correctness.
    return str(known[name])
