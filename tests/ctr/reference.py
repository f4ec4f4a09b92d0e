"""The models once more, from their papers, one sample and one number at a time in float64."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from torch import nn

from rella.baselines import BaselineConfig
from rella.ctr.batches import Batch
from rella.ctr.features import FeatureSpace

Vector = npt.NDArray[np.float64]


def relu(x: Vector) -> Vector:
    return np.maximum(x, 0.0)


def sigmoid(x: Vector) -> Vector:
    return 1.0 / (1.0 + np.exp(-x))


def softmax(scores: list[float]) -> list[float]:
    powers = [math.exp(s - max(scores)) for s in scores]
    return [p / sum(powers) for p in powers]


class Reference:
    """Logits of the samples of a batch by loops, with a model's parameters."""

    def __init__(self, model: nn.Module, space: FeatureSpace, config: BaselineConfig, k: int) -> None:
        self.p = {name: w.detach().double().numpy() for name, w in model.named_parameters()}
        self.space, self.config, self.k = space, config, k

    def logits(self, batch: Batch) -> Vector:
        return np.array([getattr(self, self.config.model)(batch, b) for b in range(len(batch))])

    def linear(self, name: str, x: Vector) -> Vector:
        out = self.p[f"{name}.weight"] @ x
        return out + self.p[f"{name}.bias"] if f"{name}.bias" in self.p else out

    def mlp(self, name: str, x: Vector, layers: int) -> Vector:
        for layer in range(layers):
            x = relu(self.linear(f"{name}.{3 * layer}", x))
        return x

    def dnn(self, parts: list[Vector]) -> float:
        layers = self.config.dnn_layers
        return self.linear(f"dnn.{3 * layers}", self.mlp("dnn", np.concatenate(parts), layers)).item()

    def history(self, batch: Batch, b: int, table: str) -> tuple[list[Vector], list[Vector]]:
        weight, length = self.p[table], int(batch.lengths[b])
        items = [weight[int(i)] for i in batch.items[b, :length]]
        if not self.space.levels:
            return items, []
        return items, [weight[self.space.first_level + int(r) - 1] for r in batch.ratings[b, :length]]

    def fields(self, batch: Batch, b: int, table: str = "inputs.table.weight") -> list[Vector]:
        return [self.p[table][int(f)] for f in batch.fields[b]]

    def pooled(self, batch: Batch, b: int, table: str = "inputs.table.weight") -> list[Vector]:
        items, ratings = self.history(batch, b, table)
        zero = np.zeros(self.p[table].shape[1])
        means = [sum(items, zero) / max(1, len(items))]
        if self.space.levels:
            means.append(sum(ratings, zero) / max(1, len(ratings)))
        return self.fields(batch, b, table) + means

    def steps(self, batch: Batch, b: int) -> list[Vector]:
        items, ratings = self.history(batch, b, "inputs.table.weight")
        joined = [np.concatenate(pair) for pair in zip(items, ratings, strict=True)] if ratings else items
        return [self.linear("steps.project", x) for x in joined]

    def deepfm(self, batch: Batch, b: int) -> float:
        v = self.pooled(batch, b)
        first = sum(w.item() for w in self.pooled(batch, b, "linear.table.weight")) + float(self.p["bias"])
        second = sum(float(v[f] @ v[g]) for f in range(len(v)) for g in range(f))
        return first + second + self.dnn(v)

    def autoint(self, batch: Batch, b: int) -> float:
        vectors, heads, size = self.pooled(batch, b), self.config.attention_heads, self.config.attention_size
        for layer in range(self.config.attention_layers):
            query, key, value, residual = np.split(self.p[f"interact.{layer}.project.weight"], 4)
            found = []
            for m in vectors:
                out = []
                for h in range(heads):
                    part = slice(h * size // heads, (h + 1) * size // heads)
                    scores = [float((query[part] @ m) @ (key[part] @ n)) / math.sqrt(size // heads) for n in vectors]
                    mixed = sum((a * (value[part] @ n) for a, n in zip(softmax(scores), vectors, strict=True)), 0.0)
                    out.append(mixed)
                found.append(relu(np.concatenate(out) + residual @ m))
            vectors = found
        return self.linear("out", np.concatenate(vectors)).item()

    def dcnv2(self, batch: Batch, b: int) -> float:
        start = x = np.concatenate(self.pooled(batch, b))
        for layer in range(self.config.cross_layers):
            x = start * self.linear(f"cross.layers.{layer}", x) + x
        return self.linear("out", np.concatenate([x, self.mlp("dnn", start, self.config.dnn_layers)])).item()

    def gru4rec(self, batch: Batch, b: int) -> float:
        inputs = self.steps(batch, b)
        for layer in range(self.config.gru_layers):
            w, u, c, d = (self.p[f"gru.{n}_l{layer}"] for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
            state, states = np.zeros(self.config.gru_size), []
            for x in inputs:
                of_x, of_h = np.split(w @ x + c, 3), np.split(u @ state + d, 3)
                reset, update = sigmoid(of_x[0] + of_h[0]), sigmoid(of_x[1] + of_h[1])
                state = (1 - update) * np.tanh(of_x[2] + reset * of_h[2]) + update * state
                states.append(state)
            inputs = states
        last = inputs[-1] if inputs else np.zeros(self.config.gru_size)
        return self.dnn([*self.fields(batch, b), last])

    def caser(self, batch: Batch, b: int) -> float:
        steps, dim = self.steps(batch, b), self.config.embedding_dim
        horizontal = np.zeros((self.k, self.config.horizontal_kernels))
        for height in range(1, self.k + 1):
            kernels, bias = self.p[f"horizontal.{height - 1}"], self.p["bias"][height - 1]
            for start in range(len(steps) - height + 1):
                value = sum(
                    (steps[start + j][e] * kernels[j, e] for j in range(height) for e in range(dim)), start=bias
                )
                horizontal[height - 1] = np.maximum(horizontal[height - 1], relu(value))
        vertical = np.zeros((self.config.vertical_kernels, dim))
        for n, step in enumerate(steps):
            vertical += np.outer(self.p["vertical.weight"][:, len(steps) - 1 - n], step)
        z = relu(self.linear("convolved", np.concatenate([horizontal.ravel(), vertical.ravel()])))
        return self.dnn([*self.fields(batch, b), z])

    def norm(self, name: str, x: Vector) -> Vector:
        return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * self.p[f"{name}.weight"] + self.p[f"{name}.bias"]

    def sasrec(self, batch: Batch, b: int) -> float:
        size, heads = self.config.attention_size, self.config.attention_heads
        x = self.steps(batch, b)
        x = [step + self.p["position"][len(x) - 1 - n] for n, step in enumerate(x)]
        for layer in range(self.config.attention_layers):
            name, found = f"blocks.{layer}", []
            normed = [self.norm(f"{name}.before_attention", v) for v in x]
            q, k, v = ([self.linear(f"{name}.{w}", n) for n in normed] for w in ("query", "key", "value"))
            for t in range(len(x)):
                mixed = np.zeros(size)
                for h in range(heads):
                    part = slice(h * size // heads, (h + 1) * size // heads)
                    scores = [float(q[t][part] @ k[s][part]) / math.sqrt(size // heads) for s in range(t + 1)]
                    for s, a in enumerate(softmax(scores)):
                        mixed[part] += a * v[s][part]
                y = x[t] + mixed
                inner = relu(self.linear(f"{name}.network.0", self.norm(f"{name}.before_network", y)))
                found.append(y + self.linear(f"{name}.network.3", inner))
            x = found
        return self.dnn([*self.fields(batch, b), self.norm("norm", x[-1]) if x else np.zeros(size)])

    def attended(self, batch: Batch, b: int, chosen: list[int]) -> float:
        fields, steps = self.fields(batch, b), self.steps(batch, b)
        q, h = fields[self.space.item_at], [steps[n] for n in chosen]
        scores = []
        for step in h:
            x = relu(self.linear("attention.first", np.concatenate([q, step, q - step, q * step])))
            x = self.mlp("attention.rest", x, self.config.attention_layers - 1)
            scores.append(self.linear("attention.score", x).item())
        zero = np.zeros(self.config.embedding_dim)
        interest = sum((a * x for a, x in zip(softmax(scores), h, strict=True)), zero) if h else zero
        return self.dnn([*fields, interest])

    def din(self, batch: Batch, b: int) -> float:
        return self.attended(batch, b, list(range(int(batch.lengths[b]))))

    def sim(self, batch: Batch, b: int) -> float:
        length = int(batch.lengths[b])
        if self.config.search != "soft":
            return self.din(batch, b)
        target = self.fields(batch, b)[self.space.item_at]
        items, _ = self.history(batch, b, "inputs.table.weight")
        best = sorted(range(length), key=lambda n: (-float(target @ items[n]), -n))
        return self.attended(batch, b, best[: self.k])
