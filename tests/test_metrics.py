"""Metrics against values worked by hand, slow definitions and simulation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

from rella.metrics import (
    PairedTest,
    accuracy,
    auc,
    bootstrap_users,
    compare_auc_by_users,
    delong,
    evaluate,
    log_loss,
    mcnemar,
    paired_t,
    relative_improvement,
)

coarse = st.integers(0, 8).map(lambda n: n / 8)
"""Few values, so that ties are common."""


@st.composite
def scored(draw, at_least: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels with at least `at_least` of each class, and two models' probabilities."""
    labels = draw(st.lists(st.integers(0, 1), max_size=20)) + [0, 1] * at_least
    rows = len(labels)
    one, two = (draw(st.lists(coarse, min_size=rows, max_size=rows)) for _ in range(2))
    return np.array(labels), np.array(one), np.array(two)


def simulated(rows: int, seed: int, users: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Users, labels and two correlated models of nearly equal quality."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(rows) < 0.6).astype(np.int8)
    shared = 0.5 + 0.15 * labels + rng.normal(0, 0.2, rows)
    one, two = (np.clip(np.round(shared + rng.normal(0, 0.1, rows), 3), 0, 1) for _ in range(2))
    return rng.integers(0, users or rows, rows), labels, one, two


@pytest.mark.parametrize(
    ("labels", "probabilities", "expected"),
    [
        ([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8], 0.75),
        ([0, 1], [0.5, 0.5], 0.5),
        ([0, 0, 1], [0.2, 0.5, 0.5], 0.75),
        ([1, 1, 0], [0.0, 0.1, 1.0], 0.0),
        ([True, False], [1.0, 0.0], 1.0),
    ],
)
def test_auc_by_hand(labels: list[int], probabilities: list[float], expected: float) -> None:
    assert auc(labels, probabilities) == expected


@given(data=scored(at_least=1))
def test_auc_is_the_share_of_ordered_pairs(data: tuple[np.ndarray, ...]) -> None:
    labels, p, _ = data
    above, below = p[labels == 1][:, None], p[labels == 0][None, :]
    assert auc(labels, p) == pytest.approx(np.mean((above > below) + 0.5 * (above == below)), abs=1e-12)


def test_log_loss_by_hand() -> None:
    assert log_loss([1, 0], [0.8, 0.4]) == pytest.approx(-(np.log(0.8) + np.log(0.6)) / 2, rel=1e-15)
    assert log_loss([1], [0.0]) == pytest.approx(15 * np.log(10), rel=1e-12)
    assert log_loss([0], [1.0]) == pytest.approx(15 * np.log(10), rel=1e-4)  # 1 - 1e-15 is not exact in float64
    assert log_loss([1, 0], [1.0, 0.0]) == pytest.approx(1e-15, rel=0.2)
    assert log_loss([0], np.array([1 - 2**-20], dtype=np.float32)) == pytest.approx(20 * np.log(2), rel=1e-12)


def test_half_predicts_a_positive() -> None:
    assert accuracy([1, 1, 1, 0], [0.5, 0.5, 0.49, 0.5]) == 0.5
    assert accuracy([1], [0.5]) == 1


def test_evaluate_is_the_three_together() -> None:
    metrics = evaluate([0, 0, 1, 1, 1], [0.1, 0.6, 0.35, 0.8, 0.6])
    assert (metrics.rows, metrics.positives) == (5, 3)
    assert metrics.auc == pytest.approx(4.5 / 6)
    assert metrics.accuracy == pytest.approx(0.6)
    assert metrics.log_loss == log_loss([0, 0, 1, 1, 1], [0.1, 0.6, 0.35, 0.8, 0.6])


@pytest.mark.parametrize(
    ("ours", "baseline", "percent"),
    # Table 2: few-shot ReLLa against DeepFM on BookCrossing and MovieLens-1M and SIM on MovieLens-25M, zero-shot ReLLa
    # against Vicuna-13B on MovieLens-25M.
    [(0.7575, 0.7496, 1.05), (0.8033, 0.7915, 1.49), (0.8477, 0.8344, 1.59), (0.7324, 0.7503, -2.39)],
)
def test_relative_improvements_of_table_2(ours: float, baseline: float, percent: float) -> None:
    assert round(100 * relative_improvement(ours, baseline), 2) == percent


def slow_delong(labels: np.ndarray, one: np.ndarray, two: np.ndarray) -> tuple[float, float]:
    """The definition: the covariance matrix of the structural components, from all pairs."""
    kernels = []
    for p in (one, two):
        above, below = p[labels == 1][:, None], p[labels == 0][None, :]
        kernels.append((above > below) + 0.5 * (above == below))
    s10 = np.cov([k.mean(axis=1) for k in kernels])
    s01 = np.cov([k.mean(axis=0) for k in kernels])
    s = s10 / kernels[0].shape[0] + s01 / kernels[0].shape[1]
    return kernels[0].mean() - kernels[1].mean(), float(s[0, 0] + s[1, 1] - 2 * s[0, 1])


@settings(deadline=None)
@given(data=scored())
def test_delong_against_its_definition(data: tuple[np.ndarray, ...]) -> None:
    difference, variance = slow_delong(*data)
    test = delong(*data)
    assert test.difference == pytest.approx(difference, abs=1e-12)
    assert test.standard_error**2 == pytest.approx(variance, abs=1e-12)
    assert 0 <= test.p_value <= 1


def test_delong_by_hand() -> None:
    # First model: V10 = (1, 1/2), V01 = (1/2, 1); second: all 1/2. Differences (1/2, 0) and (0, 1/2), each of
    # variance 1/8 over 2 rows: 1/16 + 1/16 = 1/8.
    test = delong([1, 1, 0, 0], [0.9, 0.5, 0.6, 0.4], [0.5, 0.5, 0.5, 0.5])
    assert test.difference == pytest.approx(0.25)
    assert test.standard_error == pytest.approx(np.sqrt(1 / 8))
    assert test.p_value == pytest.approx(2 * stats.norm.sf(0.25 / np.sqrt(1 / 8)))


def test_delong_without_variance() -> None:
    labels, p = [0, 0, 1, 1], np.array([0.1, 0.2, 0.8, 0.9])
    same = delong(labels, p, p)
    assert (same.difference, same.statistic, same.p_value) == (0, 0, 1)
    opposite = delong(labels, 1 - p, p)
    assert (opposite.difference, opposite.statistic, opposite.p_value) == (-1, -np.inf, 0)


@pytest.mark.parametrize("test", [delong, paired_t, mcnemar])
def test_equal_models_are_rejected_as_often_as_the_level_says(test: Callable[..., PairedTest]) -> None:
    p_values = np.array([test(*simulated(300, seed)[1:]).p_value for seed in range(400)])
    # Binomial(400, 0.05) has a standard deviation of 1.1%; McNemar's exact test is conservative.
    assert 0.005 <= np.mean(p_values < 0.05) <= 0.09


def test_paired_t_is_scipys_on_the_rows_losses() -> None:
    _, labels, one, two = simulated(500, seed=3)
    losses = [np.array([log_loss([y], [q]) for y, q in zip(labels, p, strict=True)]) for p in (one, two)]
    expected = stats.ttest_rel(*losses)
    test = paired_t(labels, one, two)
    assert test.statistic == pytest.approx(expected.statistic)
    assert test.p_value == pytest.approx(expected.pvalue)
    assert test.difference == pytest.approx(log_loss(labels, one) - log_loss(labels, two))
    assert paired_t(labels, one, one).p_value == 1


def test_mcnemar_by_hand() -> None:
    # 8 rows only the first gets right, 2 only the second, 5 both, 5 neither.
    labels = np.ones(20, dtype=int)
    one = np.array([0.9] * 8 + [0.1] * 2 + [0.9] * 5 + [0.1] * 5)
    two = np.array([0.1] * 8 + [0.9] * 2 + [0.9] * 5 + [0.1] * 5)
    test = mcnemar(labels, one, two)
    assert test.difference == pytest.approx(6 / 20)
    assert test.p_value == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert test.statistic == pytest.approx(6 / np.sqrt(10))
    assert test.standard_error == pytest.approx(np.sqrt(10 - 36 / 20) / 20)
    assert mcnemar(labels, two, one).difference == pytest.approx(-6 / 20)
    same = mcnemar(labels, one, one)
    assert (same.p_value, same.statistic, same.standard_error) == (1, 0, 0)


def test_mcnemar_is_scipys_binomial_test() -> None:
    _, labels, one, two = simulated(400, seed=5)
    right = [(p >= 0.5) == (labels == 1) for p in (one, two)]
    won, lost = int(np.sum(right[0] & ~right[1])), int(np.sum(right[1] & ~right[0]))
    assert won + lost > 20
    assert mcnemar(labels, one, two).p_value == pytest.approx(stats.binomtest(won, won + lost).pvalue)


def replicates_row_by_row(
    users: np.ndarray, columns: list[np.ndarray], count: int, seed: int
) -> list[list[np.ndarray]]:
    """Every replicate's columns with the drawn users' rows written out."""
    rng = np.random.default_rng(seed)
    known = np.unique(users)
    rows_of = [np.flatnonzero(users == user) for user in known]
    drawn = [np.concatenate([rows_of[u] for u in rng.integers(len(known), size=len(known))]) for _ in range(count)]
    return [[column[rows] for column in columns] for rows in drawn]


def test_bootstrap_is_the_metrics_of_the_drawn_rows() -> None:
    users, labels, p, _ = simulated(400, seed=5, users=40)
    result = bootstrap_users(users, labels, p, replicates=50, seed=7)
    metrics = [evaluate(y, q) for y, q in replicates_row_by_row(users, [labels, p], 50, 7)]
    assert (result.users, result.replicates) == (len(np.unique(users)), 50)
    whole = evaluate(labels, p)
    for name in ("auc", "log_loss", "accuracy"):
        values = np.array([getattr(m, name) for m in metrics])
        estimate = getattr(result, name)
        assert estimate.value == pytest.approx(getattr(whole, name), rel=1e-12)
        assert estimate.standard_error == pytest.approx(values.std(ddof=1), rel=1e-9)
        assert (estimate.low, estimate.high) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])), rel=1e-9)


