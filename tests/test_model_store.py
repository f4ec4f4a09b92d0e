"""Models in an object store: copied once to a machine, and the same model as in a folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from rella import model_store
from rella.errors import InputError, MissingError, StorageError
from rella.model_store import local_model
from rella.models import TINY, identify
from rella.storage import Storage
from tests.object_store import ObjectStore, object_store


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectStore]:
    with object_store() as store:
        yield store


@pytest.fixture
def uri(server: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = server.uri_of(f"lab/{tmp_path.name}/small-llm")
    for file in TINY.iterdir():
        Storage(found).write(file.name, file.read_bytes())
    Storage(found).write("pytorch_model.bin", b"pickled")
    return found


def test_it_is_the_model_of_the_folder(uri: str) -> None:
    from rella.lm.loading import load_tokenizer

    found, right = identify(uri), identify("tiny")
    assert (found.name, found.source) == ("small-llm", uri)
    assert (found.digest, found.hidden_size, found.revision) == (right.digest, right.hidden_size, None)
    assert not (Path(found.place) / "pytorch_model.bin").exists()
    text = "Here is a movie."
    assert load_tokenizer(found)(text)["input_ids"] == load_tokenizer(right)(text)["input_ids"]


def test_a_second_look_copies_nothing(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = local_model(uri)
    monkeypatch.setattr(model_store, "_copy", lambda *_: pytest.fail("copied again"))
    assert local_model(uri) == folder
    assert identify(uri).place == str(folder)


def test_a_half_copied_model_is_completed(uri: str) -> None:
    folder = local_model(uri)
    (folder / "config.json").unlink()
    (folder / "config.json.part-1").write_text("{")
    assert (local_model(uri) / "config.json").read_bytes() == (TINY / "config.json").read_bytes()


def test_a_changed_model_is_copied_anew_and_refused_in_a_running_job(uri: str) -> None:
    before = identify(uri)
    config = (TINY / "config.json").read_bytes()
    Storage(uri).write("config.json", config.replace(b'"hidden_size"', b' "hidden_size"'))
    assert identify(uri).digest != before.digest
    with pytest.raises(InputError, match="changed since the job began"):
        _ = before.place


def test_what_is_no_model_is_said(uri: str) -> None:
    with pytest.raises(MissingError, match=r"nothing-here.* has no config\.json"):
        identify(uri.replace("small-llm", "nothing-here"))


def test_a_file_that_shrinks_is_no_copy(uri: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"config\.json.* changed while it was copied"):
        model_store._copy(Storage(uri), "config.json", 10**6, tmp_path / "config.json")
    assert not list(tmp_path.glob("config.json*"))


SCRIPT = """
import sys
from rella import model_store

copied = []
real = model_store._copy
model_store._copy = lambda storage, path, size, target: (copied.append(path), real(storage, path, size, target))
print("ready", flush=True)
sys.stdin.readline()
model_store.local_model(sys.argv[1])
print(len(copied))
"""


def test_of_processes_that_come_at_once_one_copies(uri: str, tmp_path: Path) -> None:
    script = tmp_path / "come.py"
    script.write_text(textwrap.dedent(SCRIPT))
    root = str(Path(__file__).resolve().parents[1])
    come = [
        subprocess.Popen(
            [sys.executable, str(script), uri], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root,
            env={**_environment(), "PYTHONPATH": root},
        )
        for _ in range(3)
    ]  # fmt: skip
    for one in come:
        assert one.stdout is not None
        assert one.stdout.readline() == "ready\n"
    for one in come:
        assert one.stdin is not None
        one.stdin.write("\n")
        one.stdin.flush()
    counts = sorted(int(one.communicate(timeout=60)[0]) for one in come)
    wanted = sum(file.suffix in (".json", ".safetensors", ".jinja", ".txt", ".model") for file in TINY.iterdir())
    assert counts == [0, 0, wanted]


def _environment() -> dict[str, str]:
    import os

    return dict(os.environ)


def test_a_cache_that_cannot_be_written_is_named(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(StorageError, match="set XDG_CACHE_HOME"):
        local_model(uri)
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
