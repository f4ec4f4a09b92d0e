"""The retrieval stage (SUBR, §3.2) on a pool of actors that share vectors and histories.

Few samples are cut into ranges, each of which becomes a part. Many are cut by target, so that no row of similarities is
computed twice: groups of targets are retrieved for first and kept below the artifact until their positions have been
merged into parts in the order of samples (`rella.retrieval.plan`). One pool does both: workers take seconds to start.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
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
from rella.dist.shards import MIN_SHARDS, Left, Shard, by_cost, cut_at, look_for, run_left
from rella.errors import ArtifactError, InputError
from rella.retrieval import engines
from rella.retrieval.index import Index, Samples
from rella.retrieval.plan import Plan, merge
from rella.schemas import neighbours, position_type

REPEATED = 10.0
"""Seconds of one thread, spent on rows that several ranges of samples need, from which cutting by target pays."""
TURNS = 64
"""Pieces of work at least that the shards are given out in: few that are empty, and few of several shards."""
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
    """What everybody has to know of the work."""

    samples: int
    pairs: int
    """(target, earlier behaviour) pairs."""
    longest: int
    """Behaviours in the longest history."""
    kept: Left
    """What an earlier run has left, and what it has not."""
    kept_pairs: int
    """Of the pairs, those that are done."""
    tasks: int
    """Parts of the last of so many tasks are the result's; those of the one before wait for them."""
    work_table: str = ""
    """Where what the plan's groups have found is kept below the artifact."""

    @property
    def kind(self) -> pa.DataType:
        """The type of positions."""
        return position_type(self.longest)


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
def _ready(
    artifact: Artifact, data: Artifact, vectors: Artifact, experiment: Experiment
) -> tuple[Index, Asked, Plan | None, Brief, tuple[Shard, ...]]:
    """Make ready what all workers share, in one process: what goes from one to another is copied twice."""
    index, asked = read(data, vectors, experiment)
    samples, retrieve = asked.samples, experiment.retrieve
    shards, cut = max(MIN_SHARDS, -(-samples.pairs // retrieve.shard_pairs)), retrieve.cut
    if cut == "auto" and retrieve.gpu:
        cut = "samples"  # A card makes all rows again in less time than a merge takes.
    elif cut == "auto":
        cut = "targets" if engines.seconds(index, samples)[0] * (shards - 1) > REPEATED else "samples"
    longest, plan, table, groups = int(samples.end.max(initial=0)), None, "", tuple[Shard, ...]()
    if cut == "samples":
        # A sample costs its pairs and a little on top.
        ranges = by_cost(0, samples.end.astype(np.int64) + 16, retrieve.shard_pairs)
        kept = look_for([artifact], ranges)
        done = sum(int(samples.end[s.start : s.stop].sum(dtype=np.int64)) for s in kept.made)
    else:
        plan = Plan.of(index, samples, retrieve.k_max, shards)
        table = f"work-{plan.digest}"
        kept = look_for([artifact] * 2, cut_at(1, plan.edges[:-1].tolist(), int(plan.edges[-1])))
        groups = groups_left(artifact, plan, table) if kept.shards else ()
        done = samples.pairs - int(plan.pairs[[s.shard for s in groups]].sum())
    brief = Brief(len(samples), samples.pairs, longest, kept, done, 1 if plan is None else 2, table)
    return index, asked, plan, brief, (*groups, *kept.shards)


def groups_left(artifact: Artifact, plan: Plan, table: str) -> tuple[Shard, ...]:
    """Return the plan's groups of which an earlier run has left nothing; what is damaged goes."""
    # Those of the engine by user take longest: what is last should be short, so that no worker waits for another.
    order = (*range(plan.tables, plan.groups), *range(plan.tables))
    kept = look_for([artifact], [Shard(0, group, plan.groups, 0, 0) for group in order], [table])
    for shard in kept.shards:
        artifact.storage.delete(f"{artifact.path}/{artifact.part_name(shard.shard, plan.groups, table)}")
    return kept.shards


@dataclass(frozen=True)
class Setup:
    """What every worker of the stage gets; large things, and what is not known yet, as references."""

    artifact: Artifact
    experiment: Experiment
    threads: int
    progress: ProgressHandle
    index: Any
    asked: Any
    plan: Any
    brief: Any


class Retriever:
    """Retrieves for ranges of samples, each of which becomes a part.

    Where there is a plan, for its groups (task 0), and merges what they have found into parts (task 1).

    What a group finds waits below the artifact, a run for every part. A merge waits until all groups are there: shards
    are given out in order, so at its turn every group has been taken up.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup, self.artifact = setup, setup.artifact
        self.brief: Brief = ray.get(setup.brief)
        self.index: Index = ray.get(setup.index)
        asked: Asked = ray.get(setup.asked)
        self.ids, self.samples = asked.ids, asked.samples
        self.plan: Plan | None = ray.get(setup.plan)
        self.k, self.waited = setup.experiment.retrieve.k_max, False

    def run(self, shard: Shard) -> Part:
        """Make the part of a range, of a group, or of the result."""
        if self.plan is None:
            return self._range(shard)
        return self._merge(shard, self.plan) if shard.task else self._find(shard, self.plan)

    def _range(self, shard: Shard) -> Part:
        rows, s = slice(shard.start, shard.stop), self.samples
        mine = Samples(s.user[rows], s.item[rows], s.end[rows])
        offsets, positions = self._positions(mine, "auto")
        return self._write(self.ids[rows], offsets, positions, shard, mine.pairs)

    def _positions(
        self, samples: Samples, engine: engines.Engine
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        offsets, report = np.zeros(len(samples) + 1, np.int64), self.setup.progress.report
        np.cumsum(np.minimum(samples.end, self.k), out=offsets[1:])
        out = np.empty(int(offsets[-1]), np.int32)
        if self.setup.experiment.retrieve.gpu:
            from rella.retrieval import device

            device.run(self.index, samples, self.k, offsets[:-1], out, lambda n: report(n))
        else:
            threads = self.setup.threads
            engines.run(self.index, samples, self.k, offsets[:-1], out, lambda n: report(n), threads, engine)
        return offsets, out

    def _write(self, ids: npt.NDArray[np.int64], offsets: Any, positions: Any, shard: Shard, pairs: int) -> Part:  # noqa: ANN401
        """Write a part of the neighbours table."""
        kind = self.brief.kind
        lists = pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(positions).cast(kind))
        table = pa.table([pa.array(ids), lists], schema=neighbours(kind))
        return self.artifact.write_part(table, shard.shard, shard.shards, facts={"pairs": pairs}, layout=NEIGHBOURS)

    def _find(self, shard: Shard, plan: Plan) -> Part:
        group = shard.shard
        mine = self.samples.take(plan.rows(group))
        _, positions = self._positions(mine, plan.engine(group))
        narrow = positions.astype(self.brief.kind.to_pandas_dtype())
        runs = plan.slots[group] * narrow.itemsize
        buffers = [None, pa.py_buffer(runs), pa.py_buffer(narrow)]
        column = pa.Array.from_buffers(pa.large_binary(), len(runs) - 1, buffers)
        return self.artifact.write_part(
            pa.table({"positions": column}),
            group,
            shard.shards,
            self.brief.work_table,
            # One row for each part of the result, read by itself.
            layout=Layout("none", 1, {"positions": "PLAIN"}),
        )

    def _merge(self, shard: Shard, plan: Plan) -> Part:
        self._wait_for(plan.groups)
        part = shard.shard
        pieces = [self._piece(group, plan.groups, part) for group in range(plan.groups)]
        offsets, positions = merge(plan, part, self.samples.end, self.k, pieces)
        rows = slice(int(plan.edges[part]), int(plan.edges[part + 1]))
        pairs = int(self.samples.end[rows].sum(dtype=np.int64))
        made = self._write(self.ids[rows], offsets, positions, shard, pairs)
        self.setup.progress.report(0, f"merging into {plan.parts} parts")
        return made

    def _wait_for(self, groups: int) -> None:
        if self.waited:
            return
        artifact, pause = self.artifact, 0.1
        names = [artifact.part_name(g, groups, self.brief.work_table) for g in range(groups)]
        wanted = {f"{artifact.path}/{name}" for name in names}
        while not wanted <= set(artifact.storage.list(next(iter(wanted)).rpartition("/")[0])):
            time.sleep(pause)
            pause = min(2 * pause, 2.0)
        self.waited = True

    def _piece(self, group: int, groups: int, part: int) -> npt.NDArray[Any]:
        artifact, kind = self.artifact, self.brief.kind.to_pandas_dtype()
        name = artifact.part_name(group, groups, self.brief.work_table)
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
    index, asked, plan, told, left = _ready.options(num_returns=5).remote(artifact, data, vectors, experiment)
    with RemoteProgress("retrieve", 0, "pairs") as progress:
        # The pool starts while the work is cut: its workers take seconds to import what they need.
        threading.Thread(target=_expect, args=(progress, told), daemon=True).start()
        setup = Setup(artifact, experiment, resources.cpus, progress.handle, index, asked, plan, told)
        turns = max(TURNS, 8 * resources.workers)
        made = run_left(Retriever, {"setup": setup}, left, turns, resources)
    work: Brief = ray.get(told)
    parts = {s.shard: part for s, part in {**work.kept.made, **made}.items() if s.task == work.tasks - 1}
    return [parts[n] for n in sorted(parts)], {
        "samples": work.samples, "pairs": work.pairs, "longest_history": work.longest,
    }  # fmt: skip


def _expect(progress: RemoteProgress, told: Any) -> None:  # noqa: ANN401
    """Tell the bar how much there is to do, as soon as that is known."""
    with suppress(ray.exceptions.RayError):  # Which the workers meet as well.
        work: Brief = ray.get(told)
        progress.expect(work.pairs)
        progress.handle.kept(work.kept_pairs)
