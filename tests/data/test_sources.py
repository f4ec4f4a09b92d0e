from __future__ import annotations

import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from rella.config import DataConfig
from rella.data import sources
from rella.data.download import ARCHIVES
from rella.data.samples import assemble
from rella.data.sources import Source

FILES = {
    "users.dat": "1::F::1::10::48067\n2::M::56::16::70072\n",
    "movies.dat": "1::Toy Story (1995)::Animation|Comedy\n2::Heat (1995)::Action\n",
    "ratings.dat": "".join(
        f"{u}::{m}::{r}::{978300000 + 10 * u + m}\n" for u, m, r in [(1, 1, 5), (1, 2, 3), (2, 1, 4)]
    ),
}


def raw_identity(dataset: str, raw_dir: str | None) -> dict[str, str]:
    return Source(dataset, raw_dir).identity()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "raw"
    place.mkdir()
    for name, text in FILES.items():
        (place / name).write_text(text, encoding="latin-1")
    return place


def test_the_same_files_have_one_identity_in_a_folder_and_in_a_zip(folder: Path, tmp_path: Path) -> None:
    archive = tmp_path / "downloads" / "ml-1m.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as opened:
        for name in FILES:
            opened.write(folder / name, f"ml-1m/{name}")
    expected = raw_identity("ml-1m", str(folder))
    assert set(expected) == set(FILES)
    assert raw_identity("ml-1m", str(archive)) == expected
    assert raw_identity("ml-1m", str(archive.parent)) == expected
    (folder / "ratings.dat").write_text(FILES["ratings.dat"].replace("::5::", "::4::"))
    assert raw_identity("ml-1m", str(folder)) != expected


@pytest.mark.parametrize("dataset", ["ml-1m", "ml-25m", "bookcrossing"])
def test_the_official_download_is_known_without_downloading_it(dataset: str) -> None:
    assert raw_identity(dataset, None) == {"md5": ARCHIVES[dataset].md5}


def test_another_world_is_another_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    before = raw_identity("sample", None)
    monkeypatch.setattr(sources, "SAMPLE_WORLD", replace(sources.SAMPLE_WORLD, noise=0.1))
    assert raw_identity("sample", None) != before


def test_missing_files_are_named(folder: Path) -> None:
    (folder / "movies.dat").unlink()
    with pytest.raises(FileNotFoundError, match=r"movies\.dat: the file is missing"):
        raw_identity("ml-1m", str(folder))
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        raw_identity("ml-1m", str(folder / "nowhere"))


def test_prepare_applies_the_label_rule_and_the_filter(folder: Path) -> None:
    rules = DataConfig(min_history=1, split=(1, 0, 0))
    tables = assemble(Source("ml-1m", str(folder)).load(rules), rules)
    assert tables.samples.to_pylist() == [
        {"sample_id": 1, "user": 0, "item": 1, "end": 1, "label": 0, "split": "train", "rank": 0},
    ]
    assert tables.items["genre"].to_pylist() == ["Animation", "Action"]
