"""Fused norms give what the model's own do, and only norms of that kind are replaced."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rella.lm.norms import fuse_norms, fused_norms

IDS = torch.arange(3, 43)[None]


def test_a_llama_with_fused_norms_is_the_same_function(base: Any) -> None:
    for norm in (m for m in base.modules() if type(m).__name__ == "LlamaRMSNorm"):
        with torch.no_grad():
            norm.weight.uniform_(0.5, 2.0)
    with torch.no_grad():
        right = base(input_ids=IDS).logits
        changed = fuse_norms(base)
        assert len(changed) == 2 * base.config.num_hidden_layers + 1
        torch.testing.assert_close(base(input_ids=IDS).logits, right, rtol=1e-5, atol=1e-5)
        changed[0].weight.mul_(2)
        assert not torch.allclose(base(input_ids=IDS).logits, right), "the replaced norm is the one that runs"
    assert fuse_norms(base) == [], "those already replaced are left alone"


def test_norms_of_another_kind_stay() -> None:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.mistral.modeling_mistral import MistralRMSNorm

    model = torch.nn.ModuleList([GemmaRMSNorm(8), MistralRMSNorm(8), torch.nn.LayerNorm(8)])
    assert fuse_norms(model) == [model[1]]


def test_on_a_cpu_nothing_changes_and_on_a_card_all_comes_back(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with fused_norms(base):
        assert not [m for m in base.modules() if "forward" in vars(m)]
    monkeypatch.setattr("rella.lm.norms._on_card", lambda model: True)
    with fused_norms(base):
        assert [m for m in base.modules() if "forward" in vars(m)]
    assert not [m for m in base.modules() if "forward" in vars(m)]
    with pytest.raises(IndexError), fused_norms(base):
        base(input_ids=IDS + 10**6)
    assert not [m for m in base.modules() if "forward" in vars(m)]
