"""No folder of tests is passed over: pytest leaves some names out by itself, `dist` among them."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent


def test_every_folder_of_tests_is_collected(request: pytest.FixtureRequest) -> None:
    left_out = request.config.getini("norecursedirs")
    folders = {part for file in TESTS.rglob("test_*.py") for part in file.relative_to(TESTS).parts[:-1]}
    assert {"dist", "jobs", "lm"} <= folders
    assert not [f for f in folders if any(fnmatch(f, pattern) for pattern in left_out)]
