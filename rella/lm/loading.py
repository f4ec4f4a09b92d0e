"""Base model, tokenizer, adapter and answer tokens: the only place that knows how a model gets into memory."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rella.backbones import backbone_of
from rella.errors import InputError, MissingError
from rella.models import ModelIdentity, check_adapter
from rella.prompts import ChatWrapper, answer_text
from rella.stages import Precision, Quantize

DTYPES: dict[Precision, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep transformers' loading bars and advice out of a normal run; errors still show."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def load_tokenizer(model: ModelIdentity) -> Any:  # noqa: ANN401 - transformers is untyped here
    """Return the model's fast tokenizer; where it has no padding token, the end token pads (never trained on).

    Raises:
        OSError: the hub cannot be reached and the cache does not hold it.
    """
    from transformers import AutoTokenizer

    with quiet_libraries():
        tokenizer = AutoTokenizer.from_pretrained(model.place, revision=model.revision, trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(
    model: ModelIdentity, precision: Precision, device: torch.device, head: bool = True, quantize: Quantize = "none"
) -> Any:  # noqa: ANN401
    """Return the frozen base model in evaluation mode on `device`.

    Args:
        model: which one.
        precision: dtype of its weights; of quantised ones that of the arithmetic.
        device: a CPU or one GPU.
        head: with the LM head (tuning, scoring) or without (embedding).
        quantize: what bitsandbytes makes of the layers' weights; embeddings, norms and the LM head stay as they are.

    Raises:
        InputError: bfloat16 on a card that has none.
        MissingError: quantised weights without bitsandbytes.
    """
    from transformers import AutoModel, AutoModelForCausalLM

    check_precision(precision, device)
    kind = AutoModelForCausalLM if head else AutoModel
    own: dict[str, Any] = {}
    if quantize != "none":
        own = {"quantization_config": _quantized(quantize, precision), "device_map": {"": device}}
    with quiet_libraries():
        loaded = kind.from_pretrained(
            model.place, revision=model.revision, dtype=DTYPES[precision], trust_remote_code=False, **own
        )
    for module in loaded.modules() if own else ():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Some CPUs would repack 4-bit weights in the first validation, and a backward pass cannot read them then.
            module.support_avx512bf16_for_cpu = False
    loaded.config.use_cache = False
    loaded.requires_grad_(False)
    return (loaded if own else loaded.to(device)).eval()


def check_precision(precision: Precision, device: torch.device) -> None:
    """Verify that a card computes in a precision; what it emulates is slower than float32.

    Raises:
        InputError: bfloat16 before compute capability 8.0 (V100, T4).
    """
    if precision != "bfloat16" or device.type != "cuda":
        return
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise InputError(
            f"precision bfloat16: {torch.cuda.get_device_name(device)} (compute capability {major}.{minor}) has none: "
            "take --precision float16"
        )


def _quantized(quantize: Quantize, precision: Precision) -> Any:  # noqa: ANN401
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingError(f"quantize {quantize}: bitsandbytes is not installed here: pip install bitsandbytes")
    # It warns in every process that inputs of other types are cast.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[precision],
    )


@dataclass(frozen=True)
class Answers:
    """The answer words as tokens, proven to be one token each where they stand in a prompt (§2.2, Eq. 2)."""

    yes: tuple[int, ...]
    """Tokens of the trained answer "Yes."; the first one is compared with No's."""
    no: tuple[int, ...]

    @property
    def pair(self) -> tuple[int, int]:
        """Vocabulary indices a and b of Eq. 2."""
        return self.yes[0], self.no[0]

    def of(self, label: int) -> tuple[int, ...]:
        """Return the tokens trained for a label."""
        return self.yes if label else self.no


