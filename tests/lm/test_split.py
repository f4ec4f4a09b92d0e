"""A base over two gloo processes: the vectors, probabilities and adapter of the whole one, half of the weights each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rella.config import TuneConfig
from rella.errors import InputError
from rella.lm.embedding import embed_texts
from rella.lm.loading import attach_adapter, load_base, load_tokenizer
from rella.lm.lora import add_lora
from rella.lm.passes import TokenBudget, run_passes
from rella.lm.scoring import answer_logits, probabilities
from rella.lm.split import load_split_base, own_rows
from rella.models import identify

CPU = torch.device("cpu")
# Very different lengths: the two processes' passes differ in number.
TEXTS = [f"Here is a movie. Its title is {'Film ' * (1 + n % 7)}{n}." for n in range(37)]
RNG = np.random.default_rng(1)
PROMPTS = [RNG.integers(3, 2000, n).astype(np.int32) for n in RNG.integers(4, 90, 25)]
PAIR = (300, 17)

SCRIPT = """
import json, logging, sys, warnings

warnings.filterwarnings("ignore")
import numpy as np
import torch
import torch.distributed as dist

torch.set_num_threads(1)
rank, world, asked = int(sys.argv[1]), int(sys.argv[2]), json.load(open("asked.json"))
dist.init_process_group("gloo", init_method="file://" + asked["meeting"], rank=rank, world_size=world)
import deepspeed

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

from pathlib import Path
from rella.lm.embedding import embed_texts
from rella.lm.loading import attach_adapter, detach_adapter, load_tokenizer
from rella.lm.passes import TokenBudget
from rella.lm.scoring import answer_logits
from rella.lm.split import collected, held_weights, load_split_base, most_passes, own_rows
from rella.models import identify

cpu, identity = torch.device("cpu"), identify("tiny")
budget = TokenBudget(150, matched=most_passes)
told = {}


def together(name, values, a):
    parts = collected((a, values))
    if rank == 0:
        out = np.zeros((len(asked[name]), values.shape[1]), np.float32)
        for first, part in parts:
            out[first : first + len(part)] = part
        told[name] = out.tolist()


texts, prompts = asked["texts"], [np.array(p, np.int32) for p in asked["prompts"]]
base = load_split_base(identity, "float32", cpu, head=False)
held = held_weights(base)
a, b, _ = own_rows(0, len(texts))
counted = []
together("texts", embed_texts(base, load_tokenizer(identity), texts[a:b], True, budget, counted.append), a)
assert sum(counted) == b - a, "repeated passes are not reported"
lm = load_split_base(identity, "float32", cpu)
a, b, _ = own_rows(0, len(prompts))
together("prompts", answer_logits(lm, prompts[a:b], asked["pair"], 0, budget), a)
plain = told.pop("prompts", None)
lm = attach_adapter(lm, Path("adapter"), identity)
together("prompts", answer_logits(lm, prompts[a:b], asked["pair"], 0, budget), a)
tuned = told.pop("prompts", None)
lm = detach_adapter(lm)
together("prompts", answer_logits(lm, prompts[a:b], asked["pair"], 0, budget), a)
held = held, held_weights(lm)
shares = collected(held)
if rank == 0:
    with open("told.json", "w") as file:
        json.dump(told | {"plain": plain, "tuned": tuned, "shares": shares}, file)
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("split")
    tuned = add_lora(load_base(identify("tiny"), "float32", CPU), TuneConfig(), 0)
    torch.manual_seed(0)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    tuned.save_pretrained(folder / "adapter", safe_serialization=True)
    (folder / "run.py").write_text(textwrap.dedent(SCRIPT))
    asked = {"texts": TEXTS, "prompts": [p.tolist() for p in PROMPTS], "pair": PAIR, "meeting": str(folder / "meet")}
    (folder / "asked.json").write_text(json.dumps(asked))
    root = str(Path(__file__).resolve().parents[2])
    own = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_LOG_LEVEL": "error"}
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    running = [
        subprocess.Popen(
            [sys.executable, "run.py", str(rank), "2"],
            cwd=folder,
            env=os.environ | own | {"PYTHONPATH": path, "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for process in running:
        out, _ = process.communicate(timeout=200)
        assert process.returncode == 0, out[-3000:]
    found: dict[str, Any] = json.loads((folder / "told.json").read_text())
    return found | {"adapter": folder / "adapter"}


@pytest.mark.groups
def test_vectors_are_those_of_the_whole_base(told: dict[str, Any]) -> None:
    identity = identify("tiny")
    expected = embed_texts(load_base(identity, "float32", CPU, head=False), load_tokenizer(identity), TEXTS)
    np.testing.assert_allclose(np.array(told["texts"]), expected, atol=1e-5)


@pytest.mark.groups
def test_probabilities_are_those_of_the_whole_base_with_an_adapter_and_without(told: dict[str, Any]) -> None:
    identity = identify("tiny")
    base = load_base(identity, "float32", CPU)
    plain = probabilities(answer_logits(base, PROMPTS, PAIR, 0))
    for name in ("plain", "prompts"):
        np.testing.assert_allclose(probabilities(np.array(told[name], np.float32)), plain, atol=1e-5)
    tuned = probabilities(answer_logits(attach_adapter(base, told["adapter"], identity), PROMPTS, PAIR, 0))
    assert np.abs(tuned - plain).max() > 1e-3, "the adapter would prove nothing"
    np.testing.assert_allclose(probabilities(np.array(told["tuned"], np.float32)), tuned, atol=1e-5)


@pytest.mark.groups
def test_no_process_holds_more_than_its_part(told: dict[str, Any]) -> None:
    for shares in told["shares"]:
        for held, everything in shares:
            assert everything > 2_000_000
            assert held < 0.6 * everything


def test_memory_that_runs_out_ends_the_work_with_the_flags() -> None:
    """The other processes would wait for a pass that starts again."""

    def full(ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    budget = TokenBudget(500, "score", "--score.batch-tokens", matched=lambda n: n)
    with pytest.raises(InputError, match=r"score: out of memory .* lower --score.batch-tokens .* or raise --cluster"):
        run_passes(PROMPTS, full, CPU, 0, budget)


def test_passes_are_as_many_as_the_others_make() -> None:
    counted: list[int] = []
    seen: list[int] = []

    def forward(ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        seen.append(len(ids))
        return lengths[:, None].float()

    found = run_passes(PROMPTS, forward, CPU, 0, TokenBudget(500, matched=lambda n: n + 3), counted.append)
    assert found[:, 0].tolist() == [len(p) for p in PROMPTS]
    assert len(seen) == len(counted) + 3
    assert sum(counted) == len(PROMPTS)


def test_quantised_weights_are_refused_with_the_alternative() -> None:
    with pytest.raises(InputError, match=r"cannot be split over workers: take --quantize none, or --cluster"):
        load_split_base(identify("tiny"), "float32", CPU, quantize="int8")


@pytest.mark.parametrize(("rows", "world"), [(9, 8), (10, 2), (11, 2), (1, 4), (100, 7)])
def test_every_row_is_counted_once(rows: int, world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: world)
    counted: list[int] = []
    sizes = set()
    for rank in range(world):
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        first, last, repeated = own_rows(5, 5 + rows)
        assert 5 <= first < last <= 5 + rows
        sizes.add(last - first)
        counted += range(first + repeated, last)
    assert counted == list(range(5, 5 + rows))
    assert len(sizes) == 1
