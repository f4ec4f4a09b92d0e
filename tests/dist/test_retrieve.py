"""The stage on a real pool: cut by ranges or by target, the same table; what an earlier run left is kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from rella.artifacts import Artifact, Manifest, Part
from rella.config import ClusterConfig, Experiment, RetrieveConfig
from rella.data.questions import Neighbours
from rella.data.tables import Tables
from rella.errors import InputError, WorkerError
from rella.retrieval.engines import top_k
from rella.schemas import SAMPLES
from rella.storage import Storage
from tests.retrieval.worlds import clusters

pytestmark = pytest.mark.ray

ITEMS, USERS = 70, 60
SETTING: dict[str, Any] = {"k_max": 9, "shard_pairs": 100_000, "cut": "targets"}


@pytest.fixture(scope="module")
def _ray() -> Iterator[None]:
    from rella.dist.session import session

    with session(ClusterConfig()):
        yield


class Place:
    """A storage with a prepared data set and its vectors."""

    def __init__(self, folder: Path) -> None:
        rng = np.random.default_rng(1)
        self.storage = Storage(str(folder))
        self.vectors = clusters(rng, ITEMS, 24)
        self.tables = tables(rng)
        named = {n: getattr(self.tables, n) for n in ("users", "items", "interactions", "samples")}
        self.data = self.finished("prepare", named)
        item = pa.array(np.arange(ITEMS, dtype=np.int32))
        flat = pa.FixedSizeListArray.from_arrays(pa.array(self.vectors.reshape(-1)), 24)
        self.pca = self.finished("pca", {"": pa.table({"item": item, "vector": flat})})
        self.result = Artifact(self.storage, "d/retrieve/x-000000000000", "0" * 64)

    def finished(self, stage: str, named: dict[str, pa.Table]) -> Artifact:
        artifact = Artifact(self.storage, f"d/{stage}/x-000000000000", "0" * 64)
        parts = [artifact.write_part(t, 0, 1, n) for n, t in named.items()]
        artifact.finish(Manifest(stage, 1, "0" * 64, "d", {}, {}, {}, parts))
        return artifact

    def run(self, **options: Any) -> list[Part]:
        from rella.dist.retrieve import retrieve
        from rella.dist.session import resources

        experiment = Experiment(retrieve=RetrieveConfig(**{**SETTING, **options}))
        pool = resources(ClusterConfig(gpu=experiment.retrieve.gpu))
        parts, facts = retrieve(self.result, self.data, self.pca, experiment, pool)
        assert facts["samples"] == len(self.tables.samples)
        assert sum(p.facts["pairs"] for p in parts) == facts["pairs"]
        assert sum(p.rows for p in parts) == facts["samples"]
        return parts

    def work(self) -> dict[Path, int]:
        """What the groups have found and when, in nanoseconds."""
        found = Path(self.storage.uri, self.result.path).glob("parts/work-*/*.parquet")
        return {p: p.stat().st_mtime_ns for p in found}

    def read(self, parts: list[Part]) -> Neighbours:
        self.result.finish(Manifest("retrieve", 1, "0" * 64, "d", {}, {}, {}, parts))
        return Neighbours.from_table(self.result.read())


def tables(rng: np.random.Generator) -> Tables:
    count = rng.integers(0, 300, USERS).astype(np.int32)
    offset = np.cumsum(count) - count
    total = int(count.sum())
    item = np.minimum(rng.geometric(0.05, total) - 1, ITEMS - 1).astype(np.int32)
    user = np.repeat(np.arange(USERS, dtype=np.int32), count)
    end = (np.arange(total) - offset[user]).astype(np.int32)
    users = {"user": np.arange(USERS, dtype=np.int32), "user_id": [str(u) for u in range(USERS)]}
    return Tables(
        users=pa.table({**users, "offset": offset.astype(np.int64), "count": count}),
        items=pa.table({"item": np.arange(ITEMS, dtype=np.int32), "item_id": ["i"] * ITEMS, "title": ["t"] * ITEMS}),
        interactions=pa.table(
            {"item": item, "rating": np.ones(total, np.float32), "timestamp": np.arange(total, dtype=np.int64)}
        ),
        samples=pa.table(
            {
                "sample_id": np.arange(total, dtype=np.int64),
                "user": user,
                "item": item,
                "end": end,
                "label": pa.array(np.ones(total, np.int8)),
                "split": ["train"] * total,
            },
            schema=SAMPLES,
        ),
    )


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "storage")


def assert_right(place: Place, found: Neighbours) -> None:
    columns = [place.tables.samples[c].to_numpy() for c in ("user", "item", "end")]
    offsets, positions = top_k(place.vectors, place.tables.histories(), *columns, 9)
    assert np.array_equal(found.sample_id, place.tables.samples["sample_id"].to_numpy())
    assert np.array_equal(found.offsets, offsets)
    assert np.array_equal(found.positions, positions)
    assert found.positions.dtype == np.uint16


@pytest.mark.usefixtures("_ray")
def test_ranges_of_samples(place: Place) -> None:
    parts = place.run(cut="samples")
    assert 8 <= len(parts) <= 14
    assert place.work() == {}
    assert_right(place, place.read(parts))


@pytest.mark.usefixtures("_ray")
def test_by_target(place: Place) -> None:
    parts = place.run()
    assert len(parts) == 1
    assert 8 <= len(place.work()) <= 12
    assert_right(place, place.read(parts))
    assert place.work() == {}, "what was merged is dropped with the manifest"
    files = [f.name for f in Path(place.storage.uri, place.result.path).rglob("*") if f.is_file()]
    assert sorted(files) == ["manifest.json", "part-00000-of-00001.parquet"]


@pytest.mark.usefixtures("_ray")
def test_small_work_is_cut_into_ranges_by_itself(place: Place) -> None:
    assert 8 <= len(place.run(cut="auto")) <= 14
    assert place.work() == {}


@pytest.mark.usefixtures("_ray")
def test_what_groups_have_found_is_kept(place: Place) -> None:
    first = place.run()
    name = Path(place.storage.uri, place.result.path, first[0].name)
    whole, before = name.read_bytes(), place.work()
    name.unlink()
    damaged, gone, *_ = sorted(before)
    content = bytearray(damaged.read_bytes())
    content[60] ^= 1
    damaged.write_bytes(content)
    gone.unlink()
    place.run()
    after = place.work()
    assert {p for p in before if before[p] != after[p]} == {damaged, gone}
    assert name.read_bytes() == whole
    # With the parts there, nobody asks the groups again.
    for path in after:
        path.unlink()
    place.run()
    assert place.work() == {}
    # Another cut has other names.
    name.unlink()
    place.run(shard_pairs=60_000)
    assert not {p.parent for p in before} & {p.parent for p in place.work()}
    assert_right(place, place.read(place.run(shard_pairs=60_000)))


@pytest.mark.usefixtures("_ray")
def test_damage_between_finding_and_merging_is_named(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The group's file was whole when it was looked at, and is not when it is merged."""
    import ray

    from rella.dist import retrieve
    from rella.dist.remote_progress import RemoteProgress
    from rella.dist.session import resources

    place.run()
    victim = min(place.work())
    Path(place.storage.uri, place.result.path, "parts/part-00000-of-00001.parquet").unlink()
    with RemoteProgress("x", 1, "x") as progress:
        experiment = Experiment(retrieve=RetrieveConfig(**SETTING))
        made = retrieve._ready.options(num_returns=4).remote(place.data, place.pca, experiment)
        index, asked, plan, told = made
        work, pool = ray.get(told), resources(ClusterConfig(gpu=False))
        found = f"work-{work.digest}"
        setup = retrieve.Setup(place.result, index, asked, experiment, 299, 1, progress.handle, plan, found)
        content = bytearray(victim.read_bytes())
        content[100] ^= 1
        victim.write_bytes(content)
        monkeypatch.setattr(retrieve, "_is_found", lambda *_: True)
        with pytest.raises(WorkerError, match=rf"{victim.name} was damaged: start the job again"):
            retrieve._by_targets(setup, work, pool)


def test_l1_on_gpus_is_refused(place: Place) -> None:
    """Before anything starts."""
    from rella.dist.retrieve import retrieve
    from rella.dist.session import Resources

    experiment = Experiment(retrieve=RetrieveConfig(gpu=True), distance="l1")
    with pytest.raises(InputError, match=r"--retrieve.gpu: L1 is no matrix product"):
        retrieve(place.result, place.data, place.pca, experiment, Resources(1, 1, 1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.usefixtures("_ray")
def test_on_gpus(place: Place) -> None:
    assert_right(place, place.read(place.run(gpu=True)))
