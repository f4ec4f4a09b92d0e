"""Caser (Tang and Wang 2018): convolutions over the history as an image of time by embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from rella.baselines import BaselineConfig
from rella.ctr.batches import Batch
from rella.ctr.features import FeatureSpace
from rella.ctr.layers import MLP, Dropout, Inputs, Steps, joined


class Caser(nn.Module):
    """Horizontal convolutions of every height 1 to K, largest value each; vertical ones over all steps (Eqs. 3 to 10).

    A vertical kernel's weights belong to the last, second last, ... behaviour, and a horizontal one looks at windows
    that lie within the history: so padding changes nothing, wherever it is.
    """

    def __init__(self, space: FeatureSpace, config: BaselineConfig, k: int) -> None:
        super().__init__()
        dim = config.embedding_dim
        self.kernels = config.horizontal_kernels
        self.inputs = Inputs(space, dim, config.init_std)
        self.steps = Steps(space, dim, dim)
        self.horizontal = nn.ParameterList(_uniform(h * dim, h, dim, self.kernels) for h in range(1, k + 1))
        self.bias = nn.Parameter(torch.zeros(k, self.kernels))
        self.vertical = nn.Linear(k, config.vertical_kernels, bias=False)
        self.convolved = nn.Linear(config.horizontal_kernels * k + config.vertical_kernels * dim, dim)
        self.dropout = Dropout(config.dropout)
        width = space.fields * dim + dim
        self.dnn = MLP(width, config.dnn_size, config.dnn_layers, config.dropout, out=1)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Return (B,) logits."""
        found = self.inputs(batch)
        steps = self.steps(found, batch)
        o = torch.cat([self._horizontal(steps, batch), self._vertical(steps, batch)], dim=1)
        z = torch.relu(self.convolved(self.dropout(o)))
        return self.dnn(joined(found.fields, [z])).squeeze(-1)

    def _horizontal(self, steps: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return (B, K·kernels): max over windows of ReLU(conv), 0 where a kernel is higher than the history.

        The kernels of all heights are one matrix, filled up with zeros.
        """
        k, dim = len(self.horizontal), steps.shape[2]
        matrix = torch.stack([functional.pad(w, (0, 0, 0, 0, 0, k - len(w))) for w in self.horizontal], dim=2)
        given = (steps.flatten(1), matrix.view(k * dim, -1), batch.lengths, dim, k)
        largest: torch.Tensor = _LargestOfWindows.apply(*given)  # type: ignore[no-untyped-call]
        # A bias is a kernel's in every window, and ReLU grows: both can wait until the largest is known.
        return torch.relu(largest.unflatten(1, (k, -1)) + self.bias).flatten(1)

    def _vertical(self, steps: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return (B, E·kernels): Σ_j w_j h of the j-th last behaviour."""
        kernels, k = self.vertical.weight.T, self.vertical.in_features
        age = batch.lengths[:, None] - 1 - torch.arange(steps.shape[1], device=steps.device)
        weights = kernels[age.clamp(0, k - 1)] * ((age >= 0) & (age < k))[..., None]
        return (weights.transpose(1, 2) @ steps).flatten(1)


class _LargestOfWindows(torch.autograd.Function):
    """For every kernel its largest product with a window of the history; −∞ where the history is shorter than it.

    What begins at step t is a product of what follows in memory and the matrix's upper left part: no window is copied.
    A convolution with so few outputs takes three times as long, autograd through the slices twice.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's
        images: torch.Tensor,
        matrix: torch.Tensor,
        lengths: torch.Tensor,
        dim: int,
        k: int,
    ) -> torch.Tensor:
        """Return (B, K·kernels) of `images`, (B, T·dim) steps, and `matrix`, (K·dim, K·kernels) by height."""
        kernels, steps = matrix.shape[1] // k, images.shape[1] // dim
        largest = images.new_full((len(images), matrix.shape[1]), -torch.inf)
        begin = torch.zeros(largest.shape, dtype=torch.int16, device=images.device)
        height = torch.arange(1, k + 1, device=images.device).repeat_interleave(kernels)
        for start in range(min(k, steps)):
            rest = min(k, steps - start)
            inner, outer = rest * dim, rest * kernels
            values = images[:, start * dim : start * dim + inner] @ matrix[:inner, :outer]
            values.masked_fill_(start + height[:outer] > lengths[:, None], -torch.inf)
            begin[:, :outer].masked_fill_(values > largest[:, :outer], start)
            torch.maximum(values, largest[:, :outer], out=largest[:, :outer])
        ctx.save_for_backward(images, matrix, begin, largest.isfinite())
        ctx.dim, ctx.k = dim, k
        return largest

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
        """Pass each kernel's gradient to the window that was its largest."""
        images, matrix, begin, found = ctx.saved_tensors
        dim, k = ctx.dim, ctx.k
        gradient = gradients[0] * found
        kernels, steps = matrix.shape[1] // k, images.shape[1] // dim
        to_images, to_matrix = torch.zeros_like(images), torch.zeros_like(matrix)
        for start in range(min(k, steps)):
            rest = min(k, steps - start)
            inner, outer = rest * dim, rest * kernels
            window = slice(start * dim, start * dim + inner)
            mine = gradient[:, :outer] * (begin[:, :outer] == start)
            to_matrix[:inner, :outer].addmm_(images[:, window].T, mine)
            to_images[:, window].addmm_(mine, matrix[:inner, :outer].T)
        return to_images, to_matrix, None, None, None


def _uniform(inputs: int, *shape: int) -> nn.Parameter:
    """Return weights as a convolution's at first: uniform, the wider the fewer its inputs are."""
    return nn.Parameter((torch.rand(*shape) * 2 - 1) / inputs**0.5)
