"""The paper's architectures, small and at full size without weights: adapted, tuned, scored and embedded alike."""

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

from rella.backbones import BACKBONES
from rella.config import TuneConfig
from rella.lm.embedding import embed_texts
from rella.lm.encoding import Ids
from rella.lm.loading import (
    Answers,
    answers_for,
    attach_adapter,
    check_answer_ids,
    describe_base,
    load_base,
    load_tokenizer,
)
from rella.lm.lora import add_lora, key_rows
from rella.lm.scoring import answer_logits
from rella.models import identify

FAMILIES = ("llama", "mistral", "falcon")
CPU = torch.device("cpu")
PAIR = (301, 17)


def on_meta(model_type: str, **figures: Any) -> Any:
    """A frozen model of this architecture without weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **figures))
    return model.requires_grad_(False)


@pytest.mark.parametrize(
    ("name", "adapted", "base"),
    [
        ("vicuna-7b", 4_194_304, 6_738_415_616),
        # 40 layers × (q, v) × 8 × (5120 + 5120).
        ("vicuna-13b", 6_553_600, 13_015_864_320),
        # 32 layers × 8 × (q: 4096 + 4096, v: 4096 + 1024).
        ("mistral-7b", 3_407_872, 7_241_732_096),
        # 32 layers × 8 × (4544 in + 73 heads of 64 out); head and embeddings are one matrix.
        ("falcon-7b", 32 * 8 * (4544 + 73 * 64), 6_921_720_704),
        ("llama-2-70b-chat", 16_384_000, 68_976_648_192),
    ],
)
def test_parameters_at_full_size(name: str, adapted: int, base: int) -> None:
    model = on_meta(BACKBONES[name].model_type, **BACKBONES[name].architecture)
    assert sum(p.numel() for p in model.parameters()) == base
    tuned = add_lora(model, TuneConfig(lora_rank=8), seed=0)
    assert sum(p.numel() for p in tuned.parameters() if p.requires_grad) == adapted


def whole_vocabulary(model: Any, prompts: list[Ids]) -> np.ndarray:
    """The pair's logits of one unpadded prompt at a time, from the model's own forward pass."""
    rows = []
    with torch.no_grad():
        for prompt in prompts:
            logits = model(input_ids=torch.tensor(prompt[None].astype(np.int64))).logits[0, -1]
            rows.append([float(logits[token]) for token in PAIR])
    return np.array(rows)


def random_prompts(vocabulary: int, lengths: tuple[int, ...] = (1, 40, 7, 7, 50, 2, 33, 19)) -> list[Ids]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, vocabulary, n).astype(np.int32) for n in lengths]


@pytest.fixture(scope="module")
def bases(families: dict[str, Path]) -> dict[str, Any]:
    """The small models with their heads, for tests that leave them as they are."""
    return {family: load_base(identify(str(folder)), "float32", CPU) for family, folder in families.items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", [1, 130, 100_000])
def test_answer_logits_are_those_of_the_whole_vocabulary(family: str, budget: int, bases: dict[str, Any]) -> None:
    prompts = random_prompts(bases[family].config.vocab_size)
    expected = whole_vocabulary(bases[family], prompts)
    found = answer_logits(bases[family], prompts, PAIR, pad=0, batch_tokens=budget)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(expected[:, 0] - expected[:, 1]).min() > 1e-3


def test_mistral_s_window_is_shorter_than_the_prompts(bases: dict[str, Any]) -> None:
    """Two layers of a window of 8 reach 14 tokens back: what is before that changes nothing, what is after does."""
    prompt = random_prompts(300)[1]
    reach = 2 * (bases["mistral"].config.sliding_window - 1)
    far, near = prompt.copy(), prompt.copy()
    far[: len(prompt) - 1 - reach] = 5
    near[len(prompt) - 1 - reach] = 5
    for family in FAMILIES:
        # Longer than all of them, so that all are padded.
        rows = [prompt, far, near, np.resize(prompt, 60)]
        found = answer_logits(bases[family], rows, PAIR, pad=0)
        assert (np.abs(found[0] - found[1]).max() < 1e-5) == (family == "mistral")
        assert np.abs(found[0] - found[2]).max() > 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pool_bos", [True, False])
def test_embeddings_are_means_over_the_hidden_states(family: str, pool_bos: bool, families: dict[str, Path]) -> None:
    identity = identify(str(families[family]))
    decoder, tokenizer = load_base(identity, "float32", CPU, head=False), load_tokenizer(identity)
    texts = ["Aliens", "Her age is 25. Will she like the movie Heat?", "Tell me yes or no."]
    found = embed_texts(decoder, tokenizer, texts, pool_bos)
    # Falcon's tokenizer sets no begin token: its first token is a word of the text.
    first = int(family != "falcon" and not pool_bos)
    for text, vector in zip(texts, found, strict=True):
        ids = tokenizer(text)["input_ids"]
        assert (ids[0] == tokenizer.bos_token_id) == (family != "falcon")
        with torch.no_grad():
            states = decoder(input_ids=torch.tensor([ids])).last_hidden_state[0]
        np.testing.assert_allclose(vector, states[first:].mean(0).numpy(), atol=1e-5)


LAYOUTS = {
    "one group": {"multi_query": True, "new_decoder_architecture": False},
    "a key head each": {"multi_query": False, "new_decoder_architecture": False},
    "groups": {"multi_query": True, "new_decoder_architecture": True, "num_kv_heads": 2},
    # Only the newer architecture reads the number of key heads.
    "one group, another number given": {"multi_query": True, "new_decoder_architecture": False, "num_kv_heads": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_key_rows_are_where_falcon_takes_its_keys(layout: str) -> None:
    from transformers import FalconConfig
    from transformers.models.falcon.modeling_falcon import FalconAttention

    config = FalconConfig(hidden_size=24, num_attention_heads=6, **LAYOUTS[layout])
    attention = FalconAttention(config, layer_idx=0)
    outputs = attention.query_key_value.out_features
    # Every row holds its own number.
    query, key, value = attention._split_heads(torch.arange(outputs)[None, None])
    found = key_rows(config)
    # A head that is shared comes repeated.
    assert found.tolist() == key.unique().tolist()
    rest = torch.cat([query.flatten(), value.flatten()]).unique()
    assert sorted([*found.tolist(), *rest.tolist()]) == list(range(outputs))


def test_other_architectures_train_every_row(families: dict[str, Path]) -> None:
    base = load_base(identify(str(families["llama"])), "float32", CPU)
    tuned = add_lora(base, TuneConfig(), 0)
    assert not any(p._backward_hooks for p in tuned.parameters())


@pytest.mark.parametrize(
    ("family", "targets", "message"),
    [
        ("llama", ("query_key_value",), r"this llama model has no modules query_key_value: .*lora-targets.*\bq_proj\b"),
        ("falcon", ("q_proj", "v_proj"), r"this falcon model has no modules q_proj, v_proj: .*\bquery_key_value\b"),
        # PEFT would adapt the one that is there and say nothing.
        ("mistral", ("q_proj", "values"), r"has no modules values:"),
        # A piece of a name is not that name.
        ("llama", ("proj",), r"has no modules proj:"),
        ("llama", (), r"has no modules \(none named\)"),
    ],
)
def test_a_target_that_is_missing(
    family: str, targets: tuple[str, ...], message: str, families: dict[str, Path]
) -> None:
    base = load_base(identify(str(families[family])), "float32", CPU)
    with pytest.raises(ValueError, match=message):
        add_lora(base, TuneConfig(lora_targets=targets), 0)
    assert not any("lora_" in name for name, _ in base.named_parameters())


def test_an_architecture_that_auto_does_not_know() -> None:
    with pytest.raises(ValueError, match=r"model type 'gpt2' are not known"):
        add_lora(on_meta("gpt2", n_embd=8, n_head=2, n_layer=1, vocab_size=10), TuneConfig(), 0)


SCRIPT = """
import json, logging, sys, warnings

