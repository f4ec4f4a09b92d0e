"""The table of backbones, and that a preset means its pinned commit; nothing is downloaded."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rella.backbones import BACKBONES, LORA_TARGETS, Backbone, backbone_of, lora_targets_for
from rella.config import MODELS
from rella.models import identify

each = pytest.mark.parametrize("backbone", BACKBONES.values(), ids=lambda b: b.name)


def test_the_presets_are_those_of_the_configuration() -> None:
    assert {"tiny", *BACKBONES} == MODELS.keys()
    assert all(name == backbone.name for name, backbone in BACKBONES.items())


@each
def test_a_backbone_is_found_by_its_hub_name(backbone: Backbone) -> None:
    assert backbone_of(backbone.source) is backbone
    assert backbone_of(backbone.name) is None


@each
def test_a_revision_is_a_commit(backbone: Backbone) -> None:
    """A branch's name would let the weights change under one key."""
    assert backbone.revision is None or re.fullmatch("[0-9a-f]{40}", backbone.revision)


@each
def test_queries_and_values_are_adapted(backbone: Backbone) -> None:
    fused = backbone.model_type == "falcon"
    assert lora_targets_for(backbone.model_type) == (("query_key_value",) if fused else ("q_proj", "v_proj"))


@pytest.mark.parametrize("model_type", ["bert", "", "Llama"])
def test_an_unknown_architecture_names_the_known_ones_and_the_option(model_type: str) -> None:
    known = ", ".join(sorted(LORA_TARGETS))
    message = rf"model type '{model_type}' are not known \(known are {known}\): .* --tune\.lora-targets"
    with pytest.raises(ValueError, match=message):
        lora_targets_for(model_type)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, str, str | None]]:
    """What the hub was asked for: (model, file, revision). It answers with a small configuration."""
    calls: list[tuple[str, str, str | None]] = []

    def download(source: str, name: str, revision: str | None = None) -> str:
        calls.append((source, name, revision))
        folder = tmp_path / "snapshots" / f"commit-of-{revision}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"hidden_size": 32, "model_type": "llama"}))
        return str(folder / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    return calls


@each
def test_a_preset_is_its_pinned_commit(backbone: Backbone, asked: list[tuple[str, str, str | None]]) -> None:
    found = identify(backbone.name)
    assert asked == [(backbone.source, "config.json", backbone.revision)]
    assert (found.source, found.revision) == (backbone.source, f"commit-of-{backbone.revision}")
    assert found.digest == found.revision
    assert found.name == backbone.source.split("/")[1].lower()


def test_a_preset_by_its_hub_name_is_the_same_commit(asked: list[tuple[str, str, str | None]]) -> None:
    assert identify("lmsys/vicuna-13b-v1.3") == identify("vicuna-13b")
    assert asked[0] == asked[1]


def test_a_revision_that_is_given_wins(asked: list[tuple[str, str, str | None]]) -> None:
    found = identify("vicuna-13b", "main")
    assert asked == [("lmsys/vicuna-13b-v1.3", "config.json", "main")]
    assert found.revision == "commit-of-main"


def test_other_hub_names_have_no_pinned_commit(asked: list[tuple[str, str, str | None]]) -> None:
    identify("someone/some-model")
    identify("someone/some-model", "v2")
    assert [revision for _, _, revision in asked] == [None, "v2"]


def test_a_pinned_commit_that_cannot_be_had_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> str:
        raise OSError

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(FileNotFoundError, match=f"at revision {BACKBONES['vicuna-13b'].revision}"):
        identify("vicuna-13b")
