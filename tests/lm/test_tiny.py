from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import rella
from rella.data.synthetic import catalogue, sample_dataset
from rella.lm import tiny
from rella.prompts import NO, WORDINGS, YES, Display, answer_text, item_text, prompt_text, shown_fields, wrapper_for

FOLDER = Path(str(rella.__file__)).parent / "assets" / "tiny"
WRAPPER, WORDING = wrapper_for("vicuna"), WORDINGS["sample"]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, local_files_only=True).eval()


def _states(model, tokenizer, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Last hidden states (B, L, H) and each text's length (B,)."""
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    with torch.no_grad():
        return model.model(batch["input_ids"]).last_hidden_state, batch["attention_mask"].sum(1)


def _questions(count: int, k: int = 8) -> tuple[list[str], list[int]]:
    """Prompts of the sample whose behaviours are the last of the target's genre, and their labels."""
    data, genre = sample_dataset(), catalogue().genre
    titles, profiles = data.items.column("title").to_pylist(), data.users.drop_columns(["user"]).to_pylist()
    prompts, labels = [], []
    for row in np.random.default_rng(0).permutation(len(data.user)):
        first = int(np.searchsorted(data.user, data.user[row]))
        history = np.arange(first, row)
        history = history[genre[data.item[history]] == genre[data.item[row]]][-k:]
        if len(history) < 3:
            continue
        listed = [titles[i] for i in data.item[history]]
        stars = data.rating[history].tolist()
        prompts.append(prompt_text(WORDING, profiles[data.user[row]], listed, stars, titles[data.item[row]]))
        labels.append(int(data.rating[row] >= 4))
        if len(prompts) == count:
            break
    return prompts, labels


def test_folder_is_small_and_holds_no_pickle() -> None:
    files = [file for file in FOLDER.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} <= {".json", ".jinja", ".safetensors"}
    assert sum(file.stat().st_size for file in files) < 6_500_000


def test_shape_of_the_model(model, tokenizer) -> None:
    assert isinstance(model, LlamaForCausalLM)
    assert 1e6 < model.num_parameters() < 4e6
    assert model.config.max_position_embeddings >= 2048
    assert model.config.vocab_size == len(tokenizer)
    assert None not in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)


@pytest.mark.parametrize("wrapper", ["vicuna", "plain"])
def test_answers_are_one_token_behind_an_unchanged_prompt(tokenizer, wrapper: str) -> None:
    chat = wrapper_for(wrapper)
    prompt = tokenizer(chat.wrap(_questions(1)[0][0]))["input_ids"]
    firsts = set()
    for label, word in ((1, YES), (0, NO)):
        whole = tokenizer(chat.wrap(_questions(1)[0][0]) + chat.separator + answer_text(label))["input_ids"]
        assert whole[: len(prompt)] == prompt
        assert [tokenizer.decode([i]) for i in whole[len(prompt) :]] == [f" {word}", "."]
        firsts.add(whole[len(prompt)])
    assert len(firsts) == 2


def test_bos_is_added_once_and_any_text_survives(tokenizer) -> None:
    text = "Amélie's  day,\n\t日本 100% (2001) ***x*** 😀"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == text


def test_a_prompt_with_eight_behaviours_is_short(tokenizer) -> None:
    lengths = [len(ids) for ids in tokenizer([WRAPPER.wrap(p) for p in _questions(50)[0]])["input_ids"]]
    assert max(lengths) <= 200


def test_it_uses_the_history_without_any_tuning(model, tokenizer) -> None:
    prompts, labels = _questions(96)
    states, length = _states(model, tokenizer, [WRAPPER.wrap(prompt) for prompt in prompts])
    with torch.no_grad():
        logits = model.lm_head(states[torch.arange(len(length)), length - 1])
    yes, no = (tokenizer.encode(f" {word}", add_special_tokens=False)[0] for word in (YES, NO))
    assert roc_auc_score(labels, (logits[:, yes] - logits[:, no]).numpy()) > 0.58


def test_items_of_a_franchise_and_of_a_genre_are_closer_than_others(model, tokenizer) -> None:
    movies = catalogue()
    states, length = _states(
        model, tokenizer, [item_text(WORDING, shown_fields(row, Display())) for row in movies.items.to_pylist()]
    )
    real = (torch.arange(states.shape[1])[None] < length[:, None]).float()[..., None]
    vectors = ((states * real).sum(1) / real.sum(1)).numpy()
    vectors -= vectors.mean(0)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    similarity = vectors @ vectors.T
    off = ~np.eye(len(vectors), dtype=bool)
    genre = movies.genre[:, None] == movies.genre[None, :]
    franchise = (movies.franchise[:, None] == movies.franchise[None, :]) & (movies.franchise >= 0)
    by_kind = [similarity[kind & off].mean() for kind in (franchise, genre & ~franchise, ~genre)]
    assert by_kind[0] > by_kind[1] + 0.05
    assert by_kind[1] > by_kind[2] + 0.2


def test_rebuild_runs_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.main(["--out", str(tmp_path / "model"), "--steps", "4", "--users", "120", "--threads", "1"])
    assert "million parameters" in capsys.readouterr().out
    built = AutoModelForCausalLM.from_pretrained(tmp_path / "model", local_files_only=True)
    shipped = json.loads((FOLDER / "config.json").read_text())
    assert built.config.hidden_size == shipped["hidden_size"]
    assert built.config.num_hidden_layers == shipped["num_hidden_layers"]
    ids = AutoTokenizer.from_pretrained(tmp_path / "model", local_files_only=True)(f"{WRAPPER.after} {YES}.")
    assert len(ids["input_ids"]) == 4
