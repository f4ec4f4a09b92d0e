"""Different genres among K behaviours: against sets, and on MovieLens-1M against Table 9."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest

from rella.analysis.heterogeneity import first_genres, recent_kinds, retrieved_kinds
from rella.config import DataConfig
from rella.data.questions import Neighbours
from rella.data.samples import assemble
from rella.data.sources import Source
from rella.data.tables import column
from rella.paper.numbers import K_LIST, numbers

RAW = Path(__file__).resolve().parents[3] / "shared" / "data" / "ml-1m"


def world(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    counts = rng.integers(1, 30, 40)
    offset = np.append(0, np.cumsum(counts))
    kinds = rng.integers(0, 70, offset[-1])
    user = rng.integers(0, 40, 300)
    end = rng.integers(0, counts[user] + 1)
    return kinds, offset[user], end


@pytest.mark.parametrize("k", [1, 5, 40])
def test_recent_behaviours_against_sets(k: int) -> None:
    kinds, first, end = world(np.random.default_rng(k))
    expected = [len(set(kinds[f : f + e][-k:].tolist())) for f, e in zip(first, end, strict=True)]
    assert recent_kinds(kinds, first, end, k).tolist() == expected


@pytest.mark.parametrize("k", [1, 4, 9])
def test_retrieved_behaviours_against_sets(k: int) -> None:
    rng = np.random.default_rng(k)
    kinds, first, end = world(rng)
    found = [rng.permutation(e)[:9] for e in end]
    ids = np.arange(300) * 3
    offsets = np.append(0, np.cumsum([len(f) for f in found]))
    neighbours = Neighbours(ids, offsets, np.concatenate(found).astype(np.uint8))
    some = rng.permutation(300)[:120]
    expected = [len(set(kinds[first[s] + found[s][:k]].tolist())) for s in some]
    got = retrieved_kinds(kinds, first[some], end[some], k, ids[some], neighbours)
    assert got.tolist() == expected


def test_the_paper_s_examples() -> None:
    """Appendix D.4: [Fiction, Comedy, Comedy, Family] has 3, [Fiction, Fiction, Child, Fiction] has 2."""
    genres = first_genres(["Fiction", "Comedy", "Family", "Child"])
    kinds = genres[[0, 1, 1, 2, 0, 0, 3, 0]]
    assert recent_kinds(kinds, np.array([0, 4]), np.array([4, 4]), 10).tolist() == [3, 2]


@pytest.mark.slow
@pytest.mark.skipif(not RAW.exists(), reason="needs MovieLens-1M in ../shared")
def test_the_first_row_of_table_9() -> None:
    data = DataConfig(positive_above=3.0)
    tables = assemble(Source("ml-1m", str(RAW)).load(data), data)
    kinds = first_genres(tables.items.column("genre").to_pylist())[column(tables.interactions, "item")]
    samples = tables.samples.filter(pc.equal(tables.samples.column("split"), "test"))
    first = column(tables.users, "offset")[column(samples, "user")]
    end = column(samples, "end")
    ours = [float(recent_kinds(kinds, first, end, k).mean()) for k in K_LIST]
    print([round(x, 3) for x in ours])
    np.testing.assert_allclose(ours, numbers()["table9"]["recent"], atol=0.02)
