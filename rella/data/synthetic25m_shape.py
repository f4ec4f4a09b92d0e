"""Who rates how much and what is rated how often in the synthetic MovieLens-25M: sizes, weights and the draw itself.

User sizes are quantiles of a shifted lognormal and item counts an interpolated popularity curve, both with exact sums.
Which user rates which item follows one model, P(item i in user u) = 1 - exp(-w_i t_u), fitted to both. Items with few
ratings are dealt out exactly; the others are drawn without replacement from their weights. A user's draw depends on the
user's own random stream alone, so a sub-sample of users costs only its own ratings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt
from scipy.special import ndtri

from rella.errors import InputError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Items = npt.NDArray[np.int32]
Words = npt.NDArray[np.uint64]

EXACT_BELOW = 32
"""Items with fewer ratings get exactly that many; the others' numbers scatter by about their square root."""
MOST_DRAWN = 0.8
"""A user draws at most this part of the frequent items (those that are not dealt out exactly)."""
BINS = 20
"""Bins of user sizes per factor e, for the fit of the weights."""
FIRST, LAST = 789_652_009, 1_574_320_000
"""Seconds of the first and the last possible start of a session, in January 1995 and November 2019."""
DAY = 86_400
BIAS, QUALITY = 0.45, 0.45
"""Parts of a standard normal score that belong to the user and to the item (standard deviations)."""


@dataclass(frozen=True)
class Shape:
    """How large the data set is and how uneven; the defaults are the summary figures of MovieLens-25M.

    Raises:
        InputError: the figures contradict each other.
    """

    ratings: int = 25_000_095
    users: int = 162_541
    shortest: int = 20
    """Ratings of the user with the fewest."""
    longest: int = 32_202
    """Ratings of the user with the most."""
    spread: float = 1.255
    """Standard deviation of the logarithm of a user's ratings beyond `shortest`."""
    items: int = 59_047
    """Items that somebody rates."""
    listed: int = 62_423
    """Items in movies.csv."""
    largest_id: int = 209_171
    """No movieId is larger."""
    popularity: tuple[tuple[int, int], ...] = (
        (1, 81_491),
        (590, 10_000),
        (3_790, 1_000),
        (10_300, 100),
        (24_300, 10),
        (48_547, 2),
        (59_047, 1),
    )
    """(rank, ratings) of items from the most rated to the last; between them the curve is interpolated."""
    twins: int = 89
    """Rated items that share their title with another one."""
    stars: tuple[float, ...] = (1.57, 3.11, 1.60, 6.57, 5.05, 19.59, 12.72, 26.56, 8.80, 14.43)
    """Per cent of the ratings that are 0.5, 1.0 ... 5.0."""

    def __post_init__(self) -> None:
        ranks, counts = zip(*self.popularity, strict=True)
        wrong = {
            "users": not self.users * self.shortest < self.ratings < self.users * self.longest,
            "longest": not 1 <= self.shortest < self.longest < self.items,
            "listed": not self.items <= self.listed <= self.largest_id * 4 // 5 < 1 << 20,
            "popularity": (ranks[0], ranks[-1]) != (1, self.items)
            or list(ranks) != sorted(set(ranks))
            or list(counts) != sorted(counts, reverse=True)
            or not 1 <= counts[-1] <= counts[0] <= self.users,
            "twins": self.twins * 2 > self.items,
            "stars": len(self.stars) != 10 or min(self.stars) <= 0.0,
        }
        if any(wrong.values()):
            raise InputError(f"{self}: no such data set, see {', '.join(n for n, bad in wrong.items() if bad)}")


ML_25M = Shape()
"""The original's shape."""


def stream(seed: int, use: int) -> np.random.Generator:
    """Return the random numbers of one use (a small number of its own) under a seed.

    Raises:
        InputError: the seed is negative.
    """
    if seed < 0:
        raise InputError(f"seed {seed}: a seed is 0 or larger")
    return np.random.Generator(np.random.PCG64([seed, 25, use]))


