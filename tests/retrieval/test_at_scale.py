"""Exactness at the size of the data sets: 10,000 targets of synthetic MovieLens-25M, and all of MovieLens-1M."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from benchmarks.retrieval import World
from rella.artifacts import Artifact, Manifest
from rella.config import ClusterConfig, DataConfig, Distance, Experiment, RetrieveConfig
from rella.data.questions import Neighbours
from rella.data.tables import Histories, Tables
from rella.retrieval.engines import Engine, top_k
from rella.storage import Storage
from tests.retrieval.worlds import Floats, clusters, gaussian

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

ML_1M = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "ml-1m"
KS = (5, 10, 15, 20, 25, 30, 40, 60, 80)
DISTANCES: tuple[Distance, ...] = ("cosine", "l2", "l1")
Ints = npt.NDArray[np.int32]


@numba.njit(parallel=True)
def _definition(
    stored: Floats, offset: Any, behaviours: Ints, user: Ints, item: Ints, end: Ints, k: int, kind: int, out: Ints
) -> None:
    """Float64 sums in index order over the stored float32; of equals the more recent. One sample a row of `out`."""
    for s in numba.prange(len(user)):
        history = behaviours[offset[user[s]] : offset[user[s]] + end[s]]
        x, scores = stored[item[s]], np.empty(len(history))
        for j in range(len(history)):
            h, total = stored[history[j]], 0.0
            for i in range(len(x)):
                a, b = np.float64(x[i]), np.float64(h[i])
                total += a * b if kind == 0 else (-(a - b) * (a - b) if kind == 1 else -abs(a - b))
            scores[j] = total
        # From the most recent to the oldest, sorted stably: equals stay in that order.
        order = np.argsort(-scores[::-1], kind="mergesort")
        for r in range(min(k, len(history))):
            out[s, r] = len(history) - 1 - order[r]


def definition(
    vectors: Floats, histories: Histories, columns: tuple[Ints, Ints, Ints], k: int, distance: Distance
) -> Ints:
    """(S, k), filled up with -1."""
    stored = vectors
    if distance == "cosine":
        wide = vectors.astype(np.float64)
        stored = (wide / np.sqrt((wide * wide).sum(axis=1, keepdims=True))).astype(np.float32)
    out = np.full((len(columns[0]), k), -1, np.int32)
    kind = {"cosine": 0, "l2": 1, "l1": 2}[distance]
    _definition(np.ascontiguousarray(stored), histories.offset, histories.item, *columns, k, kind, out)
    return out


def squared(offsets: npt.NDArray[np.int64], positions: npt.NDArray[Any], k: int) -> Ints:
    """Ragged rows as (S, k), filled up with -1."""
    counts = np.diff(offsets)
    out = np.full((len(counts), k), -1, np.int32)
    out[np.arange(k)[None, :] < counts[:, None]] = positions
    return out


@pytest.fixture(scope="module")
def world() -> World:
    return World.of(None)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("make", [gaussian, clusters], ids=lambda f: f.__name__)
def test_ten_thousand_targets_of_ml_25m(world: World, make: Any, distance: Distance) -> None:
    """The two engines and the mix of them, one and two threads, K from 5 to 80."""
    rng = np.random.default_rng(25)
    vectors = make(rng, world.items, 512)
    rows = np.sort(rng.choice(len(world.user), 10_000, replace=False))
    columns = (world.user[rows], world.item[rows], world.end[rows])
    right = definition(vectors, world.histories, columns, 80, distance)
    engines: list[Engine] = ["blocks", "auto"] if distance == "l1" else ["table", "blocks", "auto"]
    for k in KS:
        # Every K with one of the settings in turn, the smallest and the largest with all.
        settings = list(itertools.product(engines, (1, 2)))
        for engine, threads in settings if k in (5, 30, 80) else [settings[k % len(settings)]]:
            found = top_k(vectors, world.histories, *columns, k, distance, threads=threads, engine=engine)
            assert np.array_equal(squared(*found, k), right[:, :k]), (k, engine, threads)


@pytest.fixture(scope="module")
def ml_1m() -> Tables:
    from rella.data.samples import assemble
    from rella.data.sources import Source

    if not ML_1M.is_dir():
        pytest.skip("the MovieLens-1M files are not in ../shared/data/ml-1m")
    rules = DataConfig()
    return assemble(Source("ml-1m", str(ML_1M), None).load(rules), rules)


@pytest.fixture(scope="module")
def _ray() -> Iterator[None]:
    from rella.dist.session import session

    with session(ClusterConfig(gpu=False)):
        yield


def finished(storage: Storage, stage: str, tables: dict[str, pa.Table]) -> Artifact:
    artifact = Artifact(storage, f"ml-1m/{stage}/x-000000000000", "0" * 64)
    parts = [artifact.write_part(t, 0, 1, name) for name, t in tables.items()]
    artifact.finish(Manifest(stage, 1, "0" * 64, "ml-1m", {}, {}, {}, parts))
    return artifact


@pytest.mark.ray
@pytest.mark.usefixtures("_ray")
@pytest.mark.parametrize("distance", DISTANCES)
def test_all_of_ml_1m_by_one_and_by_two_workers(ml_1m: Tables, tmp_path: Path, distance: Distance) -> None:
    """The stage as jobs run it, cut in both ways: every position of every sample."""
    from rella.dist.dataset import TABLES
    from rella.dist.retrieve import retrieve
    from rella.dist.session import resources

    vectors = clusters(np.random.default_rng(1), len(ml_1m.items), 512)
    columns = tuple(ml_1m.samples[c].to_numpy() for c in ("user", "item", "end"))
    right = definition(vectors, ml_1m.histories(), columns, 80, distance)  # type: ignore[arg-type]
    storage = Storage(str(tmp_path))
    data = finished(storage, "prepare", {name: getattr(ml_1m, name) for name in TABLES})
    flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), 512)
    pca = finished(storage, "pca", {"": pa.table({"item": ml_1m.items["item"], "vector": flat})})
    for cut, workers in itertools.product(("samples", "targets"), (1, 2)):
        result = Artifact(storage, f"ml-1m/retrieve/{cut}-{workers}-000000000000", "1" * 64)
        rules = RetrieveConfig(cut=cut, k_max=80)  # type: ignore[arg-type]
        experiment = Experiment(retrieve=rules, distance=distance)
        parts, _ = retrieve(result, data, pca, experiment, resources(ClusterConfig(gpu=False, workers=workers)))
        result.finish(Manifest("retrieve", 1, "1" * 64, "ml-1m", {}, {}, {}, parts))
        found = Neighbours.from_table(result.read())
        assert np.array_equal(found.sample_id, ml_1m.samples["sample_id"].to_numpy())
        assert np.array_equal(squared(found.offsets, found.positions, 80), right), (cut, workers)
