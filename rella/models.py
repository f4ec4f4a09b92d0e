"""Which model is meant, to the byte: what goes into keys in place of a name. Imports neither torch nor transformers."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rella.artifacts import digest
from rella.backbones import BACKBONES, backbone_of
from rella.digests import file_digest
from rella.errors import InputError, MissingError
from rella.model_store import is_remote, local_model

TINY = Path(__file__).resolve().parent / "assets" / "tiny"
"""The stand-in LLM that ships with the package."""

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_DESCRIBING = (
    *("config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "added_tokens.json"),
)


ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
"""What a PEFT folder holds; pickled weights are not loaded."""

BASE_FILE = "rella_base.json"
"""Beside an adapter's weights: which base it was tuned on."""


@dataclass(frozen=True)
class ModelIdentity:
    """A base model as resolved: readable name, place, and the digest that keys hold."""

    name: str
    source: str
    """A folder of this machine, a hub name, or a URI."""
    revision: str | None
    """The hub's commit; None for a folder."""
    digest: str
    """The commit, or the SHA-256 of configuration, tokenizer and weights."""
    hidden_size: int
    max_positions: int
    """The context: tokens of prompt and answer together."""
    model_type: str
    """The architecture, as in config.json; of a model with a language model inside, the outer one, which is loaded."""

    @property
    def place(self) -> str:
        """What libraries load it from: a folder of this machine, to which a URI's files are copied once, or a hub name.

        Raises:
            InputError: what is at the URI is not what was resolved.
        """
        if not is_remote(self.source):
            return self.source
        folder = local_model(self.source)
        if _identify_folder(folder, self.name).digest != self.digest:
            raise InputError(f"model {self.source} changed since the job began: start it again")
        return str(folder)


def identify(model: str, revision: str | None = None, flag: str = "--model") -> ModelIdentity:
    """Resolve a preset, folder, URI or hub name; `HF_TOKEN` and offline mode are the hub library's own.

    Args:
        model: which one.
        revision: commit, tag or branch on the hub; without it the pinned commit of a preset (called by its
            own name or the hub's), else the newest.
        flag: what named it, for messages.

    Raises:
        MissingError: a folder without config.json or safetensors, or a hub model that cannot be reached.
    """
    if model == "tiny":
        return _identify_folder(TINY, "tiny")
    if is_remote(model):
        uri = model.rstrip("/")
        name = uri.partition("?")[0].rpartition("/")[2]
        return replace(_identify_folder(local_model(uri), name), source=uri)
    if Path(model).expanduser().is_dir():
        folder = Path(model).expanduser().resolve()
        return _identify_folder(folder, folder.name)
    preset = BACKBONES.get(model) or backbone_of(model)
    if preset is None:
        return _identify_hub(model, revision, flag)
    return _identify_hub(preset.source, revision or preset.revision, flag)


def _identify_folder(folder: Path, name: str) -> ModelIdentity:
    if not (folder / "config.json").exists():
        raise MissingError(f"model folder {folder} has no config.json")
    weights = sorted(p for pattern in _WEIGHTS for p in folder.glob(pattern))
    if not weights:
        raise MissingError(f"model folder {folder} has no *.safetensors (pickled weights are not loaded)")
    files = [folder / f for f in _DESCRIBING if (folder / f).exists()] + weights
    content = digest({p.name: file_digest(p) for p in files})
    return _with_config(name, str(folder), None, content, folder / "config.json")


def _identify_hub(name: str, revision: str | None, flag: str) -> ModelIdentity:
    from huggingface_hub import hf_hub_download

    try:
        config = Path(hf_hub_download(name, "config.json", revision=revision))
    except Exception as error:
        raise MissingError(
            f"model {name!r} is neither a preset, nor a folder, nor to be had from the hub"
            f"{f' at revision {revision}' if revision else ''} ({type(error).__name__}): "
            f"give a folder with {flag}, or set HF_HUB_OFFLINE=1 with a filled cache, or HF_TOKEN for a gated model"
        ) from error
    # The hub's cache is laid out as snapshots/<commit>/config.json.
    return _with_config(name.rpartition("/")[2], name, config.parent.name, config.parent.name, config)


def _with_config(name: str, source: str, revision: str | None, content: str, config: Path) -> ModelIdentity:
    fields: dict[str, Any] = json.loads(config.read_text())
    text = fields.get("text_config", fields)
    hidden = int(text.get("hidden_size") or text.get("n_embd") or text["d_model"])
    context = int(text.get("max_position_embeddings") or text.get("n_positions") or 2048)
    kind = str(fields.get("model_type") or text.get("model_type") or "")
    return ModelIdentity(name.lower(), source, revision, content, hidden, context, kind)


def check_adapter(folder: Path, model: ModelIdentity, named: str | None = None) -> None:
    """Verify that `folder` is an adapter of `model`; a missing adapter is never a silent zero-shot.

    Messages call it `named`, where the folder is a copy of what the user named.

    Raises:
        MissingError: files are missing.
        InputError: it was tuned on another base.
    """
    shown = named or folder
    for name in ADAPTER_FILES:
        if not (folder / name).exists():
            raise MissingError(f"adapter {shown} has no {name}: give a PEFT folder, or `--adapter none`")
    if (folder / BASE_FILE).exists():
        base = json.loads((folder / BASE_FILE).read_text())
        if base["digest"] != model.digest:
            raise InputError(
                f"adapter {shown} was tuned on {base['name']} ({base['digest'][:12]}), not on {model.name} "
                f"({model.digest[:12]}): give --model that base, or --adapter none"
            )
        return
    of = json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path") or ""
    if of and "/" in of and not os.path.isabs(of) and of != model.source:
        raise InputError(f"adapter {shown} names {of} as its base, not {model.source}: give --model {of}")


def adapter_identity(folder: Path) -> str:
    """Return the SHA-256 of an adapter's configuration and weights, which must be there: see `check_adapter`."""
    files = [folder / name for name in ADAPTER_FILES]
    return hashlib.sha256("".join(file_digest(f) for f in files).encode()).hexdigest()
