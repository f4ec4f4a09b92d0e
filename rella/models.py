"""Which model is meant, to the byte: what goes into keys in place of a name. Imports neither torch nor transformers."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rella.artifacts import digest
from rella.config import SOURCES
from rella.digests import file_digest

TINY = Path(__file__).resolve().parent / "assets" / "tiny"
"""The stand-in LLM that ships with the package."""

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_DESCRIBING = ("config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class ModelIdentity:
    """A base model as resolved: readable name, place, and the digest that keys hold."""

    name: str
    source: str
    """A folder of this machine, or a hub name."""
    revision: str | None
    """The hub's commit; None for a folder."""
    digest: str
    """The commit, or the SHA-256 of configuration, tokenizer and weights."""
    hidden_size: int
    max_positions: int
    """The context: tokens of prompt and answer together."""


def identify(model: str, revision: str | None = None) -> ModelIdentity:
    """Resolve a preset, folder or hub name; `HF_TOKEN` and offline mode are the hub library's own.

    Raises:
        FileNotFoundError: a folder without config.json or safetensors, or a hub model that cannot be reached.
    """
    if model == "tiny":
        return _identify_folder(TINY, "tiny")
    if Path(model).expanduser().is_dir():
        folder = Path(model).expanduser().resolve()
        return _identify_folder(folder, folder.name)
    return _identify_hub(SOURCES.get(model, model), revision)


def _identify_folder(folder: Path, name: str) -> ModelIdentity:
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"model folder {folder} has no config.json")
    weights = sorted(p for pattern in _WEIGHTS for p in folder.glob(pattern))
    if not weights:
        raise FileNotFoundError(f"model folder {folder} has no *.safetensors (pickled weights are not loaded)")
    files = [folder / f for f in _DESCRIBING if (folder / f).exists()] + weights
    content = digest({p.name: file_digest(p) for p in files})
    return _with_config(name, str(folder), None, content, folder / "config.json")


def _identify_hub(name: str, revision: str | None) -> ModelIdentity:
    from huggingface_hub import hf_hub_download

    try:
        config = Path(hf_hub_download(name, "config.json", revision=revision))
    except Exception as error:
        raise FileNotFoundError(
            f"model {name!r} is neither a preset, nor a folder, nor to be had from the hub ({type(error).__name__}): "
            "give a folder with --model, or set HF_HUB_OFFLINE=1 with a filled cache, or HF_TOKEN for a gated model"
        ) from error
    # The hub's cache is laid out as snapshots/<commit>/config.json.
    return _with_config(name.rpartition("/")[2], name, config.parent.name, config.parent.name, config)


def _with_config(name: str, source: str, revision: str | None, content: str, config: Path) -> ModelIdentity:
    fields: dict[str, Any] = json.loads(config.read_text())
    text = fields.get("text_config", fields)
    hidden = int(text.get("hidden_size") or text.get("n_embd") or text["d_model"])
    context = int(text.get("max_position_embeddings") or text.get("n_positions") or 2048)
    return ModelIdentity(name.lower(), source, revision, content, hidden, context)


def adapter_identity(folder: Path) -> str:
    """Return the SHA-256 of an adapter's configuration and weights.

    Raises:
        FileNotFoundError: not a PEFT folder with safetensors; a missing adapter is never a silent zero-shot.
    """
    files = [folder / "adapter_config.json", folder / "adapter_model.safetensors"]
    missing = [f.name for f in files if not f.exists()]
    if missing:
        raise FileNotFoundError(f"adapter {folder}: {' and '.join(missing)} missing (a PEFT folder has both)")
    return hashlib.sha256("".join(file_digest(f) for f in files).encode()).hexdigest()