def user_sizes(shape: Shape) -> Ints:
    """Return the (U,) int64 numbers of ratings of the users, about ascending; sum and bounds are exact.

    Raises:
        InputError: no numbers within the bounds have the sum.
    """
    base = np.exp(shape.spread * ndtri((np.arange(shape.users) + 0.5) / shape.users))

    def sizes(scale: float) -> Ints:
        found = np.minimum(shape.shortest + np.floor(scale * base), shape.longest).astype(np.int64)
        found[0], found[-1] = shape.shortest, shape.longest
        return found

    low, high = 0.0, shape.longest / float(base[0])
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if sizes(middle).sum() > shape.ratings else (middle, high)
    found = sizes(low)
    missing = shape.ratings - int(found.sum())
    if not 0 <= missing <= shape.users - 2:
        raise InputError(f"{shape.users} users cannot have {shape.ratings} ratings with the longest {shape.longest}")
    found[1 : 1 + missing] += 1
    return found


def item_counts(shape: Shape) -> Ints:
    """Return the (I,) int64 numbers of ratings that the items shall have, the most rated first, with the exact sum.

    In log-log the curve bows between its anchors, all pieces alike; the sum decides how much.

    Raises:
        InputError: no bow gives the sum.
    """
    at, value = np.log(np.array(shape.popularity, np.float64)).T
    rank = np.log(np.arange(1, shape.items + 1))
    piece = np.clip(np.searchsorted(at, rank, side="right") - 1, 0, len(at) - 2)
    drop = value[piece] - value[piece + 1]
    along = (rank - at[piece]) / (at[piece + 1] - at[piece])

    def counts(bow: float) -> Ints:
        curve = value[piece] - drop * along + bow * drop * along * (1.0 - along)
        return np.floor(np.exp(curve) * (1.0 + 1e-12)).astype(np.int64)  # an anchor stays what it is

    low, high = -1.0, 1.0  # beyond, the curve would not fall everywhere
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if counts(middle).sum() > shape.ratings else (middle, high)
    found = counts(low)
    missing = shape.ratings - int(found.sum())
    if not 0 <= missing <= shape.items // 2:
        least, most = (int(counts(bow).sum()) for bow in (-1.0, 1.0))
        raise InputError(f"the popularity curve gives {least} to {most} ratings, not {shape.ratings}")
    found[1 : 1 + missing] += 1
    return found


def movie_ids(rng: np.random.Generator, shape: Shape) -> tuple[Ints, Ints]:
    """Return all movieIds, (M,) ascending, and which of them somebody rates, (I,) ascending rows."""
    early = shape.listed // 7  # ids that were given out one after the other, with few gaps
    dense = early * 11 // 10
    ids = np.concatenate(
        [
            rng.choice(dense, early, replace=False),
            dense + rng.choice(shape.largest_id - dense, shape.listed - early, replace=False),
        ]
    )
    return np.sort(ids) + 1, np.sort(rng.choice(shape.listed, shape.items, replace=False))


def fit(sizes: Ints, counts: Ints) -> tuple[Floats, Floats]:
    """Return the weights of the items, (I,) float64, and how many of a user's ratings are dealt out, (U,) float64.

    The model is fitted for groups: items with equal counts, users of about equal sizes. Each sweep is one Newton step
    for the users' t and one for the items' w.
    """
    count, group, items = np.unique(counts, return_inverse=True, return_counts=True)
    _, bin_of, users = np.unique(np.floor(np.log(sizes) * BINS), return_inverse=True, return_counts=True)
    size = np.bincount(bin_of, weights=sizes) / users
    w, t = count / counts.sum(), size.copy()
    for _ in range(16):  # twelve are enough
        absent = np.exp(-np.outer(w, t))
        step = (size - items @ (1.0 - absent)) / ((items * w) @ absent)
        t = np.maximum(t + step, t / 4)  # a step from the far side of the root may be too long
        absent = np.exp(-np.outer(w, t))
        step = (count - (1.0 - absent) @ users) / (absent @ (users * t))
        w = np.maximum(w + step, w / 4)
    dealt = items * np.where(count < EXACT_BELOW, 1.0, 1.0 / count)
    of_bin = dealt @ (1.0 - np.exp(-np.outer(w, t)))
    # In the model the largest user rates nearly all frequent items; the draw needs some to choose from.
    least = sizes - MOST_DRAWN * (counts >= EXACT_BELOW).sum()
    return w[group], np.maximum((of_bin / size)[bin_of] * sizes, least)


