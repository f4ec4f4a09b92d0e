"""The official archives: download with resume, checked by size and MD5."""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Never

from tqdm import tqdm

from rella.errors import RellaError

CHUNK = 1 << 20
"""The most bytes read at once."""


@dataclass(frozen=True)
class Archive:
    """One file to download."""

    name: str
    """The data set."""
    url: str
    file: str
    """Its name on disk."""
    size: int
    """Bytes."""
    md5: str
    """Hexadecimal."""


_GROUPLENS = "https://files.grouplens.org/datasets/movielens"
# Served without TLS: the checksum is what makes it trustworthy.
_FREIBURG = "http://www2.informatik.uni-freiburg.de/~cziegler/BX/BX-CSV-Dump.zip"

ARCHIVES: dict[str, Archive] = {
    archive.name: archive
    for archive in (
        Archive("ml-1m", f"{_GROUPLENS}/ml-1m.zip", "ml-1m.zip", 5_917_549, "c4d9eecfca2ab87c1945afe126590906"),
        Archive("ml-25m", f"{_GROUPLENS}/ml-25m.zip", "ml-25m.zip", 261_978_986, "6b51fb2759a8657d3bfcbfc42b592ada"),
        Archive("bookcrossing", _FREIBURG, "BX-CSV-Dump.zip", 26_085_508, "37d647ee9e18ba134ea6d78ee4fe5292"),
    )
}
"""The archives that may be downloaded, by data set."""


class DownloadError(RellaError, RuntimeError):
    """A download that cannot go on; the message names the URL, the file and the remedy."""


class _Interrupted(Exception):
    """A transfer that a new attempt may continue."""


def download(name: str, folder: Path, *, progress: bool = True) -> Path:
    """Return the official archive of the data set `name` in `folder`, downloading what is missing of it.

    Raises:
        DownloadError: the data set has no archive, or see `fetch`.
    """
    if name not in ARCHIVES:
        raise DownloadError(
            f"there is no archive to download for data set {name!r} (there is for {sorted(ARCHIVES)}). "
            "Get the original files from their official place and pass their folder with --raw-dir."
        )
    return fetch(ARCHIVES[name], folder, progress=progress)


def fetch(
    archive: Archive,
    folder: Path,
    *,
    attempts: int = 5,
    timeout: float = 30.0,
    backoff: float = 1.0,
    progress: bool = True,
) -> Path:
    """Download `archive` into `folder` and return its path; a file that is already there is only verified.

    The bytes grow in `<file>.part`, which gets its name when size and MD5 are right. A later call (or attempt) asks the
    server for the rest of it by HTTP Range and starts afresh where the server does not offer that, or where the
    completed rest turns out wrong.

    Args:
        archive: what to download.
        folder: where to; made if missing.
        attempts: connections in a row that may break without getting further than any before.
        timeout: seconds without a byte after which a connection counts as broken.
        backoff: seconds before the second attempt; each further wait is twice as long, at most a minute.
        progress: show a progress bar on stderr where that is a terminal.

    Raises:
        DownloadError: the file cannot be had or is not the official one, or another process is downloading it.
    """
    target, part = folder / archive.file, folder / f"{archive.file}.part"
    if target.exists():
        fault = _fault(archive, target)
        if fault:
            raise DownloadError(_message(archive, target, f"the file that is there {fault}; delete or move it"))
        return target
    folder.mkdir(parents=True, exist_ok=True)
    patience = _Patience(attempts, timeout, backoff)
    with _exclusive(archive, part) as sink:
        resumed = _size(sink) > 0
        _complete(archive, target, sink, patience, progress)
        fault = _fault(archive, part)
        if fault and resumed:  # what was there may have been of another file: once more from the start
            sink.truncate(0)
            _complete(archive, target, sink, patience, progress)
            fault = _fault(archive, part)
        if fault:
            part.unlink()
            raise DownloadError(_message(archive, target, f"the file that the server sent {fault}"))
        os.fsync(sink.fileno())
        part.rename(target)
    return target


@dataclass(frozen=True)
class _Patience:
    attempts: int
    timeout: float
    backoff: float

    def wait(self, failures: int) -> None:
        time.sleep(min(60.0, self.backoff * 2 ** (failures - 1)))


