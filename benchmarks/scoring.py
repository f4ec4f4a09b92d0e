"""Prompts to P(yes): ours against what people run, with one model on one device, in one process.

    python benchmarks/scoring.py [--quick] [--device cpu|cuda] [--json FILE]

(a) the authors' script: `Trainer.evaluate` with 4 prompts a batch as they come, padded to the longest, the answer in
the labels, so that the loss and the logits of the whole vocabulary are made at every position (their 8-bit base is left
out: all ways run one model); (b) `Trainer.predict` with left padding and `logits_to_keep=1`. The model is a randomly
initialised Llama with 32,000 tokens, on a card of Vicuna-13B's shape in 16 bit; prompts are of Figure 9 with K = 30.
(a) and (b) do a part of the prompts; ratios are their seconds per token over ours, so more is better. The probabilities
of all are held against a float32 loop without batches.
"""

from __future__ import annotations

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
from benchmarks.embedding import BUDGET, padding
from benchmarks.lm_bench import Machine, forward_flops, interleaved, mfu, peak_memory
from rella.lm.encoding import Ids, token_rows
from rella.lm.passes import TokenBudget
from rella.lm.scoring import answer_logits, probabilities
from rella.plan import forward_memory

Odds = npt.NDArray[np.float64]

AUTHORS_BATCH = 4
CHECKED = 16
"""Prompts whose probabilities are held against those of a float32 loop without batches."""


@dataclass(frozen=True)
class Size:
    """How much of the work each way does, and how often."""

    prompts: int
    authors: int
    engineer: int
    engineer_batch: int
    rounds: int
    k: int = 30


SIZES = {
    ("cpu", False): Size(64, 16, 48, 8, 5),
    ("cpu", True): Size(16, 8, 16, 8, 3),
    ("cuda", False): Size(256, 32, 96, 16, 3),
    ("cuda", True): Size(64, 16, 32, 16, 2),
}


@dataclass(frozen=True)
class Task:
    """Prompts as token ids, and the two answers' first tokens."""

    prompts: list[Ids]
    pair: tuple[int, int]

    def part(self, count: int) -> Task:
        """Return the first `count` prompts."""
        return Task(self.prompts[:count], self.pair)

    @property
    def lengths(self) -> list[int]:
        """Tokens of every prompt."""
        return [len(p) for p in self.prompts]


def ours(m: Machine, task: Task, tokens: int | TokenBudget = BUDGET) -> Odds:
    """P(yes) by `rella.lm.scoring`."""
    return probabilities(answer_logits(m.model, task.prompts, task.pair, m.tokenizer.pad_token_id, tokens))


def trainer(m: Machine, folder: str, batch: int, **parts: Any) -> Any:  # noqa: ANN401
    """Return a Hugging Face `Trainer` that only evaluates."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=folder,
        per_device_eval_batch_size=batch,
        use_cpu=not m.gpu,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    made = Trainer(model=m.model, args=arguments, **parts)
    made.remove_callback(PrinterCallback)
    return made


def authors_way(m: Machine, task: Task) -> Odds:
    """P(yes) by (a)."""
    from transformers import DataCollatorForSeq2Seq

    rows = [
        {
            "input_ids": [*p.tolist(), task.pair[0]],
            "attention_mask": [1] * (len(p) + 1),
            "labels": [-100] * len(p) + [task.pair[0]],
        }
        for p in task.prompts
    ]
    found: list[torch.Tensor] = []

    def keep(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        row, place = torch.nonzero(labels == task.pair[0], as_tuple=True)
        found.append(torch.softmax(logits[row, place - 1][:, list(task.pair)].float(), dim=-1)[:, 0].double().cpu())
        return found[-1].to(labels.device)

    with tempfile.TemporaryDirectory() as folder:
        collator = DataCollatorForSeq2Seq(m.tokenizer, padding="longest", return_tensors="pt")
        # Without metrics to compute it would make the loss alone.
        parts = {"data_collator": collator, "preprocess_logits_for_metrics": keep, "compute_metrics": lambda seen: {}}
        trainer(m, folder, AUTHORS_BATCH, **parts).evaluate(rows)
    return torch.cat(found).numpy()


def engineer_way(m: Machine, task: Task, batch: int) -> Odds:
    """P(yes) by (b)."""
    rows = [{"input_ids": p.tolist()} for p in task.prompts]

    def collate(some: Sequence[dict[str, Any]]) -> dict[str, Any]:
        padded = m.tokenizer.pad(list(some), padding="longest", padding_side="left", return_tensors="pt")
        return {**padded, "logits_to_keep": 1}

    def keep(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        del labels
        return logits[:, -1, list(task.pair)].float()

    with tempfile.TemporaryDirectory() as folder:
        parts = {"data_collator": collate, "preprocess_logits_for_metrics": keep}
        found = trainer(m, folder, batch, **parts).predict(rows).predictions
    return probabilities(np.asarray(found, dtype=np.float32))


def make_task(m: Machine, size: Size) -> Task:
    """Return the run's prompts."""
    texts = lm_bench.wrapped_prompts(size.prompts, size.k)
    return Task(token_rows(m.tokenizer, texts), lm_bench.answer_tokens(m.tokenizer))


