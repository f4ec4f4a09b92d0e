"""What the ranks of a training group do together, whatever they train. Alone (`world` 1) no group is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from rella.lm.checkpoints import Checkpoints, TrainingState

T = TypeVar("T")


def from_first(value: T, world: int) -> T:
    """Return rank 0's value on every rank."""
    if world == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def newest_state(checkpoints: Checkpoints | None, rank: int, world: int) -> TrainingState | None:
    """Return the newest state of an earlier run, the same on every rank: one of them looks, all of them read."""
    if checkpoints is None:
        return None
    name = from_first(checkpoints.newest() if rank == 0 else None, world)
    return None if name is None else checkpoints.load(name)


def write_on_first(write: Callable[[], None], rank: int, world: int) -> None:
    """Let rank 0 write; all learn whether it could.

    Raises:
        OSError: it could not, on every rank.
    """
    fault: OSError | None = None
    if rank == 0:
        try:
            write()
        except OSError as error:
            fault = error
    fault = from_first(fault, world)
    if fault is not None:
        raise fault


def join_shares(
    share: npt.NDArray[np.float32], rows: slice | npt.NDArray[np.int64], count: int, world: int, device: torch.device
) -> npt.NDArray[np.float32]:
    """Return what all ranks have computed, the same to the bit on every rank.

    Args:
        share: this rank's rows, (S, ...) float32.
        rows: which of the `count` rows they are; each row is in one rank's share.
        count: N.
        world: number of ranks.
        device: on which the group's collectives run.
    """
    whole = np.zeros((count, *share.shape[1:]), dtype=np.float32)
    whole[rows] = share
    if world == 1:
        return whole
    # Where one rank has a row the others have zeros, so the sum is exact.
    shared = torch.from_numpy(whole).to(device)
    dist.all_reduce(shared)
    summed: npt.NDArray[np.float32] = shared.cpu().numpy()
    return summed
