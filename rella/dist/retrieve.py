"""The retrieval stage (SUBR, §3.2) on a pool of actors that share vectors and histories.

Few samples are cut into ranges, each of which becomes a part. Many are cut by target, so that no row of similarities is
computed twice: groups of targets are retrieved for first and kept below the artifact until their positions have been
merged into parts in the order of samples (`rella.retrieval.plan`). One pool does both: workers take seconds to start.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from rella.artifacts import Artifact, Layout, Part
from rella.config import Experiment
from rella.data.selection import SubsetRule, choose, wanted_ids
from rella.data.tables import Histories, column
from rella.dist.embed import vectors_of
from rella.dist.remote_progress import ProgressHandle, RemoteProgress
from rella.dist.session import Resources
from rella.dist.shards import MIN_SHARDS, Shard, by_cost, cut_at, run_shards
from rella.errors import ArtifactError, InputError
from rella.retrieval import engines
from rella.retrieval.index import Index, Samples
from rella.retrieval.plan import Plan, merge
from rella.schemas import neighbours, position_type

REPEATED = 10.0
"""Seconds of one thread, spent on rows that several ranges of samples need, from which cutting by target pays."""
NEIGHBOURS = Layout(
    row_group_rows=2**16,
    encodings={"sample_id": "DELTA_BINARY_PACKED", "positions.list.element": "BYTE_STREAM_SPLIT"},
)
"""Smaller than Parquet's dictionaries for numbers of such variety, and twice as fast to read; twice again in row groups
whose buffers stay in the processor's caches."""


@dataclass(frozen=True)
class Asked:
    """The samples to retrieve for, ascending by id."""

    ids: npt.NDArray[np.int64]
    samples: Samples


@dataclass(frozen=True)
class Brief:
    """What the driver has to know of the work."""

    samples: int
    pairs: int
    """(target, earlier behaviour) pairs."""
    longest: int
    """Behaviours in the longest history."""
    ranges: Sequence[Shard] = ()
    """Ranges of samples; empty where it is cut by target."""
    digest: str = ""
    """Of the plan, where it is cut by target."""
    group_pairs: tuple[int, ...] = ()
    """By group of the plan."""
    order: tuple[int, ...] = ()
    """The plan's groups as they are given out: what is last should be short, so that no worker waits for another."""
    edges: tuple[int, ...] = ()
    """Where the parts' samples begin, and where the last one's end."""


def asked_samples(table: pa.Table, experiment: Experiment) -> Asked:
    """Return the samples that `retrieve.samples` names."""
    if experiment.retrieve.samples == "all":
        user, item, end = (column(table, name) for name in ("user", "item", "end"))
        return Asked(column(table, "sample_id"), Samples(user, item, end))
    chosen = choose(table, wanted_ids(table, experiment.retrieve.samples, SubsetRule.of(experiment)))
    return Asked(chosen.sample_id, Samples(chosen.user, chosen.item, chosen.end))


def read(data: Artifact, vectors: Artifact, experiment: Experiment) -> tuple[Index, Asked]:
    """Read what retrieval looks at, and nothing else of the data set.

    All at once: most of it is hashing and decoding, which do not hold the interpreter's lock.
    """
    needed = ["sample_id", "user", "item", "end"] if experiment.retrieve.samples == "all" else None
    with ThreadPoolExecutor(4) as pool:
        samples = pool.submit(lambda: asked_samples(data.read("samples", needed), experiment))
        items = pool.submit(lambda: column(data.read("interactions", ["item"]), "item"))
        offset = pool.submit(lambda: column(data.read("users", ["offset"]), "offset"))
        floats = pool.submit(lambda: vectors_of(vectors.read()))
        item = items.result()
        no_ratings = np.zeros(0, np.float32)
        histories = Histories(np.append(offset.result(), np.int64(len(item))), item, no_ratings)
        return Index.of(floats.result(), histories, experiment.distance), samples.result()


