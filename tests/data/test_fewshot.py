"""Few-shot sets: stable, nested, uniform, independent by purpose."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rella.data.fewshot import few_shot, mix64, sample_hash, subset, training_rows, twins_identical

IDS = np.arange(5, 100_005, dtype=np.int64)

GOLDEN_TRAIN = [32859, 39497, 46484, 63385, 70041]
GOLDEN_VALID = [11933, 58355, 84630, 87566, 96482]

id_lists = st.lists(st.integers(0, 2**62), min_size=1, max_size=50, unique=True)
seeds = st.integers(-(2**31), 2**63)


def test_mix64_is_splitmix64() -> None:
    assert mix64(np.array([0], dtype=np.uint64))[0] == 0xE220A8397B1DCDAF
    assert mix64(np.array([1234567], dtype=np.uint64))[0] == 6457827717110365317


def hash_in_plain_python(sample_id: int, seed: int, purpose: str) -> int:
    def mix(x: int) -> int:
        z = (x + 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    key = mix(seed % 2**64)
    for byte in purpose.encode():
        key = mix(key ^ byte)
    return mix((mix(sample_id ^ key) + key) % 2**64)


@given(ids=id_lists, seed=seeds)
def test_the_hash_is_the_documented_one(ids: list[int], seed: int) -> None:
    hashes = sample_hash(np.array(ids), seed, "train")
    assert hashes.tolist() == [hash_in_plain_python(i, seed, "train") for i in ids]


def test_the_chosen_ids_never_change() -> None:
    assert few_shot(IDS, 5, seed=42).tolist() == GOLDEN_TRAIN
    assert subset(IDS, 5, seed=42, purpose="valid").tolist() == GOLDEN_VALID


@given(ids=id_lists, seed=seeds, data=st.data())
def test_sets_are_nested_sorted_and_blind_to_the_order_of_the_ids(ids: list[int], seed: int, data) -> None:
    small, large = sorted(data.draw(st.tuples(*[st.integers(1, len(ids))] * 2)))
    inner, outer = (few_shot(np.array(ids), n, seed) for n in (small, large))
    assert len(inner) == small
    assert len(outer) == large
    assert set(inner.tolist()) <= set(outer.tolist()) <= set(ids)
    assert (np.diff(outer) > 0).all()
    shuffled = np.array(data.draw(st.permutations(ids)))
    assert np.array_equal(few_shot(shuffled, small, seed), inner)


@given(ids=id_lists, seed=seeds, data=st.data())
def test_a_shard_can_decide_on_its_own(ids: list[int], seed: int, data) -> None:
    n = data.draw(st.integers(1, len(ids)))
    chosen = few_shot(np.array(ids), n, seed)
    last = sample_hash(chosen, seed, "train").max()
    shard = np.array(ids[::2])
    from_shard = shard[sample_hash(shard, seed, "train") <= last]
    assert set(from_shard.tolist()) == set(chosen.tolist()) & set(ids[::2])


@pytest.mark.parametrize("n", ["all", None, len(IDS)])
def test_all(n: int | str | None) -> None:
    assert np.array_equal(few_shot(IDS[::-1], n, seed=1), IDS)


@pytest.mark.parametrize("seed", [0, 1, 42])
def test_a_set_is_uniform_over_the_ids(seed: int) -> None:
    chosen = few_shot(IDS, 20_000, seed)
    for bucket in ((chosen - 5) * 50 // len(IDS), chosen % 50):
        assert stats.chisquare(np.bincount(bucket, minlength=50)).pvalue > 1e-4


def test_every_sample_is_as_likely_as_any_other() -> None:
    ids = np.arange(100)
    times = sum(np.isin(ids, few_shot(ids, 20, seed)).astype(int) for seed in range(2000))
    # Without replacement: the counts vary by 1 - 20/100 less than a multinomial's.
    statistic = ((times - 400) ** 2 / 400).sum() / 0.8
    assert stats.chi2.sf(statistic, 99) > 1e-4
    assert stats.chi2.cdf(statistic, 99) > 1e-4


def test_seeds_and_purposes_are_independent() -> None:
    sets = [few_shot(IDS, 10_000, 0), few_shot(IDS, 10_000, 1)]
    sets += [subset(IDS, 10_000, 0, "valid"), subset(IDS, 10_000, 0, "test")]
    for n, one in enumerate(sets):
        for other in sets[:n]:
            # Hypergeometric: mean 1,000, standard deviation 28.5.
            assert abs(len(np.intersect1d(one, other)) - 1000) < 143


def test_impossible_sizes_name_both_numbers() -> None:
    with pytest.raises(ValueError, match="11 train samples are asked for, but there are 10"):
        few_shot(np.arange(10), 11, 0)
    with pytest.raises(ValueError, match="0 test samples are asked for, but there are 10"):
        subset(np.arange(10), 0, 0, "test")
    with pytest.raises(ValueError, match="sample id 3 occurs twice among the train samples"):
        few_shot(np.array([3, 1, 3]), 1, 0)


def test_mixtures() -> None:
    ids = np.array([4, 9])
    assert [a.tolist() for a in training_rows(ids, "original")] == [[4, 9], [False, False]]
    assert [a.tolist() for a in training_rows(ids, "retrieved")] == [[4, 9], [True, True]]
    assert [a.tolist() for a in training_rows(ids, "mixed")] == [[4, 4, 9, 9], [False, True, False, True]]
    assert training_rows(np.zeros(0, dtype=np.int64), "mixed")[0].tolist() == []
    with pytest.raises(ValueError, match="mix 'both' is none of"):
        training_rows(ids, "both")


def test_identical_twins() -> None:
    assert twins_identical(np.array([5, 30, 31, 100]), 30) == 0.5
    with pytest.raises(ValueError, match="undefined without samples"):
        twins_identical(np.zeros(0, dtype=np.int32), 30)
