"""AdamW on all weights of a model that every rank holds: gradients of all ranks, clipping, loss scale, state."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import nn

from rella.baselines import TextBaselineConfig
from rella.errors import TrainingError
from rella.lm.zero import MOMENTS, OptimiserState
from rella.stages import Precision

_BUCKET = 1 << 25
"""Numbers that one collective call carries."""
_GROWTH = 2000
"""Good steps after which float16's loss scale doubles."""
_FIRST_SCALE = 2.0**14


def learning_rate(config: TextBaselineConfig, step: int, total: int) -> float:
    """Return the rate of a step (0 is the first of `total`): linear from 0 over the warm-up, then linear to 0.

    The warm-up has `ceil(warmup * total)` steps; as in transformers' schedule, the very first rate is 0 if there are
    any.
    """
    warm = math.ceil(config.warmup * total)
    if step < warm:
        return config.learning_rate * step / warm
    return config.learning_rate * max(0.0, (total - step) / max(1, total - warm))


class Optimiser:
    """AdamW, with the gradients of all ranks; every rank makes the same calls and holds the same state.

    Args:
        model: every parameter of it is trained.
        config: weight decay and clipping.
        precision: float16 gets a loss scale.
        world: ranks.
        state: where to go on; the parameters then start from its weights.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TextBaselineConfig,
        precision: Precision,
        world: int,
        state: OptimiserState | None = None,
    ) -> None:
        self.config, self.world = config, world
        self.named = dict(model.named_parameters())
        self.scale = _FIRST_SCALE if precision == "float16" else 1.0
        self.scaled = precision == "float16"
        self._good, self._steps = 0, 0
        self._adam = torch.optim.AdamW(self.named.values(), lr=0.0, weight_decay=config.weight_decay)
        if state is not None:
            self._restore(state)
        if world > 1:
            for parameter in self.named.values():
                dist.broadcast(parameter.data, src=0)

    def backward(self, summed: torch.Tensor) -> None:
        """Add the gradients of a micro-batch's summed loss."""
        (summed * self.scale).backward()

    def step(self, rate: float, divisor: float) -> None:
        """Sum the gradients over all ranks, divide them, clip, and take a step; float16 skips one that overflowed.

        Raises:
            TrainingError: in float16 gradients overflow whatever the loss scale.
        """
        gradients = []
        for parameter in self.named.values():
            if parameter.grad is None:
                # A rank without rows, or a weight that no row used.
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        if self.world > 1:
            _sum_over_ranks(gradients)
        torch._foreach_mul_(gradients, 1.0 / (divisor * self.scale))
        if self._fits(gradients):
            if self.config.clip is not None:
                nn.utils.clip_grad_norm_(list(self.named.values()), self.config.clip)
            for group in self._adam.param_groups:
                group["lr"] = rate
            self._adam.step()
            self._steps += 1
        self._adam.zero_grad(set_to_none=True)

    def state(self) -> OptimiserState:
        """Return weights, moments and counts, copies on the CPU."""
        moments = {
            moment: {name: self._moment(parameter, moment) for name, parameter in self.named.items()}
            for moment in MOMENTS
        }
        scale = {"scale": self.scale, "good": float(self._good)} if self.scaled else {}
        weights = {n: p.detach().to("cpu", copy=True) for n, p in self.named.items()}
        return OptimiserState(weights, moments, self._steps, scale)

    def _moment(self, parameter: nn.Parameter, moment: str) -> torch.Tensor:
        found = self._adam.state[parameter].get(moment) if parameter in self._adam.state else None
        return torch.zeros_like(parameter, device="cpu") if found is None else found.to("cpu", copy=True)

    def _restore(self, state: OptimiserState) -> None:
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(state.weights[name])
                if state.steps:
                    moments = {m: state.moments[m][name].to(parameter.device, copy=True) for m in MOMENTS}
                    self._adam.state[parameter] = {"step": torch.tensor(float(state.steps)), **moments}
        self._steps = state.steps
        if self.scaled:
            self.scale, self._good = state.scale["scale"], int(state.scale["good"])

    def _fits(self, gradients: list[torch.Tensor]) -> bool:
        """Whether the step counts; the gradients are the same on every rank, and so is the answer."""
        if not self.scaled:
            return True
        if all(bool(torch.isfinite(g).all()) for g in gradients):
            self._good += 1
            if self._good % _GROWTH == 0:
                self.scale *= 2.0
            return True
        if self.scale <= 1.0:
            raise TrainingError("gradients overflow in float16 at any loss scale: take another precision")
        self._good, self.scale = 0, self.scale / 2.0
        return False


def _sum_over_ranks(gradients: list[torch.Tensor]) -> None:
    """Replace each gradient by its sum over all ranks; many small ones travel together."""
    bucket: list[torch.Tensor] = []
    for n, gradient in enumerate(gradients):
        bucket.append(gradient)
        if n + 1 == len(gradients) or sum(g.numel() for g in bucket) + gradients[n + 1].numel() > _BUCKET:
            whole = torch.cat([g.reshape(-1) for g in bucket])
            dist.all_reduce(whole)
            for g, summed in zip(bucket, whole.split([g.numel() for g in bucket]), strict=True):
                g.copy_(summed.view_as(g))
            bucket = []