def _complete(archive: Archive, target: Path, sink: BinaryIO, patience: _Patience, progress: bool) -> None:
    """Append to `sink` until it has the archive's size, over as many connections as it takes."""
    failures, furthest = 0, _size(sink)
    hidden = None if progress else True  # None: hidden where stderr is no terminal
    with tqdm(desc=archive.file, total=archive.size, unit="B", unit_scale=True, disable=hidden) as bar:
        while True:
            try:
                _transfer(archive, sink, patience.timeout, bar)
                return
            except (_Interrupted, urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as e:
                if isinstance(e, urllib.error.HTTPError) and e.code < 500 and e.code not in (408, 429):
                    raise DownloadError(_message(archive, target, f"the server answers {e.code} {e.reason}")) from e
                failures = 1 if _size(sink) > furthest else failures + 1
                furthest = max(furthest, _size(sink))
                if failures >= patience.attempts:
                    what = f"{failures} attempts in a row got no further than {furthest} of {archive.size} bytes ({e})"
                    raise DownloadError(_message(archive, target, what)) from e
            patience.wait(failures)


def _transfer(archive: Archive, sink: BinaryIO, timeout: float, bar: tqdm[Never]) -> None:
    """Append to `sink` what one connection brings.

    Raises:
        _Interrupted: the body ended early, or the server sent another part than was asked for.
    """
    start = _size(sink)
    if start == archive.size:
        return
    if start > archive.size:
        sink.truncate(0)
        start = 0
    with _answer(archive, sink, start, timeout) as response:
        start = _size(sink)
        bar.n = start
        bar.refresh()
        # One byte past the expected size is enough to see that the file is another one.
        while (missing := archive.size + 1 - _size(sink)) > 0 and (data := response.read1(min(CHUNK, missing))):
            sink.write(data)
            sink.flush()
            bar.update(len(data))
        length = response.headers.get("Content-Length")
        expected = archive.size if length is None else min(start + int(length), archive.size + 1)
        if _size(sink) < expected:
            raise _Interrupted(f"the connection ended after {_size(sink)} of {expected} bytes")


def _answer(archive: Archive, sink: BinaryIO, start: int, timeout: float) -> http.client.HTTPResponse:
    """Return the answer whose body continues `sink` at `start`; empties `sink` when it starts from the beginning."""
    request = urllib.request.Request(archive.url, headers={"User-Agent": "rella"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            sink.truncate(0)  # what is here is no beginning of the server's file
            raise _Interrupted("the server has no such rest of the file") from error
        raise
    if response.status == http.HTTPStatus.PARTIAL_CONTENT:
        sent = response.headers.get("Content-Range") or ""
        if not sent.startswith(f"bytes {start}-"):
            response.close()
            raise _Interrupted(f"the server sent {sent!r} instead of the bytes from {start}")
    else:
        sink.truncate(0)  # the server ignores Range: its body is the whole file
    return response


@contextmanager
def _exclusive(archive: Archive, part: Path) -> Iterator[BinaryIO]:
    """Open `part` for appending, locked against a second process that downloads the same file."""
    with part.open("ab") as sink:
        try:
            fcntl.flock(sink, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DownloadError(_message(archive, part, "another process is downloading it; wait for that")) from error
        except OSError:
            pass  # a file system without locks: the checksum still guards the result
        # The other process may have finished and renamed the file between the opening and the lock.
        if not (part.exists() and os.path.samestat(part.stat(), os.fstat(sink.fileno()))):
            raise DownloadError(_message(archive, part, "another process has just downloaded it; start again"))
        try:
            yield sink
        finally:
            if _size(sink) == 0:
                part.unlink(missing_ok=True)


def _size(sink: BinaryIO) -> int:
    return os.fstat(sink.fileno()).st_size


def _fault(archive: Archive, path: Path) -> str:
    """Return what is wrong with a complete file, or an empty string."""
    size = path.stat().st_size
    if size != archive.size:
        return f"has {size if size < archive.size else 'more'} bytes instead of {archive.size}"
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    return "" if found == archive.md5 else f"has the MD5 {found} instead of {archive.md5}"


def _message(archive: Archive, path: Path, what: str) -> str:
    return (
        f"{archive.url} → {path}: {what}. "
        f"Or download {archive.file} yourself and pass the folder that holds it with --raw-dir."
    )
