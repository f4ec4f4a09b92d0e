"""What ranks do together, where there is one; with two of them see the fits' tests, which start processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rella.lm.ranks import from_first, join_shares, newest_state, write_on_first


def test_shares_come_to_their_rows() -> None:
    cpu = torch.device("cpu")
    found = join_shares(np.array([[1.0, 2.0], [3.0, 4.0]], np.float32), np.array([2, 0]), 3, 1, cpu)
    assert found.tolist() == [[3.0, 4.0], [0.0, 0.0], [1.0, 2.0]]
    assert join_shares(np.array([5.0], np.float32), slice(1, 2), 2, 1, cpu).tolist() == [0.0, 5.0]


def test_rank_0_writes_and_its_fault_is_raised() -> None:
    written: list[int] = []
    write_on_first(lambda: written.append(1), 0, 1)
    write_on_first(lambda: written.append(2), 1, 1)
    assert written == [1]

    def full() -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_on_first(full, 0, 1)
    assert from_first("x", 1) == "x"
    assert newest_state(None, 0, 1) is None
