"""AUC, log loss and accuracy (§4.1.2), the paired tests behind a table's `*`, and a bootstrap over users.

Labels are 0 or 1, probabilities those of label 1; everything is computed in float64 on all rows. A difference is always
first minus second. The rows of the paired tests are the same samples scored by two models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy  # its submodules come when they are first used, which takes half a second

from rella.errors import InputError

CLIP = 1e-15
"""Probabilities are clipped to [CLIP, 1 - CLIP] in the log loss."""

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Metrics:
    """The three metrics of §4.1.2 on one set of samples."""

    auc: float
    log_loss: float
    accuracy: float
    rows: int
    positives: int


@dataclass(frozen=True)
class PairedTest:
    """A test of the hypothesis that two models do equally well on the same samples."""

    test: str
    """`delong`, `bootstrap_users`, `paired_t` or `mcnemar`."""
    metric: str
    """`auc`, `log_loss` or `accuracy`."""
    difference: float
    """The first model's metric minus the second's."""
    standard_error: float
    """Of the difference."""
    statistic: float
    """The difference in standard errors (for McNemar, under the hypothesis)."""
    p_value: float
    """Two-sided."""


@dataclass(frozen=True)
class Estimate:
    """A metric with its uncertainty over users."""

    value: float
    """On the rows themselves."""
    standard_error: float
    low: float
    """2.5% quantile of the replicates."""
    high: float
    """97.5% quantile of the replicates."""


@dataclass(frozen=True)
class BootstrapEstimates:
    """The three metrics with their uncertainty over users."""

    auc: Estimate
    log_loss: Estimate
    accuracy: Estimate
    users: int
    replicates: int
    """Those with both classes, on which the estimates rest."""


def auc(labels: npt.ArrayLike, probabilities: npt.ArrayLike) -> float:
    """Return the area under the ROC curve: the chance that a positive outranks a negative, ties counted half.

    Args:
        labels: (S,) 0 or 1.
        probabilities: (S,) in [0, 1].

    Raises:
        InputError: a value or length is wrong, or all labels are the same and AUC is undefined.
    """
    y, (p,) = _checked(labels, probabilities)
    _both_classes(y)
    return _auc(y, p)


def _auc(labels: npt.NDArray[np.int8], probabilities: Array) -> float:
    from sklearn.metrics import roc_auc_score  # Slow to import, which a job's start need not wait for.

    return float(roc_auc_score(labels, probabilities))


def log_loss(labels: npt.ArrayLike, probabilities: npt.ArrayLike) -> float:
    """Return the mean binary cross-entropy (natural logarithm) of (S,) probabilities clipped to [1e-15, 1 - 1e-15].

    Raises:
        InputError: a value or length is wrong.
    """
    y, (p,) = _checked(labels, probabilities)
    return float(np.mean(_losses(y, p)))


def accuracy(labels: npt.ArrayLike, probabilities: npt.ArrayLike) -> float:
    """Return the share of (S,) samples predicted right; a probability of exactly 0.5 or more predicts label 1.

    Raises:
        InputError: a value or length is wrong.
    """
    y, (p,) = _checked(labels, probabilities)
    return float(np.mean(_right(y, p)))


def evaluate(labels: npt.ArrayLike, probabilities: npt.ArrayLike) -> Metrics:
    """Return the three metrics of (S,) labels and probabilities.

    Raises:
        InputError: a value or length is wrong, or all labels are the same and AUC is undefined.
    """
    y, (p,) = _checked(labels, probabilities)
    _both_classes(y)
    return Metrics(
        auc=_auc(y, p),
        log_loss=float(np.mean(_losses(y, p))),
        accuracy=float(np.mean(_right(y, p))),
        rows=len(y),
        positives=int(y.sum()),
    )


def relative_improvement(ours: float, baseline: float) -> float:
    """Return Table 2's `Rel.Impr` of two AUCs as a fraction, `ours / baseline - 1`: 0.8033 over 0.7915 is 1.49%.

    Raises:
        InputError: `baseline` is not positive.
    """
    if not baseline > 0:
        raise InputError(f"a relative improvement over {baseline} is undefined")
    return ours / baseline - 1


def delong(labels: npt.ArrayLike, first: npt.ArrayLike, second: npt.ArrayLike) -> PairedTest:
    """Test the difference of two correlated AUCs (DeLong et al. 1988) in O(S log S) (midranks, Sun and Xu 2014).

    Rows count as independent; where users have many rows `compare_auc_by_users` is the safer test.

    Args:
        labels: (S,) 0 or 1, at least two of each.
        first: (S,) probabilities of the first model.
        second: (S,) probabilities of the second model.

    Raises:
        InputError: a value or length is wrong, or a class has fewer than two rows.
    """
    y, scores = _checked(labels, first, second)
    _both_classes(y, at_least=2)
    positive_parts, negative_parts = zip(*(_placements(y == 1, score) for score in scores), strict=True)
    difference = float(positive_parts[0].mean() - positive_parts[1].mean())
    variance = sum(
        float(np.var(parts[0] - parts[1], ddof=1)) / len(parts[0]) for parts in (positive_parts, negative_parts)
    )
    return _normal_test("delong", "auc", difference, float(np.sqrt(variance)))


def paired_t(labels: npt.ArrayLike, first: npt.ArrayLike, second: npt.ArrayLike) -> PairedTest:
    """Test the difference of two log losses by a paired t-test on the rows' losses; arguments as in `delong`.

    Raises:
        InputError: a value or length is wrong, or there are fewer than two rows.
    """
    y, (p, q) = _checked(labels, first, second)
    if len(y) < 2:
        raise InputError("a paired t-test takes at least two rows")
    loss = _losses(y, p) - _losses(y, q)
    error = float(np.std(loss, ddof=1) / np.sqrt(len(y)))
    return _symmetric_test(
        "paired_t", "log_loss", float(loss.mean()), error, lambda t: float(2 * scipy.stats.t.sf(t, len(y) - 1))
    )


def mcnemar(labels: npt.ArrayLike, first: npt.ArrayLike, second: npt.ArrayLike) -> PairedTest:
    """Test the difference of two accuracies by McNemar's exact test; arguments as in `delong`.

    Only rows that exactly one model predicts right count: under the hypothesis either model is as likely to be it.

    Raises:
        InputError: a value or length is wrong.
    """
    y, (p, q) = _checked(labels, first, second)
    first_right, second_right = _right(y, p), _right(y, q)
    won, lost = int(np.sum(first_right & ~second_right)), int(np.sum(second_right & ~first_right))
    discordant, rows = won + lost, len(y)
    return PairedTest(
        test="mcnemar",
        metric="accuracy",
        difference=(won - lost) / rows,
        standard_error=float(np.sqrt(discordant - (won - lost) ** 2 / rows) / rows),
        statistic=float((won - lost) / np.sqrt(discordant)) if discordant else 0.0,
        p_value=min(1.0, float(2 * scipy.stats.binom.cdf(min(won, lost), discordant, 0.5))),
    )


def bootstrap_users(
    users: npt.ArrayLike,
    labels: npt.ArrayLike,
    probabilities: npt.ArrayLike,
    replicates: int = 200,
    seed: int = 0,
) -> BootstrapEstimates:
    """Return the three metrics with standard errors and 95% intervals over users.

    A replicate draws as many users as there are, with replacement, each with all its rows: rows of one user are not
    independent. Replicates with one class only are left out.

    Args:
        users: (S,) whose sample each row is, any ids.
        labels: (S,) 0 or 1.
        probabilities: (S,) in [0, 1].
        replicates: how many, at least 2.
        seed: of the draws.

    Raises:
        InputError: a value or length is wrong, AUC is undefined, or fewer than two replicates have both classes.
    """
    y, (p,) = _checked(labels, probabilities)
    _both_classes(y)
    user, size = _numbered(users, len(y))
    sums = np.stack([np.bincount(user, weights=w, minlength=size) for w in (_losses(y, p), _right(y, p), None)])
    aucs, drawn = _RepeatedAuc(user, y, p), []
    for weights in _draws(size, replicates, seed):
        loss, right, rows = (weights * sums).sum(axis=1)
        drawn.append((aucs.of(weights), loss / rows, right / rows))
    table = _defined(np.array(drawn, dtype=np.float64).reshape(-1, 3))
    whole = evaluate(y, p)
    values = (whole.auc, whole.log_loss, whole.accuracy)
    of_auc, of_loss, of_accuracy = (_estimate(value, column) for value, column in zip(values, table.T, strict=True))
    return BootstrapEstimates(of_auc, of_loss, of_accuracy, users=size, replicates=len(table))


def compare_auc_by_users(
    users: npt.ArrayLike,
    labels: npt.ArrayLike,
    first: npt.ArrayLike,
    second: npt.ArrayLike,
    replicates: int = 200,
    seed: int = 0,
) -> tuple[PairedTest, Estimate]:
    """Test the difference of two AUCs by a bootstrap over users, both models on the same draws.

    The p-value is the normal one of difference / bootstrap standard error: the share of replicates beyond 0 could not
    get below 1 / replicates, and the paper's level is 0.001. Arguments as in `bootstrap_users` and `delong`.

    Returns:
        The test, and the difference with its standard error and 95% interval.

    Raises:
        InputError: a value or length is wrong, AUC is undefined, or fewer than two replicates have both classes.
    """
    y, (p, q) = _checked(labels, first, second)
    _both_classes(y)
    user, size = _numbered(users, len(y))
    one, two = _RepeatedAuc(user, y, p), _RepeatedAuc(user, y, q)
    drawn = [(one.of(weights) - two.of(weights),) for weights in _draws(size, replicates, seed)]
    table = _defined(np.array(drawn, dtype=np.float64).reshape(-1, 1))
    estimate = _estimate(_auc(y, p) - _auc(y, q), table[:, 0])
    return _normal_test("bootstrap_users", "auc", estimate.value, estimate.standard_error), estimate


class _RepeatedAuc:
    """AUC under many weightings of the users, with everything sorted once.

    Positives and negatives are sorted by score. A positive beats the negatives before `low`, ties with those in
    [low, high): a weighted AUC is one cumulative sum over the negatives and one gather by the positives.
    """

    def __init__(self, user: npt.NDArray[np.intp], labels: npt.NDArray[np.int8], scores: Array) -> None:
        positive = np.flatnonzero(labels == 1)
        negative = np.flatnonzero(labels == 0)
        positive = positive[np.argsort(scores[positive])]
        negative = negative[np.argsort(scores[negative])]
        self._positive_user, self._negative_user = user[positive], user[negative]
        self._low = np.searchsorted(scores[negative], scores[positive], side="left")
        self._high = np.searchsorted(scores[negative], scores[positive], side="right")

    def of(self, weights: Array) -> float:
        """Return the AUC where user u counts `weights[u]` times; NaN if a class has no weight."""
        won = weights[self._positive_user]
        below = np.concatenate(([0.0], np.cumsum(weights[self._negative_user])))
        pairs = won.sum() * below[-1]
        if not pairs:
            return float("nan")
        # No dot product: BLAS threads on busy cores made it a hundred times slower than this sum.
        return float((won * (below[self._low] + below[self._high])).sum() / (2 * pairs))


def _draws(users: int, replicates: int, seed: int) -> Iterator[Array]:
    """Yield how often every user is drawn in each replicate: `replicates` arrays (U,)."""
    if replicates < 2:
        raise InputError(f"replicates is {replicates}; a standard error takes at least 2")
    generator = np.random.default_rng(seed)
    for _ in range(replicates):
        yield np.bincount(generator.integers(users, size=users), minlength=users).astype(np.float64)


def _defined(table: Array) -> Array:
    """Return the (B', M) replicates without NaN."""
    kept = table[np.isfinite(table).all(axis=1)]
    if len(kept) < 2:
        raise InputError(f"AUC is undefined in {len(table) - len(kept)} of {len(table)} replicates: too few users")
    return kept


def _estimate(value: float, replicates: Array) -> Estimate:
    low, high = np.quantile(replicates, [0.025, 0.975])
    return Estimate(value, float(np.std(replicates, ddof=1)), float(low), float(high))


def _placements(positive: npt.NDArray[np.bool_], scores: Array) -> tuple[Array, Array]:
    """Return DeLong's structural components V10 (P,) and V01 (N,).

    V10: the share of negatives that each positive outranks (ties half); V01: the share of positives that outrank each
    negative. A midrank among all minus the midrank in the own class counts the others below.
    """
    above, below = scores[positive], scores[~positive]
    rank = scipy.stats.rankdata(scores)
    v10 = (rank[positive] - scipy.stats.rankdata(above)) / len(below)
    v01 = 1 - (rank[~positive] - scipy.stats.rankdata(below)) / len(above)
    return v10, v01


def _normal_test(test: str, metric: str, difference: float, error: float) -> PairedTest:
    return _symmetric_test(test, metric, difference, error, lambda z: float(2 * scipy.stats.norm.sf(z)))


def _symmetric_test(
    test: str, metric: str, difference: float, error: float, two_sided: Callable[[float], float]
) -> PairedTest:
    """Return the test of difference / error; without any variance equal models have p = 1 and others p = 0."""
    without_variance = float(np.copysign(np.inf, difference)) if difference else 0.0
    statistic = difference / error if error > 0 else without_variance
    return PairedTest(test, metric, difference, error, statistic, two_sided(abs(statistic)))


def _losses(labels: npt.NDArray[np.int8], probabilities: Array) -> Array:
    p = np.clip(probabilities, CLIP, 1 - CLIP)
    return -np.where(labels == 1, np.log(p), np.log1p(-p))


def _right(labels: npt.NDArray[np.int8], probabilities: Array) -> npt.NDArray[np.bool_]:
    return np.equal(probabilities >= 0.5, labels == 1)


def _numbered(users: npt.ArrayLike, rows: int) -> tuple[npt.NDArray[np.intp], int]:
    """Return every row's user as a number below U, and U."""
    values = np.asarray(users)
    if values.shape != (rows,):
        raise InputError(f"users have shape {values.shape}, but there are {rows} labels")
    known, numbers = np.unique(values, return_inverse=True)
    return numbers, len(known)


def _checked(labels: npt.ArrayLike, *probabilities: npt.ArrayLike) -> tuple[npt.NDArray[np.int8], list[Array]]:
    """Return labels as int8 and each model's probabilities as float64 after checking shapes and values."""
    y = np.asarray(labels)
    if y.ndim != 1 or not len(y):
        raise InputError(f"labels have shape {y.shape}; expected one value per row and at least one row")
    wrong = ~np.isin(y, (0, 1))
    if wrong.any():
        row = int(np.argmax(wrong))
        raise InputError(f"labels must be 0 or 1; row {row} is {y[row]} ({int(wrong.sum())} such rows)")
    checked = []
    for values in probabilities:
        p = np.asarray(values, dtype=np.float64)
        if p.shape != y.shape:
            raise InputError(f"{len(y)} labels, but probabilities of shape {p.shape}")
        wrong = ~((p >= 0) & (p <= 1))  # NaN fails both comparisons
        if wrong.any():
            row = int(np.argmax(wrong))
            raise InputError(f"probabilities must be in [0, 1]; row {row} is {p[row]} ({int(wrong.sum())} such rows)")
        checked.append(p)
    return y.astype(np.int8), checked


def _both_classes(labels: npt.NDArray[np.int8], at_least: int = 1) -> None:
    positives = int(labels.sum())
    fewest = min(positives, len(labels) - positives)
    if not fewest:
        raise InputError(f"AUC is undefined: all {len(labels)} labels are {labels[0]}")
    if fewest < at_least:
        raise InputError(f"the variance of AUC is undefined with {fewest} row of one class; it takes {at_least}")