warnings.filterwarnings("ignore")
import numpy as np
import torch
import torch.distributed as dist

torch.set_num_threads(1)
families, rendezvous, out = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
import deepspeed

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

from rella.config import TuneConfig
from rella.lm.loading import load_base
from rella.lm.lora import add_lora, key_rows
from rella.lm.scoring import answer_logits
from rella.lm.tuning import Row, Tuner
from rella.models import identify


def row(n, rng):
    # The last token of the prompt tells the answer.
    prompt = [*rng.integers(3, 200, rng.integers(3, 20)), 300 + n % 2]
    return Row(np.array(prompt, np.int32), (301, 312) if n % 2 else (17,))


ROWS = [row(n, np.random.default_rng(n)) for n in range(24)]
PROMPTS = [r.prompt for r in ROWS[:6]]


def run(family, save=None, precision="float32", checkpointing=False, **changes):
    base = load_base(identify(families[family]), precision, torch.device("cpu"))
    if checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    chosen = {"learning_rate": 0.05, "batch_size": 8, "max_epochs": 4, "lora_dropout": 0.0, "micro_batch_rows": 4}
    config = TuneConfig(**(chosen | changes))
    tuned = add_lora(base, config, 0)
    # Every epoch is better than those before: the last one's weights are kept.
    aucs = iter(range(1, 99))
    tuner = Tuner(tuned, ROWS, config, precision, 0, 0, lambda model: {"auc": float(next(aucs))}, lambda told: None)
    result = tuner.run()
    updates = {n: p.float() for n, p in result.best.items() if "lora_B" in n}
    found = {"losses": result.course.losses, "matrices": len(updates)}
    if family == "falcon":
        keys = key_rows(base.config)
        rest = [r for r in range(len(next(iter(updates.values())))) if r not in set(keys.tolist())]
        found["keys"] = max(float(u[keys].abs().max()) for u in updates.values())
        found["rest"] = min(float(u[rest].abs().max(dim=1).values.min()) for u in updates.values())
    if save:
        tuned.eval()
        found["logits"] = answer_logits(tuned, PROMPTS, (301, 17), 0).tolist()
        found["prompts"] = [p.tolist() for p in PROMPTS]
        tuned.save_pretrained(f"{save}/{family}", safe_serialization=True)
    return found