def same_pass_memory(m: Machine, task: Task) -> float:
    """Return what (a) holds beyond the weights over what ours holds, in passes of as many tokens: a batch of (a)'s."""
    batch = task.part(AUTHORS_BATCH)
    tokens = max(batch.lengths) * AUTHORS_BATCH
    theirs = peak_memory(lambda: authors_way(m, batch), m.device).used
    return theirs / max(1, peak_memory(lambda: ours(m, batch, tokens), m.device).used)


def errors(m: Machine, task: Task, found: Mapping[str, Odds]) -> dict[str, float]:
    """Return, by way, the largest difference of its first probabilities from the exact ones."""
    checked = task.part(min(CHECKED, *(len(odds) for odds in found.values())))
    head = m.model.lm_head.weight[list(task.pair)].float()
    logits = torch.stack([states[-1] @ head.T for states in lm_bench.exact_states(m, checked.prompts)])
    right = probabilities(logits.cpu().numpy())
    return {name: float(np.abs(odds[: len(right)] - right).max()) for name, odds in found.items()}


def run(m: Machine, quick: bool, faults: list[str]) -> dict[str, float]:
    """Measure, print and return the figures, flat; what is wrong with the probabilities goes to `faults`."""
    size = SIZES[m.device.type, quick]
    task = make_task(m, size)
    ways: dict[str, Callable[[], Odds]] = {
        "ours": lambda: ours(m, task),
        "authors": lambda: authors_way(m, task.part(size.authors)),
        "engineer": lambda: engineer_way(m, task.part(size.engineer), size.engineer_batch),
    }
    timings = interleaved(ways, size.rounds, m.device)
    mine, tokens = timings["ours"], sum(task.lengths)
    exactness = errors(m, task, {name: t.result for name, t in timings.items()})
    figures = {
        "prompts": float(len(task.prompts)),
        "tokens": float(tokens),
        "seconds": mine.median,
        "prompts_per_second": len(task.prompts) / mine.median,
        "tokens_per_second": tokens / mine.median,
        "mfu": mfu(forward_flops(m.shape, task.lengths), mine.median, m.gemm),
        "padding": padding(task.lengths, m.device),
    }
    print(f"scoring    {len(task.prompts):,} prompts, {tokens:,} tokens ({figures['padding']:.1%} padding in ours)")
    figures |= {f"error_{name}": error for name, error in exactness.items()}
    print(f"  ours      {figures['prompts_per_second']:10,.2f} prompts/s  {figures['mfu']:.1%} of the dense rate; "
          f"P(yes) {exactness['ours']:.1e} from exact ones")  # fmt: skip
    if fault := lm_bench.worse(exactness, m.dtype):
        faults.append(f"scoring: {fault}")
    for name, count in (("authors", size.authors), ("engineer", size.engineer)):
        theirs, part = timings[name], task.part(count)
        ratio = theirs.median / sum(part.lengths) / (mine.median / tokens)
        by_cpu = theirs.median_cpu / sum(part.lengths) / (mine.median_cpu / tokens)
        figures |= {f"ratio_{name}": ratio, f"ratio_cpu_{name}": by_cpu}
        print(f"  {name:<9} {len(part.prompts) / theirs.median:10,.2f} prompts/s  ours {ratio:.2f} × "
              f"({by_cpu:.2f} × by CPU time); P(yes) {exactness[name]:.1e}")  # fmt: skip
    figures["memory_ratio_authors"] = same_pass_memory(m, task)
    few = task.part(64)
    figures["peak_gib"] = peak_memory(lambda: ours(m, few), m.device).highest / 2**30
    print(f"  memory: authors {figures['memory_ratio_authors']:.2f} × in passes of as many tokens; ours at its own "
          f"budget {figures['peak_gib']:.2f} GiB in all", flush=True)  # fmt: skip
    if m.gpu:
        # Memory that runs out is not to halve it.
        firm, terms = TokenBudget(BUDGET, matched=lambda own: own), forward_memory(m.shape, m.setting(BUDGET), True)
        figures |= lm_bench.beside_plan("scoring", lambda: ours(m, few, firm), m.device, terms, faults)
    return figures


def main() -> None:
    """Measure, print and write the figures."""
    lm_bench.run_alone(__doc__, run)


if __name__ == "__main__":
    main()
