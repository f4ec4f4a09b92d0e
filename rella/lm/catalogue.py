"""A small Llama that has read nothing but a catalogue: `python -m rella.lm.catalogue --dataset ml-1m --out FOLDER`.

For machines without a GPU or a hub: built from its configuration and pre-trained on the item sentences of a data set
(§3.2, Figure 4) only. It has met titles and genres, but neither a user nor a question. With `--knows genre` its pooled
states tell an item's genre too, as those of a large model do that has read about films: the behaviours that it
retrieves are of few genres.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rella.config import DATASETS, DataConfig, PromptConfig
from rella.data.sources import Source
from rella.lm.small_llama import Shape, new_model, save
from rella.lm.tiny_tokenizer import train_tokenizer
from rella.prompts import WORDINGS, Display, answer_text, item_text, prompt_text, shown_fields, wrapper_for


@dataclass(frozen=True)
class CatalogueBuild(Shape):
    """Size and training of the model: about 3 million parameters."""

    epochs: int = 6
    batch: int = 64
    learning_rate: float = 2e-3
    seed: int = 0
    hidden: int = 224
    layers: int = 4
    heads: int = 7
    intermediate: int = 608
    vocabulary: int = 4096
    knowing_epochs: int = 1
    """Epochs behind the others, in which the pooled states learn to tell a field."""
    knowing_rate: float = 5e-4
    """Their learning rate."""


def vocabulary_texts(sentences: Sequence[str], dataset: str) -> list[str]:
    """Return the texts that the tokenizer is learned from: the sentences, and prompts that name nothing.

    The tokenizer has to know the prompts' form (numbers, stars, answers), or every behaviour costs three times its
    tokens; the model never reads them.
    """
    wording, wrapper = WORDINGS[dataset], wrapper_for("vicuna")
    other = {"age": "25-34", "occupation": "other", "location": "unknown"}
    profiles = [{"gender": g, **other} for g in ("female", "male")]
    stars = [float(1 + n % 5) for n in range(80)]
    lists = ([""] * 80, ["'s"] * 80)  # An apostrophe changes the quotes around an entry.
    prompts = [
        f"{wrapper.wrap(prompt_text(wording, profile, titles, stars, ''))}{wrapper.separator}{answer_text(label)}"
        for profile in profiles
        for titles in lists
        for label in (0, 1)
    ]
    return [*sentences, *(prompts * 20)]


def batches(rows: Sequence[Sequence[int]], build: CatalogueBuild, pad: int) -> Iterator[torch.Tensor]:
    """Yield shuffled batches of token ids, (B, L) int64, padded on the right, for every epoch."""
    rng = np.random.default_rng(build.seed)
    for _ in range(build.epochs):
        order = rng.permutation(len(rows))
        for start in range(0, len(rows), build.batch):
            chosen = [list(rows[i]) for i in order[start : start + build.batch]]
            longest = max(map(len, chosen))
            yield torch.tensor([r + [pad] * (longest - len(r)) for r in chosen])


def pretrain(
    sentences: Sequence[str], dataset: str, build: CatalogueBuild
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Train tokenizer and model on the sentences and return them, the model in evaluation mode."""
    tokenizer = train_tokenizer(vocabulary_texts(sentences, dataset), build.vocabulary)
    model = new_model(build, tokenizer)
    rows = tokenizer(list(sentences))["input_ids"]
    steps = build.epochs * math.ceil(len(rows) / build.batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=build.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.02, 1.0 - step / steps))
    pad = tokenizer.pad_token_id
    bar = tqdm(batches(rows, build, pad), total=steps, unit="step", smoothing=0.05)
    for ids in bar:
        logits = model(input_ids=ids).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=pad)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval(), tokenizer


def know(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    sentences: Sequence[str],
    values: Sequence[str],
    build: CatalogueBuild,
) -> None:
    """Train on until the mean of a sentence's last hidden states tells a field of the item, and the words still.

    Args:
        model: of `pretrain`.
        tokenizer: its.
        sentences: S of them.
        values: the field's value by sentence, (S,), e.g. the first genre.
        build: says how long.
    """
    kinds = torch.from_numpy(np.unique(np.asarray(values, dtype=str), return_inverse=True)[1])
    head = nn.Linear(model.config.hidden_size, int(kinds.max()) + 1)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=build.knowing_rate)
    rows, pad = tokenizer(list(sentences))["input_ids"], tokenizer.pad_token_id
    order = np.random.default_rng(build.seed)
    model.train()
    for _ in range(build.knowing_epochs):
        for chosen in tqdm(
            np.array_split(order.permutation(len(rows)), math.ceil(len(rows) / build.batch)), unit="step"
        ):
            longest = max(len(rows[i]) for i in chosen)
            ids = torch.tensor([[*rows[i], *[pad] * (longest - len(rows[i]))] for i in chosen])
            states = model.model(input_ids=ids, attention_mask=(ids != pad).long()).last_hidden_state
            there = (ids != pad).unsqueeze(-1)
            pooled = (states * there).sum(dim=1) / there.sum(dim=1)
            logits = model.lm_head(states[:, :-1])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=pad)
            (loss + nn.functional.cross_entropy(head(pooled), kinds[chosen])).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    model.eval()


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, read the catalogue, train and save."""
    parser = argparse.ArgumentParser(prog="python -m rella.lm.catalogue", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--dataset", default="ml-1m", choices=sorted(DATASETS), help="whose catalogue")
    parser.add_argument("--raw-dir", help="folder or zip with the original files; without it they are downloaded")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--epochs", type=int, default=CatalogueBuild.epochs, help="default: %(default)s")
    parser.add_argument("--knows", metavar="FIELD", help="item field that the pooled states tell, e.g. genre")
    parser.add_argument("--seed", type=int, default=CatalogueBuild.seed, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="torch threads; more only on idle cores (default: 1)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    raw = Source(options.dataset, options.raw_dir).load(DataConfig(strict=options.dataset != "bookcrossing"))
    wording, display = WORDINGS[options.dataset], Display(PromptConfig().title_chars)
    if options.knows and options.knows not in raw.items.schema.names:
        parser.error(f"--knows {options.knows}: items have {', '.join(raw.items.schema.names)}")
    items = raw.items.to_pylist()
    sentences = [item_text(wording, shown_fields(row, display)) for row in items]
    build = CatalogueBuild(epochs=options.epochs, seed=options.seed)
    model, tokenizer = pretrain(sentences, options.dataset, build)
    if options.knows:
        know(model, tokenizer, sentences, [str(row[options.knows]) for row in items], build)
    save(model, tokenizer, options.out)
    print(f"{options.out}: {model.num_parameters() / 1e6:.2f} million parameters, {len(sentences)} sentences read")


if __name__ == "__main__":
    main()
