"""`--show N`: a few samples as the model reads them, with their token counts."""

from __future__ import annotations

from collections.abc import Iterator

from rella.artifacts import Artifact
from rella.data.questions import Neighbours, Question, questions
from rella.data.selection import SubsetRule, choose, split_subset
from rella.dist.dataset import catalogue_of, read_tables
from rella.models import ModelIdentity
from rella.pipeline import Pipeline
from rella.prompts import answer_text, item_text, shown_fields
from rella.wording import Wording


def shown_samples(
    pipeline: Pipeline, data: Artifact, found: Artifact | None, model: ModelIdentity, wording: Wording, n: int
) -> Iterator[str]:
    """Yield `n` samples of the scored split as text: prompts with recent and, where there are any, retrieved
    behaviours, the answer, and the target's item text, each with its number of tokens.

    Args:
        pipeline: the experiment.
        data: the finished `prepare` artifact.
        found: the `retrieve` artifact where it is finished.
        model: whose tokenizer counts.
        wording: the data set's.
        n: how many, at most the split's samples.
    """
    from rella.lm.loading import load_tokenizer
    from rella.lm.reading import Reader

    e = pipeline.experiment
    tables, reader = read_tables(data), Reader(load_tokenizer(model), model, e.prompt, wording)
    catalogue = catalogue_of(tables, wording, reader.display)
    chosen = choose(tables.samples, split_subset(tables.samples, e.score.split, n, SubsetRule.of(e)))
    asked: dict[str, list[Question]] = {"recent": questions(catalogue, chosen, "recent", None, int(e.score.k))}
    if found is not None:
        neighbours = Neighbours.from_table(found.read().combine_chunks())
        asked["retrieved"] = questions(catalogue, chosen, "retrieved", neighbours, int(e.score.k))
    items = tables.items.take(chosen.item).to_pylist()
    for row in range(n):
        label = "unknown" if chosen.label[row] != chosen.label[row] else answer_text(bool(chosen.label[row]))
        yield f"── sample {chosen.sample_id[row]}, {e.score.split}, {chosen.end[row]} behaviours, answer {label}"
        for history, of_samples in asked.items():
            encoder = reader.encoder()
            tokens = len(encoder.encode([of_samples[row]])[0])
            lost = f", {encoder.dropped} oldest behaviours did not fit" if encoder.dropped else ""
            yield f"[{history}, K = {e.score.k}: {tokens} tokens{lost}]"
            yield of_samples[row].text(reader.wording, reader.wrapper, encoder.dropped)
        text = item_text(wording, shown_fields(items[row], reader.display))
        text = reader.wrapper.wrap(text) if e.embed.wrapped else text
        yield f"[item text: {len(reader.tokenizer(text)['input_ids'])} tokens]\n{text}\n"
    if found is None:
        yield "Retrieved behaviours are shown once jobs/retrieve.py (or reit.py) has run with the same flags."
