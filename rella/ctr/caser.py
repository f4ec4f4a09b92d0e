"""Caser (Tang and Wang 2018): convolutions over the history as an image of time by embedding."""

from __future__ import annotations

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

        The kernels of all heights are one matrix, filled up with zeros. What begins at step t is a product of what
        follows in memory and the matrix's upper left part: no window is copied, and a convolution with so few outputs
        takes three times as long.
        """
        k, dim, images = len(self.horizontal), steps.shape[2], steps.flatten(1)
        matrix = torch.stack([functional.pad(w, (0, 0, 0, 0, 0, k - len(w))) for w in self.horizontal], dim=2)
        matrix = matrix.view(k * dim, k * self.kernels)
        height = torch.arange(1, k + 1, device=steps.device)
        largest = steps.new_zeros(len(steps), k, self.kernels)
        for start in range(min(k, steps.shape[1])):
            rest = min(k, steps.shape[1] - start)
            window = images[:, start * dim : (start + rest) * dim]
            values = (window @ matrix[: rest * dim, : rest * self.kernels]).unflatten(1, (rest, self.kernels))
            within = start + height[:rest] <= batch.lengths[:, None]
            seen = torch.relu(values + self.bias[:rest]) * within[..., None]
            largest = torch.maximum(largest, functional.pad(seen, (0, 0, 0, k - rest)))
        return largest.flatten(1)

    def _vertical(self, steps: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return (B, E·kernels): Σ_j w_j h of the j-th last behaviour."""
        kernels, k = self.vertical.weight.T, self.vertical.in_features
        age = batch.lengths[:, None] - 1 - torch.arange(steps.shape[1], device=steps.device)
        weights = kernels[age.clamp(0, k - 1)] * ((age >= 0) & (age < k))[..., None]
        return (weights.transpose(1, 2) @ steps).flatten(1)


def _uniform(inputs: int, *shape: int) -> nn.Parameter:
    """Return weights as a convolution's at first: uniform, the wider the fewer its inputs are."""
    return nn.Parameter((torch.rand(*shape) * 2 - 1) / inputs**0.5)
