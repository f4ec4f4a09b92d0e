"""Files on any filesystem URI: a folder, or an object store such as S3, through pyarrow.

Nothing here needs rename on an object store: a file appears whole or not at all, by rename on a disk and by the put
that closing an object-store stream is. Whatever the filesystem below raises leaves here as a `StorageError`, whose one
message says which file, what is wrong and what to do; a file that is not there is a `MissingError`.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from rella.errors import InputError, MissingError
from rella.storage_errors import MAKE_ROOM, TEMPORARY, USE, explained, with_errno, without_secrets

SUBMITTED_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray in the driver of a submitted job, whose working directory is a copy that starts empty at every edit."""
ATTEMPTS = 3
"""How often a request to an S3 store is tried: a server that does not answer is given up after 10 to 30 seconds."""
_LEFT_OVER = re.compile(r"\.tmp-[0-9a-f]{8}$")


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
    """A tree of files at `uri`; all paths are relative to it, with forward slashes.

    Raises:
        StorageError: from every method, this one included: names the file, the fault and the remedy; `errno` is set.
    """

    uri: str
    _fs: pafs.FileSystem = field(init=False, repr=False, compare=False)
    _root: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        with explained(f"cannot use {self.shown()}", USE):
            fs, root = _connect(self.uri)
            object.__setattr__(self, "_fs", fs)
            object.__setattr__(self, "_root", root.rstrip("/"))
            if self.is_local and not (nearest := _nearest(Path(f"{self._root}/"))).is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(nearest))

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

    def shown(self, path: str = "") -> str:
        """Return `where(path)` for a message: without the credentials that a URI may hold."""
        return without_secrets(self.where(path))

    def exists(self, path: str) -> bool:
        """Return whether there is a file or folder at `path`."""
        with explained(f"cannot look for {self.shown(path)}"):
            return bool(self._fs.get_file_info(self.absolute(path)).type != pafs.FileType.NotFound)

    def read(self, path: str) -> bytes:
        """Return the whole file.

        Raises:
            MissingError: there is none.
            StorageError: it cannot be read.
        """
        with self._reading(path), self._fs.open_input_stream(self.absolute(path), compression=None) as stream:
            return bytes(stream.read())

    @contextmanager
    def open(self, path: str) -> Iterator[pa.NativeFile]:
        """Open a file to read pieces of it.

        Raises:
            MissingError: there is none.
            StorageError: it cannot be read.
        """
        with self._reading(path), self._fs.open_input_file(self.absolute(path)) as file:
            yield file

    @contextmanager
    def _reading(self, path: str) -> Iterator[None]:
        with explained(f"cannot read {self.shown(path)}"):
            try:
                yield
            except FileNotFoundError as error:
                missing = MissingError(f"{self.shown(path)} is missing")
                missing.errno = errno.ENOENT
                raise missing from error

    def write(self, path: str, data: bytes | bytearray) -> None:
        """Write `data` so that `path` holds either the whole of it or what was there before.

        Raises:
            StorageError: the disk is full, the folder cannot be written, the object store did not keep all of it, ...
        """
        with explained(f"cannot write {self.shown(path)}"):
            self._write(self.absolute(path), data)

    def list(self, path: str, recursive: bool = False) -> list[str]:
        """Return the files (and, without `recursive`, the folders) below `path`, sorted; none where it is no folder.

        Left-over temporary files of killed writers are not among them.
        """
        kinds = {pafs.FileType.File} if recursive else {pafs.FileType.File, pafs.FileType.Directory}
        with explained(f"cannot list {self.shown(path)}"):
            selector = pafs.FileSelector(self.absolute(path), allow_not_found=True, recursive=recursive)
            try:
                found = self._fs.get_file_info(selector)
            except (NotADirectoryError, FileNotFoundError):
                # The second where a folder comes or goes while it is listed.
                return []
            if not found and not path:
                self._find_bucket()
        keep = [i.path for i in found if i.type in kinds and not _LEFT_OVER.search(i.path)]
        return sorted(p[len(self._root) + 1 :] for p in keep)

    def states(self, path: str) -> dict[str, tuple[int, int]]:
        """Return size in bytes and time of change in nanoseconds of every file below `path`, by path."""
        names = self.list(path, recursive=True)
        with explained(f"cannot list {self.shown(path)}"):
            found = self._fs.get_file_info([self.absolute(p) for p in names])
        return {p: (int(i.size or 0), int(i.mtime_ns or 0)) for p, i in zip(names, found, strict=True)}

    def size(self, path: str) -> int:
        """Return the bytes of one file, or of all the files below a folder."""
        with explained(f"cannot measure {self.shown(path)}"):
            info = self._fs.get_file_info(self.absolute(path))
            if info.type == pafs.FileType.File:
                return int(info.size)
            below = self._fs.get_file_info([self.absolute(p) for p in self.list(path, recursive=True)])
            # One that was deleted meanwhile has no size.
            return sum(int(i.size or 0) for i in below)

    def delete(self, path: str) -> None:
        """Delete a file or a folder with all that is in it; a missing one is fine."""
        with explained(f"cannot delete {self.shown(path)}"):
            self._delete(self.absolute(path))

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
            with explained(f"cannot copy {self.shown(name)} to {target}", TEMPORARY):
                if not target.exists():
                    _write_and_rename(target, data)
        return folder

    def free(self) -> int | None:
        """Return the bytes that are free where the storage is a folder; an object store does not say (None)."""
        if not self.is_local:
            return None
        with explained(f"cannot measure {self.shown()}"):
            return shutil.disk_usage(_nearest(Path(f"{self._root}/"))).free

    def check_space(self, need: int, what: str) -> None:
        """Refuse `what` (e.g. `the embed stage`), which writes `need` bytes, if the folder has no room for them.

        Raises:
            StorageError: names what is needed, what is free and the remedy.
        """
        free = self.free()
        if free is not None and free < need:
            room = f"{what} needs {_readable(need)}, {_readable(free)} are free"
            raise with_errno(errno.ENOSPC, f"{self.shown()} has too little room: {room}: {MAKE_ROOM}")

    def check_writable(self) -> None:
        """Write and delete a small file, so that a storage that cannot be written is refused before any work."""
        probe = f".probe-{uuid.uuid4().hex}"
        with explained(f"cannot write {self.shown()}"):
            self._write(self.absolute(probe), b"probe")
        with explained(f"cannot delete files in {self.shown()}"):
            self._delete(self.absolute(probe))

    def sweep(self, path: str, older_than: float) -> int:
        """Delete what killed writers left below `path`: temporary files not touched for `older_than` seconds.

        Object stores have none. Returns how many.
        """
        if not self.is_local:
            return 0
        swept = 0
        with explained(f"cannot sweep {self.shown(path)}"):
            for folder, _, names in os.walk(self.absolute(path)):
                for file in (Path(folder, n) for n in names if _LEFT_OVER.search(n)):
                    # Its writer may finish, or another sweep be faster.
                    with suppress(FileNotFoundError):
                        if time.time() - file.stat().st_mtime > older_than:
                            file.unlink()
                            swept += 1
        return swept

    def _write(self, target: str, data: bytes | bytearray) -> None:
        if self.is_local:
            return _write_and_rename(Path(target), data)
        stream = self._fs.open_output_stream(target, compression=None)
        try:
            stream.write(data)
        except BaseException:
            # Closing is what publishes an object, after a failed write too: half of it must not stay.
            with suppress(OSError):
                stream.close()
                self._drop_torn(target, data)
            raise
        stream.close()
        kept = self._drop_torn(target, data)
        if kept is not None:
            raise OSError(f"the object store kept {kept:,} of {len(data):,} bytes")
        return None

    def _drop_torn(self, target: str, data: bytes | bytearray) -> int | None:
        """Delete an object that holds only the beginning of `data` and return its size; None where it is whole.

        An object that holds something else is another writer's, who came later: as good as whole.
        """
        info = self._fs.get_file_info(target)
        if info.type == pafs.FileType.NotFound:
            return 0
        if info.size >= len(data):
            return None
        with self._fs.open_input_stream(target, compression=None) as stream:
            kept = bytes(stream.read())
        if len(kept) >= len(data) or not data.startswith(kept):
            return None
        with suppress(OSError):
            self._fs.delete_file(target)
        return len(kept)

    def _delete(self, target: str) -> None:
        for last in (False, False, False, True):
            kind = self._fs.get_file_info(target).type
            if kind == pafs.FileType.NotFound:
                return
            try:
                (self._fs.delete_dir if kind == pafs.FileType.Directory else self._fs.delete_file)(target)
                return
            except OSError:
                # A folder in which somebody writes or deletes meanwhile (a heartbeat, say) is not gone at once.
                if last:
                    raise

    def _find_bucket(self) -> None:
        """S3 lists a bucket that does not exist as an empty one."""
        if self._fs.type_name == "s3":
            bucket = self._root.partition("/")[0]
            if self._fs.get_file_info(bucket).type == pafs.FileType.NotFound:
                raise OSError(f"NoSuchBucket: {bucket}")


def _connect(uri: str) -> tuple[pafs.FileSystem, str]:
    """Open the filesystem of a URI; on S3 with limits to its patience, which no URI can give.

    By itself pyarrow tries a server that swallows all packets for 1.7 minutes and a silent one for 5.
    """
    fs, root = pafs.FileSystem.from_uri(uri)
    # The filesystem does not tell these two options, so one that has them stays as it is.
    if fs.type_name != "s3" or "tls_verify_certificates=" in uri or "smart_defaults=" in uri:
        return fs, root
    # As pickle would make it anew: with all that the URI and the environment say (endpoint, region, credentials).
    _, (options,) = fs.__reduce__()
    options = {**options, "retry_strategy": pafs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS)}
    if "allow_delayed_open=" not in uri:
        # A file of less than 5 MB is one put, not an upload in parts that can stay behind unfinished.
        options["allow_delayed_open"] = True
    return pafs.S3FileSystem(**options), root


def _write_and_rename(target: Path, data: bytes | bytearray) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    except BaseException:
        # A disk that fails may fail here again; the first error is the one that tells.
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def _nearest(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(p for p in (path, *path.parents) if p.exists())


def _readable(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
