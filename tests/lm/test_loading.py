"""Models, tokenizers, answers and adapters: what does not fit is an error, never something else in its place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from rella.config import TuneConfig
from rella.lm.loading import (
    Answers,
    answers_for,
    attach_adapter,
    describe_base,
    detach_adapter,
    load_base,
    load_tokenizer,
    quiet_libraries,
)
from rella.lm.lora import add_lora
from rella.models import ModelIdentity, adapter_identity, check_adapter, identify
from rella.prompts import WRAPPERS, ChatWrapper


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(v, second[n]) for n, v in first.items())


def test_the_base_is_frozen_and_of_the_precision_asked_for(identity: ModelIdentity) -> None:
    for precision, dtype in (("float32", torch.float32), ("float16", torch.float16), ("bfloat16", torch.bfloat16)):
        base = load_base(identity, precision, torch.device("cpu"))  # type: ignore[arg-type]
        assert {p.dtype for p in base.parameters()} == {dtype}
        assert not any(p.requires_grad for p in base.parameters())
        assert not base.training
        assert base.get_output_embeddings() is not None
    assert not hasattr(load_base(identity, "float32", torch.device("cpu"), head=False), "lm_head")


def test_a_tokenizer_without_padding_token_gets_one(identity: ModelIdentity, tmp_path: Path) -> None:
    folder = tmp_path / "unpadded"
    shutil.copytree(identity.source, folder)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config.pop("pad_token")
    file.write_text(json.dumps(config))
    assert load_tokenizer(identity).pad_token == "<pad>"
    assert load_tokenizer(identify(str(folder))).pad_token == "</s>"


@pytest.mark.parametrize("wrapper", ["vicuna", "plain"])
def test_answers_follow_the_prompt(wrapper: str, tokenizer: Any) -> None:
    chosen = WRAPPERS[wrapper]
    found = answers_for(tokenizer, chosen)
    prompt = chosen.wrap("Does she like it?")
    for label, text in ((1, "Yes."), (0, "No.")):
        whole = tokenizer(prompt + chosen.separator + text)["input_ids"]
        assert whole == tokenizer(prompt)["input_ids"] + list(found.of(label))
    assert [tokenizer.decode([t]).strip() for t in found.pair] == ["Yes", "No"]
    assert found.pair[0] != found.pair[1]


class Stub:
    """A tokenizer that answers by table, for faults that real ones have."""

    eos_token_id = 9

    def __init__(self, encode: Any, words: dict[int, str]) -> None:
        self.encode, self.words = encode, words

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": self.encode(text)}

    def decode(self, ids: list[int]) -> str:
        return "".join(self.words.get(i, "?") for i in ids)


def test_answers_of_a_well_behaved_table() -> None:
    def encode(text: str) -> list[int]:
        return [1, *([5, 6] if text.endswith("Yes.") else [7, 6] if text.endswith("No.") else [])]

    assert answers_for(Stub(encode, {5: "Yes", 7: "No", 6: "."}), WRAPPERS["vicuna"]) == Answers((5, 6), (7, 6))


def test_an_end_token_behind_every_text_is_an_error() -> None:
    with pytest.raises(ValueError, match="turn add_eos_token off"):
        answers_for(Stub(lambda text: [1, 9], {}), WRAPPERS["vicuna"])


def test_an_answer_that_merges_with_the_prompt_is_an_error() -> None:
    def encode(text: str) -> list[int]:
        return [1, 2, 3] if text.endswith("Yes.") else [1, 2, 4]

    with pytest.raises(ValueError, match=r"merges the end of the prompt with 'Yes\.'"):
        answers_for(Stub(encode, {}), WRAPPERS["vicuna"])


def test_a_common_first_token_is_an_error() -> None:
    """Llama's blank before a word, where the wrapper ends in a line break."""

    def encode(text: str) -> list[int]:
        return [1, *([4, 5, 6] if text.endswith("Yes.") else [4, 7, 6] if text.endswith("No.") else [])]

    with pytest.raises(ValueError, match="'Yes' is not one token behind wrapper 'vicuna'"):
        answers_for(Stub(encode, {4: " ", 5: "Yes", 7: "No", 6: "."}), WRAPPERS["vicuna"])


def test_a_word_in_pieces_is_an_error(tokenizer: Any) -> None:
    def encode(text: str) -> list[int]:
        return [1, *([5, 6] if text.endswith("Yes.") else [7, 8, 6] if text.endswith("No.") else [])]

    with pytest.raises(ValueError, match="'No' is not one token"):
        answers_for(Stub(encode, {5: "Yes", 7: "N", 8: "o", 6: "."}), WRAPPERS["vicuna"])
    # And with a real one: behind "~Y" no merge of this tokenizer makes a word.
    odd = ChatWrapper("odd", "", "", separator="~Y")
    with pytest.raises(ValueError, match=r"one token|merges"):
        answers_for(tokenizer, odd)


@pytest.fixture
def adapter(base: Any, identity: ModelIdentity, tmp_path: Path) -> Path:
    """An adapter of the small model with weights that show."""
    tuned = add_lora(base, TuneConfig(), seed=3)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    folder = tmp_path / "adapter"
    with quiet_libraries():
        tuned.save_pretrained(folder, safe_serialization=True)
    (folder / "rella_base.json").write_bytes(describe_base(identity))
    tuned.unload()
    return folder