def test_bootstrap_of_a_difference_draws_the_same_users_for_both() -> None:
    users, labels, one, two = simulated(400, seed=6, users=40)
    test, estimate = compare_auc_by_users(users, labels, one, two, replicates=50, seed=7)
    values = [
        roc_auc_score(y, p) - roc_auc_score(y, q) for y, p, q in replicates_row_by_row(users, [labels, one, two], 50, 7)
    ]
    assert test.standard_error == pytest.approx(np.std(values, ddof=1), rel=1e-9)
    assert test.difference == pytest.approx(auc(labels, one) - auc(labels, two))
    assert test.p_value == pytest.approx(2 * stats.norm.sf(abs(test.difference) / test.standard_error))
    assert estimate.low <= estimate.value <= estimate.high


def test_bootstrap_agrees_with_delong_where_every_row_is_a_user_of_its_own() -> None:
    _, labels, one, two = simulated(3000, seed=8)
    rows = np.arange(len(labels))
    by_users, _ = compare_auc_by_users(rows, labels, one, two, replicates=1000)
    assert by_users.standard_error == pytest.approx(delong(labels, one, two).standard_error, rel=0.1)
    error = bootstrap_users(rows, labels, one, replicates=1000).accuracy.standard_error
    share = accuracy(labels, one)
    assert error == pytest.approx(np.sqrt(share * (1 - share) / 3000), rel=0.1)


