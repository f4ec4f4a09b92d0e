"""DeepSpeed's settings in a file: those that ship are right, and what contradicts a flag is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rella.config import TuneConfig
from rella.lm.zero import deepspeed_config
from rella.lm.zero_settings import OURS, read_settings

SHIPPED = sorted((Path(__file__).parents[2] / "cluster/deepspeed").glob("*.json"))


def written(folder: Path, content: object) -> str:
    file = folder / "ds.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(file)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_what_ships_is_understood(file: Path) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    stage: Any = int(file.stem[4])
    precision: Any = "float16" if file.stem.endswith("fp16") else "bfloat16"
    config = TuneConfig(zero_stage=stage, deepspeed=str(file))
    settings = read_settings(config, precision)
    assert settings["zero_optimization"]["stage"] == stage
    whole = DeepSpeedConfig(deepspeed_config(config, precision, 4096, settings))
    assert (whole.zero_config.stage, whole.zero_config.reduce_bucket_size) == (stage, 4096)
    assert (whole.zero_config.offload_param is not None) == ("offload" in file.stem)
    assert whole.gradient_clipping == 1.0
    if precision == "float16":
        assert whole.float16_config.enabled
        assert whole.float16_config.initial_scale_power == 14


def test_there_are_some() -> None:
    assert {file.stem for file in SHIPPED} >= {"zero1", "zero2", "zero3", "zero3-offload", "zero2-fp16"}
    readme = (SHIPPED[0].parent / "README.md").read_text()
    assert all(f"`{file.name}`" in readme for file in SHIPPED)


def test_no_file_is_no_settings() -> None:
    assert read_settings(TuneConfig(), "float16") == {}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{,", "not JSON"),
        ([1], "give an object"),
        ({"zero_optimisation": {}}, "unknown or unsupported key 'zero_optimisation'"),
        ({"zero_optimization": {"stage": 2, "overlap_com": True}}, "zero_optimization.overlap_com: Extra inputs"),
        ({"zero_optimization": 2}, "zero_optimization is 2; give an object"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage is 3, but --tune.zero-stage is 2"),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, "offload_param needs stage 3, not 2"),
        ({"fp16": {"enabled": True}}, "fp16.enabled is true, but --precision is bfloat16"),
        ({"bf16": {"enabled": False}}, "bf16.enabled is false, but --precision is bfloat16"),
        ({"wall_clock_breakdown": "yes"}, "wall_clock_breakdown is 'yes'; give a bool"),
        *(({key: 1}, f"remove {key}; say it with --tune.") for key in OURS),
    ],
)
def test_what_is_wrong_is_named(content: object, said: str, tmp_path: Path) -> None:
    file = written(tmp_path, content)
    with pytest.raises(ValueError) as refused:
        read_settings(TuneConfig(deepspeed=file), "bfloat16")
    assert said in str(refused.value)
    assert str(refused.value).startswith(f"--tune.deepspeed {file}: ")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_settings(TuneConfig(deepspeed=str(tmp_path / "no.json")), "float16")
