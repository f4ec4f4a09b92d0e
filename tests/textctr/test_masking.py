"""Masks of stage A of PTab: 15%, of these 80/10/10, and a function of (seed, epoch, row) alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rella.textctr.ptab import Masking

MASKING = Masking(0.15, 4, 90, np.arange(5), 7)


def test_masking_statistics() -> None:
    ids = np.random.default_rng(0).integers(0, 90, (400, 500))
    shown, chosen = MASKING(ids, np.arange(400), 0)
    assert not chosen[ids < 5].any()
    assert np.array_equal(shown[~chosen], ids[~chosen])
    open_to_it = int((ids >= 5).sum())
    assert chosen.sum() / open_to_it == pytest.approx(0.15, abs=0.004)
    was, now = ids[chosen], shown[chosen]
    masked = now == 4
    # A random token may be the mask or the token itself: 1 of 90 each.
    assert masked.mean() == pytest.approx(0.8 + 0.1 / 90, abs=0.01)
    assert (now == was).mean() == pytest.approx(0.1 + 0.1 / 90, abs=0.008)
    counts = np.bincount(now[~masked & (now != was)], minlength=90)
    assert counts[[n for n in range(90) if n != 4]].min() > 0, "every token may come"
    assert counts.max() < 3 * counts.mean()
    # By row and by position: no stripes.
    for axis in (0, 1):
        shares = chosen.sum(axis) / (ids >= 5).sum(axis)
        assert abs(shares - 0.15).max() < 0.1
    assert abs(np.corrcoef(chosen[:-1].ravel(), chosen[1:].ravel())[0, 1]) < 0.01
    assert abs(np.corrcoef(chosen[:, :-1].ravel(), chosen[:, 1:].ravel())[0, 1]) < 0.01


def test_masks_are_a_function_of_seed_epoch_and_row() -> None:
    ids = np.random.default_rng(0).integers(5, 90, (6, 50))
    shown, chosen = MASKING(ids, np.array([3, 1, 4, 11, 5, 9]), 2)
    again, _ = MASKING(ids[[4, 0]], np.array([5, 3]), 2)
    assert np.array_equal(again, shown[[4, 0]])
    short, _ = MASKING(ids[:2, :20], np.array([3, 1]), 2)
    assert np.array_equal(short, shown[:2, :20])
    others = [
        MASKING(ids, np.array([3, 1, 4, 11, 5, 9]), 3)[1],
        MASKING(ids, np.array([2, 6, 5, 3, 8, 7]), 2)[1],
        replace(MASKING, seed=8)(ids, np.array([3, 1, 4, 11, 5, 9]), 2)[1],
    ]
    assert all((other != chosen).mean() > 0.1 for other in others)
    # Pinned: others would be another algorithm.
    assert [int(n) for n in np.flatnonzero(MASKING(ids[:1], np.array([0]), 0)[1][0])] == PINNED


PINNED = [5, 6, 8, 22, 36, 44, 45, 46]
