"""The cost model sends work where it is cheaper, and the answers do not depend on where it went."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rella.retrieval import blocks, engines, table
from rella.retrieval.engines import cheaper
from tests.retrieval.test_blocks import gaussian, world


def test_many_samples_of_a_small_catalogue_go_to_the_table() -> None:
    """MovieLens-1M: a million samples, 3,706 items."""
    assert cheaper(3706, 512, 3706, 970_009, 310_000_000, "cosine") == "table"
    assert cheaper(59_047, 512, 59_047, 24_187_390, 7_800_000_000, "cosine") == "table"


def test_few_samples_of_a_large_catalogue_go_to_the_blocks() -> None:
    assert cheaper(59_047, 512, 900, 1000, 300_000, "cosine") == "blocks"


def test_l1_has_one_engine() -> None:
    assert cheaper(3706, 512, 3706, 970_009, 310_000_000, "l1") == "blocks"


@pytest.mark.parametrize(("engine", "module"), [("table", table), ("blocks", blocks)])
def test_the_cheaper_one_does_the_work(engine: str, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    vectors = gaussian(rng, 60, 16)
    histories, samples = world(rng, vectors, [40, 90], 50)
    calls: list[int] = []
    real = module.top_k

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return real(*arguments)

    monkeypatch.setattr(module, "top_k", counted)
    monkeypatch.setattr(engines, "cheaper", lambda *arguments: engine)
    found = engines.top_k(vectors, histories, *samples, 7)
    assert calls == [1]
    right = blocks.top_k(vectors, histories, *samples, 7)
    assert all(np.array_equal(a, b) for a, b in zip(found, right, strict=True))


def test_no_samples_at_all() -> None:
    rng = np.random.default_rng(1)
    vectors = gaussian(rng, 6, 4)
    histories, samples = world(rng, vectors, [9], 3)
    offsets, positions = engines.top_k(vectors, histories, *(column[:0] for column in samples), 3)
    assert (offsets.tolist(), positions.tolist()) == ([0], [])
