"""Item sentences to vectors: ours against what people run, with one model on one device, in one process.

    python benchmarks/embedding.py [--quick] [--device cpu|cuda] [--json FILE]

(a) the authors' script: per item one `generate` of two tokens, a hook that copies the last hidden states to the host,
their mean there; (b) sentence-transformers with mean pooling over the same decoder, which sorts by length, pads and
masks. The model is a randomly initialised Llama with 32,000 tokens, on a card of Vicuna-13B's shape in 16 bit. (a) and
(b) do a part of the texts; ratios are their seconds per text over ours, so more is better. The vectors of all are held
against a float32 loop without batches.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script

from benchmarks import lm_bench
from benchmarks.lm_bench import Machine, forward_flops, interleaved, mfu, peak_memory
from rella.lm.embedding import embed_texts
from rella.lm.encoding import token_rows
from rella.lm.loading import quiet_libraries
from rella.lm.passes import TokenBudget, plan
from rella.plan import forward_memory

Vectors = npt.NDArray[np.float32]

BUDGET = 16_384
"""Tokens of our passes: the jobs' default."""
CHECKED = 24
"""Texts whose vectors are held against those of a float32 loop without batches."""


@dataclass(frozen=True)
class Size:
    """How much of the work each way does, and how often."""

    texts: int
    authors: int
    engineer: int
    engineer_batch: int
    rounds: int


SIZES = {
    ("cpu", False): Size(2000, 40, 1000, 32, 5),
    ("cpu", True): Size(600, 20, 300, 32, 3),
    ("cuda", False): Size(4096, 24, 1536, 256, 3),
    ("cuda", True): Size(1024, 8, 512, 256, 2),
}


def authors_way(m: Machine, texts: Sequence[str]) -> Vectors:
    """Return what (a) is after: the mean over the text's own states, which the hook sees in the first of two steps."""
    kept: list[Vectors] = []
    hook = m.model.model.norm.register_forward_hook(lambda *seen: kept.append(seen[2].float().cpu().numpy()))
    means = []
    m.model.config.use_cache = True  # what generate runs with unless told otherwise
    try:
        for text in texts:
            kept.clear()
            ids = torch.as_tensor(m.tokenizer([text]).input_ids, device=m.device)
            with torch.inference_mode():
                m.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=True,
                    temperature=0.01,
                    max_new_tokens=2,
                    min_new_tokens=2,
                )
            means.append(kept[0][0, : ids.shape[1]].mean(axis=0))
    finally:
        hook.remove()
        m.model.config.use_cache = False
    return np.stack(means)


def sentence_transformer(m: Machine) -> Any | None:  # noqa: ANN401
    """Return (b)'s model around the machine's own decoder, or None where sentence-transformers is not installed."""
    try:
        library = importlib.import_module("sentence_transformers")
        modules = importlib.import_module("sentence_transformers.sentence_transformer.modules")
    except ImportError:
        return None
    small = lm_bench.build_model(lm_bench.TINY, torch.device("cpu"), torch.float32)
    # It loads from a folder only: a tiny one, whose decoder is then replaced.
    with tempfile.TemporaryDirectory() as folder, quiet_libraries():
        small.model.save_pretrained(folder)
        m.tokenizer.save_pretrained(folder)
        transformer = modules.Transformer(folder)
    transformer.model = m.model.model
    return library.SentenceTransformer(modules=[transformer, modules.Pooling(m.shape.hidden)], device=str(m.device))


def ways(m: Machine, texts: Sequence[str], size: Size) -> dict[str, Callable[[], Vectors]]:
    """Return what is timed, by name."""
    found: dict[str, Callable[[], Vectors]] = {
        "ours": lambda: embed_texts(m.model.model, m.tokenizer, texts),
        "authors": lambda: authors_way(m, texts[: size.authors]),
    }
    theirs = sentence_transformer(m)
    if theirs is not None:
        part, batch = list(texts[: size.engineer]), size.engineer_batch
        found["engineer"] = lambda: np.asarray(theirs.encode(part, batch_size=batch, show_progress_bar=False))
    return found


def errors(m: Machine, texts: Sequence[str], found: Mapping[str, Vectors]) -> dict[str, float]:
    """Return, by way, the largest distance of its first vectors from the exact ones, over the exact ones' lengths."""
    rows = token_rows(m.tokenizer, texts[: min(CHECKED, *(len(v) for v in found.values()))])
    right = np.stack([states.mean(0).cpu().numpy() for states in lm_bench.exact_states(m, rows)])

    def error(vectors: Vectors) -> float:
        return float((np.linalg.norm(vectors[: len(right)] - right, axis=1) / np.linalg.norm(right, axis=1)).max())

    return {name: error(vectors.astype(np.float32)) for name, vectors in found.items()}