def deal(rng: np.random.Generator, sizes: Ints, counts: Ints, expected: Floats) -> tuple[Ints, Items]:
    """Deal out all ratings of the rare items and one of every other item, so that each is rated.

    Args:
        rng: decides who gets what.
        sizes: (U,) ratings of each user.
        counts: (I,) ratings of each item.
        expected: (U,) how many each user should get, about.

    Returns:
        offsets (U + 1,) int64 and items (offsets[-1],) int32: user u gets items[offsets[u] : offsets[u + 1]], none
        twice.

    Raises:
        InputError: too many of too few items, or too few of the frequent items are left for a user.
    """
    copies = np.where(counts < EXACT_BELOW, counts, 1)
    cuts = np.cumsum(expected)
    offsets = np.zeros(len(sizes) + 1, np.int64)
    offsets[1:] = np.rint(cuts * (copies.sum() / cuts[-1]))
    user = np.repeat(np.arange(len(sizes)), np.diff(offsets))
    item = rng.permutation(np.repeat(np.arange(len(counts)), copies))
    for _ in range(1000):
        pair = user * len(counts) + item
        order = np.argsort(pair, kind="stable")
        again = order[1:][pair[order[1:]] == pair[order[:-1]]]
        if not len(again):
            break
        for place, other in zip(again, rng.integers(0, len(item), len(again)), strict=True):
            item[place], item[other] = item[other], item[place]
    else:
        raise InputError("the rare items cannot be dealt out so that nobody gets one twice: fewer or larger users")
    frequent = int((counts >= EXACT_BELOW).sum())
    taken = np.bincount(user[item < frequent], minlength=len(sizes))
    if (np.diff(offsets) > sizes).any() or (sizes - np.diff(offsets) > frequent - taken).any():
        raise InputError(f"a user rates nearly all of the {frequent} items that have {EXACT_BELOW} ratings or more")
    return offsets, item.astype(np.int32)


class Tables(NamedTuple):
    """What the draw reads; the F frequent items come first among the I items, users are all U of the population."""

    weight: Floats
    """(F,)"""
    keep: Words
    """(F,) of 2³², Walker's alias table: how often slot i gives item i, else `other`."""
    other: Items
    """(F,)"""
    place: Items
    """(I,) the item's number in the order of movieIds."""
    quality: Floats
    """(I,) part of the score."""
    start: Ints
    """(U + 1,) where a user's dealt items start."""
    dealt: Items
    """(start[-1],) from `deal`."""
    word: Words
    """(U,) what a user's random numbers start from."""
    bias: Floats
    """(U,) part of the score."""
    noise: Floats
    """(4096,) part of the score."""
    bound: Floats
    """(9,) scores from which on a rating has half a star more."""


def alias_table(weight: Floats) -> tuple[Words, Items]:
    """Return `keep` and `other` of `Tables` for draws in proportion to (F,) weights."""
    scaled = (weight * (len(weight) / weight.sum())).tolist()
    keep, other = np.full(len(scaled), 1 << 32, np.uint64), np.arange(len(scaled), dtype=np.int32)
    small = [i for i, value in enumerate(scaled) if value < 1.0]
    large = [i for i, value in enumerate(scaled) if value >= 1.0]
    while small and large:
        i, j = small.pop(), large[-1]
        keep[i], other[i] = round(scaled[i] * (1 << 32)), j
        scaled[j] -= 1.0 - scaled[i]
        if scaled[j] < 1.0:
            small.append(large.pop())
    return keep, other


def score_bounds(shape: Shape) -> tuple[Floats, Floats]:
    """Return `noise` and `bound` of `Tables`: standard normal scores are cut as `shape.stars` says."""
    noise = math.sqrt(1.0 - BIAS**2 - QUALITY**2) * ndtri((np.arange(4096) + 0.5) / 4096)
    share = np.cumsum(shape.stars) / sum(shape.stars)
    return noise, ndtri(share[:-1])


_GAMMA, _M1, _M2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_11, _27, _30, _31, _32 = np.uint64(11), np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(32)
_LOW = np.uint64(0xFFFFFFFF)
_ITEM = (1 << 20) - 1


@numba.njit(cache=True, nogil=True)
def _next(state: Words) -> np.uint64:  # pragma: no cover - compiled
    """Return 64 random bits (splitmix64)."""
    state[0] += _GAMMA
    z = state[0]
    z = (z ^ (z >> _30)) * _M1
    z = (z ^ (z >> _27)) * _M2
    return z ^ (z >> _31)


