"""From ratings to samples: order, label, filter and split (Appendix B of the paper)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy import sparse

from rella.data.raw import RawDataset
from rella.data.tables import Tables, table1
from rella.schemas import INTERACTIONS, SAMPLES, SPLITS

__all__ = ["assemble", "table1"]


def assemble(
    raw: RawDataset, *, positive_above: float, min_history: int = 5, parts: tuple[int, int, int] = (8, 1, 1)
) -> Tables:
    """Order the ratings, drop samples without enough history, label and split them.

    The one order is (timestamp, user, item); equal triples keep the order of the input. A user's behaviours follow it,
    and so does the split: the samples that are left are cut into training, validation and test part at the floor of
    each of the first two shares. Memory is proportional to the ratings; no history is ever written out.

    Args:
        raw: R ratings of U users and I items.
        positive_above: the label is 1 where the rating is above it (MovieLens: 3, so that 4 and 5 stars are positive).
        min_history: a rating with fewer earlier ratings of its user is behaviour only, not a sample.
        parts: shares of train, valid and test, e.g. (8, 1, 1).

    Returns:
        Tables where `interactions` are all R ratings by user, `sample_id` is the target's row in them and `end` its
        position within the user.

    Raises:
        ValueError: a column's length or range is wrong, a share is negative, or no sample is left.
    """
    _check(raw, min_history, parts)
    users = len(raw.users)
    order = _chronological(raw)
    by_user = _stable_by_user(raw.user[order], users)
    row = order[by_user]
    count = np.bincount(raw.user, minlength=users)
    offset = np.cumsum(count) - count
    user = raw.user[row]
    end = np.arange(len(row)) - offset[user]

    kept = end >= min_history
    if not kept.any():
        raise ValueError(f"no sample is left: no user has more than {min_history} ratings (min_history={min_history})")
    interactions = pa.table(
        [raw.item[row], raw.rating[row], raw.timestamp[row]],
        schema=INTERACTIONS,
    )
    labels = (raw.rating[row[kept]] > positive_above).astype(np.int8)
    samples = pa.table(
        [
            pa.array(np.flatnonzero(kept)),
            pa.array(user[kept]),
            pa.array(raw.item[row[kept]]),
            pa.array(end[kept].astype(np.int32)),
            pa.array(labels),
            _splits(by_user, kept, parts),
        ],
        schema=SAMPLES,
    )
    return Tables(_with_offsets(raw.users, offset, count), raw.items, interactions, samples)


def _check(raw: RawDataset, min_history: int, parts: tuple[int, int, int]) -> None:
    ratings = len(raw.rating)
    for name, rows in (("user", raw.users), ("item", raw.items)):
        values = getattr(raw, name)
        if len(values) != ratings:
            raise ValueError(f"{name}: {len(values)} values for {ratings} ratings")
        if ratings and not 0 <= values.min() <= values.max() < len(rows):
            raise ValueError(f"{name}: values {values.min()}..{values.max()}, but the table has {len(rows)} rows")
    if len(raw.timestamp) != ratings:
        raise ValueError(f"timestamp: {len(raw.timestamp)} values for {ratings} ratings")
    if not np.isfinite(raw.rating).all():
        raise ValueError(f"rating: row {int(np.argmin(np.isfinite(raw.rating)))} is not a number")
    if min_history < 0:
        raise ValueError(f"min_history is {min_history}; it must be at least 0")
    if min(parts) < 0 or sum(parts) == 0:
        raise ValueError(f"parts are {parts}; they must be non-negative and not all 0")


def _chronological(raw: RawDataset) -> npt.NDArray[np.int64]:
    """Return the (R,) rows of `raw` in the order of (timestamp, user, item), stable."""
    if not len(raw.timestamp):
        return np.zeros(0, dtype=np.int64)
    start = int(raw.timestamp.min())
    widths = [
        max(1, largest.bit_length())
        for largest in (int(raw.timestamp.max()) - start, int(raw.user.max()), int(raw.item.max()))
    ]
    if sum(widths) > 64:
        return np.lexsort((raw.item, raw.user, raw.timestamp))
    # One packed key sorts four times as fast as three columns (25 million ratings: 6 instead of 23 seconds).
    key = (raw.timestamp - start).astype(np.uint64)
    for column, width in ((raw.user, widths[1]), (raw.item, widths[2])):
        key <<= np.uint64(width)
        key |= column.astype(np.uint64)
    return np.argsort(key, kind="stable")


def _stable_by_user(user: npt.NDArray[np.int32], users: int) -> npt.NDArray[np.integer]:
    """Return the permutation that groups (R,) `user` ascending and keeps the order inside a group.

    Building a sparse matrix is a counting sort, ten times as fast as a stable `argsort`.
    """
    rows = len(user)
    entries = sparse.coo_matrix((np.ones(rows, dtype=np.int8), (user, np.arange(rows))), shape=(users, rows))
    grouped: npt.NDArray[np.integer] = entries.tocsr().indices
    return grouped


def _splits(by_user: npt.NDArray[np.integer], kept: npt.NDArray[np.bool_], parts: tuple[int, int, int]) -> pa.Array:
    """Return the (S,) split names of the kept interactions, cut in global order.

    Args:
        by_user: (R,) global position of every interaction.
        kept: (R,) whether the interaction is a sample.
        parts: the shares.
    """
    kept_in_time = np.empty(len(kept), dtype=bool)
    kept_in_time[by_user] = kept
    rank = (np.cumsum(kept_in_time) - 1)[by_user[kept]]
    train, valid = (len(rank) * part // sum(parts) for part in parts[:2])
    code = (rank >= train).astype(np.int8) + (rank >= train + valid)
    return pa.DictionaryArray.from_arrays(pa.array(code), pa.array(SPLITS)).cast(pa.string())


def _with_offsets(users: pa.Table, offset: npt.NDArray[np.int64], count: npt.NDArray[np.int64]) -> pa.Table:
    place = users.schema.get_field_index("user_id") + 1
    users = users.add_column(place, pa.field("offset", pa.int64(), nullable=False), pa.array(offset))
    return users.add_column(place + 1, pa.field("count", pa.int32(), nullable=False), pa.array(count.astype(np.int32)))
