"""Files on any filesystem URI: a folder, or an object store such as S3, through pyarrow.

Nothing here needs rename on an object store: a file appears whole or not at all, by rename on a disk and by the single
put that closing an object-store stream is.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.fs as pafs

from rella.errors import InputError

SUBMITTED_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray in the driver of a submitted job, whose working directory is a copy that starts empty at every edit."""


def resolve_uri(uri: str | None) -> str:
    """Return the storage URI to use: `uri`, else `$RELLA_STORAGE`, else `~/rella`; folders become absolute.

    Raises:
        InputError: a relative folder inside a submitted job.
    """
    chosen = uri or os.environ.get("RELLA_STORAGE") or "~/rella"
    if "://" in chosen:
        return chosen.rstrip("/")
    path = Path(chosen).expanduser()
    if not path.is_absolute() and SUBMITTED_JOB in os.environ:
        raise InputError(
            f"storage {chosen!r} is relative, and a submitted job runs in a copy of its folder that starts empty at "
            "every edit: give an absolute path or a URI such as s3://bucket/rella"
        )
    return str(path.absolute())


@dataclass(frozen=True)
class Storage:
    """A tree of files at `uri`; all paths are relative to it, with forward slashes."""

    uri: str
    _fs: pafs.FileSystem = field(init=False, repr=False, compare=False)
    _root: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        fs, root = pafs.FileSystem.from_uri(self.uri)
        object.__setattr__(self, "_fs", fs)
        object.__setattr__(self, "_root", root.rstrip("/"))

    def __reduce__(self) -> tuple[type[Storage], tuple[str]]:
        # Workers open their own connection.
        return (Storage, (self.uri,))

    @property
    def is_local(self) -> bool:
        """Whether this is a folder of the machine's own file system (which may still be a network mount)."""
        return isinstance(self._fs, pafs.LocalFileSystem)

    def absolute(self, path: str) -> str:
        """Return `path` as the filesystem below knows it."""
        return f"{self._root}/{path}" if path else self._root

    def where(self, path: str) -> str:
        """Return `path` as a user would type it; the options of a URI (`?endpoint_override=…`) stay at its end."""
        place, mark, options = self.uri.partition("?") if "://" in self.uri else (self.uri, "", "")
        return f"{place.rstrip('/')}/{path}{mark}{options}" if path else self.uri

    def exists(self, path: str) -> bool:
        """Return whether there is a file or folder at `path`."""
        return bool(self._fs.get_file_info(self.absolute(path)).type != pafs.FileType.NotFound)

    def read(self, path: str) -> bytes:
        """Return the whole file.

        Raises:
            MissingError: there is none.
        """
        with self._fs.open_input_stream(self.absolute(path), compression=None) as stream:
            return bytes(stream.read())

    def write(self, path: str, data: bytes) -> None:
        """Write `data` so that `path` holds either the whole of it or what was there before.

        Raises:
            OSError: names the file where the disk is full or the folder cannot be written.
        """
        target = self.absolute(path)
        try:
            if not self.is_local:
                with self._fs.open_output_stream(target, compression=None) as stream:
                    stream.write(data)
                return
            _write_and_rename(Path(target), data)
        except OSError as error:
            raise OSError(error.errno, f"cannot write {self.where(path)}: {error}") from error

    def list(self, path: str, recursive: bool = False) -> list[str]:
        """Return the files (and, without `recursive`, the folders) below `path`, sorted; none where it is no folder."""
        selector = pafs.FileSelector(self.absolute(path), allow_not_found=True, recursive=recursive)
        try:
            found = self._fs.get_file_info(selector)
        except NotADirectoryError:
            return []
        keep = [i for i in found if not recursive or i.type == pafs.FileType.File]
        return sorted(i.path[len(self._root) + 1 :] for i in keep)

    def size(self, path: str) -> int:
        """Return the bytes of one file, or of all the files below a folder."""
        info = self._fs.get_file_info(self.absolute(path))
        if info.type == pafs.FileType.File:
            return int(info.size)
        return sum(int(self._fs.get_file_info(self.absolute(p)).size) for p in self.list(path, recursive=True))

    def delete(self, path: str) -> None:
        """Delete a file or a folder with all that is in it; a missing one is fine."""
        info = self._fs.get_file_info(self.absolute(path))
        if info.type == pafs.FileType.Directory:
            self._fs.delete_dir(self.absolute(path))
        elif info.type == pafs.FileType.File:
            self._fs.delete_file(self.absolute(path))

    def local_copy(self, path: str) -> Path:
        """Return a folder of this machine that holds the files below `path`; object stores are downloaded once.

        The copy's name carries the digest of what it holds, so that a changed remote folder is never served stale.
        """
        if self.is_local:
            return Path(self.absolute(path))
        files = {p: self.read(p) for p in self.list(path, recursive=True)}
        digest = hashlib.sha256(b"".join(p.encode() + b"\0" + d for p, d in files.items())).hexdigest()
        folder = Path(tempfile.gettempdir()) / f"rella-{os.getuid()}" / digest[:16]
        for name, data in files.items():
            target = folder / name[len(path) :].lstrip("/")
            if not target.exists():
                _write_and_rename(target, data)
        return folder


def _write_and_rename(target: Path, data: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
