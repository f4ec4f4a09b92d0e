"""A prepared data set in Ray's object store: read once by a task, then shared by every worker of a node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray

from rella.artifacts import Artifact
from rella.data.questions import Catalogue, Neighbours
from rella.data.tables import Tables
from rella.prompts import Display
from rella.wording import Wording

TABLES = ("users", "items", "interactions", "samples")


def read_tables(artifact: Artifact) -> Tables:
    """Return the four tables of a finished `prepare` artifact, each as one chunk so that numpy views need no copy."""
    return Tables(**{name: artifact.read(name).combine_chunks() for name in TABLES})


@ray.remote(num_cpus=0)
def _load_tables(artifact: Artifact) -> Tables:
    return read_tables(artifact)


@ray.remote(num_cpus=0)
def _load_neighbours(artifact: Artifact) -> Neighbours:
    return Neighbours.from_table(artifact.read())


@dataclass(frozen=True)
class Shared:
    """References to what several stages read. The driver holds the references only, never the data."""

    tables: Any
    neighbours: Any | None = None

    @staticmethod
    def load(data: Artifact, neighbours: Artifact | None = None) -> Shared:
        """Start loading; returns at once."""
        return Shared(_load_tables.remote(data), None if neighbours is None else _load_neighbours.remote(neighbours))

    def fetch_tables(self) -> Tables:
        """Return the tables, in a worker: views into shared memory."""
        tables: Tables = ray.get(self.tables)
        return tables

    def fetch_neighbours(self) -> Neighbours | None:
        """Return the neighbours, in a worker: views into shared memory; None where the stage needs none."""
        found: Neighbours | None = None if self.neighbours is None else ray.get(self.neighbours)
        return found


def catalogue_of(tables: Tables, wording: Wording, display: Display) -> Catalogue:
    """Return what questions are made of."""
    return Catalogue.from_tables(tables.users, tables.items, tables.histories(), wording, display)