IDS = torch.tensor([[0, 300, 301, 302, 17]])


def test_an_adapter_changes_the_model_and_comes_off_again(base: Any, identity: ModelIdentity, adapter: Path) -> None:
    before, logits = state(base), base(IDS).logits
    tuned = attach_adapter(base, adapter, identity)
    assert not tuned.training
    assert not any(p.requires_grad for p in tuned.parameters())
    changed = tuned(IDS).logits
    assert (changed - logits).abs().max() > 0.01
    assert torch.equal(tuned(IDS).logits, changed)
    back = detach_adapter(tuned)
    assert same(state(back), before)
    assert torch.equal(back(IDS).logits, logits)
    # And on again, as a worker that scores several adapters does.
    assert torch.equal(attach_adapter(back, adapter, identity)(IDS).logits, changed)


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_adapter_is_never_zero_shot(
    missing: str, base: Any, identity: ModelIdentity, adapter: Path, tmp_path: Path
) -> None:
    (adapter / missing).unlink()
    for folder in (adapter, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="give a PEFT folder"):
            attach_adapter(base, folder, identity)
    # Nor is a hub name that looks like a folder: nothing is downloaded.
    with pytest.raises(FileNotFoundError):
        attach_adapter(base, Path("someone/adapter"), identity)


def test_an_adapter_of_another_base_is_refused(base: Any, identity: ModelIdentity, adapter: Path) -> None:
    other = ModelIdentity("other", "/models/other", None, "f" * 64, 32, 1024, "llama")
    with pytest.raises(ValueError, match=rf"was tuned on {identity.name} .* not on other \(ffffffffffff\)"):
        attach_adapter(base, adapter, other)
    (adapter / "rella_base.json").unlink()
    check_adapter(adapter, other)
    config = json.loads((adapter / "adapter_config.json").read_text())
    for named, fine in (("lmsys/vicuna-7b-v1.3", False), ("", True), ("/another/machine/vicuna", True)):
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": named}))
        if fine:
            check_adapter(adapter, other)
        else:
            with pytest.raises(ValueError, match=f"names {named} as its base"):
                check_adapter(adapter, other)


def test_an_adapter_whose_weights_do_not_fit_is_refused(base: Any, identity: ModelIdentity, adapter: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({n: torch.zeros(w.shape[0], w.shape[1] + 8) for n, w in weights.items()}, file)
    with pytest.raises(ValueError, match="does not fit"):
        attach_adapter(base, adapter, identity)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize("which", ["half", "renamed", "none", "one more"])
def test_an_adapter_that_fits_in_part_is_refused(which: str, base: Any, identity: ModelIdentity, adapter: Path) -> None:
    """PEFT would warn and leave the layers without effect: zero-shot under another name."""
    from safetensors.torch import load_file, save_file

    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    changed = {
        "half": dict(list(weights.items())[::2]),
        "renamed": {n.replace("self_attn", "attention"): w for n, w in weights.items()},
        "none": {},
        "one more": weights | {"base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": torch.zeros(8, 32)},
    }[which]
    save_file(changed, file)
    before = state(base)
    with pytest.raises(ValueError, match=f"does not fit {identity.name}: [0-9]+ weights do not match"):
        attach_adapter(base, adapter, identity)
    assert same(state(base), before), "the base must come out clean"


def test_an_adapter_s_identity_is_its_content(adapter: Path) -> None:
    first = adapter_identity(adapter)
    (adapter / "rella_base.json").unlink()
    assert adapter_identity(adapter) == first
    data = bytearray((adapter / "adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    (adapter / "adapter_model.safetensors").write_bytes(data)
    second = adapter_identity(adapter)
    assert second != first
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 16', '"lora_alpha": 32'))
    assert adapter_identity(adapter) not in {first, second}


def test_a_model_s_identity_is_its_content(identity: ModelIdentity, tmp_path: Path) -> None:
    copy = tmp_path / "Copy"
    shutil.copytree(identity.source, copy)
    again = identify(str(copy))
    assert again.digest == identity.digest
    assert (again.name, again.source, again.revision) == ("copy", str(copy), None)
    assert (again.hidden_size, again.max_positions) == (32, 1024)
    (copy / "notes.txt").write_text("not part of the model")
    assert identify(str(copy)).digest == identity.digest
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        file, whole = copy / name, (copy / name).read_bytes()
        file.write_bytes(whole + b" ")
        assert identify(str(copy)).digest != identity.digest, name
        file.write_bytes(whole)
    # The vocabularies of older BERTs and T5s.
    for name in ("vocab.txt", "spiece.model"):
        (copy / name).write_text("word")
        assert identify(str(copy)).digest != identity.digest, name
        (copy / name).unlink()


@pytest.mark.parametrize(("gone", "message"), [("config.json", "no config.json"), ("model.safetensors", "pickled")])
def test_a_folder_that_is_no_model(gone: str, message: str, identity: ModelIdentity, tmp_path: Path) -> None:
    shutil.copytree(identity.source, tmp_path / "copy")
    (tmp_path / "copy" / gone).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        identify(str(tmp_path / "copy"))


def test_a_name_that_nobody_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="neither a preset, nor a folder, nor to be had from the hub"):
        identify("nobody/has-this-model")
    with pytest.raises(FileNotFoundError, match=r"give a folder with --textctr\.base"):
        identify("nobody/has-this-model", flag="--textctr.base")
