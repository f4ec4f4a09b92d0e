"""The cost model sends work where it is cheaper, and the answers do not depend on where it went."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rella.retrieval import blocks, engines, table
from rella.retrieval.engines import by_row, pays_from, seconds, top_k
from rella.retrieval.index import Index, Samples
from tests.retrieval.worlds import gaussian, world


def test_a_row_of_a_large_catalogue_pays_for_frequent_targets_only() -> None:
    """MovieLens-1M has 3,706 items, MovieLens-25M 59,047."""
    assert 500 < pays_from(3706, 512, "cosine") < 5000
    assert 10_000 < pays_from(59_047, 512, "cosine") < 40_000
    assert pays_from(10_000_000, 512, "cosine") > 10**6
    assert pays_from(10, 512, "l1") == np.inf
    assert pays_from(100, 1, "cosine") > 100, "of one dimension no product is dearer than looking it up"


def test_every_target_goes_where_it_is_cheaper(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    vectors = gaussian(rng, 60, 16)
    histories, samples = world(rng, vectors, [40, 90], 300)
    pairs = np.bincount(samples[1], weights=samples[2], minlength=60)
    limit = float(np.median(pairs))
    monkeypatch.setattr(engines, "pays_from", lambda *_: limit)
    taken: dict[str, list[int]] = {"table": [], "blocks": []}
    for name, module in (("table", table), ("blocks", blocks)):
        monkeypatch.setattr(module, "run", counted(module.run, taken[name]))
    offsets, positions = top_k(vectors, histories, *samples, 7)
    assert sorted(set(taken["table"])) == sorted(np.flatnonzero(pairs > limit).tolist())
    assert len(taken["table"]) + len(taken["blocks"]) == 300
    assert not set(taken["table"]) & set(taken["blocks"])
    for engine in ("table", "blocks"):
        right = top_k(vectors, histories, *samples, 7, engine=engine)  # type: ignore[arg-type]
        assert np.array_equal(offsets, right[0])
        assert np.array_equal(positions, right[1])


def counted(real: Any, taken: list[int]) -> Any:
    def run(index: Any, samples: Samples, *rest: Any) -> None:
        taken.extend(samples.item.tolist())
        real(index, samples, *rest)

    return run


def test_the_expected_time_grows_with_the_work() -> None:
    rng = np.random.default_rng(2)
    vectors = gaussian(rng, 50, 64)
    histories, samples = world(rng, vectors, [4000], 2000)
    index, whole = Index.of(vectors, histories, "cosine"), Samples(*samples)
    half = whole.take(np.arange(1000))
    assert by_row(index, whole).all()
    assert seconds(index, whole)[0] == pytest.approx(50 * 50 * 64 * engines.GEMM * 1e-9)
    assert 0 < seconds(index, half)[1] < seconds(index, whole)[1]
    assert not by_row(Index.of(vectors, histories, "l1"), whole).any()
    assert seconds(Index.of(vectors, histories, "l1"), whole)[0] == 0


def test_items_without_a_vector_are_refused() -> None:
    """By compiled loops that would write beyond their arrays."""
    rng = np.random.default_rng(3)
    vectors = gaussian(rng, 10, 4)
    histories, (user, item, end) = world(rng, vectors, [6, 3], 5)
    with pytest.raises(IndexError, match="behaviour's item has no vector"):
        Index.of(vectors[: int(histories.item.max())], histories, "cosine")
    with pytest.raises(IndexError, match="sample's item has no vector"):
        by_row(Index.of(vectors, histories, "cosine"), Samples(user, item + np.int32(10), end))
