"""`--restart` deletes what it names, and nothing while another driver works on it; exit codes tell faults apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rella.artifacts import Artifact, list_artifacts
from rella.dist import jobs
from rella.dist.jobs import main, prepare_job
from rella.leases import Lease
from rella.storage import Storage

Prepare = Callable[..., tuple[int, str]]


@pytest.fixture
def prepare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Prepare:
    """Run `prepare` on a small sample and return its exit status and all that it said."""

    def run(*flags: str) -> tuple[int, str]:
        flags = ("--data.sample-users", "30", "--storage", str(tmp_path), *flags)
        code = main("prepare", "A job.", prepare_job, flags)
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


def the_one(folder: Path) -> Artifact:
    (found,) = list_artifacts(Storage(str(folder)))
    return found


def test_a_stage_is_made_again(prepare: Prepare, tmp_path: Path) -> None:
    assert prepare()[0] == 0
    first = the_one(tmp_path).manifest()
    assert "found" in prepare()[1]
    code, said = prepare("--restart", "prepare")
    assert code == 0
    assert "prepare   gone" in said
    assert "prepare   made" in said
    again = the_one(tmp_path).manifest()
    assert [p.sha256 for p in again.parts] == [p.sha256 for p in first.parts]
    assert "gone" not in prepare("--restart", "embed,score")[1]


def test_unfinished_takes_what_no_manifest_vouches_for(prepare: Prepare, tmp_path: Path) -> None:
    prepare()
    assert "found" in prepare("--restart", "unfinished")[1]
    artifact = the_one(tmp_path)
    (tmp_path / artifact.path / "manifest.json").write_text("{}")
    code, said = prepare()
    assert code == 1
    assert "manifest.json is not a manifest" in said
    assert "--restart prepare" in said
    code, said = prepare("--restart", "unfinished")
    assert (code, "gone" in said) == (0, True)
    assert the_one(tmp_path).is_vouched_for()


def test_nothing_goes_while_another_driver_works_on_it(prepare: Prepare, tmp_path: Path) -> None:
    prepare()
    with Lease(the_one(tmp_path)):
        code, said = prepare("--restart", "prepare", "--cluster.on-busy", "leave")
    assert code == 1
    assert "is being made by another driver" in said
    assert the_one(tmp_path).is_vouched_for()


def test_an_unknown_word_is_refused(prepare: Prepare) -> None:
    code, said = prepare("--restart", "everything")
    assert code == 1
    assert "restart: unknown everything; there are prepare, embed," in said


def test_a_folder_of_another_configuration_is_refused(prepare: Prepare, tmp_path: Path) -> None:
    prepare()
    folder = tmp_path / the_one(tmp_path).path
    key = json.loads((folder / "manifest.json").read_text())["key"]
    (folder / "manifest.json").unlink()
    taken = {"key": key[:12] + "0" * 52, "config": {"data.min_history": 7}}
    (folder / "stage.json").write_text(json.dumps(taken))
    code, said = prepare()
    assert code == 1
    assert "is unfinished work of another configuration" in said
    assert "data.min_history 7 there, 5 here" in said


def test_a_fault_of_the_program_is_called_one(prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise TypeError("\n".join(f"line {n}" for n in range(40)))

    monkeypatch.setattr(jobs, "Runner", broken)
    code, said = prepare()
    assert code == 3
    message = said[said.index("prepare: unexpected") :]
    assert message.startswith("prepare: unexpected TypeError: line 0\n")
    assert len(message.splitlines()) < 20
    log = Path(message.strip().rpartition("Traceback: ")[2])
    assert "in broken" in log.read_text()
    assert "line 39" in log.read_text()
    log.unlink()
