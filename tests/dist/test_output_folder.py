"""Where jobs put what people read."""

from __future__ import annotations

from pathlib import Path

import pytest

from rella.dist.figures import output_folder
from rella.errors import InputError
from rella.storage import SUBMITTED_JOB, Storage


def test_here_unless_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SUBMITTED_JOB, raising=False)
    storage = Storage(str(tmp_path))
    assert output_folder("auto", "reports/x", storage) == Path("reports/x")
    assert output_folder("mine", "reports/x", storage) == Path("mine")


def test_a_submitted_job_s_are_where_somebody_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SUBMITTED_JOB, "{}")
    assert output_folder("auto", "reports/x", Storage(str(tmp_path))) == tmp_path / "reports" / "x"
    assert output_folder("/data/mine", "reports/x", Storage(str(tmp_path))) == Path("/data/mine")
    with pytest.raises(InputError, match="mine is relative"):
        output_folder("mine", "reports/x", Storage(str(tmp_path)))