@numba.njit(cache=True, nogil=True)
def _below(state: Words, n: int) -> int:  # pragma: no cover - compiled
    """Return a random number from 0 to n - 1, n below 2³²."""
    return int(np.int64(((_next(state) >> _32) * np.uint64(n)) >> _32))


@numba.njit(cache=True, nogil=True)
def _unit(state: Words) -> float:  # pragma: no cover - compiled
    """Return a random number between 0 and 1, neither of them."""
    return (np.float64(_next(state) >> _11) + 0.5) * 2.0**-53


@numba.njit(cache=True, nogil=True)
def _choose(state: Words, tables: Tables, seen: Items, mark: int, out: Items) -> None:  # pragma: no cover - compiled
    """Fill `out` with different frequent items, drawn one after the other by weight; those `seen` by `mark` are out."""
    frequent, found = tables.weight.size, 0
    if out.size * 8 > frequent:
        # The smallest of exponential times are the same draw, without the many repeats. Positive floats are ordered
        # as their bits are; the last bits make room for the item.
        times = np.empty(frequent, np.float64)
        for i in range(frequent):
            times[i] = np.inf if seen[i] == mark else -math.log(_unit(state)) / tables.weight[i]
        keys = times.view(np.int64)
        for i in range(frequent):
            keys[i] = keys[i] & ~_ITEM | i
        keys.sort()
        for j in range(out.size):
            out[j] = keys[j] & _ITEM
        return
    while found < out.size:
        word = _next(state)
        slot = np.int64(((word >> _32) * np.uint64(frequent)) >> _32)
        if (word & _LOW) >= tables.keep[slot]:
            slot = np.int64(tables.other[slot])
        if seen[slot] != mark:
            seen[slot] = mark
            out[found] = slot
            found += 1


@numba.njit(cache=True, nogil=True)
def _sessions(state: Words, out: Ints) -> None:  # pragma: no cover - compiled
    """Fill `out` with times: sessions of 10 to 99 ratings, in them pages of 1 to 5 ratings at one second."""
    least = min(out.size // 50 * DAY, (LAST - FIRST) // 2)
    start = FIRST + _below(state, LAST - FIRST - least)
    # Most users come for a day or so, some for years.
    span = least + np.int64((LAST - start - least) * _unit(state) ** 8)
    now, session, page = start, 0, 0
    for j in range(out.size):
        if session == 0:
            session, page, now = 10 + _below(state, 90), 0, start + _below(state, span + 1)
        if page == 0:
            page = 1 + _below(state, 5)
            now += 2 + _below(state, 40)
        out[j] = now
        session -= 1
        page -= 1


@numba.njit(cache=True, nogil=True)
def draw(
    tables: Tables, users: Ints, offsets: Ints, item: Items, half_stars: npt.NDArray[np.int8], timestamp: Ints
) -> None:  # pragma: no cover - compiled
    """Fill the ratings of `users`: rows offsets[k] to offsets[k + 1] are those of users[k], ordered by item."""
    seen = np.full(tables.place.size, -1, np.int32)
    state = np.empty(1, np.uint64)
    longest = 0
    for k in range(users.size):
        longest = max(longest, offsets[k + 1] - offsets[k])
    chosen, keys, time = np.empty(longest, np.int32), np.empty(longest, np.int64), np.empty(longest, np.int64)
    for k in range(users.size):
        u, at = users[k], offsets[k]
        n = offsets[k + 1] - at
        state[0] = tables.word[u]
        dealt = tables.dealt[tables.start[u] : tables.start[u + 1]]
        chosen[: dealt.size] = dealt
        for i in dealt:
            seen[i] = k
        _choose(state, tables, seen, k, chosen[dealt.size : n])
        _sessions(state, time[:n])
        for j in range(n):
            # Each takes a random one of the times that are left.
            other = j + _below(state, n - j)
            time[j], time[other] = time[other], time[j]
            score = tables.bias[u] + tables.quality[chosen[j]] + tables.noise[_below(state, 4096)]
            stars = 1
            for bound in tables.bound:
                stars += score >= bound
            keys[j] = ((np.int64(tables.place[chosen[j]]) << 4 | stars) << 40) | time[j]
        keys[:n].sort()
        for j in range(n):
            item[at + j] = keys[j] >> 44
            half_stars[at + j] = keys[j] >> 40 & 15
            timestamp[at + j] = keys[j] & ((1 << 40) - 1)
