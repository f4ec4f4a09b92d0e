"""The parts that the models share: embeddings, histories, DNN, FM, cross and attention layers.

Shapes: B samples, F fields, K behaviours, E the embedding's size, L rating levels. All values are float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from rella.ctr import kernels
from rella.ctr.batches import Batch
from rella.ctr.features import PADDING, FeatureSpace


class _LookUp(torch.autograd.Function):
    """`functional.embedding` on a CPU, whose gradient there takes ten times as long as this one's and is the same."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:  # noqa: ANN401 - torch's
        """Return (N, E) rows of the (V, E) table at (N,) int32 ids."""
        ctx.save_for_backward(ids)
        ctx.rows = len(weight)
        return functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # noqa: ANN401
        """Return the table's gradient."""
        (ids,) = ctx.saved_tensors
        table = gradient.new_zeros(ctx.rows, gradient.shape[1])
        kernels.add_rows(table.numpy(), ids.numpy(), gradient.contiguous().numpy())
        return table, None


class Embeddings(nn.Module):
    """One table for the features of all fields, N(0, std²); the padding's row is zero and stays so."""

    def __init__(self, count: int, dim: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(count, dim) * std)
        with torch.no_grad():
            self.weight[PADDING] = 0.0

    def forward(self, *ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return (..., E) vectors for each (...) int32 tensor of ids.

        One look-up for all: each has a gradient as large as the table, and that of Book-Crossing is 117 MB.
        """
        flat = torch.cat([part.reshape(-1) for part in ids])
        if flat.device.type == "cpu":
            vectors: torch.Tensor = _LookUp.apply(self.weight, flat)  # type: ignore[no-untyped-call]
        else:
            vectors = functional.embedding(flat, self.weight, padding_idx=PADDING)
        found = vectors.split([part.numel() for part in ids])
        return tuple(v.view(*part.shape, -1) for v, part in zip(found, ids, strict=True))


class Embedded(NamedTuple):
    """The vectors of a batch."""

    fields: torch.Tensor
    """(B, F, E)."""
    items: torch.Tensor
    """(B, K, E) of the behaviours' items, zeros at padding."""
    levels: torch.Tensor
    """(L + 1, E) of the padding (zeros) and the rating levels; (1, E) where there are no ratings."""


class Inputs(nn.Module):
    """The embeddings of a batch's fields and behaviours."""

    level_ids: torch.Tensor

    def __init__(self, space: FeatureSpace, dim: int, std: float) -> None:
        super().__init__()
        self.table = Embeddings(space.count, dim, std)
        levels = torch.arange(space.first_level, space.first_level + space.levels)
        self.register_buffer("level_ids", torch.cat([torch.tensor([PADDING]), levels]).int(), persistent=False)

    def forward(self, batch: Batch) -> Embedded:
        """Return the vectors of a batch."""
        return Embedded(*self.table(batch.fields, batch.items, self.level_ids))


def one_hot(ratings: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Return (B, K, L + 1) ones where a behaviour has a level: as a product, L + 1 rows cost less than B·K look-ups."""
    return (ratings[..., None] == torch.arange(len(levels), device=ratings.device)).to(levels.dtype)


def mean_pool(vectors: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Return (B, E) means of (B, K, E) vectors over the true lengths (B,); padding must be zeros. Empty: zeros."""
    return vectors.sum(dim=1) / lengths.clamp(min=1)[:, None]


def pooled_fields(found: Embedded, batch: Batch) -> torch.Tensor:
    """Return (B, F + 2, E): the fields, and the history's mean item and mean rating as two more (§4.1.3).

    Without ratings (B, F + 1, E).
    """
    pooled = [mean_pool(found.items, batch.lengths)[:, None]]
    if len(found.levels) > 1:
        shares = mean_pool(one_hot(batch.ratings, found.levels), batch.lengths)
        pooled.append((shares @ found.levels)[:, None])
    return torch.cat([found.fields, *pooled], dim=1)


def pooled_width(space: FeatureSpace) -> int:
    """Return how many fields `pooled_fields` has."""
    return space.fields + 1 + (space.levels > 0)


class Steps(nn.Module):
    """A behaviour as one vector, W [item; rating] + b.

    The ratings' half is multiplied by W before it is spread over the behaviours: there are only L of them.
    """

    def __init__(self, space: FeatureSpace, dim: int, width: int) -> None:
        super().__init__()
        self.rated = space.levels > 0
        self.project = nn.Linear((1 + self.rated) * dim, width)

    def forward(self, found: Embedded, batch: Batch) -> torch.Tensor:
        """Return (B, K, `width`), oldest first; what is at padding means nothing."""
        if not self.rated:
            return self.project(found.items)
        of_item, of_rating = self.project.weight.split(found.items.shape[-1], dim=1)
        rows = one_hot(batch.ratings, found.levels).flatten(0, 1)
        of_level = functional.linear(found.levels, of_rating, self.project.bias)
        steps = torch.addmm(rows @ of_level, found.items.flatten(0, 1), of_item.T)
        return steps.view(*batch.ratings.shape, -1)


class Dropout(nn.Module):
    """`nn.Dropout` at a third of its cost on a CPU, where it draws 64 random bits a value: 16 do.

    A probability is then a multiple of 2⁻¹⁶.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x with a share p of it set to 0, the rest times 1 / (1 − p); x itself in eval mode."""
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return functional.dropout(x, self.p, self.training)
        drawn = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        kept = drawn.view(torch.int16)[: x.numel()].view(x.shape) >= round(self.p * 2**16) - 2**15
        return (x * kept).mul_(1 / (1 - self.p))


class MLP(nn.Sequential):
    """`layers` times Linear, ReLU, dropout; then, where `out` is given, a Linear to as many outputs."""

    def __init__(self, width: int, size: int, layers: int, dropout: float, out: int | None = None) -> None:
        parts: list[nn.Module] = []
        for _ in range(layers):
            parts += [nn.Linear(width, size), nn.ReLU(inplace=True), Dropout(dropout)]
            width = size
        if out is not None:
            parts.append(nn.Linear(width, out))
        super().__init__(*parts)
        self.width = width if out is None else out


def factorization_machine(vectors: torch.Tensor) -> torch.Tensor:
    """Return (B,): Σ_{f<g} ⟨v_f, v_g⟩ of (B, F, E) vectors (DeepFM, Eq. 2), as ½ Σ_e [(Σ_f v_fe)² − Σ_f v_fe²]."""
    return 0.5 * (vectors.sum(dim=1).square() - vectors.square().sum(dim=1)).sum(dim=-1)


class CrossNetV2(nn.Module):
    """x_{l+1} = x_0 ⊙ (W_l x_l + b_l) + x_l with full matrices (DCNv2, Eq. 1)."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, start: torch.Tensor) -> torch.Tensor:
        """Return (B, D) of (B, D)."""
        x = start
        for layer in self.layers:
            x = torch.addcmul(x, start, layer(x))
        return x


class Interacting(nn.Module):
    """Self-attention over fields, ReLU(attention + W_res e) (AutoInt, Eqs. 5 to 8), with scaled products."""

    def __init__(self, dim: int, size: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.project = nn.Linear(dim, 4 * size, bias=False)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return (B, F, `size`) of (B, F, E)."""
        query, key, value, residual = self.project(vectors).split(self.size, dim=-1)
        query, key, value = (split_heads(part, self.heads) for part in (query, key, value))
        weights = torch.softmax(query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]), dim=-1)
        return torch.relu((weights @ value).transpose(1, 2).flatten(2) + residual)


