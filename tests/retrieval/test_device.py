"""The engine for GPUs, here on the processor: the same positions; on a card where there is one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from rella.config import Distance
from rella.retrieval import device
from rella.retrieval.engines import top_k
from rella.retrieval.index import Index, Samples
from tests.retrieval.worlds import MAKERS, Floats, clusters, near_ties, world

DISTANCES: tuple[Distance, ...] = ("cosine", "dot", "l2")


def same(vectors: Floats, lengths: list[int], samples: int, k: int, distance: Distance, where: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    histories, columns = world(rng, vectors, lengths, samples)
    offsets, right = top_k(vectors, histories, *columns, k, distance)
    out, pairs = np.full(len(right), -1, np.int32), list[int]()
    index = Index.of(vectors, histories, distance)
    device.run(index, Samples(*columns), k, offsets[:-1], out, pairs.append, where)
    assert np.array_equal(out, right)
    assert sum(pairs) == columns[2].sum()


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("make", MAKERS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("k", [5, 30])
def test_the_same_positions(make: Callable[..., Floats], distance: Distance, k: int) -> None:
    vectors = make(np.random.default_rng(k), 150, 140)
    same(vectors, [900, 3, 0, 1, 200, 60], 300, k, distance, "cpu", k)


@pytest.mark.parametrize(
    ("name", "value"), [("ROW_CELLS", 1), ("CELLS", 1), ("CELLS", 900), ("SPARE", 1), ("EXACT", 7)]
)
def test_how_work_is_cut_changes_nothing(name: str, value: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, name, value)
    same(near_ties(np.random.default_rng(1), 60, 40), [300, 8], 120, 6, "cosine", "cpu", 1)


def test_the_setting_of_matrix_products_is_put_back() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        same(clusters(np.random.default_rng(2), 50, 20), [90], 40, 4, "dot", "cpu", 2)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("make", MAKERS, ids=lambda f: f.__name__)
def test_the_same_positions_on_a_card(make: Callable[..., Floats], distance: Distance) -> None:
    vectors = make(np.random.default_rng(3), 3000, 512)
    same(vectors, [9000, 3, 0, 1, 2000, 600], 4000, 30, distance, "cuda", 3)
