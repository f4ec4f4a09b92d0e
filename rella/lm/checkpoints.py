"""A training run's state as one file, written at a step's end: what a killed run goes on from, on any worker count.

A file is plain safetensors: tensors under `weights/`, `exp_avg/`, `exp_avg_sq/` and `best/`, the rest as JSON in its
header. Its name holds the step and the beginning of its SHA-256, so a damaged file is never mistaken for a state.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from dataclasses import asdict, dataclass, field
from typing import Any

from safetensors.torch import load, save
from torch import nn

from rella.artifacts import Artifact
from rella.lm.zero import MOMENTS, OptimiserState, Tensors

FORMAT = 1
FOLDER = "checkpoints"
KEPT = 2
"""A state that turns out damaged has one before it."""
_NAME = re.compile(r"step-(\d{8})-([0-9a-f]{16})\.safetensors$")


@dataclass
class Course:
    """What has happened in a run so far; figures are of all workers."""

    losses: list[float] = field(default_factory=list)
    """Mean loss per answer token, of `rella.ctr` per sample; one value a step."""
    valid: list[dict[str, float]] = field(default_factory=list)
    """Validation metrics with the `step` after which they were taken."""
    best_step: int = 0
    """Step whose weights are kept: the one with the best validation AUC, the earliest of equals."""
    rows: int = 0
    """Rows trained."""
    resumed_at: list[int] = field(default_factory=list)
    """Steps at which a killed run went on."""

    @property
    def steps(self) -> int:
        """Optimiser steps done."""
        return len(self.losses)

    @property
    def since_best(self) -> int:
        """Validations since the best one."""
        return sum(v["step"] > self.best_step for v in self.valid)


@dataclass
class TrainingState:
    """Everything that a run needs to go on after a step, whatever the number of workers.

    The generators' states are not in it: order of rows and dropout masks are functions of seed, step and worker.
    """

    course: Course
    optimiser: OptimiserState
    best: Tensors
    """The best step's weights, as the model computes with them; empty before the first validation."""

    def to_bytes(self, key: str) -> bytes:
        """Return the content of a checkpoint file of the artifact with this key."""
        tensors: Tensors = {f"weights/{n}": t for n, t in self.optimiser.weights.items()}
        for moment in MOMENTS:
            tensors |= {f"{moment}/{n}": t for n, t in self.optimiser.moments[moment].items()}
        tensors |= {f"best/{n}": t for n, t in self.best.items()}
        said = {
            "format": FORMAT,
            "key": key,
            "course": asdict(self.course),
            "adam_steps": self.optimiser.steps,
            "loss_scale": self.optimiser.scale,
        }
        return save({n: t.contiguous() for n, t in tensors.items()}, {"rella": json.dumps(said)})

    @staticmethod
    def from_bytes(data: bytes, key: str) -> TrainingState | None:
        """Return the state in a file's content; None where it is another artifact's or another format's."""
        said = _header(data)
        if said.get("format") != FORMAT or said.get("key") != key:
            return None
        groups: dict[str, Tensors] = {"weights": {}, "best": {}, **{m: {} for m in MOMENTS}}
        for name, tensor in load(data).items():
            group, _, parameter = name.partition("/")
            groups[group][parameter] = tensor
        moments = {m: groups[m] for m in MOMENTS}
        optimiser = OptimiserState(groups["weights"], moments, said["adam_steps"], said["loss_scale"])
        return TrainingState(Course(**said["course"]), optimiser, groups["best"])


def _header(data: bytes) -> dict[str, Any]:
    """The JSON that `to_bytes` put in the header of a safetensors file."""
    (length,) = struct.unpack("<Q", data[:8])
    found: dict[str, Any] = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["rella"])
    return found


@dataclass(frozen=True)
class Checkpoints:
    """The states of a training run, in its artifact's folder."""

    artifact: Artifact

    @property
    def _folder(self) -> str:
        return f"{self.artifact.path}/{FOLDER}"

    def space(self, model: nn.Module) -> int:
        """Return the bytes that a run's states take at most: weights, two moments, the best, and one more file."""
        trained = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
        return 4 * 4 * trained * (KEPT + 1)

    def save(self, state: TrainingState) -> None:
        """Write a state and drop the oldest; called by one worker.

        Raises:
            StorageError: the disk is full or cannot be written.
        """
        data = state.to_bytes(self.artifact.key)
        sha = hashlib.sha256(data).hexdigest()[:16]
        self.artifact.write_file(f"{FOLDER}/step-{state.course.steps:08d}-{sha}.safetensors", data)
        for name in self._names()[:-KEPT]:
            self.artifact.storage.delete(name)

    def newest(self) -> str | None:
        """Return the name of the newest state that is whole, or None; damaged ones are passed over."""
        return next((name for name in reversed(self._names()) if self.load(name) is not None), None)

    def load(self, name: str) -> TrainingState | None:
        """Return the state in a file, or None where it is damaged or not this artifact's."""
        found = _NAME.search(name)
        data = self.artifact.storage.read(name)
        if found is None or hashlib.sha256(data).hexdigest()[:16] != found[2]:
            return None
        return TrainingState.from_bytes(data, self.artifact.key)

    def clear(self) -> None:
        """Delete all states: the run is finished, and its adapter stands for it."""
        self.artifact.storage.delete(self._folder)

    def _names(self) -> list[str]:
        """Paths below the storage, oldest first."""
        return [name for name in self.artifact.storage.list(self._folder) if _NAME.search(name)]
