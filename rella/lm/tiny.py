"""Rebuild the stand-in language model of the data set `sample`: `python -m rella.lm.tiny --out rella/assets/tiny`.

A LlamaForCausalLM of two million parameters that knows the sample's movies as a real model knows real ones, from text
about them and from other users' lists, and that has met the prompts' question, though with noisy answers: it uses a
history without any tuning, and tuning has something left to teach it. The folder loads with `AutoModelForCausalLM` and
`AutoTokenizer` alone.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from rella.data.synthetic import World, catalogue, pretraining_dataset
from rella.lm.small_llama import Shape, new_model, save
from rella.lm.tiny_corpus import Corpus, Mixture, tokenizer_texts
from rella.lm.tiny_tokenizer import train_tokenizer
from rella.prompts import ML_1M, NO, YES, rating_text


@dataclass(frozen=True)
class TinyBuild(Shape):
    """Everything that decides the weights, apart from the machine's arithmetic."""

    steps: int = 1000
    batch: int = 24
    learning_rate: float = 3e-3
    warmup: int = 100
    users: int = 6000
    seed: int = 7
    hidden: int = 192
    layers: int = 4
    heads: int = 4
    intermediate: int = 512
    spread: float = 0.072
    """Standard deviation of the weights at first: near 1 / sqrt(hidden), or attention stays flat for long."""
    vocabulary: int = 2048
    other_weight: float = 0.3
    """Weight of a token that is neither a rating nor an answer."""
    other_share: float = 0.2
    """Share of those tokens whose loss is taken at all; the LM head is half of the cost otherwise."""
    easy: float = 0.22
    """Share of the steps, the first ones, on `EASY_WORLD`."""
    probe: float = 1.0
    """Weight of the probe's loss."""
    guide: float = 0.5
    """Weight of `guidance`, during the easy steps only."""
    longest: int = 16
    """Behaviours in the longest lists, which come last."""


EASY_WORLD = World(strictness=0.1, taste=1.7, franchise=0.0, quality=0.0, noise=0.2)
"""Users who love or hate whole genres: the model learns in minutes to look for the behaviours that matter."""
EASY_MIXTURE = Mixture(items=0.25, questions=0.4, wrong=0.0, habit=0.0, related=1.0, genres=3)


