"""Downloads from a server on this machine that cuts, refuses, and forgets."""

from __future__ import annotations

import fcntl
import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from rella.data.download import ARCHIVES, Archive, DownloadError, download, fetch

BODY = bytes(range(256)) * 1000


@dataclass
class Server:
    """What the server does, and what it was asked."""

    body: bytes = BODY
    ranges: bool = True
    cuts: list[int] = field(default_factory=list)
    """Bytes after which the next connections break; then whole answers."""
    statuses: list[int] = field(default_factory=list)
    """Error codes of the next answers."""
    length: bool = True
    stall: threading.Event | None = None
    """The next answer ends in silence until it is set."""
    asked: list[str | None] = field(default_factory=list)
    """The Range header of every request."""
    url: str = ""

    def archive(self, body: bytes = BODY) -> Archive:
        return Archive("toy", self.url, "toy.zip", len(body), hashlib.md5(body).hexdigest())


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            state.asked.append(asked)
            if state.statuses:
                self.send_error(state.statuses.pop(0))
                return
            start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and state.ranges else 0
            if start >= len(state.body):
                self.send_error(416)
                return
            self.send_response(206 if start else 200)
            if state.length:
                self.send_header("Content-Length", str(len(state.body) - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(state.body) - 1}/{len(state.body)}")
            self.end_headers()
            cut = state.cuts.pop(0) if state.cuts else len(state.body)
            self.wfile.write(state.body[start : start + cut])
            if state.stall and not state.stall.is_set():
                state.stall.wait(5)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        state.url = f"http://127.0.0.1:{httpd.server_address[1]}/toy.zip"
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield state
        httpd.shutdown()
        thread.join()


def get(server: Server, folder: Path, archive: Archive | None = None, attempts: int = 3) -> Path:
    return fetch(archive or server.archive(), folder, attempts=attempts, timeout=5, backoff=0, progress=False)


def test_a_plain_download(server: Server, tmp_path: Path) -> None:
    path = get(server, tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "toy.zip"
    assert path.read_bytes() == BODY
    assert [file.name for file in path.parent.iterdir()] == ["toy.zip"]
    assert server.asked == [None]


def test_a_file_that_is_there_is_only_verified(server: Server, tmp_path: Path) -> None:
    get(server, tmp_path)
    get(server, tmp_path)
    assert len(server.asked) == 1
    (tmp_path / "toy.zip").write_bytes(BODY[:-1] + b"?")
    with pytest.raises(DownloadError, match=r"there has the MD5 .* delete or move it.*--raw-dir"):
        get(server, tmp_path)
    assert (tmp_path / "toy.zip").exists()


@pytest.mark.parametrize("length", [True, False])
def test_a_broken_connection_is_continued(server: Server, tmp_path: Path, length: bool) -> None:
    server.cuts, server.length = [1000, 5000], length
    assert get(server, tmp_path).read_bytes() == BODY
    assert server.asked == [None, "bytes=1000-", "bytes=6000-"]


def test_without_range_a_broken_connection_starts_again(server: Server, tmp_path: Path) -> None:
    server.cuts, server.ranges = [1000], False
    assert get(server, tmp_path).read_bytes() == BODY
    assert server.asked == [None, "bytes=1000-"]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_part_of_an_earlier_run_is_continued(server: Server, tmp_path: Path, ranges: bool) -> None:
    server.ranges = ranges
    (tmp_path / "toy.zip.part").write_bytes(BODY[:777])
    assert get(server, tmp_path).read_bytes() == BODY
    assert server.asked == ["bytes=777-"]


def test_a_complete_part_needs_no_request(server: Server, tmp_path: Path) -> None:
    (tmp_path / "toy.zip.part").write_bytes(BODY)
    assert get(server, tmp_path).read_bytes() == BODY
    assert server.asked == []


@pytest.mark.parametrize("stale", [b"x" * 777, b"x" * len(BODY), b"x" * (len(BODY) + 5)])
def test_a_part_of_another_file_is_replaced(server: Server, tmp_path: Path, stale: bytes) -> None:
    (tmp_path / "toy.zip.part").write_bytes(stale)
    assert get(server, tmp_path).read_bytes() == BODY
    assert server.asked[-1] is None


def test_attempts_that_get_no_further_are_counted(server: Server, tmp_path: Path) -> None:
    server.cuts = [100] + [0] * 10
    with pytest.raises(DownloadError, match=r"3 attempts in a row got no further than 100 of 256000") as error:
        get(server, tmp_path)
    assert all(text in str(error.value) for text in (server.url, "toy.zip", "--raw-dir"))
    assert len(server.asked) == 3
    assert (tmp_path / "toy.zip.part").stat().st_size == 100
    server.cuts = []
    assert get(server, tmp_path).read_bytes() == BODY
    assert server.asked[-1] == "bytes=100-"


def test_without_range_repeated_cuts_end(server: Server, tmp_path: Path) -> None:
    server.ranges, server.cuts = False, [500, 400] * 50
    with pytest.raises(DownloadError, match="3 attempts in a row"):
        get(server, tmp_path)


def test_a_busy_server_is_asked_again_a_refusing_one_is_not(server: Server, tmp_path: Path) -> None:
    server.statuses = [503, 429]
    assert get(server, tmp_path / "a").read_bytes() == BODY
    server.statuses = [404]
    with pytest.raises(DownloadError, match=r"toy\.zip.*the server answers 404.*--raw-dir"):
        get(server, tmp_path / "b")
    assert len(server.asked) == 4


def test_silence_is_a_broken_connection(server: Server, tmp_path: Path) -> None:
    server.stall, server.cuts = threading.Event(), [1000, 0]
    with pytest.raises(DownloadError, match=r"2 attempts in a row got no further than 1000 .*timed out"):
        fetch(server.archive(), tmp_path, attempts=2, timeout=0.2, backoff=0, progress=False)
    server.stall.set()
    assert get(server, tmp_path).read_bytes() == BODY
    assert server.asked == [None, "bytes=1000-", "bytes=1000-"]


def test_the_wait_doubles(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("rella.data.download.time.sleep", waits.append)
    server.statuses = [503] * 9
    with pytest.raises(DownloadError):
        fetch(server.archive(), tmp_path, attempts=9, backoff=1.0, progress=False)
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_checksum(server: Server, tmp_path: Path) -> None:
    archive = replace(server.archive(), md5="0" * 32)
    with pytest.raises(DownloadError, match=r"server sent has the MD5 \w{32} instead of 0{32}.*--raw-dir"):
        get(server, tmp_path, archive)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("body", "found"), [(BODY[:500], "500"), (BODY + b"x" * 10, "more")])
def test_a_wrong_size(server: Server, tmp_path: Path, body: bytes, found: str) -> None:
    server.body = body
    with pytest.raises(DownloadError, match=f"server sent has {found} bytes instead of 256000"):
        get(server, tmp_path, server.archive())
    assert list(tmp_path.iterdir()) == []


def test_a_part_longer_than_the_servers_file(server: Server, tmp_path: Path) -> None:
    (tmp_path / "toy.zip.part").write_bytes(BODY[:777])
    server.body = BODY[:500]
    with pytest.raises(DownloadError, match="server sent has 500 bytes instead of 256000"):
        get(server, tmp_path, server.archive())
    assert server.asked[:2] == ["bytes=777-", None]


def test_no_server(server: Server, tmp_path: Path) -> None:
    archive = replace(server.archive(), url="http://127.0.0.1:9/toy.zip")
    with pytest.raises(DownloadError, match="2 attempts in a row got no further than 0"):
        get(server, tmp_path, archive, attempts=2)


def test_a_second_process_is_refused(server: Server, tmp_path: Path) -> None:
    with (tmp_path / "toy.zip.part").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(DownloadError, match="another process is downloading"):
            get(server, tmp_path)


def test_the_official_archives() -> None:
    assert {name: archive.md5 for name, archive in ARCHIVES.items()} == {
        "ml-1m": "c4d9eecfca2ab87c1945afe126590906",
        "ml-25m": "6b51fb2759a8657d3bfcbfc42b592ada",
        "bookcrossing": "37d647ee9e18ba134ea6d78ee4fe5292",
    }
    assert ARCHIVES["ml-1m"].url == "https://files.grouplens.org/datasets/movielens/ml-1m.zip"


def test_a_data_set_without_archive(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"'netflix' .*ml-1m.*--raw-dir"):
        download("netflix", tmp_path)


def test_a_verified_archive_is_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHIVES, "toy", replace(Server().archive(), url="http://127.0.0.1:9/"))
    (tmp_path / "toy.zip").write_bytes(BODY)
    assert download("toy", tmp_path, progress=False) == tmp_path / "toy.zip"
