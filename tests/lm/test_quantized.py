"""Quantised bases on the CPU: how far they are from the weights themselves, tuning, and the adapter loaded again."""

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

from rella.config import Experiment, TuneConfig
from rella.errors import InputError, MissingError
from rella.lm import loading
from rella.lm.embedding import embed_texts
from rella.lm.loading import attach_adapter, check_precision, load_base, load_tokenizer
from rella.lm.scoring import answer_logits
from rella.models import TINY, identify
from rella.pipeline import resolve_auto

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
CPU = torch.device("cpu")
KINDS = {"int8": ("Linear8bitLt", 0.05), "nf4": ("Linear4bit", 0.3)}
"""Module of a quantised layer, and how far states may be from those of the float32 weights, relative to their length:
8 bits keep about two digits of a weight, 4 bits one."""
TEXTS = [f"Here is a movie. Its title is Film {n} ({1980 + n}). The movie's genre is Drama." for n in range(8)]


@pytest.mark.parametrize("kind", list(KINDS))
def test_vectors_within_the_stated_error(kind: str) -> None:
    identity = identify("tiny")
    exact = embed_texts(load_base(identity, "float32", CPU, head=False), load_tokenizer(identity), TEXTS)
    base = load_base(identity, "float32", CPU, head=False, quantize=kind)  # type: ignore[arg-type]
    module, error = KINDS[kind]
    assert type(base.layers[0].mlp.up_proj).__name__ == module
    assert not any(p.requires_grad for p in base.parameters())
    found = embed_texts(base, load_tokenizer(identity), TEXTS)
    off = np.linalg.norm(found - exact, axis=1) / np.linalg.norm(exact, axis=1)
    assert 0 < off.max() < error


SCRIPT = """
import json, logging, sys, warnings

warnings.filterwarnings("ignore")
import numpy as np
import torch
import torch.distributed as dist

torch.set_num_threads(1)
kind, stage, precision = sys.argv[1], int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{sys.argv[4]}", rank=0, world_size=1)
import deepspeed

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

from rella.config import TuneConfig
from rella.lm.encoding import pad_right
from rella.lm.loading import load_base
from rella.lm.lora import add_lora
from rella.lm.scoring import answer_logits
from rella.lm.tuning import Row, Tuner
from rella.models import identify


def row(n):
    # The last token of the prompt tells the answer.
    return Row(np.array([*np.random.default_rng(n).integers(3, 200, 3 + n % 9), 300 + n % 2], np.int32), (400 + n % 2,))


rows = [row(n) for n in range(24)]
base = load_base(identify("tiny"), precision, torch.device("cpu"), quantize=kind)
before = {n: p.clone() for n, p in base.named_parameters()}
config = TuneConfig(
    learning_rate=0.05, batch_size=8, max_epochs=3, lora_dropout=0.0, micro_batch_rows=4, zero_stage=stage
)
tuned = add_lora(base, config, 0)
aucs = iter(range(1, 99))


def validate(root):
    # A real pass in evaluation mode: what it does to the weights must not reach the training that follows.
    ids, lengths = pad_right([r.prompt for r in rows[:3]], 0, torch.device("cpu"))
    with torch.no_grad():
        root(ids, torch.arange(3), lengths - 1)
    return {"auc": float(next(aucs))}


tuner = Tuner(tuned, rows, config, precision, 0, 0, validate, lambda told: None)
result = tuner.run()
tuned.eval()
logits = answer_logits(tuned, [r.prompt for r in rows[:6]], (400, 401), 0)
whole = {n.replace("base_model.model.", "").replace(".base_layer", ""): p for n, p in tuned.named_parameters()}
same = all(torch.equal(p, whole[n]) for n, p in before.items())
tuned.save_pretrained("adapter", safe_serialization=True)
told = {"losses": result.course.losses, "logits": logits.tolist(), "same": same}
with open("told.json", "w") as file:
    json.dump(told | {"prompts": [r.prompt.tolist() for r in rows[:6]]}, file)
"""


@pytest.mark.parametrize(
    ("kind", "stage", "precision"), [("int8", 2, "float32"), ("nf4", 1, "float32"), ("nf4", 2, "bfloat16")]
)
def test_tuning_and_the_adapter_loaded_again(kind: str, stage: int, precision: Any, tmp_path: Path) -> None:
    told = tuned_in(tmp_path, kind, stage, precision)
    assert told["same"], "quantised weights stay frozen"
    assert len(told["losses"]) == 9
    assert sum(told["losses"][-3:]) < 0.7 * sum(told["losses"][:3])
    identity = identify("tiny")
    base = load_base(identity, precision, CPU, quantize=kind)  # type: ignore[arg-type]
    again = attach_adapter(base, tmp_path / "adapter", identity)
    prompts = [np.array(p, np.int32) for p in told["prompts"]]
    found = answer_logits(again, prompts, (400, 401), 0)
    np.testing.assert_allclose(found, np.array(told["logits"]), atol=1e-5 if precision == "float32" else 0.05)


def tuned_in(folder: Path, kind: str, stage: int, precision: str) -> dict[str, Any]:
    (folder / "run.py").write_text(textwrap.dedent(SCRIPT))
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "LOCAL_RANK": "0",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    words = [sys.executable, "run.py", kind, str(stage), precision, str(folder / "meeting")]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "MatMul8bitLt" not in done.stderr
    found: dict[str, Any] = json.loads((folder / "told.json").read_text())
    return found


def test_sharded_and_quantised_is_refused_with_the_alternative() -> None:
    experiment = Experiment(quantize="nf4", tune=TuneConfig(zero_stage=3))
    with pytest.raises(InputError, match=r"quantize nf4: .* cannot be sharded by ZeRO-3: take --tune.zero-stage 2"):
        resolve_auto(experiment, identify("tiny"))


def test_bfloat16_on_a_card_without_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    card = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla V100-SXM2-32GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
    with pytest.raises(InputError, match=r"precision bfloat16: Tesla V100.* has none: take --precision float16"):
        check_precision("bfloat16", card)
    check_precision("float16", card)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    check_precision("bfloat16", card)
    check_precision("bfloat16", CPU)


def test_without_bitsandbytes_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)  # type: ignore[attr-defined]
    with pytest.raises(MissingError, match=r"quantize int8: bitsandbytes is not installed"):
        load_base(identify(str(TINY)), "float32", CPU, quantize="int8")
