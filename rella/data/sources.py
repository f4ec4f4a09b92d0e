"""Data sets by name: where their original files are, what they contain to the byte, how they are read and worded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from rella.artifacts import digest
from rella.config import DataConfig, Experiment
from rella.data import bookcrossing, movielens, movielens25m
from rella.data.custom import read_own
from rella.data.download import ARCHIVES, download
from rella.data.files import RawFiles, locate
from rella.data.raw import RawDataset
from rella.data.synthetic import CATALOGUE_SEED, SAMPLE_WORLD, sample_dataset
from rella.dataset_file import DatasetFile, read_dataset_file
from rella.digests import cache_folder
from rella.prompts import wording_for
from rella.wording import Wording

Read = Callable[[RawFiles, bool], RawDataset]
"""(files, strict) → the ratings."""

READERS: dict[str, tuple[tuple[str, ...], Read]] = {
    "ml-1m": (movielens.FILES, movielens.read_ml1m),
    "ml-25m": (movielens25m.FILES, movielens25m.read_ml25m),
    "bookcrossing": (bookcrossing.FILES, bookcrossing.read_bookcrossing),
}
"""Data set → the original files that it is read from, and how."""


@dataclass(frozen=True)
class Source:
    """One data set as an experiment names it; nothing is read before it is asked for."""

    dataset: str
    raw_dir: str | None
    file: str | None = None
    """The YAML file of one's own data."""

    @staticmethod
    def of(experiment: Experiment) -> Source:
        """Return the experiment's data set."""
        return Source(experiment.dataset, experiment.raw_dir, experiment.dataset_file)

    @cached_property
    def own(self) -> DatasetFile | None:
        """The description of one's own data, None for the data sets that are built in."""
        return None if self.file is None else read_dataset_file(self.file)

    def files(self) -> RawFiles:
        """Return the original files, downloading the official archive where no folder is given.

        Raises:
            MissingError: the folder or one of the files in it is missing.
            DownloadError: no archive to be had.
            InputError: a damaged archive.
        """
        if self.own is not None:
            return locate(self.own.name, self.own.files, self.raw_dir or Path(self.file or "").expanduser().parent)
        names, _ = READERS[self.dataset]
        archive = ARCHIVES[self.dataset].file
        if self.raw_dir is not None:
            return locate(self.dataset, names, self.raw_dir, archive)
        return locate(self.dataset, names, download(self.dataset, cache_folder() / "raw"), archive)

    def identity(self) -> dict[str, str]:
        """Return what identifies the original files, for keys: their digests, whatever folder or zip they lie in.

        The official download is identified by its published checksum, so that nothing is downloaded to find an
        artifact; `sample` by the constants of its world; one's own data by the columns that are read as well.

        Raises:
            MissingError: `raw_dir` or one of the files in it is missing.
        """
        if self.dataset == "sample":
            return {"world": digest([asdict(SAMPLE_WORLD), CATALOGUE_SEED])}
        if self.own is None and self.raw_dir is None:
            return {"md5": ARCHIVES[self.dataset].md5}
        files = self.files()
        found = {name: files.digest(name) for name in files.names}
        return found if self.own is None else {**found, "columns": digest(self.own.columns())}

    def load(self, config: DataConfig) -> RawDataset:
        """Read the original files, or make `sample`.

        Raises:
            InputError: a file that breaks its format; names file, row and remedy.
        """
        if self.dataset == "sample":
            return sample_dataset(config.sample_seed, config.sample_users)
        if self.own is not None:
            return read_own(self.own, self.files(), config.strict)
        return READERS[self.dataset][1](self.files(), config.strict)

    def wording(self, experiment: Experiment) -> Wording:
        """Return how the data set is put into words under `experiment.prompt`.

        Raises:
            InputError: no such wording.
        """
        return wording_for(self.dataset, experiment.prompt, None if self.own is None else self.own.words())


def table1_row(counts: Mapping[str, int]) -> str:
    """Return users, items and samples as in the paper's Table 1, on one line."""
    shown = ", ".join(f"{counts[n]:,} {n}" for n in ("users", "items", "samples"))
    return f"{shown} (train {counts['train']:,}, valid {counts['valid']:,}, test {counts['test']:,})"
