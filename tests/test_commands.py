from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from rella.__main__ import JOBS, main, readable_size
from rella.artifacts import Artifact, Manifest, now
from rella.leases import Lease
from rella.storage import Storage


def made(storage: Storage, name: str, finished: bool = True) -> Artifact:
    key = f"{hash(name) % 16**12:012x}" + "0" * 52
    artifact = Artifact(storage, f"sample/prepare/{name}-{key[:12]}", key)
    part = artifact.write_part(pa.table({"a": [1, 2, 3]}), 0, 1)
    if finished:
        artifact.finish(Manifest("prepare", 1, key, "sample", {"k": 1}, {}, {}, [part], created=now(), seconds=1.5))
    return artifact


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


def run(storage: Storage, *words: str) -> int:
    return main(["--storage", storage.uri, *words])


def test_ls_tells_done_from_unfinished_and_damaged(storage: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    made(storage, "one")
    made(storage, "two", finished=False)
    damaged = made(storage, "three")
    file = Path(storage.uri, damaged.path, "manifest.json")
    file.write_text(file.read_text().replace('"rows": 3', '"rows": 4'))
    assert run(storage, "ls") == 0
    lines = {line.split("-")[0]: line.split()[1] for line in capsys.readouterr().out.splitlines()[:-1]}
    assert lines == {
        "sample/prepare/one": "done",
        "sample/prepare/two": "unfinished",
        "sample/prepare/three": "damaged",
    }


def test_show_prints_the_manifest_and_verifies_parts(storage: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = made(storage, "one")
    assert run(storage, "show", artifact.path, "--verify") == 0
    out = capsys.readouterr().out
    assert artifact.key in out
    assert "1 parts match their digests" in out
    part = Path(storage.uri, artifact.path, artifact.manifest().parts[0].name)
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    assert run(storage, "show", artifact.path, "--verify") == 1
    assert "does not match the digest" in capsys.readouterr().err


def test_clean_asks_and_takes_only_what_was_named(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = made(storage, "one"), made(storage, "two")
    monkeypatch.setattr("builtins.input", lambda question: "n")
    assert run(storage, "clean", one.path) == 1
    assert one.is_complete()
    monkeypatch.setattr("builtins.input", lambda question: "y")
    assert run(storage, "clean", one.path[-12:]) == 0
    assert not storage.exists(one.path)
    assert two.is_complete()


def test_clean_unfinished_leaves_finished_work_and_work_in_progress(storage: Storage) -> None:
    done, left, busy = made(storage, "one"), made(storage, "two", finished=False), made(storage, "six", finished=False)
    with Lease(busy):
        assert run(storage, "clean", "--unfinished", "--yes") == 0
    assert done.is_complete()
    assert not storage.exists(left.path)
    assert storage.exists(busy.path)


def test_an_unknown_artifact_is_an_error(storage: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(storage, "show", "nothing") == 1
    assert "python -m rella ls" in capsys.readouterr().err


def test_every_job_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    scripts = {p.stem for p in (Path(__file__).parents[1] / "jobs").glob("*.py")}
    assert set(JOBS) == scripts
    assert main(["jobs"]) == 0
    assert capsys.readouterr().out.count("python jobs/") == len(scripts)


@pytest.mark.parametrize(("size", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2.5e12, "2.5 TB")])
def test_sizes_are_readable(size: float, text: str) -> None:
    assert readable_size(size) == text