def split_heads(vectors: torch.Tensor, heads: int) -> torch.Tensor:
    """Return (B, heads, N, d / heads) of (B, N, d)."""
    return vectors.unflatten(-1, (heads, -1)).transpose(1, 2)


def masked_softmax(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the softmax of (B, K) scores over where the (B, K) mask holds, 0 elsewhere; all 0 where it holds nowhere.

    The least number of the type, not −1e9, which float16 does not have.
    """
    lowest = torch.finfo(scores.dtype).min
    return torch.softmax(scores.masked_fill(~mask, lowest), dim=-1) * mask


class TargetAttention(nn.Module):
    """DIN's local activation unit (§4.3 there), Σ_k a(q, h_k) h_k: a is the softmax of an MLP of [q; h; q−h; q⊙h].

    The first layer's W [q; h; q−h; q⊙h] is computed as (W₁ + W₃) q + (W₂ − W₃) h + W₄ (q⊙h): the same parameters and
    function with half of the products, those of q once a sample instead of once a behaviour.
    """

    def __init__(self, dim: int, size: int, layers: int) -> None:
        super().__init__()
        self.first = nn.Linear(4 * dim, size)
        self.rest = MLP(size, size, layers - 1, 0.0)
        # No bias: a softmax does not see it.
        self.score = nn.Linear(size, 1, bias=False)

    def weights(self, query: torch.Tensor, steps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return a, (B, K): 0 at padding, with the sum 1.

        Args:
            query: (B, E) target.
            steps: (B, K, E) behaviours.
            mask: (B, K) bool.
        """
        of_query, of_step, of_difference, of_product = self.first.weight.split(query.shape[-1], dim=1)
        alone = functional.linear(query, of_query + of_difference, self.first.bias)
        pairs = torch.cat([steps, query[:, None] * steps], dim=-1)
        both = functional.linear(pairs, torch.cat([of_step - of_difference, of_product], dim=1))
        scores = self.score(self.rest(both.add_(alone[:, None]).relu_())).squeeze(-1)
        return masked_softmax(scores, mask)

    def forward(self, query: torch.Tensor, steps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the interest, (B, E); arguments as in `weights`."""
        return (self.weights(query, steps, mask)[:, None] @ steps).squeeze(1)


def last_step(states: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Return (B, d) states of (B, K, d) at the last true step of (B,) lengths; zeros where there is none."""
    rows = torch.arange(len(states), device=states.device)
    return states[rows, (lengths - 1).clamp(min=0)] * (lengths > 0)[:, None]


def joined(fields: torch.Tensor, more: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return (B, F·E + ...): the (B, F, E) fields in a row, then `more`, each (B, d)."""
    return torch.cat([fields.flatten(1), *more], dim=1)