answers = {family: run(family, save="adapters") for family in families}
for stage in (1, 2, 3):
    for decay in (0.0, 0.1):
        answers[f"falcon, stage {stage}, decay {decay}"] = run("falcon", zero_stage=stage, weight_decay=decay)
answers["falcon, bfloat16"] = run("falcon", precision="bfloat16", weight_decay=0.1)
answers["falcon, checkpointing"] = run("falcon", checkpointing=True)
with open(out, "w") as file:
    json.dump(answers, file)
"""


@pytest.fixture(scope="module")
def tuned_folder(families: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one process tuned all three, and Falcon under several settings: answers.json and adapters/."""
    folder = tmp_path_factory.mktemp("deepspeed")
    (folder / "run.py").write_text(textwrap.dedent(SCRIPT))
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "LOCAL_RANK": "0",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    places = json.dumps({family: str(place) for family, place in families.items()})
    done = subprocess.run(
        [sys.executable, "run.py", places, str(folder / "meeting"), "answers.json"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def runs(tuned_folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tuned_folder / "answers.json").read_text())
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_falls(family: str, runs: dict[str, Any]) -> None:
    losses = runs[family]["losses"]
    assert len(losses) == 12
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    assert runs[family]["matrices"] == (2 if family == "falcon" else 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_is_saved_attached_and_scored(
    family: str, runs: dict[str, Any], tuned_folder: Path, families: dict[str, Path]
) -> None:
    identity, adapter = identify(str(families[family])), tuned_folder / "adapters" / family
    (adapter / "rella_base.json").write_bytes(describe_base(identity))
    base = load_base(identity, "float32", CPU)
    prompts = [np.array(p, np.int32) for p in runs[family]["prompts"]]
    before = answer_logits(base, prompts, PAIR, 0)
    tuned = attach_adapter(base, adapter, identity)
    found = answer_logits(tuned, prompts, PAIR, 0)
    np.testing.assert_allclose(found, runs[family]["logits"], atol=1e-5)
    np.testing.assert_allclose(found, whole_vocabulary(tuned, prompts), atol=1e-5)
    assert np.abs(found - before).max() > 0.1


FALCON_RUNS = [
    "falcon",
    *(f"falcon, stage {stage}, decay {decay}" for stage in (1, 2, 3) for decay in (0.0, 0.1)),
    "falcon, bfloat16",
    "falcon, checkpointing",
]


@pytest.mark.parametrize("which", FALCON_RUNS)
def test_falcon_s_keys_are_not_adapted(which: str, runs: dict[str, Any]) -> None:
    """Not at all, while every row of queries and values is. The first run has the default stage."""
    assert runs[which]["keys"] == 0.0
    assert runs[which]["rest"] > 1e-4


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_falcon_s_curve_is_one_for_all_stages(stage: int, runs: dict[str, Any]) -> None:
    for decay in (0.0, 0.1):
        found = runs[f"falcon, stage {stage}, decay {decay}"]["losses"]
        np.testing.assert_allclose(found, runs[f"falcon, stage 2, decay {decay}"]["losses"], atol=1e-5)
    np.testing.assert_allclose(runs["falcon, checkpointing"]["losses"], runs["falcon"]["losses"], atol=1e-5)


VICUNA = BACKBONES["vicuna-13b"].source
ANSWERS = (3869, 1939)


@pytest.mark.parametrize("name", BACKBONES)
def test_the_answers_that_are_known(name: str) -> None:
    backbone = BACKBONES[name]
    assert backbone.answer_ids in (ANSWERS, None)
    check_answer_ids(Answers((3869, 29889), (1939, 29889)), backbone.source)


@pytest.mark.parametrize("pair", [ANSWERS[::-1], (3869, 1940), (8241, 3782)])
def test_answers_that_differ_from_those_known(pair: tuple[int, int]) -> None:
    wrong = Answers((pair[0], 29889), (pair[1], 29889))
    with pytest.raises(ValueError, match=rf"tokenizer of {VICUNA} gives .*\({pair[0]}, {pair[1]}\).*\(3869, 1939\)"):
        check_answer_ids(wrong, VICUNA)
    # Nothing is known of others, or of backbones without confirmed tokens.
    check_answer_ids(wrong, "someone/some-model")
    check_answer_ids(wrong, BACKBONES["falcon-7b"].source)


def test_answers_are_words_behind_every_family_s_prompt(families: dict[str, Path]) -> None:
    from rella.prompts import WRAPPERS

    for family, folder in families.items():
        tokenizer = load_tokenizer(identify(str(folder)))
        found = answers_for(tokenizer, WRAPPERS["vicuna"])
        assert [tokenizer.decode([t]).strip() for t in found.pair] == ["Yes", "No"], family