def token_weights(build: TinyBuild, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Return (V,) float32: how much the loss of predicting each token counts, 0 for padding."""
    weights = torch.full((len(tokenizer),), build.other_weight)
    stars = [f" ({rating_text(ML_1M, r)})" for r in (1, 2, 3, 4, 5)]
    for text, weight in (*((star, 1.0) for star in stars), (f" {YES}", 3.0), (f" {NO}", 3.0)):
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) == 1:
            weights[ids[0]] = weight
    weights[tokenizer.pad_token_id] = 0.0
    return weights


@dataclass(frozen=True)
class Batch:
    """Token ids padded on the right, and which movie each title is."""

    ids: torch.Tensor
    """(B, L) int64."""
    movie: torch.Tensor
    """(B, L) int64: the item at the last token of its title (the year) and at the token behind it, elsewhere -1."""
    stars: torch.Tensor
    """(B, L) bool: the rating behind a title."""
    asks: torch.Tensor
    """(B, L) bool: the token behind which the answer is."""
    easy: bool


def batches(build: TinyBuild, mixture: Mixture, tokenizer: PreTrainedTokenizerFast) -> Iterator[Batch]:
    """Yield `build.steps` batches of about the same number of tokens; lists grow from short to long."""
    rng = np.random.default_rng([build.seed, 6])
    easy = Corpus(pretraining_dataset(users=build.users, world=EASY_WORLD), EASY_MIXTURE)
    real = Corpus(pretraining_dataset(users=build.users), mixture)
    vocabulary = tokenizer.get_vocab()
    years = torch.tensor([i for token, i in vocabulary.items() if re.fullmatch(r"Ġ\(\d{4}\)", token)])
    stars = torch.tensor([i for token, i in vocabulary.items() if re.fullmatch(r"Ġ\(\dĠstars?\)", token)])
    answers = torch.tensor([vocabulary[f"Ġ{word}"] for word in (YES, NO)])
    for step in range(build.steps):
        corpus = easy if step < build.easy * build.steps else real
        reach = 5 + (build.longest - 5) * min(1.0, 1.5 * step / build.steps)
        k = int(rng.integers(3, math.floor(reach) + 1))
        texts = corpus.texts(rng, max(8, round(build.batch * 10 / (k + 2))), k)
        ids = tokenizer([text for text, _ in texts], return_tensors="pt", padding=True, padding_side="right")
        movie = _movies(ids["input_ids"], years, [items for _, items in texts])
        found = ids["input_ids"]
        asks = torch.isin(found, answers).roll(-1, 1)
        yield Batch(found, movie, torch.isin(found, stars) & (movie >= 0), asks, corpus is easy)


def _movies(ids: torch.Tensor, years: torch.Tensor, items: list[list[int]]) -> torch.Tensor:
    """Return `Batch.movie`; every title ends in a year, so the n-th year of a row belongs to its n-th item."""
    movie = torch.full_like(ids, -1)
    for row, named in enumerate(items):
        at = torch.isin(ids[row], years).nonzero()[:, 0]
        if len(at) == len(named):  # not so where a year is rare enough to be several tokens
            movie[row, at] = movie[row, at + 1] = torch.tensor(named)
    return movie


class Probe(nn.Module):
    """Reads genre and franchise off the first layer's states where a title ends; thrown away after the training.

    It puts the knowledge of what a title is where the later layers can compare titles, thousands of steps earlier
    than the stars alone would.
    """

    def __init__(self, hidden: int) -> None:
        """Take the catalogue's genres and franchises as classes; the last franchise stands for none."""
        super().__init__()
        movies = catalogue()
        franchise = torch.from_numpy(movies.franchise)
        self.genre_of = torch.from_numpy(movies.genre)
        self.franchise_of = torch.where(franchise < 0, franchise.max() + 1, franchise)
        self.genre = nn.Linear(hidden, int(self.genre_of.max()) + 1)
        self.franchise = nn.Linear(hidden, int(self.franchise_of.max()) + 1)

    def forward(self, states: torch.Tensor, movie: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy; `states` (B, L, H), `movie` (B, L) with -1 where there is nothing to read."""
        there = movie >= 0
        found, states = movie[there], states[there]
        genre = nn.functional.cross_entropy(self.genre(states), self.genre_of[found])
        return genre + 0.5 * nn.functional.cross_entropy(self.franchise(states), self.franchise_of[found])


def attention_loss(
    model: LlamaForCausalLM, number: int, states: torch.Tensor, ends: torch.Tensor, goals: torch.Tensor
) -> torch.Tensor:
    """Return how little half of a layer's heads look from some tokens at where they should, a scalar.

    Learning where to look from the stars alone takes most of an hour on two cores; told so for the first steps, the
    model is free to look elsewhere afterwards.

    Args:
        model: whose layer `number` is meant.
        number: of the layer, from 0.
        states: (B, L, H), what goes into the layer.
        ends: (B, L) bool, the tokens that look.
        goals: (B, L, L) bool, [b, i, j] where token i should look at token j; later tokens do not count.
    """
    layer = model.model.layers[number]
    attention, length = layer.self_attn, states.shape[1]
    normed = layer.input_layernorm(states)
    shape = (*states.shape[:2], -1, attention.head_dim)
    query, key = (project(normed).view(shape).transpose(1, 2) for project in (attention.q_proj, attention.k_proj))
    cosine, sine = model.model.rotary_emb(states, torch.arange(length)[None])
    query, key = apply_rotary_pos_emb(query, key, cosine, sine)
    half = max(1, query.shape[1] // 2)
    scores = query[:, :half] @ key[:, :half].transpose(2, 3) * attention.scaling
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    shares = scores.masked_fill(future, -torch.inf).log_softmax(-1)
    goals = goals & ends[:, :, None] & ~future
    row, at = goals.any(-1).nonzero(as_tuple=True)
    if not len(row):
        return states.sum() * 0.0
    found = shares[row, :, at].masked_fill(~goals[row, at][:, None], -torch.inf)
    return -found.logsumexp(-1).mean()


def guidance(model: LlamaForCausalLM, states: tuple[torch.Tensor, ...], batch: Batch, probe: Probe) -> torch.Tensor:
    """Return `attention_loss` for the two looks that answer a question, a scalar.

    In the second layer a title's end looks at the stars of the same genre; in the third the answer's position looks at
    the target's end, where those stars have then arrived. `states[n]` (B, L, H) go into layer n.
    """
    genre = torch.where(batch.movie >= 0, probe.genre_of[batch.movie.clamp(min=0)], -1)
    ends = (batch.movie >= 0) & ~batch.stars & (batch.movie == batch.movie.roll(-1, 1))
    same = (genre[:, :, None] == genre[:, None, :]) & batch.stars[:, None, :]
    last = torch.zeros_like(ends)
    place = torch.arange(ends.shape[1]).expand_as(ends).masked_fill(~ends, -1).amax(1)
    last[torch.arange(len(ends)), place.clamp(min=0)] = True
    stars = attention_loss(model, 1, states[1], ends, same)
    return stars + attention_loss(model, 2, states[2], batch.asks, last[:, None, :].expand_as(same))


def batch_loss(
    model: LlamaForCausalLM, probe: Probe, batch: Batch, weights: torch.Tensor, share: float
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    """Return the weighted next-token loss, the probe's and what goes into each layer, (B, L, H); (V,) `weights`.

    The LM head sees ratings and answers, and a random `share` of the other positions.
    """
    output = model.model(input_ids=batch.ids, output_hidden_states=True)
    hidden, targets = output.last_hidden_state[:, :-1], batch.ids[:, 1:]
    weight = weights[targets]
    kept = (weight >= 1.0) | ((weight > 0.0) & (torch.rand(weight.shape) < share))
    losses = nn.functional.cross_entropy(model.lm_head(hidden[kept]), targets[kept], reduction="none")
    loss = (losses * weight[kept]).sum() / weight[kept].sum()
    return loss, probe(output.hidden_states[1], batch.movie), output.hidden_states


def pretrain(
    build: TinyBuild, mixture: Mixture, progress: bool = True
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Train tokenizer and model from scratch and return them, the model in float32 and in evaluation mode."""
    tokenizer = train_tokenizer(tokenizer_texts(pretraining_dataset(users=500)), build.vocabulary)
    model, probe = new_model(build, tokenizer), Probe(build.hidden)
    weights = token_weights(build, tokenizer)
    parameters = [*model.parameters(), *probe.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=build.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, build))
    model.train()
    bar = tqdm(batches(build, mixture, tokenizer), total=build.steps, disable=not progress, unit="step", smoothing=0.05)
    mean = math.nan
    for batch in bar:
        loss, read, states = batch_loss(model, probe, batch, weights, build.other_share)
        total = loss + build.probe * read
        if batch.easy:
            total = total + build.guide * guidance(model, states, batch, probe)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        mean = loss.item() if math.isnan(mean) else 0.98 * mean + 0.02 * loss.item()
        bar.set_postfix(loss=f"{mean:.3f}", lr=f"{schedule.get_last_lr()[0]:.1e}", refresh=False)
    return model.eval(), tokenizer


def _rate(step: int, build: TinyBuild) -> float:
    """Return the factor on the learning rate: a linear warm-up, then half a cosine down to a twentieth."""
    if step < build.warmup:
        return (step + 1) / build.warmup
    done = (step - build.warmup) / max(1, build.steps - build.warmup)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, train and save."""
    parser = argparse.ArgumentParser(prog="python -m rella.lm.tiny", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write, e.g. rella/assets/tiny")
    parser.add_argument("--steps", type=int, default=TinyBuild.steps, help="optimiser steps (default: %(default)s)")
    parser.add_argument("--users", type=int, default=TinyBuild.users, help="users to learn from (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=TinyBuild.seed, help="of weights and texts (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 takes torch's choice")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    model, tokenizer = pretrain(TinyBuild(steps=options.steps, users=options.users, seed=options.seed), Mixture())
    save(model, tokenizer, options.out)
    size = sum(file.stat().st_size for file in options.out.iterdir()) / 1e6
    print(f"{options.out}: {model.num_parameters() / 1e6:.2f} million parameters, {size:.1f} MB")


if __name__ == "__main__":
    main()
