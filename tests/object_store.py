"""Object stores whose failures a test switches on: an S3 server on this machine (moto's), and one in this process.

`with object_store() as store: Storage(store.uri)`; other processes need `store.environment`. Run as a script, this file
is the server. It ends when its standard input closes, so it outlives no test, not even one that is killed.
"""

from __future__ import annotations

import errno
import http.client
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast
from unittest import mock
from urllib.parse import urlencode

import pyarrow as pa
import pyarrow.fs as pafs
import pytest

from rella.errors import RellaError, StorageError
from rella.storage import Storage

HOST = "127.0.0.1"
BUCKET = "lab"
KEY = "test"
WRONG_KEYS = {"unknown": "InvalidAccessKeyId", "forged": "SignatureDoesNotMatch", "expired": "ExpiredToken"}
"""Access key → how the server refuses it; all but these and `KEY` are unknown, and no key at all is AccessDenied."""
CONTROL = "/-/faults"

Wsgi = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class ObjectStore:
    """The server as a test sees it."""

    def __init__(self, server: subprocess.Popen[str], port: int) -> None:
        self.process, self.port = server, port
        self.environment = {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": KEY,
            "AWS_EC2_METADATA_DISABLED": "true",
            # Whatever the machine has set up for itself stays out of it.
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }
        self.uri = self.uri_of(f"{BUCKET}/rella")

    def uri_of(self, path: str, port: int | None = None) -> str:
        """Return the storage URI of `bucket/folder` on this server, or on another port."""
        options = {"endpoint_override": f"{HOST}:{port or self.port}", "scheme": "http", "region": "us-east-1"}
        return f"s3://{path}?{urlencode(options)}"

    def read_only(self, on: bool) -> None:
        """Answer 403 AccessDenied to all that writes or deletes."""
        self._set(read_only=on)

    def full(self, after_bytes: int | None) -> None:
        """Answer 507 XMinioStorageFull once so many more bytes were put; None: never."""
        self._set(room=after_bytes)

    def busy(self, times: int) -> None:
        """Answer 503 SlowDown to so many requests that come next."""
        self._set(busy=times)

    def requests(self) -> list[str]:
        """Return method, path and query of all requests since the last call."""
        found: list[str] = self._set()
        return found

    def stop(self) -> None:
        """End the server at once, as a crash would."""
        self.process.kill()
        self.process.wait()

    def _set(self, **faults: object) -> Any:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=10)
        try:
            connection.request("POST", CONTROL, json.dumps(faults).encode())
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """Start a server with an empty bucket; while it runs, its credentials are in this process's environment too."""
    command = [sys.executable, __file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            port = server.stdout.readline().strip()
            assert port.isdigit(), f"the server did not start: {port!r}"
            store = ObjectStore(server, int(port))
            with mock.patch.dict(os.environ, store.environment):
                os.environ.pop("AWS_SESSION_TOKEN", None)
                yield store
        finally:
            server.kill()


class Objects(pafs.FileSystemHandler):
    """Keys and bytes in this process: an object is there when its stream is closed; no rename, no real folders."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.puts: list[str] = []
        self.fault: Exception | None = None
        """Raised by whatever is asked."""
        self.keep: Callable[[bytes], bytes | None] = lambda data: data
        """What of an object stays when it is put; None: nothing at all."""
        self.breaks: list[str] = []
        """Steps of a put that raise: write, close."""
        self.stays = 0
        """Deletions that fail before one does what it should."""

    def __eq__(self, other: object) -> bool:
        return self is other

    def get_type_name(self) -> str:
        return "objects"

    def normalize_path(self, path: str) -> str:
        return path

    def _info(self, path: str) -> pafs.FileInfo:
        if path in self.objects:
            return pafs.FileInfo(path, pafs.FileType.File, size=len(self.objects[path]))
        if any(name.startswith(f"{path}/") for name in self.objects):
            return pafs.FileInfo(path, pafs.FileType.Directory)
        return pafs.FileInfo(path, pafs.FileType.NotFound)

    def get_file_info(self, paths: list[str]) -> list[pafs.FileInfo]:
        self._fail()
        return [self._info(p) for p in paths]

    def _fail(self) -> None:
        if self.fault is not None:
            raise self.fault

    def get_file_info_selector(self, selector: Any) -> list[pafs.FileInfo]:
        self._fail()
        base = f"{selector.base_dir.rstrip('/')}/"
        below = [n.removeprefix(base) for n in self.objects if n.startswith(base)]
        if not below and not selector.allow_not_found:
            raise FileNotFoundError(selector.base_dir)
        folders = {"/".join(n.split("/")[:d]) for n in below for d in range(1, n.count("/") + 1)}
        names = (set(below) | folders) if selector.recursive else {n.split("/")[0] for n in below}
        return [self._info(f"{base}{n}") for n in sorted(names, reverse=True)]

    def open_input_stream(self, path: str) -> pa.NativeFile:
        self._fail()
        if path not in self.objects:
            raise FileNotFoundError(path)
        return pa.PythonFile(io.BytesIO(self.objects[path]), mode="r")

    open_input_file = open_input_stream

    def open_output_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        self._fail()
        store = self

        class Put(io.BytesIO):
            def write(self, data: Any) -> int:
                if "write" in store.breaks:
                    super().write(bytes(data)[: len(data) // 2])
                    raise OSError(errno.ENOSPC, "No space left on device")
                return super().write(data)

            def close(self) -> None:
                if not self.closed and "close" in store.breaks:
                    super().close()
                    raise OSError("AWS Error UNKNOWN (HTTP status 507): XMinioStorageFull")
                if not self.closed:
                    kept = store.keep(self.getvalue())
                    store.puts.append(path)
                    if kept is not None:
                        store.objects[path] = kept
                super().close()

        return pa.PythonFile(Put(), mode="w")

    def delete_file(self, path: str) -> None:
        self._stay()
        del self.objects[path]

    def _stay(self) -> None:
        self.stays -= 1
        if self.stays >= 0:
            raise OSError("Directory not empty")

    def delete_dir(self, path: str) -> None:
        self._stay()
        for name in [n for n in self.objects if n.startswith(f"{path}/")]:
            del self.objects[name]

    def _refuse(self, *args: Any) -> Any:
        raise NotImplementedError("an object store has no such thing")

    move = copy_file = create_dir = delete_dir_contents = delete_root_dir_contents = open_append_stream = _refuse


def on_objects() -> tuple[Storage, Objects]:
    """A storage on such a filesystem."""
    store, storage = Objects(), Storage("mock:///bucket/rella")
    object.__setattr__(storage, "_fs", pafs.PyFileSystem(store))
    return storage, store


def raised(action: Callable[[], object], code: int) -> str:
    """The message of the StorageError that `action` raises."""
    with pytest.raises(StorageError) as caught:
        action()
    assert isinstance(caught.value, RellaError)
    assert isinstance(caught.value, OSError)
    assert caught.value.errno == code, str(caught.value)
    return str(caught.value)


class Faults:
    """Stands before moto's server and refuses what it was told to refuse."""

    def __init__(self, server: Wsgi) -> None:
        self.server = server
        self.state: dict[str, Any] = {"read_only": False, "room": None, "busy": 0}
        self.log: list[str] = []
        self.lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        method, path, query = environ["REQUEST_METHOD"], environ["PATH_INFO"], environ.get("QUERY_STRING", "")
        if path == CONTROL:
            return self._control(environ, start_response)
        with self.lock:
            self.log.append(f"{method} {path}{'?' if query else ''}{query}")
            refused = self._refusal(method, path, environ)
        if refused is None:
            return self.server(environ, start_response)
        # The body is read all the same: a client that still sends would see a broken connection and no answer.
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        status, code, message = refused
        body = f"<Error><Code>{code}</Code><Message>{message}</Message><Resource>{path}</Resource></Error>".encode()
        start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [b"" if method == "HEAD" else body]

    def _control(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        change = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
        with self.lock:
            self.state |= change
            seen, self.log = self.log, ([] if not change else self.log)
        body = json.dumps(seen).encode()
        start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
        return [body]

    def _refusal(self, method: str, path: str, environ: dict[str, Any]) -> tuple[str, str, str] | None:
        """Status, code and message of a refusal; None where there is nothing against the request."""
        user = environ.get("HTTP_AUTHORIZATION", "").partition("Credential=")[2].partition("/")[0]
        if not user:
            return "403 Forbidden", "AccessDenied", "Access Denied."
        if user != KEY:
            return "403 Forbidden", WRONG_KEYS.get(user, "InvalidAccessKeyId"), "The credentials do not do."
        self.state["busy"] -= 1
        if self.state["busy"] >= 0:
            return "503 Slow Down", "SlowDown", "Please reduce your request rate."
        writes = method in ("PUT", "DELETE", "POST")
        if writes and self.state["read_only"]:
            return "403 Forbidden", "AccessDenied", "Access Denied."
        room: int | None = self.state["room"]
        if room is None or method != "PUT" or path.count("/") < 2:
            return None
        size = int(environ.get("HTTP_X_AMZ_DECODED_CONTENT_LENGTH") or environ.get("CONTENT_LENGTH") or 0)
        # Once full it stays full, for small files too.
        self.state["room"] = room - size if size < room else 0
        if size < room:
            return None
        message = (
            "Storage backend has reached its minimum free drive threshold. Please delete a few objects to proceed."
        )
        return "507 Insufficient Storage", "XMinioStorageFull", message


def _serve() -> None:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    class Handler(MotoRequestHandler):
        def log_request(self, code: object = "-", size: object = "-") -> None:
            pass

    moto = cast(Wsgi, DomainDispatcherApplication(create_backend_app))
    server = make_server(HOST, 0, Faults(moto), threaded=True, request_handler=Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    connection = http.client.HTTPConnection(HOST, server.port)
    user = f"AWS4-HMAC-SHA256 Credential={KEY}/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
    connection.request("PUT", f"/{BUCKET}", headers={"Authorization": user})
    answer = connection.getresponse()
    assert answer.status == 200, answer.read().decode()
    print(server.port, flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    _serve()
