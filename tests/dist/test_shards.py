from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from rella.artifacts import Artifact, Part
from rella.config import ClusterConfig
from rella.dist.shards import Shard, by_cost, cut, run_shards
from rella.storage import Storage


@pytest.mark.parametrize(("rows", "at_most"), [(0, 10), (1, 10), (63, 1000), (1000, 70), (100_000, 4096)])
def test_cut_covers_every_row_once_in_order(rows: int, at_most: int) -> None:
    shards = cut(3, rows, at_most)
    assert [row for s in shards for row in range(s.start, s.stop)] == list(range(rows))
    assert all(s.stop - s.start <= at_most for s in shards)
    assert [(s.task, s.shard, s.shards) for s in shards] == [(3, n, len(shards)) for n in range(len(shards))]


def test_the_number_of_shards_alone_says_where_the_cuts_are() -> None:
    """A part's name holds shard and number: two budgets that give the same number must give the same rows."""
    cost = np.random.default_rng(1).integers(1, 50, 40_000)
    for make in (lambda budget: cut(0, 40_000, budget), lambda budget: by_cost(0, cost, budget * 25)):
        seen: dict[int, list[Shard]] = {}
        for budget in range(3000, 5000, 50):
            shards = make(budget)
            assert seen.setdefault(len(shards), shards) == shards


def test_cost_is_shared_out_evenly() -> None:
    cost = np.random.default_rng(0).integers(1, 100, 10_000)
    shards = by_cost(0, cost, 50_000)
    sums = [int(cost[s.start : s.stop].sum()) for s in shards]
    assert sum(sums) == cost.sum()
    assert [s.start for s in shards[1:]] == [s.stop for s in shards[:-1]]
    assert shards[0].start == 0
    assert shards[-1].stop == len(cost)
    assert max(sums) < 50_000 + 100
    # One sample costlier than a whole shard does not break the cut.
    cost[17] = 10**6
    lonely = by_cost(0, cost, 50_000)
    assert [row for s in lonely for row in range(s.start, s.stop)] == list(range(len(cost)))


class Squares:
    """Writes its rows' squares, and leaves a trace of every shard that it was asked for."""

    def __init__(self, artifact: Artifact, traces: Path) -> None:
        self.artifact, self.traces = artifact, traces

    def run(self, shard: Shard) -> Part:
        (self.traces / str(shard.shard)).touch()
        rows = np.arange(shard.start, shard.stop, dtype=np.int64)
        table = pa.table({"row": rows, "square": rows**2})
        return self.artifact.write_part(table, shard.shard, shard.shards, facts={"rows": len(rows)})


@pytest.fixture(scope="module")
def _ray() -> Iterator[None]:
    from rella.dist.session import session

    with session(ClusterConfig(gpu=False)):
        yield


@pytest.mark.ray
@pytest.mark.usefixtures("_ray")
def test_parts_that_are_whole_are_kept_and_the_rest_is_done(tmp_path: Path) -> None:
    from rella.dist.session import resources

    artifact = Artifact(Storage(str(tmp_path / "storage")), "d/squares/x-000000000000", "0" * 64)
    traces = tmp_path / "traces"
    traces.mkdir()
    shards = cut(0, 1000, 130)
    setup = {"artifact": artifact, "traces": traces}
    pool = resources(ClusterConfig(gpu=False))
    first = run_shards(Squares, setup, [artifact], shards, pool)[0]
    assert sorted(int(p.name) for p in traces.iterdir()) == list(range(len(shards)))
    assert sum(p.rows for p in first) == 1000

    for trace in traces.iterdir():
        trace.unlink()
    folder = tmp_path / "storage" / artifact.path
    damaged = folder / first[2].name
    content = bytearray(damaged.read_bytes())
    content[40] ^= 1
    damaged.write_bytes(content)
    (folder / first[5].name).unlink()
    (folder / first[6].name).write_bytes(b"")
    kept: list[int] = []
    again = run_shards(Squares, setup, [artifact], shards, pool, lambda s: kept.append(s.shard))[0]
    assert sorted(int(p.name) for p in traces.iterdir()) == [2, 5, 6]
    assert sorted(kept) == [n for n in range(len(shards)) if n not in (2, 5, 6)]
    assert again == first