def answers_for(tokenizer: Any, wrapper: ChatWrapper) -> Answers:  # noqa: ANN401
    """Return the answers' tokens behind a wrapped prompt.

    Raises:
        InputError: prompt and answer do not tokenise as one after the other, or Yes and No share their first token;
            the logits of two words could then not be compared at one position.
    """
    prompt = wrapper.wrap("You should ONLY tell me yes or no.")
    before: list[int] = tokenizer(prompt)["input_ids"]
    if tokenizer.eos_token_id is not None and before[-1] == tokenizer.eos_token_id:
        raise InputError("this tokenizer ends every text with its end token: turn add_eos_token off")
    found: list[tuple[int, ...]] = []
    for label in (1, 0):
        whole: list[int] = tokenizer(prompt + wrapper.separator + answer_text(label))["input_ids"]
        if whole[: len(before)] != before:
            raise InputError(
                f"with wrapper {wrapper.name!r} this tokenizer merges the end of the prompt with {answer_text(label)!r}"
            )
        found.append(tuple(whole[len(before) :]))
    yes, no = found
    for word, tokens in (("Yes", yes), ("No", no)):
        if tokenizer.decode([tokens[0]]).strip() != word:
            raise InputError(
                f"{word!r} is not one token behind wrapper {wrapper.name!r}: {tokens}; try another wrapper"
            )
    return Answers(yes, no)


def check_answer_ids(answers: Answers, source: str) -> None:
    """Hold the derived answer tokens against those known for a backbone of the paper; others pass.

    Args:
        answers: from `answers_for`, behind a wrapper whose answer follows a blank.
        source: the model's hub name.

    Raises:
        InputError: the tokenizer is not the one that belongs to this model, or was converted wrongly.
    """
    backbone = backbone_of(source)
    if backbone is None or backbone.answer_ids is None or answers.pair == backbone.answer_ids:
        return
    raise InputError(
        f"the tokenizer of {source} gives Yes and No as tokens {answers.pair}, but in its vocabulary they are "
        f"{backbone.answer_ids}: delete its tokenizer from the hub's cache, or install sentencepiece and protobuf"
    )


def attach_adapter(base: Any, folder: Path, model: ModelIdentity) -> Any:  # noqa: ANN401
    """Return `base` with the PEFT adapter in `folder`; `detach_adapter` gives the base back.

    Raises:
        MissingError: no PEFT folder with safetensors.
        InputError: an adapter of another base, or one whose weights do not fit.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    check_adapter(folder, model)
    try:
        with quiet_libraries():
            tuned = PeftModel.from_pretrained(base, str(folder), is_trainable=False).eval()
    except (RuntimeError, ValueError) as error:
        raise InputError(f"adapter {folder} does not fit {model.name}: {error}") from error
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        # PEFT only warns of weights that it does not find, and leaves these layers without effect.
        odd = set(file.keys()) ^ set(get_peft_model_state_dict(tuned, save_embedding_layers=False))
    if odd:
        tuned.unload()
        raise InputError(
            f"adapter {folder} does not fit {model.name}: {len(odd)} weights do not match, e.g. {min(odd)}"
        )
    return tuned


def detach_adapter(tuned: Any) -> Any:  # noqa: ANN401
    """Return the base model, its LoRA layers removed."""
    return tuned.unload()


def describe_base(model: ModelIdentity) -> bytes:
    """Return the content of `rella_base.json` for an adapter tuned on `model`."""
    fields = {"name": model.name, "source": model.source, "revision": model.revision, "digest": model.digest}
    return (json.dumps(fields, indent=1) + "\n").encode()


# The old name warns from torch 2.11 on. Setting a variable instead may be too late in a worker's process.
_allocator_settings: Callable[[str], None] = getattr(
    torch._C, "_accelerator_setAllocatorSettings", torch.cuda.memory._set_allocator_settings
)

ALLOCATOR_VARIABLES = frozenset(("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
"""With either set, what a user asks of torch's allocator stands."""


def best_device() -> torch.device:
    """Return the process's GPU where it has one, else the CPU; a GPU's memory is then handed out without gaps."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if not ALLOCATOR_VARIABLES & os.environ.keys():
        # Passes of many sizes leave gaps in fixed segments: up to 13 GiB beside a 13B model (docs/engine.md).
        _allocator_settings("expandable_segments:True")
    return torch.device("cuda", torch.cuda.current_device())
