"""Where fault tests keep their artifacts: a folder, or an S3 server on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.harness import Place, end_all
from tests.object_store import ObjectStore, object_store


@pytest.fixture(scope="session")
def server() -> Iterator[ObjectStore]:
    with object_store() as store:
        yield store


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    end_all()


@pytest.fixture(params=["folder", "s3"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def place(kind: str, model_folder: Path, tmp_path: Path, server: ObjectStore) -> Callable[[str], Place]:
    """Return the maker of a new, empty storage of this kind."""

    def make(name: str) -> Place:
        if kind == "folder":
            return Place(str(tmp_path / name), model_folder)
        return Place(server.uri_of(f"lab/{tmp_path.name}-{name}"), model_folder, server.environment)

    return make


@pytest.fixture(scope="session")
def untouched(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The main job on a folder, undisturbed: what every other run has to end with."""
    place = Place(str(tmp_path_factory.mktemp("untouched")), model_folder)
    run = place.run("reit", "--variants", "ours")
    assert run.code == 0, run.out
    return place