@pytest.mark.ray
@pytest.mark.usefixtures("_ray")
def test_progress_arrives_from_workers_and_stragglers_do_not_move_the_next_bar(
    capsys: pytest.CaptureFixture[str],
) -> None:
    import ray

    from rella.dist.remote_progress import RemoteProgress

    with RemoteProgress("first", 10, "rows") as first:
        first.handle.report(4)
    with RemoteProgress("second", 20, "rows") as second:
        first.handle.report(6)
        second.handle.report(3, "note")
        second.handle.kept(2)
        second.handle.report_at(0, 1)
        second.handle.end_at(0, 5)
        # The second source goes on from 4 of an earlier driver; what its group finds at a later start is this bar's.
        second.handle.report_at(1, 6, found=4)
        second.handle.report_at(1, 8, found=7)
        looked = ray.get(second.handle.counter.look.remote())
    assert looked == (3 + 2 + 5 + 8, "note", 2 + 4 + 4)


class Writer:
    """Computes under a lock and then "writes"; the part's facts say when each began and ended."""

    def __init__(self, artifact: Artifact) -> None:
        self.artifact, self.device = artifact, threading.Lock()

    def run(self, shard: Shard) -> Part:
        times = []
        with self.device:
            times.append(time.time())
            time.sleep(0.3)
            times.append(time.time())
        time.sleep(0.6)
        times.append(time.time())
        return self.artifact.write_part(
            pa.table({"row": [shard.start]}), shard.shard, shard.shards, facts={"times": times}
        )


@pytest.mark.ray
@pytest.mark.usefixtures("_ray")
def test_a_worker_of_two_threads_writes_while_it_computes_the_next(tmp_path: Path) -> None:
    from rella.dist.session import resources

    artifact = Artifact(Storage(str(tmp_path / "storage")), "d/writer/x-000000000000", "0" * 64)
    pool = resources(ClusterConfig(gpu=False), at_most=1)
    parts = run_shards(Writer, {"artifact": artifact}, [artifact], cut(0, 6, 1), pool, threads=2)[0]
    times = sorted(np.array([p.facts["times"] for p in parts]).tolist())
    pairs = list(itertools.pairwise(times))
    for (_, computed, _), (begun, _, _) in pairs:
        assert begun >= computed, "one at a time on the device"
    # Of five; a busy machine may begin one late, and one thread would begin all of them after the writing.
    assert sum(begun < written for (_, _, written), (begun, _, _) in pairs) >= 3, (
        "the next begins before this is written"
    )


@pytest.mark.ray
@pytest.mark.usefixtures("_ray")
def test_what_workers_say_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    from rella.dist.remote_progress import RemoteProgress

    with RemoteProgress("earlier", 10, "rows") as earlier:
        pass
    with RemoteProgress("embed", 10, "rows") as progress:
        for line in ("embed: out of memory", "embed: out of memory", "embed: again"):
            progress.handle.say(line)
        earlier.handle.say("of a stage that is over")
        time.sleep(0.8)
        progress.handle.say("embed: last")
    shown = [line for line in capsys.readouterr().err.splitlines() if "rows" not in line]
    assert shown == ["embed: out of memory", "embed: again", "embed: last"]


def _told(names: list[str]) -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in names}


@pytest.mark.ray
@pytest.mark.usefixtures("_ray")
def test_workers_of_a_local_session_have_their_environment_and_the_driver_keeps_its_own() -> None:
    import ray

    from rella.dist.session import worker_environment

    wanted = worker_environment(gpu=False) | {"RAY_USAGE_STATS_ENABLED": "0"}
    assert {"DS_ACCELERATOR", "ARROW_DEFAULT_MEMORY_POOL", "NUMBA_CACHE_DIR"} <= set(wanted)
    assert ray.get(ray.remote(num_cpus=0)(_told).remote(list(wanted))) == wanted
    assert os.environ.get("ARROW_DEFAULT_MEMORY_POOL") is None
