"""What no model may fall below: how often this user, and this item, were liked in the training split."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import expit, logit

from rella.data.selection import Chosen
from rella.errors import InputError

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Floor:
    """Log-odds of the whole, plus what the user's and the item's shrunk shares of label 1 add to them."""

    whole: float
    """Log-odds of label 1 among the training rows."""
    user: Doubles
    """(U,) log-odds of the user's shrunk share minus `whole`; 0 for users without training rows."""
    item: Doubles
    """(I,) the same by item."""

    @staticmethod
    def fit(samples: Chosen, users: int, items: int, shrinkage: float = 10.0) -> Floor:
        """Return the floor of some training rows.

        Args:
            samples: training rows, all with a label.
            users: U.
            items: I.
            shrinkage: rows of the whole's share that every user's and item's rows are mixed with.

        Raises:
            InputError: no rows, a label that is unknown, one label only, or a shrinkage that is not positive.
        """
        label = samples.label
        if not len(label) or np.isnan(label).any() or label.min() == label.max():
            raise InputError(f"a floor takes rows of both labels and no other; here are {len(label)} rows")
        if not shrinkage > 0:
            raise InputError(f"shrinkage is {shrinkage}; it must be positive")
        share = float(label.mean())
        whole = float(logit(share))

        def effect(rows: npt.NDArray[np.int32], size: int) -> Doubles:
            count = np.bincount(rows, minlength=size)
            liked = np.bincount(rows, weights=label, minlength=size)
            found: Doubles = logit((liked + shrinkage * share) / (count + shrinkage)) - whole
            return found

        return Floor(whole, effect(samples.user, users), effect(samples.item, items))

    def predict(self, samples: Chosen) -> tuple[Doubles, npt.NDArray[np.float32]]:
        """Return the probabilities of label 1, (S,) float64, and their logits, (S,) float32, as `fit.predict` does."""
        logits = (self.whole + self.user[samples.user] + self.item[samples.item]).astype(np.float32)
        probabilities: Doubles = expit(logits.astype(np.float64))
        return probabilities, logits