def same_pass_memory(m: Machine, texts: Sequence[str]) -> float:
    """Return what (a) holds beyond the weights over what ours holds in passes of as many tokens: one text each."""
    few = sorted(texts[:8], key=len)
    tokens = max(len(ids) for ids in m.tokenizer(few)["input_ids"])
    theirs = peak_memory(lambda: authors_way(m, few), m.device).used
    return theirs / max(
        1, peak_memory(lambda: embed_texts(m.model.model, m.tokenizer, few, True, tokens), m.device).used
    )


def run(m: Machine, quick: bool, faults: list[str]) -> dict[str, float]:
    """Measure, print and return the figures, flat; what is wrong with the vectors goes to `faults`."""
    size = SIZES[m.device.type, quick]
    texts = lm_bench.item_sentences(size.texts)
    lengths = [len(ids) for ids in m.tokenizer(texts)["input_ids"]]
    timings = interleaved(ways(m, texts, size), size.rounds, m.device)
    ours = timings["ours"]
    exactness = errors(m, texts, {name: t.result for name, t in timings.items()})
    figures = {
        "texts": float(len(texts)),
        "tokens": float(sum(lengths)),
        "seconds": ours.median,
        "texts_per_second": len(texts) / ours.median,
        "tokens_per_second": sum(lengths) / ours.median,
        "mfu": mfu(forward_flops(m.shape, lengths), ours.median, m.gemm),
        "padding": padding(lengths, m.device),
    }
    print(f"embedding  {len(texts):,} texts, {sum(lengths):,} tokens ({figures['padding']:.1%} padding in ours)")
    figures |= {f"error_{name}": error for name, error in exactness.items()}
    print(f"  ours      {len(texts) / ours.median:10,.1f} texts/s  {figures['mfu']:.1%} of the dense rate; vectors "
          f"{exactness['ours']:.1e} from exact ones")  # fmt: skip
    if fault := lm_bench.worse(exactness, m.dtype):
        faults.append(f"embedding: {fault}")
    for name, count in (("authors", size.authors), ("engineer", size.engineer)):
        if name not in timings:
            print(f"  {name}  left out: pip install sentence-transformers")
            continue
        theirs, part = timings[name], min(count, len(texts))
        figures[f"ratio_{name}"] = theirs.median / part / (ours.median / len(texts))
        figures[f"ratio_cpu_{name}"] = theirs.median_cpu / part / (ours.median_cpu / len(texts))
        print(f"  {name:<9} {part / theirs.median:10,.1f} texts/s  ours {figures[f'ratio_{name}']:.2f} × "
              f"({figures[f'ratio_cpu_{name}']:.2f} × by CPU time); vectors {exactness[name]:.1e}")  # fmt: skip
    figures["memory_ratio_authors"] = same_pass_memory(m, texts)
    figures["peak_gib"] = (
        peak_memory(lambda: embed_texts(m.model.model, m.tokenizer, texts[:1024]), m.device).highest / 2**30
    )
    print(f"  memory: authors {figures['memory_ratio_authors']:.2f} × in passes of as many tokens; ours at its own "
          f"budget {figures['peak_gib']:.2f} GiB in all", flush=True)  # fmt: skip
    if m.gpu:
        # A budget of its own kind: memory that runs out is not to halve it. The LM head is there for the other parts.
        firm, terms = TokenBudget(BUDGET, matched=lambda own: own), forward_memory(m.shape, m.setting(BUDGET), True)
        work = lambda: embed_texts(m.model.model, m.tokenizer, texts[:1024], True, firm)  # noqa: E731
        figures |= lm_bench.beside_plan("embedding", work, m.device, terms, faults)
    return figures


def padding(lengths: Sequence[int], device: torch.device) -> float:
    """Return the padded share of all tokens in passes of our making."""
    passes = plan(lengths, TokenBudget(BUDGET).on(device))
    return 1 - sum(lengths) / sum(max(lengths[i] for i in batch) * len(batch) for batch in passes)


def main() -> None:
    """Measure, print and write the figures."""
    lm_bench.run_alone(__doc__, run)


if __name__ == "__main__":
    main()