def test_more_rows_of_the_same_users_do_not_narrow_the_interval() -> None:
    _, labels, p, _ = simulated(200, seed=9)
    once = bootstrap_users(np.arange(200), labels, p, seed=1)
    often = bootstrap_users(np.repeat(np.arange(200), 10), np.repeat(labels, 10), np.repeat(p, 10), seed=1)
    assert often.auc.standard_error == pytest.approx(once.auc.standard_error)


def test_bootstrap_takes_any_user_ids_and_is_seeded() -> None:
    users, labels, p, _ = simulated(200, seed=10, users=30)
    number = bootstrap_users(users, labels, p, seed=2)
    text = bootstrap_users(np.char.add("u", np.char.zfill(users.astype(str), 3)), labels, p, seed=2)
    assert number == text
    assert bootstrap_users(users, labels, p, seed=3) != number


def test_replicates_of_one_class_are_left_out() -> None:
    result = bootstrap_users([0, 1, 2], [0, 1, 1], [0.2, 0.7, 0.1], replicates=100)
    assert 50 < result.replicates < 90  # a replicate has both classes with 1 - (8 + 1) / 27 = 2 / 3
    assert np.isfinite(result.auc.standard_error)


ONE_CLASS_SEED = 15
"""Its first four draws of two users take one of them twice."""

