"""Cases for the engine on cards, run by test_device.py on numba's simulator: its threads are Python's, so all is small.

The simulator is chosen by an environment variable before numba is imported: in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numba import config

from rella.config import Distance
from rella.errors import InputError
from rella.retrieval import blocks, device
from rella.retrieval.engines import top_k
from rella.retrieval.index import Index, Samples
from tests.retrieval.worlds import MAKERS, Floats, gaussian, near_ties, world


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    assert config.ENABLE_CUDASIM, "run by test_device.py"
    monkeypatch.setattr(device, "SELECTING", 1)
    monkeypatch.setattr(device, "SETTLING", 1)


def same(vectors: Floats, k: int, distance: Distance) -> list[int]:
    """Compare the engine with the others; return how many samples each call left to the processor."""
    histories, columns = world(np.random.default_rng(k), vectors, [40, 3, 0, 1, 20], 6)
    offsets, right = top_k(vectors, histories, *columns, k, distance)
    left, run = list[int](), blocks.run

    def watched(index: Index, samples: Samples, *rest: Any) -> None:
        left.append(len(samples))
        run(index, samples, *rest)

    out, pairs = np.full(len(right), -1, np.int32), list[int]()
    index = Index.of(vectors, histories, distance)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "run", watched)
        device.run(index, Samples(*columns), k, offsets[:-1], out, pairs.append, "cpu")
    assert np.array_equal(out, right)
    assert sum(pairs) == columns[2].sum()
    return left


@pytest.mark.parametrize("make", MAKERS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("distance", "k"), [("cosine", 5), ("l2", 12)])
def test_the_same_positions(make: Callable[..., Floats], distance: Distance, k: int) -> None:
    same(make(np.random.default_rng(k), 25, 12), k, distance)


def test_threads_share_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "SELECTING", 3)
    monkeypatch.setattr(device, "SETTLING", 2)
    assert same(gaussian(np.random.default_rng(1), 25, 12), 5, "dot") == []


@pytest.mark.parametrize(("name", "value"), [("ROW_CELLS", 1), ("CHUNK", 1), ("PIECE", 7)])
def test_how_work_is_cut_changes_nothing(name: str, value: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, name, value)
    same(near_ties(np.random.default_rng(1), 25, 12), 6, "dot")


def test_what_has_too_many_candidates_is_left_to_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "HELD", 8)
    # All equal: whoever sees more than 8 behaviours has more than 8 candidates.
    assert same(np.ones((25, 12), np.float32), 5, "dot") == [1]
    assert same(gaussian(np.random.default_rng(0), 25, 12), 9, "dot") == [6]  # K itself is too many


def test_l1_is_refused() -> None:
    with pytest.raises(InputError, match="no matrix product"):
        same(gaussian(np.random.default_rng(0), 25, 12), 5, "l1")
