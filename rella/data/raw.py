"""What every data source hands over: users, items and ratings, before order, filter, label and split."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa


@dataclass(frozen=True)
class RawDataset:
    """The ratings of one data set as columns, with the tables they point into.

    Users and items are numbered in the order of their original ids, so that ties in time that are broken by user and
    item number are broken by the ids as well.
    """

    users: pa.Table
    """`user` int32 (= row number), `user_id` string, then profile fields as the text that prompts show."""
    items: pa.Table
    """`item` int32 (= row number), `item_id` string, `title`, then descriptive fields (`genre`, `genres`)."""
    user: npt.NDArray[np.int32]
    """(R,) row of `users`."""
    item: npt.NDArray[np.int32]
    """(R,) row of `items`."""
    rating: npt.NDArray[np.float32]
    """(R,) in stars."""
    timestamp: npt.NDArray[np.int64]
    """(R,) seconds since the epoch."""
