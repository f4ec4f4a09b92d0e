"""Few-shot training sets and seeded subsets, nested and uniform, and the mixture of §3.3.

Samples are ordered by a keyed hash of their id. Whoever holds any shard of the ids can therefore decide on its own
which of them come first, and neither the order of the shards nor the version of a library changes the choice. The set
of N samples is part of the set of 2N.

The hash of an id under (seed, purpose), all in unsigned 64-bit arithmetic modulo 2**64::

    mix(x)  = splitmix64's output for state x:  z = x + 0x9E3779B97F4A7C15
              z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
              z = (z ^ (z >> 27)) * 0x94D049BB133111EB
              z ^ (z >> 31)
    key     = mix(seed), then key = mix(key ^ byte) for every UTF-8 byte of purpose
    hash    = mix(mix(id ^ key) + key)

For one key the hash is a bijection of the 64-bit integers, so different ids never tie.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from rella.errors import InputError

Mix = Literal["original", "retrieved", "mixed"]
"""What a training set is made of: samples with recent behaviours, with retrieved ones (SUBR), or both (ReiT, §3.3)."""

Purpose = Literal["train", "valid", "test"]

_GAMMA, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = 2**64 - 1


def mix64(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return splitmix64's output for every state in `x`, any shape: a bijection of uint64 with full avalanche."""
    z = x + np.uint64(_GAMMA)
    z ^= z >> np.uint64(30)
    z *= np.uint64(_FIRST)
    z ^= z >> np.uint64(27)
    z *= np.uint64(_SECOND)
    z ^= z >> np.uint64(31)
    return z


def sample_hash(sample_ids: npt.NDArray[np.int64], seed: int, purpose: str) -> npt.NDArray[np.uint64]:
    """Return the (S,) keyed hashes that order `sample_ids` for one seed and purpose (see the module's text)."""
    state = mix64(np.array([seed & _MASK], dtype=np.uint64))
    for byte in purpose.encode():
        state = mix64(state ^ np.uint64(byte))
    return mix64(mix64(sample_ids.astype(np.int64).view(np.uint64) ^ state) + state)


def few_shot(sample_ids: npt.NDArray[np.int64], n: int | Literal["all"] | None, seed: int) -> npt.NDArray[np.int64]:
    """Return the N-shot training set: the ids of the first `n` samples in the order of (seed, "train"), ascending.

    Args:
        sample_ids: (S,) different ids of the training split, in any order.
        n: number of shots; `"all"` or None takes all.
        seed: of the order.

    Raises:
        InputError: `n` is below 1 or above S, or an id occurs twice.
    """
    return subset(sample_ids, n, seed, "train")


def subset(
    sample_ids: npt.NDArray[np.int64], n: int | Literal["all"] | None, seed: int, purpose: Purpose
) -> npt.NDArray[np.int64]:
    """Return the ids of the first `n` samples in the order of (seed, purpose), ascending; see `few_shot`.

    Different purposes give independent orders.
    """
    ids = np.sort(np.asarray(sample_ids, dtype=np.int64))
    if (ids[1:] == ids[:-1]).any():
        raise InputError(f"sample id {ids[1:][ids[1:] == ids[:-1]][0]} occurs twice among the {purpose} samples")
    if n is None or n == "all":
        return ids
    if not 1 <= n <= len(ids):
        raise InputError(
            f"{n} {purpose} samples are asked for, but there are {len(ids)}; take 1 to {len(ids)}, or 'all'"
        )
    if n == len(ids):
        return ids
    first = np.argpartition(sample_hash(ids, seed, purpose), n - 1)[:n]
    return ids[np.sort(first)]


def training_rows(ids: npt.NDArray[np.int64], mix: Mix) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Return the rows of a training set (§3.3): sample ids and whether the row shows retrieved behaviours.

    Args:
        ids: (N,) sample ids.
        mix: `original` and `retrieved` give N rows, `mixed` 2N, every original followed by its retrieved twin.

    Raises:
        InputError: `mix` is none of the three.
    """
    ids = np.asarray(ids, dtype=np.int64)
    if mix == "mixed":
        return np.repeat(ids, 2), np.tile([False, True], len(ids))
    if mix not in get_args(Mix):
        raise InputError(f"mix {mix!r} is none of {list(get_args(Mix))}")
    return ids, np.full(len(ids), mix == "retrieved")


def twins_identical(ends: npt.NDArray[np.integer], k: int) -> float:
    """Return the share of samples whose original and retrieved rows are the same text.

    With at most `k` behaviours the history is shown whole, in order of time, by both.

    Args:
        ends: (N,) lengths of the histories.
        k: K of the paper, how many behaviours a prompt shows.

    Raises:
        InputError: there is no sample.
    """
    if not len(ends):
        raise InputError("the share of identical twins is undefined without samples")
    return float(np.mean(np.asarray(ends) <= k))