PAIR = ([0, 1], [0.2, 0.7])


@pytest.mark.parametrize("metric", [auc, log_loss, accuracy, evaluate])
@pytest.mark.parametrize(
    ("labels", "probabilities", "message"),
    [
        ([0, 1], [0.1, np.nan], r"probabilities must be in \[0, 1\]; row 1 is nan \(1 such rows\)"),
        ([0, 1], [1.5, 0.2], "row 0 is 1.5"),
        ([0, 1], [-0.1, 0.2], "row 0 is -0.1"),
        ([0, 1], [0.1], r"2 labels, but probabilities of shape \(1,\)"),
        ([0, 2], [0.1, 0.2], "labels must be 0 or 1; row 1 is 2"),
        ([0, np.nan], [0.1, 0.2], "labels must be 0 or 1; row 1 is nan"),
        ([0, None], [0.1, 0.2], "labels must be 0 or 1; row 1 is None"),
        ([], [], r"labels have shape \(0,\)"),
        ([[0, 1]], [[0.1, 0.2]], r"labels have shape \(1, 2\)"),
    ],
)
def test_faulty_input(metric: Callable[..., object], labels: list, probabilities: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metric(labels, probabilities)


@pytest.mark.parametrize("label", [0, 1])
def test_auc_of_one_class_is_undefined(label: int) -> None:
    labels, p = [label] * 3, [0.1, 0.2, 0.3]
    message = f"AUC is undefined: all 3 labels are {label}"
    for call in (
        lambda: auc(labels, p),
        lambda: evaluate(labels, p),
        lambda: delong(labels, p, p),
        lambda: bootstrap_users([1, 2, 3], labels, p),
        lambda: compare_auc_by_users([1, 2, 3], labels, p, p),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert log_loss(labels, p) > 0


def test_impossible_requests() -> None:
    with pytest.raises(ValueError, match="undefined with 1 row of one class"):
        delong(*PAIR, [0.1, 0.2])
    with pytest.raises(ValueError, match="at least two rows"):
        paired_t([1], [0.5], [0.4])
    with pytest.raises(ValueError, match=r"users have shape \(3,\), but there are 2 labels"):
        bootstrap_users([1, 2, 3], *PAIR)
    with pytest.raises(ValueError, match="replicates is 1"):
        bootstrap_users([1, 2], *PAIR, replicates=1)
    with pytest.raises(ValueError, match="AUC is undefined in 4 of 4 replicates: too few users"):
        compare_auc_by_users([1, 2], *PAIR, [0.1, 0.2], replicates=4, seed=ONE_CLASS_SEED)
    with pytest.raises(ValueError, match=r"over 0\.0 is undefined"):
        relative_improvement(0.5, 0.0)


def test_a_hundred_thousand_rows_take_seconds() -> None:
    users, labels, p, q = simulated(100_000, seed=11, users=1000)
    result = bootstrap_users(users, labels, p)
    assert result.replicates == 200
    assert 0 < result.auc.standard_error < 0.01
    test, _ = compare_auc_by_users(users, labels, p, q)
    assert test.standard_error < result.auc.standard_error
