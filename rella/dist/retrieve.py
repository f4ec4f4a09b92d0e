"""The retrieval stage (SUBR, §3.2): contiguous ranges of samples of about equal cost, on a pool of actors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from rella.artifacts import Artifact, Part
from rella.config import Experiment
from rella.data.selection import Chosen, SubsetRule, choose, wanted_ids
from rella.data.tables import Tables
from rella.dist.dataset import Shared
from rella.dist.embed import vectors_of
from rella.dist.session import ProgressHandle, RemoteProgress, Resources
from rella.dist.shards import Shard, by_cost, run_shards
from rella.schemas import neighbours, position_type


@dataclass(frozen=True)
class Work:
    """How the retrieval of a data set is cut."""

    shards: list[Shard]
    samples: int
    pairs: int
    """(target, earlier behaviour) pairs."""
    longest: int
    """Behaviours in the longest history."""


def chosen_samples(tables: Tables, experiment: Experiment) -> Chosen:
    """Return the samples that `retrieve.samples` names, ascending by id."""
    return choose(tables.samples, wanted_ids(tables.samples, experiment.retrieve.samples, SubsetRule.of(experiment)))


@ray.remote(num_cpus=0)
def _plan(tables: Tables, experiment: Experiment) -> Work:
    end = chosen_samples(tables, experiment).end.astype(np.int64)
    # A sample costs its pairs and a little on top.
    shards = by_cost(0, end + 16, experiment.retrieve.shard_pairs)
    return Work(shards, len(end), int(end.sum()), int(end.max(initial=0)))


@ray.remote(num_cpus=0)
def _load_vectors(artifact: Artifact) -> np.ndarray:
    return vectors_of(artifact.read())


class RetrieveWorker:
    """Reads histories and vectors from shared memory; makes one part a shard."""

    def __init__(
        self,
        artifact: Artifact,
        shared: Shared,
        vectors: Any,  # noqa: ANN401 - a Ray object reference
        experiment: Experiment,
        longest: int,
        threads: int,
        progress: ProgressHandle,
    ) -> None:
        tables = shared.fetch_tables()
        self.threads = threads
        self.artifact, self.experiment, self.progress = artifact, experiment, progress
        self.histories = tables.histories()
        self.samples = chosen_samples(tables, experiment)
        self.vectors = ray.get(vectors)
        self.kind = position_type(longest)

    def run(self, shard: Shard) -> Part:
        """Retrieve for the samples of a shard and write their part."""
        from rella.retrieval.engines import top_k

        rows, s = slice(shard.start, shard.stop), self.samples
        e = self.experiment
        offsets, positions = top_k(
            self.vectors,
            self.histories,
            s.user[rows],
            s.item[rows],
            s.end[rows],
            e.retrieve.k_max,
            e.distance,
            lambda pairs: self.progress.report(pairs),
            self.threads,
        )
        lists = pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(positions).cast(self.kind))
        table = pa.table([pa.array(s.sample_id[rows]), lists], schema=neighbours(self.kind))
        return self.artifact.write_part(table, shard.shard, shard.shards, facts={"pairs": int(s.end[rows].sum())})


def retrieve(
    artifact: Artifact, shared: Shared, vectors: Artifact, experiment: Experiment, resources: Resources
) -> tuple[list[Part], dict[str, int]]:
    """Retrieve for every sample asked for; return the parts and the stage's facts."""
    work: Work = ray.get(_plan.remote(shared.tables, experiment))
    with RemoteProgress("retrieve", work.pairs, "pairs") as progress:
        setup = {
            "artifact": artifact,
            "shared": shared,
            "vectors": _load_vectors.remote(vectors),
            "experiment": experiment,
            "longest": work.longest,
            "threads": resources.cpus,
            "progress": progress.handle,
        }
        costs = {s: s.stop - s.start for s in work.shards}
        kept = lambda shard: progress.handle.report(costs[shard] * work.pairs // max(1, work.samples))  # noqa: E731
        parts = run_shards(RetrieveWorker, setup, [artifact], work.shards, resources, kept)[0]
    return parts, {"samples": work.samples, "pairs": work.pairs, "longest_history": work.longest}
