"""A file of DeepSpeed's settings (`--tune.deepspeed`): read and checked on the driver, before anything expensive.

What a flag of ours decides is refused here by name: one place says it. DeepSpeed reads past keys at the top that it
does not know; here they are errors, as they are below.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rella.config import TuneConfig
from rella.errors import InputError, MissingError
from rella.stages import Precision

Settings = dict[str, Any]

OURS = {
    "train_batch_size": "--tune.batch-size",
    "train_micro_batch_size_per_gpu": "--tune.micro-batch-tokens and --tune.micro-batch-rows",
    "gradient_accumulation_steps": "--tune.micro-batch-tokens and --tune.micro-batch-rows",
    "gradient_clipping": "--tune.clip",
    "optimizer": "--tune.learning-rate and --tune.weight-decay (AdamW)",
    "scheduler": "--tune.learning-rate and --tune.max-epochs (linear to 0)",
}
"""Key → the flags that say the same."""
PLAIN = {"communication_data_type": str, "wall_clock_breakdown": bool, "memory_breakdown": bool}
"""Keys with a single value."""


def read_settings(config: TuneConfig, precision: Precision) -> Settings:
    """Return the content of `config.deepspeed`, checked; empty where no file is given.

    Args:
        config: names the file and the stage.
        precision: of the base.

    Raises:
        MissingError: no such file.
        InputError: not JSON, a key or value that DeepSpeed does not know, or one that a flag contradicts; names file,
            key and flag.
    """
    if config.deepspeed is None:
        return {}
    file = Path(config.deepspeed).expanduser()
    if not file.is_file():
        raise MissingError(f"--tune.deepspeed {file}: there is no such file")
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise InputError(f"--tune.deepspeed {file}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"--tune.deepspeed {file}: give an object of settings, {{...}}")
    for key, value in found.items():
        _check(str(file), key, value)
    _check_flags(str(file), found, config, precision)
    return found


def _sections() -> dict[str, Any]:
    """Key → DeepSpeed's own model of what is below it."""
    if not torch.cuda.is_available():
        # Else DeepSpeed warns that it found no card: a driver need not have one.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return {"zero_optimization": DeepSpeedZeroConfig, "fp16": DeepSpeedFP16Config, "bf16": DeepSpeedBF16Config}


def _check(file: str, key: str, value: object) -> None:
    if key in OURS:
        raise InputError(f"--tune.deepspeed {file}: remove {key}; say it with {OURS[key]}")
    if key in PLAIN:
        if not isinstance(value, PLAIN[key]):
            raise InputError(f"--tune.deepspeed {file}: {key} is {value!r}; give a {PLAIN[key].__name__}")
        return
    sections = _sections()
    if key not in sections:
        known = ", ".join([*sections, *PLAIN])
        raise InputError(f"--tune.deepspeed {file}: unknown or unsupported key {key!r}; there are {known}")
    if not isinstance(value, dict):
        raise InputError(f"--tune.deepspeed {file}: {key} is {value!r}; give an object, {{...}}")
    try:
        sections[key](**value)
    except ValueError as error:
        faults: list[Any] = getattr(error, "errors", list)()
        said = "; ".join(f"{key}.{'.'.join(map(str, f['loc']))}: {f['msg']}" for f in faults) or str(error)
        raise InputError(f"--tune.deepspeed {file}: {said}") from error


def _check_flags(file: str, found: Mapping[str, Any], config: TuneConfig, precision: Precision) -> None:
    stage = found.get("zero_optimization", {}).get("stage", config.zero_stage)
    if stage != config.zero_stage:
        flag = f"--tune.zero-stage is {config.zero_stage}"
        raise InputError(f"--tune.deepspeed {file}: zero_optimization.stage is {stage}, but {flag}: make them agree")
    if stage != 3 and "offload_param" in found.get("zero_optimization", {}):
        raise InputError(f"--tune.deepspeed {file}: zero_optimization.offload_param needs stage 3, not {stage}")
    for key, dtype in (("fp16", "float16"), ("bf16", "bfloat16")):
        on = found.get(key, {}).get("enabled", precision == dtype)
        if on != (precision == dtype):
            said = str(on).lower()
            raise InputError(f"--tune.deepspeed {file}: {key}.enabled is {said}, but --precision is {precision}")
