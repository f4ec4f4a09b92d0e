"""The original files of a data set, wherever they lie: a folder, a folder around it, or a zip archive."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from rella.digests import file_digest, remembered
from rella.errors import InputError, MissingError


@dataclass(frozen=True)
class RawFiles:
    """Named files in one folder or archive; see `locate`."""

    place: Path
    """The folder that holds the files, or the archive."""
    names: tuple[str, ...]
    """What the data set is read from."""

    def where(self, name: str) -> str:
        """Return where a file lies, for messages."""
        return str(self.place / name)

    def read(self, name: str) -> bytes:
        """Return a file's content.

        Raises:
            MissingError: the archive has no such file.
            InputError: a truncated or damaged archive.
        """
        with self.open(name) as file:
            return file.read()

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """Open a file for reading, without unpacking an archive.

        Raises:
            MissingError: the archive has no such file.
            InputError: a truncated or damaged archive.
        """
        if self.place.is_dir():
            with (self.place / name).open("rb") as file:
                yield file
            return
        try:
            with zipfile.ZipFile(self.place) as archive, archive.open(self._member(archive, name)) as member:
                yield member  # type: ignore[misc]
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise InputError(
                f"{self.place}: a truncated or damaged zip archive ({error}; {self.place.stat().st_size:,} bytes). "
                "Delete it and download it again."
            ) from error

    def digest(self, name: str) -> str:
        """Return the SHA-256 of a file's content as 64 hex digits, remembered by path, size and time."""
        if self.place.is_dir():
            return file_digest(self.place / name)
        return remembered(self.place, f"member {name}", lambda: self._digest(name))

    def _digest(self, name: str) -> str:
        with self.open(name) as member:
            return hashlib.file_digest(member, "sha256").hexdigest()  # type: ignore[arg-type]

    def _member(self, archive: zipfile.ZipFile, name: str) -> str:
        found = [member for member in archive.namelist() if member.rpartition("/")[2] == name]
        if not found:
            raise MissingError(f"{self.place}: no {name} in the archive, which must hold {', '.join(self.names)}.")
        return found[0]


def locate(dataset: str, names: Sequence[str], path: Path | str, archive: str | None = None) -> RawFiles:
    """Find a data set's files in a folder, in `<folder>/<dataset>/`, in `<folder>/<archive>`, or in an archive itself.

    Args:
        dataset: its name, also that of the folder in the official archive.
        names: the files that must be there.
        path: a folder or a zip.
        archive: name of the official archive; `<dataset>.zip` where it is None.

    Raises:
        MissingError: there is no such path, or a file is missing; names it and the remedy.
        InputError: a truncated or damaged archive.
    """
    path = Path(path).expanduser()
    remedy = f"Name the folder that holds {', '.join(names)}, or the archive, with --raw-dir."
    if not path.exists():
        raise MissingError(f"{path}: no such file or folder. {remedy}")
    if path.is_dir():
        folders = [folder for folder in (path, path / dataset) if any((folder / n).is_file() for n in names)]
        packed = path / (archive or f"{dataset}.zip")
        if not folders and not packed.is_file():
            raise MissingError(
                f"{path}: neither {', '.join(names)} nor {dataset}/ nor {packed.name} is in this folder. {remedy}"
            )
        if folders:
            missing = [name for name in names if not (folders[0] / name).is_file()]
            if missing:
                raise MissingError(f"{folders[0] / missing[0]}: the file is missing. {remedy}")
            return RawFiles(folders[0], tuple(names))
        path = packed
    files = RawFiles(path, tuple(names))
    for name in names:
        with files.open(name):
            pass
    return files
