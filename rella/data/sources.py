"""Data sets by name: where their original files are, what they contain to the byte, and how they are read."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from rella.artifacts import digest
from rella.config import DataConfig
from rella.data.download import ARCHIVES, download
from rella.data.movielens import read_ml1m
from rella.data.raw import RawDataset
from rella.data.samples import assemble
from rella.data.synthetic import CATALOGUE_SEED, SAMPLE_WORLD, sample_dataset
from rella.data.tables import Tables
from rella.digests import cache_folder, file_digest, remembered

FILES = {"ml-1m": ("users.dat", "movies.dat", "ratings.dat")}
"""Original files that a data set is read from."""


def raw_identity(dataset: str, raw_dir: str | None) -> dict[str, str]:
    """Return what identifies the original files, for keys: their digests, whatever folder or zip they lie in.

    The official download is identified by its published checksum, so that nothing is downloaded to find an artifact;
    `sample` by the constants of its world.

    Raises:
        FileNotFoundError: `raw_dir` or one of the files in it is missing.
    """
    if dataset == "sample":
        return {"world": digest([asdict(SAMPLE_WORLD), CATALOGUE_SEED])}
    if raw_dir is None:
        return {"md5": ARCHIVES[dataset].md5}
    path = Path(raw_dir).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"--raw-dir {raw_dir}: there is no such folder or zip")
    folder = path / dataset if (path / dataset).is_dir() else path
    missing = [name for name in FILES[dataset] if not (folder / name).exists()]
    if missing and (path / f"{dataset}.zip").is_file():
        path = path / f"{dataset}.zip"
    if path.is_file():
        return {name: remembered(path, f"member {name}", lambda n=name: _member(path, n)) for name in FILES[dataset]}  # type: ignore[misc]
    if missing:
        raise FileNotFoundError(f"--raw-dir {raw_dir}: {', '.join(missing)} not found in {folder}")
    return {name: file_digest(folder / name) for name in FILES[dataset]}


def _member(archive: Path, name: str) -> str:
    with zipfile.ZipFile(archive) as opened:
        found = [n for n in opened.namelist() if n.rpartition("/")[2] == name]
        if not found:
            raise FileNotFoundError(f"--raw-dir {archive}: no {name} in it")
        with opened.open(found[0]) as member:
            return hashlib.file_digest(member, "sha256").hexdigest()  # type: ignore[arg-type]


def load_raw(dataset: str, raw_dir: str | None, config: DataConfig) -> RawDataset:
    """Read a data set's original files, downloading the official archive where no folder is given; or make `sample`.

    Raises:
        ValueError: an unknown data set, or a file that breaks its format; names file, row and remedy.
    """
    if dataset == "sample":
        return sample_dataset(config.sample_seed, config.sample_users)
    if dataset == "ml-1m":
        path = Path(raw_dir).expanduser() if raw_dir else download(dataset, cache_folder() / "raw")
        return read_ml1m(path)
    raise ValueError(f"unknown data set {dataset!r}")


def prepare(dataset: str, raw_dir: str | None, config: DataConfig) -> Tables:
    """Return the data set's tables under the rules of Appendix B; see `assemble`."""
    raw = load_raw(dataset, raw_dir, config)
    return assemble(raw, positive_above=config.positive_above, min_history=config.min_history, parts=config.split)


def table1_row(counts: Mapping[str, int]) -> str:
    """Return users, items and samples as in the paper's Table 1, on one line."""
    shown = ", ".join(f"{counts[n]:,} {n}" for n in ("users", "items", "samples"))
    return f"{shown} (train {counts['train']:,}, valid {counts['valid']:,}, test {counts['test']:,})"
