"""Each model against plain calls of transformers, row by row: padding and batches have no influence."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, T5ForConditionalGeneration

from rella.baselines import text_baseline
from rella.lm.loading import quiet_libraries
from rella.models import ModelIdentity, identify
from rella.textctr.ctr_bert import CtrBert, load_ctr_bert
from rella.textctr.examples import PairExamples, TextExamples, encode_items, item_encoder
from rella.textctr.model import put_weights, weights_from_bytes, weights_of, weights_to_bytes
from rella.textctr.p5 import P5, Targets, load_p5, targets_for
from rella.textctr.predict import Predictor, predict
from rella.textctr.ptab import MaskedLm, load_masked_lm, load_ptab
from rella.textctr.texts import FieldTexts, PackedIds

CPU = torch.device("cpu")
BERT = replace(text_baseline("ctr-bert"), max_tokens=128, precision="float32")
T5 = replace(text_baseline("p5"), precision="float32")


def random_texts(lengths: list[int], seed: int = 0, first: int | None = 2) -> PackedIds:
    rng = np.random.default_rng(seed)
    begin = [] if first is None else [first]
    return PackedIds.of([[*begin, *rng.integers(5, 90, n - len(begin)).tolist()] for n in lengths])


LENGTHS = [9, 40, 3, 17, 40, 5]
LABELS = np.array([1.0, 0.0, 1.0, 1.0, 0.0, 0.0])
ALL = np.arange(6)


@pytest.fixture
def pairs() -> PairExamples:
    return PairExamples(random_texts(LENGTHS), random_texts([4, 12, 7], 1), np.array([2, 0, 0, 2, 1, 2]), LABELS)


@pytest.fixture
def rows() -> TextExamples:
    return TextExamples(random_texts(LENGTHS), LABELS)


@pytest.fixture
def prompts() -> TextExamples:
    return TextExamples(random_texts(LENGTHS, first=None), LABELS)


def one(ids: Any) -> torch.Tensor:
    return torch.tensor([[int(i) for i in ids]])


def bce(logits: torch.Tensor, labels: Any) -> float:
    return float(nn.functional.binary_cross_entropy_with_logits(logits, torch.tensor(labels).float(), reduction="sum"))


@pytest.mark.parametrize("tie", [False, True])
def test_ctr_bert(tie: bool, bert: ModelIdentity, bert_tokenizer: Any, pairs: PairExamples) -> None:
    model = load_ctr_bert(bert, bert_tokenizer, replace(BERT, tie=tie), 0, CPU).eval()
    assert (model.item is model.user) == tie
    if not tie:
        with torch.no_grad():
            for parameter in model.item.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
    wanted = []
    with torch.no_grad():
        for n in range(6):
            u = model.user(input_ids=one(pairs.users[n])).last_hidden_state[0, 0]
            i = model.item(input_ids=one(pairs.items[int(pairs.item[n])])).last_hidden_state[0, 0]
            first, _, _, last = model.head
            wanted.append(last(torch.tanh(first(torch.cat([u, i])))))
        found = model.click_logits(pairs, ALL)
        loss, weight = model.loss(pairs, ALL, 0)
    right = torch.stack(wanted)[:, 0]
    torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-5)
    assert float(right.std()) > 0.01
    assert float(loss) == pytest.approx(bce(right, LABELS), abs=1e-4)
    assert weight == 6.0
    for budget in (1, 60, 10_000):
        scores = predict(model, pairs, budget)
        np.testing.assert_allclose(scores.logits[:, 0], right, atol=1e-5)
        np.testing.assert_allclose(scores.probability, torch.sigmoid(right.double()), atol=1e-5)
    assert (scores.logits.dtype, scores.probability.dtype) == (np.float32, np.float64)
    assert not scores.logits[:, 1].any()


def test_ctr_bert_s_shape(bert: ModelIdentity, bert_tokenizer: Any) -> None:
    model, tied = (load_ctr_bert(bert, bert_tokenizer, replace(BERT, tie=tie), 0, CPU) for tie in (False, True))
    head = 64 * 128 + 128 + 128 + 1
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, tied)]
    assert sizes[0] - head == 2 * (sizes[1] - head)
    assert not any("pooler" in name for name, _ in model.named_parameters())
    assert [type(layer).__name__ for layer in model.head] == ["Linear", "Tanh", "Dropout", "Linear"]
    assert model.head[2].p == 0.1
    again = load_ctr_bert(bert, bert_tokenizer, BERT, 0, CPU)
    assert torch.equal(again.head[0].weight, model.head[0].weight)
    other = load_ctr_bert(bert, bert_tokenizer, BERT, 1, CPU)
    assert not torch.equal(other.head[0].weight, model.head[0].weight)


def test_the_item_tower_runs_once_for_each_item(bert: ModelIdentity, bert_tokenizer: Any, pairs: PairExamples) -> None:
    model = load_ctr_bert(bert, bert_tokenizer, BERT, 0, CPU)
    seen: list[int] = []
    model.item.register_forward_hook(
        lambda m, args, kwargs, out: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    predictor = Predictor(model, 50)
    parts = [predictor(pairs, part).logits for part in (np.array([1, 2]), np.array([5, 4, 3]), np.array([0]))]
    assert sum(seen) == 3
    assert model.training, "scoring leaves the mode as it was"
    whole = predict(model, pairs, 10_000).logits
    np.testing.assert_allclose(np.concatenate(parts), whole[[1, 2, 5, 4, 3, 0]], atol=1e-6)
    uncached = model.eval().logits(pairs, ALL).detach().numpy()
    np.testing.assert_allclose(whole, uncached, atol=1e-6)


def test_item_texts_are_encoded_by_row(texts: FieldTexts, bert: ModelIdentity, bert_tokenizer: Any) -> None:
    ids = encode_items(texts, item_encoder(bert_tokenizer, bert, BERT))
    assert len(ids) == 5
    assert ids[3].tolist() == bert_tokenizer(texts.items[3])["input_ids"]
    with pytest.raises(ValueError, match="max_item_tokens = 5"):
        encode_items(texts, item_encoder(bert_tokenizer, bert, replace(BERT, max_item_tokens=5)))
    unlimited = item_encoder(bert_tokenizer, bert, replace(BERT, max_item_tokens="auto"))
    assert encode_items(texts, unlimited).digest() == ids.digest()


def test_ptab(bert: ModelIdentity, bert_tokenizer: Any, rows: TextExamples, bert_folder: Path) -> None:
    model = load_ptab(bert, bert_tokenizer, BERT, 0, CPU).eval()
    with quiet_libraries():
        plain = AutoModelForSequenceClassification.from_pretrained(bert_folder, num_labels=1).eval()
    plain.bert.pooler.load_state_dict(model.model.bert.pooler.state_dict())
    plain.classifier.load_state_dict(model.model.classifier.state_dict())
    with torch.no_grad():
        right = torch.cat([plain(input_ids=one(rows.texts[n])).logits[0] for n in range(6)])
        loss, _ = model.loss(rows, ALL, 0)
    for budget in (1, 80, 10_000):
        np.testing.assert_allclose(predict(model, rows, budget).logits[:, 0], right, atol=1e-5)
    assert float(loss) == pytest.approx(bce(right, LABELS), abs=1e-4)


def test_stage_a_s_loss(bert: ModelIdentity, bert_tokenizer: Any, rows: TextExamples, bert_folder: Path) -> None:
    model = load_masked_lm(bert, bert_tokenizer, replace(BERT, mlm_probability=0.5), 3, CPU).eval()
    plain = AutoModelForMaskedLM.from_pretrained(bert_folder).eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for n in range(6):
            ids = rows.texts[n].astype(np.int64)
            shown, chosen = model.masking(ids[None], np.array([n]), 1)
            log_p = plain(input_ids=torch.from_numpy(shown)).logits[0].double().log_softmax(-1)
            total -= sum(float(log_p[at, ids[at]]) for at in np.flatnonzero(chosen[0]))
            count += int(chosen.sum())
        loss, weight = model.loss(rows, ALL, 1)
        pieces = [model.loss(rows, piece, 1) for piece in (ALL[:2], ALL[2:])]
    assert weight == count > 10
    assert float(loss) == pytest.approx(total, rel=1e-5)
    assert sum(float(x) for x, _ in pieces) == pytest.approx(total, rel=1e-5)


def test_a_head_by_another_name(bert: ModelIdentity, bert_tokenizer: Any, rows: TextExamples) -> None:
    """Without a head that can be applied apart, the whole model gives the same."""
    model = load_masked_lm(bert, bert_tokenizer, BERT, 3, CPU).eval()
    ids = torch.from_numpy(np.stack([rows.texts[1], rows.texts[4]]).astype(np.int64))
    at = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.3

    class Plain(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, **inputs: torch.Tensor) -> Any:
            return self.inner(**inputs)

    other = MaskedLm(Plain(model.model), 0, model.masking)
    with torch.no_grad():
        found = [m.logits_at(ids, torch.ones_like(ids), at) for m in (model, other)]
    torch.testing.assert_close(*found)


def test_stage_b_starts_from_stage_a(bert: ModelIdentity, bert_tokenizer: Any, tmp_path: Path) -> None:
    stage_a = load_masked_lm(bert, bert_tokenizer, BERT, 0, CPU)
    with torch.no_grad():
        for parameter in stage_a.parameters():
            parameter += 0.01
    stage_a.save(bert_tokenizer, tmp_path / "a")
    assert {p.suffix for p in (tmp_path / "a").iterdir()} == {".json", ".safetensors"}
    saved = identify(str(tmp_path / "a"))
    assert saved.digest != bert.digest
    model = load_ptab(saved, bert_tokenizer, BERT, 0, CPU)
    encoder = dict(stage_a.model.bert.named_parameters())
    found = dict(model.model.bert.named_parameters())
    assert found.keys() - encoder.keys() == {"pooler.dense.weight", "pooler.dense.bias"}
    assert all(torch.equal(found[name], value) for name, value in encoder.items())
    assert {n.split(".")[0] for n, _ in model.model.named_parameters()} == {"bert", "classifier"}


def test_p5(t5: ModelIdentity, t5_tokenizer: Any, t5_folder: Path, prompts: TextExamples) -> None:
    """The one step's probability is that of the full forward on each answer; the loss is the library's, row by row."""
    model = load_p5(t5, t5_tokenizer, T5, 0, CPU).eval()
    plain = T5ForConditionalGeneration.from_pretrained(t5_folder).eval()
    yes, no = t5_tokenizer("yes")["input_ids"], t5_tokenizer("no")["input_ids"]
    assert (model.targets.yes, model.targets.no) == (tuple(yes), tuple(no))
    wanted, losses = [], []
    with torch.no_grad():
        for n in range(6):
            ids = one(prompts.texts[n])
            of_yes, of_no = (plain(input_ids=ids, labels=one(answer)) for answer in (yes, no))
            wanted.append([float(of_yes.logits[0, 0, yes[0]]), float(of_no.logits[0, 0, no[0]])])
            losses.append(float((of_yes if LABELS[n] else of_no).loss))
        loss, weight = model.loss(prompts, ALL, 0)
    assert float(loss) == pytest.approx(sum(losses), rel=1e-5)
    assert weight == 6.0
    right = torch.tensor(wanted)
    assert float((right[:, 0] - right[:, 1]).std()) > 0.01
    for budget in (1, 80, 10_000):
        scores = predict(model, prompts, budget)
        np.testing.assert_allclose(scores.logits, right, atol=1e-5)
        np.testing.assert_allclose(scores.probability, right.double().softmax(1)[:, 0], atol=1e-6)


def test_p5_s_answers_of_different_lengths(t5: ModelIdentity, t5_tokenizer: Any, prompts: TextExamples) -> None:
    loaded = load_p5(t5, t5_tokenizer, T5, 0, CPU)
    model = P5(loaded.model, Targets((30, 31, 32, 1), (40, 1)), 0).eval()
    with torch.no_grad():
        losses = [
            float(model.model(input_ids=one(prompts.texts[n]), labels=one(model.targets.of(LABELS[n]))).loss)
            for n in range(6)
        ]
        loss, _ = model.loss(prompts, ALL, 0)
    assert float(loss) == pytest.approx(sum(losses), rel=1e-5)


class Stub:
    """A tokenizer that answers by table."""

    def __init__(self, words: dict[str, list[int]], end: int | None = 1) -> None:
        self.words, self.eos_token_id = words, end

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": self.words[text]}


def test_answers_that_one_step_cannot_tell_apart() -> None:
    assert targets_for(Stub({"yes": [7, 8], "no": [9]})) == Targets((9, 1), (7, 8, 1))
    assert targets_for(Stub({"yes": [7, 8], "no": [9]})).pair == (7, 9)
    with pytest.raises(ValueError, match="begins both answers with token 3"):
        targets_for(Stub({"yes": [3, 8], "no": [3, 9]}))
    with pytest.raises(ValueError, match="no end token"):
        targets_for(Stub({"yes": [7], "no": [9]}, None))


def test_weights_come_back(bert: ModelIdentity, bert_tokenizer: Any, rows: TextExamples) -> None:
    model, other = (load_ptab(bert, bert_tokenizer, BERT, seed, CPU) for seed in (0, 1))
    before = predict(model, rows, 1000).logits
    assert not np.array_equal(predict(other, rows, 1000).logits, before)
    put_weights(other, weights_from_bytes(weights_to_bytes(weights_of(model))))
    assert np.array_equal(predict(other, rows, 1000).logits, before)
    pair = load_ctr_bert(bert, bert_tokenizer, replace(BERT, tie=True), 0, CPU)
    with pytest.raises(ValueError, match="not this model's"):
        put_weights(pair, weights_of(model))


def test_what_does_not_fit_is_said(
    bert: ModelIdentity, t5: ModelIdentity, bert_tokenizer: Any, t5_tokenizer: Any
) -> None:
    with pytest.raises(ValueError, match="small-bert reads 128 tokens; lower max_tokens"):
        load_ptab(bert, bert_tokenizer, replace(BERT, max_tokens=129), 0, CPU)
    with pytest.raises(ValueError, match="P5 is built on T5, but small-bert is 'bert'"):
        load_p5(bert, bert_tokenizer, T5, 0, CPU)
    with pytest.raises(ValueError, match="float16"):
        load_p5(t5, t5_tokenizer, replace(T5, precision="float16"), 0, CPU)
    with pytest.raises(ValueError, match="no mask token"):
        load_masked_lm(t5, t5_tokenizer, BERT, 0, CPU)
    with pytest.raises(ValueError, match="begins no text with a CLS token"):
        load_ctr_bert(t5, t5_tokenizer, BERT, 0, CPU)


def test_missing_weights_are_never_random(bert_folder: Path, bert_tokenizer: Any, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = tmp_path / "half"
    shutil.copytree(bert_folder, folder)
    weights = load_file(folder / "model.safetensors")
    save_file({n: w for n, w in weights.items() if "layer.1." not in n}, folder / "model.safetensors", {"format": "pt"})
    for load in (load_ctr_bert, load_masked_lm, load_ptab):
        with pytest.raises(ValueError, match=r"half lacks 16 weights of a AutoModel"):
            load(identify(str(folder)), bert_tokenizer, BERT, 0, CPU)


def test_the_hub_s_file_of_bert_base_uncased(bert_folder: Path, bert_tokenizer: Any, tmp_path: Path) -> None:
    """It was saved by an older library from BertForPreTraining: other names for norms, and two heads more."""
    from safetensors.torch import save_file
    from transformers import BertConfig, BertForPreTraining

    torch.manual_seed(3)
    plain = BertForPreTraining(BertConfig.from_pretrained(bert_folder)).eval()
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): p.clone()
        for n, p in plain.named_parameters()
    }
    assert any("gamma" in name for name in old)
    shutil.copytree(bert_folder, tmp_path / "old")
    save_file(old, tmp_path / "old" / "model.safetensors", {"format": "pt"})
    identity = identify(str(tmp_path / "old"))
    encoder = dict(plain.bert.named_parameters())
    for tower in (
        load_ctr_bert(identity, bert_tokenizer, BERT, 0, CPU).user,
        load_ptab(identity, bert_tokenizer, BERT, 0, CPU).model.bert,
        load_masked_lm(identity, bert_tokenizer, BERT, 0, CPU).model.bert,
    ):
        assert all(torch.equal(p, encoder[n]) for n, p in tower.named_parameters())
    head = dict(load_masked_lm(identity, bert_tokenizer, BERT, 0, CPU).model.cls.named_parameters())
    assert all(torch.equal(p, dict(plain.cls.named_parameters())[n]) for n, p in head.items())


def test_neither_pickles_nor_foreign_code_are_loaded(
    bert: ModelIdentity, bert_folder: Path, bert_tokenizer: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "odd"
    shutil.copytree(bert_folder, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="pickled"):
        load_ptab(replace(bert, source=str(folder)), bert_tokenizer, BERT, 0, CPU)
    shutil.copy(bert_folder / "model.safetensors", folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "own.Own", "AutoConfig": "own.OwnConfig"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("raise SystemExit('code of a model folder ran')\n")
    assert isinstance(load_ctr_bert(identify(str(folder)), bert_tokenizer, BERT, 0, CPU), CtrBert)


def test_loading_moves_no_generator(bert: ModelIdentity, bert_tokenizer: Any) -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    load_ctr_bert(bert, bert_tokenizer, BERT, 0, CPU)
    assert torch.equal(torch.rand(3), wanted)


def test_dropout_is_the_configuration_s(
    bert: ModelIdentity, t5: ModelIdentity, bert_tokenizer: Any, t5_tokenizer: Any
) -> None:
    for model in (
        load_ctr_bert(bert, bert_tokenizer, replace(BERT, dropout=0.0), 0, CPU),
        load_ptab(bert, bert_tokenizer, replace(BERT, dropout=0.0), 0, CPU),
    ):
        assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.0}
    p5 = load_p5(t5, t5_tokenizer, replace(T5, dropout=0.3), 0, CPU)
    assert {m.p for m in p5.modules() if isinstance(m, nn.Dropout)} == {0.3}
