"""The floor: shares shrunk towards the whole, in log-odds."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from rella.ctr.floor import Floor
from rella.data.selection import Chosen
from rella.errors import InputError


def rows(user: list[int], item: list[int], label: list[float]) -> Chosen:
    n = len(user)
    columns = (np.array(c, dtype=np.int32) for c in (user, item, [9] * n))
    return Chosen(np.arange(n), *columns, np.array(label))


def test_by_hand() -> None:
    train = rows([0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 0, 1])
    floor = Floor.fit(train, users=3, items=2, shrinkage=2)
    odds = lambda p: math.log(p / (1 - p))  # noqa: E731
    whole = odds(3 / 4)
    user, item = (2 + 2 * 0.75) / 4, (1 + 2 * 0.75) / 3
    expected = whole + (odds(user) - whole) + (odds(item) - whole)
    probabilities, logits = floor.predict(rows([0, 2], [0, 0], [0, 0]))
    assert probabilities.dtype == np.float64
    assert logits.dtype == np.float32
    assert logits[0] == pytest.approx(expected, rel=1e-6)
    assert logits[1] == pytest.approx(odds(item), rel=1e-6), "a new user adds nothing"
    assert probabilities[0] == pytest.approx(1 / (1 + math.exp(-expected)), rel=1e-6)


def test_rows_that_make_no_floor_are_refused() -> None:
    train = rows([0, 0], [0, 1], [1, 0])
    for label in ([1.0, 1.0], [1.0, np.nan]):
        with pytest.raises(InputError, match="both labels"):
            Floor.fit(replace(train, label=np.array(label)), 1, 2)
    with pytest.raises(InputError, match="shrinkage"):
        Floor.fit(train, 1, 2, shrinkage=0)