@ray.remote(num_cpus=0)
def _ready(data: Artifact, vectors: Artifact, experiment: Experiment) -> tuple[Index, Asked, Plan | None, Brief]:
    """Make ready what all workers share, in one process: what goes from one to another is copied twice."""
    index, asked = read(data, vectors, experiment)
    samples, retrieve = asked.samples, experiment.retrieve
    shards, cut = max(MIN_SHARDS, -(-samples.pairs // retrieve.shard_pairs)), retrieve.cut
    if cut == "auto" and retrieve.gpu:
        cut = "samples"  # A card makes all rows again in less time than a merge takes.
    elif cut == "auto":
        cut = "targets" if engines.seconds(index, samples)[0] * (shards - 1) > REPEATED else "samples"
    brief = Brief(len(samples), samples.pairs, int(samples.end.max(initial=0)))
    if cut == "samples":
        # A sample costs its pairs and a little on top.
        ranges = by_cost(0, samples.end.astype(np.int64) + 16, retrieve.shard_pairs)
        return index, asked, None, replace(brief, ranges=ranges)
    plan = Plan.of(index, samples, retrieve.k_max, shards)
    pairs, edges = tuple(plan.pairs.tolist()), tuple(plan.edges.tolist())
    order = (*range(plan.tables, plan.groups), *range(plan.tables))
    return index, asked, plan, replace(brief, digest=plan.digest, group_pairs=pairs, order=order, edges=edges)


@dataclass(frozen=True)
class Setup:
    """What every worker of the stage gets; large things as references to the object store."""

    artifact: Artifact
    index: Any
    asked: Any
    experiment: Experiment
    longest: int
    threads: int
    progress: ProgressHandle
    plan: Any = None
    work_table: str = ""
    """Where what the plan's groups have found is kept below the artifact."""

    @cached_property
    def kind(self) -> pa.DataType:
        """The type of positions."""
        return position_type(self.longest)

    @property
    def k(self) -> int:
        """Neighbours kept."""
        return self.experiment.retrieve.k_max

    def write(self, ids: npt.NDArray[np.int64], offsets: Any, positions: Any, shard: Shard, pairs: int) -> Part:  # noqa: ANN401
        """Write a part of the neighbours table."""
        lists = pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(positions).cast(self.kind))
        table = pa.table([pa.array(ids), lists], schema=neighbours(self.kind))
        return self.artifact.write_part(table, shard.shard, shard.shards, facts={"pairs": pairs}, layout=NEIGHBOURS)


class _Retrieving:
    def __init__(self, setup: Setup) -> None:
        asked: Asked = ray.get(setup.asked)
        self.setup, self.index = setup, ray.get(setup.index)
        self.ids, self.samples = asked.ids, asked.samples

    def positions(
        self, samples: Samples, engine: engines.Engine
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        k, report = self.setup.k, self.setup.progress.report
        offsets = np.zeros(len(samples) + 1, np.int64)
        np.cumsum(np.minimum(samples.end, k), out=offsets[1:])
        out = np.empty(int(offsets[-1]), np.int32)
        if self.setup.experiment.retrieve.gpu:
            from rella.retrieval import device

            device.run(self.index, samples, k, offsets[:-1], out, lambda n: report(n))
        else:
            engines.run(self.index, samples, k, offsets[:-1], out, lambda n: report(n), self.setup.threads, engine)
        return offsets, out


class RangeWorker(_Retrieving):
    """Retrieves for a range of samples, which becomes a part."""

    def run(self, shard: Shard) -> Part:
        """Retrieve and write the part."""
        rows, s = slice(shard.start, shard.stop), self.samples
        mine = Samples(s.user[rows], s.item[rows], s.end[rows])
        offsets, positions = self.positions(mine, "auto")
        return self.setup.write(self.ids[rows], offsets, positions, shard, mine.pairs)


class TargetWorker(_Retrieving):
    """Retrieves for the plan's groups (task 0), and merges what they have found into parts (task 1).

    What a group finds waits below the artifact, a run for every part. A merge waits until all groups are there: shards
    are given out in order, so at its turn every group has been taken up.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.plan: Plan = ray.get(setup.plan)
        self.waited = False

    def run(self, shard: Shard) -> Part:
        """Make the part of a group, or of the result."""
        return self._merge(shard) if shard.task else self._find(shard)

    def _find(self, shard: Shard) -> Part:
        group = shard.shard
        mine = self.samples.take(self.plan.rows(group))
        _, positions = self.positions(mine, self.plan.engine(group))
        narrow = positions.astype(self.setup.kind.to_pandas_dtype())
        runs = self.plan.slots[group] * narrow.itemsize
        buffers = [None, pa.py_buffer(runs), pa.py_buffer(narrow)]
        column = pa.Array.from_buffers(pa.large_binary(), len(runs) - 1, buffers)
        return self.setup.artifact.write_part(
            pa.table({"positions": column}),
            group,
            shard.shards,
            self.setup.work_table,
            # One row for each part of the result, read by itself.
            layout=Layout("none", 1, {"positions": "PLAIN"}),
        )

    def _merge(self, shard: Shard) -> Part:
        self._wait_for_groups()
        plan, part = self.plan, shard.shard
        pieces = [self._piece(group, part) for group in range(plan.groups)]
        offsets, positions = merge(plan, part, self.samples.end, self.setup.k, pieces)
        rows = slice(int(plan.edges[part]), int(plan.edges[part + 1]))
        pairs = int(self.samples.end[rows].sum(dtype=np.int64))
        made = self.setup.write(self.ids[rows], offsets, positions, shard, pairs)
        self.setup.progress.report(0, f"merging into {plan.parts} parts")
        return made

    def _wait_for_groups(self) -> None:
        if self.waited:
            return
        artifact, pause = self.setup.artifact, 0.1
        names = [artifact.part_name(g, self.plan.groups, self.setup.work_table) for g in range(self.plan.groups)]
        wanted = {f"{artifact.path}/{name}" for name in names}
        while not wanted <= set(artifact.storage.list(next(iter(wanted)).rpartition("/")[0])):
            time.sleep(pause)
            pause = min(2 * pause, 2.0)
        self.waited = True

    def _piece(self, group: int, part: int) -> npt.NDArray[Any]:
        artifact, kind = self.setup.artifact, self.setup.kind.to_pandas_dtype()
        name = artifact.part_name(group, self.plan.groups, self.setup.work_table)
        try:
            with artifact.storage.open(f"{artifact.path}/{name}") as file:
                found = pq.ParquetFile(file, page_checksum_verification=True).read_row_group(part)
        except (pa.ArrowException, OSError) as error:
            raise ArtifactError(f"{artifact.where(name)} was damaged: start the job again ({error})") from error
        return np.frombuffer(found.column("positions")[0].as_buffer(), kind)


def retrieve(
    artifact: Artifact, data: Artifact, vectors: Artifact, experiment: Experiment, resources: Resources
) -> tuple[list[Part], dict[str, int]]:
    """Retrieve for every sample asked for; return the parts and the stage's facts.

    Raises:
        InputError: L1 on GPUs.
    """
    if experiment.retrieve.gpu and experiment.distance == "l1":
        raise InputError("--retrieve.gpu: L1 is no matrix product, and has no engine there; leave the flag out")
    index, asked, plan, told = _ready.options(num_returns=4).remote(data, vectors, experiment)
    work: Brief = ray.get(told)
    with RemoteProgress("retrieve", work.pairs, "pairs") as progress:
        setup = Setup(artifact, index, asked, experiment, work.longest, resources.cpus, progress.handle)
        if work.ranges:
            parts = _by_ranges(setup, work, resources)
        else:
            setup = replace(setup, plan=plan, work_table=f"work-{work.digest}")
            parts = _by_targets(setup, work, resources)
    return parts, {"samples": work.samples, "pairs": work.pairs, "longest_history": work.longest}


def _by_ranges(setup: Setup, work: Brief, resources: Resources) -> list[Part]:
    pairs = {s: (s.stop - s.start) * work.pairs // max(1, work.samples) for s in work.ranges}
    kept = lambda shard: setup.progress.kept(pairs[shard])  # noqa: E731
    return run_shards(RangeWorker, {"setup": setup}, [setup.artifact], work.ranges, resources, kept)[0]


def _by_targets(setup: Setup, work: Brief, resources: Resources) -> list[Part]:
    """Retrieve for every group of the plan, unless all parts are there, and merge what was found into parts."""
    artifact, count = setup.artifact, len(work.group_pairs)
    parts = [replace(s, task=1) for s in cut_at(0, work.edges[:-1], work.edges[-1])]
    groups = () if all(artifact.good_part(s.shard, s.shards) for s in parts) else work.order
    todo = [Shard(0, g, count, 0, 0) for g in groups if not _is_found(artifact, g, count, setup.work_table)]
    setup.progress.kept(work.pairs - sum(work.group_pairs[s.shard] for s in todo))
    tables = [setup.work_table, ""]
    return run_shards(TargetWorker, {"setup": setup}, [artifact] * 2, [*todo, *parts], resources, tables=tables)[1]


def _is_found(artifact: Artifact, group: int, groups: int, table: str) -> bool:
    """Return whether an earlier run has left what a group found; damaged it goes, as a merge takes what is there."""
    if artifact.good_part(group, groups, table) is not None:
        return True
    artifact.storage.delete(f"{artifact.path}/{artifact.part_name(group, groups, table)}")
    return False
