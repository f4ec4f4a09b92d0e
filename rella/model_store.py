"""Models in an object store: copied once to each machine, whichever of its processes comes first."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from rella.digests import cache_folder
from rella.errors import MissingError, StorageError
from rella.storage import Storage

CHUNK = 64 << 20
"""Bytes that are held at a time of a file that is copied."""
WAIT_SECONDS = 6 * 3600.0
"""How long a process waits for another one's copy: 140 GB at 10 MB a second take four hours."""
_WANTED = (".json", ".safetensors", ".model", ".txt", ".jinja")
"""Ends of the files that a model is loaded from; pickled weights are left where they are."""


def is_remote(source: str) -> bool:
    """Return whether a model's name is a URI."""
    return "://" in source


def local_model(uri: str) -> Path:
    """Return a folder of this machine that holds the model at `uri`; it is copied where it is not there yet.

    Processes of one machine take turns: the first one copies, the others find it. Folders are named after names, sizes
    and times of what is at `uri`, so a changed model is copied anew.

    Raises:
        MissingError: there is no config.json at `uri`.
        StorageError: it cannot be read, or the copy cannot be written.
    """
    from filelock import FileLock, Timeout

    storage = Storage(uri)
    states = {p: s for p, s in storage.states("").items() if "/" not in p and p.endswith(_WANTED)}
    if "config.json" not in states:
        raise MissingError(f"model {storage.shown()} has no config.json: give the folder that holds it")
    name = hashlib.sha256(json.dumps([uri, sorted(states.items())]).encode()).hexdigest()[:24]
    folder = cache_folder() / "models" / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock", timeout=WAIT_SECONDS):
            for path, (size, _) in states.items():
                if not (folder / path).exists():
                    _copy(storage, path, size, folder / path)
    except Timeout as error:
        raise StorageError(f"{folder}.lock is held by another process for hours: end it, or delete the file") from error
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(
            f"cannot copy {storage.shown()} to {folder}: {error}: make room there, or set XDG_CACHE_HOME"
        ) from error
    return folder


def _copy(storage: Storage, path: str, size: int, target: Path) -> None:
    """Copy one file; it appears whole or not at all."""
    partial = target.with_name(f"{target.name}.part-{os.getpid()}")
    try:
        with storage.open(path) as source, partial.open("wb") as file:
            while chunk := source.read(CHUNK):
                file.write(chunk)
        if partial.stat().st_size != size:
            raise StorageError(f"{storage.shown(path)} changed while it was copied: start again")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
