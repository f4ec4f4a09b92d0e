"""The probe measures what it says, and chooses by what it found."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rella.backbones import BACKBONES
from rella.lm import probe as prober
from rella.lm.probe import KERNELS, Kernel, Probe, Product, choose, lines, main, probe
from rella.shapes import shape_of

VICUNA = shape_of(BACKBONES["vicuna-13b"].architecture, "llama")
CARD = Probe(
    "Tesla V100-SXM2-32GB",
    31.7,
    False,
    (
        Product("float32", 14.0, 0.0),
        Product("float16", 90.0, 4e-4),
        Product("bfloat16", 10.0, 3e-3),
        Product("int8", 40.0, 4e-3),
        Product("nf4", 60.0, 9e-2),
    ),
    tuple(Kernel(name, 1.0) for name in KERNELS),
)


@pytest.fixture(scope="module")
def here() -> Probe:
    return probe(torch.device("cpu"), 64, 128, 0.01)


def test_products_and_kernels_of_a_cpu(here: Probe) -> None:
    assert here.memory_gib is None
    assert here.product("float32").error == pytest.approx(0.0, abs=1e-6)
    assert 1e-3 < (here.product("bfloat16").error or 0) < 1e-2
    assert (here.product("float32").tflops or 0) > 0
    kernels = {k.name: k for k in here.attention}
    assert (kernels["math"].milliseconds or 0) > 0
    assert kernels["memory-efficient"].milliseconds is None
    assert kernels["memory-efficient"].why


def test_quantised_products_have_the_error_of_their_bits(here: Probe) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    assert 1e-3 < (here.product("int8").error or 0) < 2e-2
    assert 5e-2 < (here.product("nf4").error or 0) < 0.15


def test_without_bitsandbytes_the_table_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prober.importlib.util, "find_spec", lambda name: None)  # type: ignore[attr-defined]
    found = probe(torch.device("cpu"), 8, 16, 0.0)
    assert found.product("int8").why == "bitsandbytes is not installed"
    text = "\n".join(lines(found, choose(found, None)))
    assert "int8                      -         -  bitsandbytes is not installed" in text


@pytest.mark.parametrize(
    ("memory", "native", "flags"),
    [
        (31.7, False, "--precision float16 --quantize none"),
        (31.7, True, "--precision bfloat16 --quantize none"),
        (22.0, True, "--precision bfloat16 --quantize int8"),
        (14.0, False, "--precision float16 --quantize nf4"),
        (6.0, False, "--precision float16 --quantize none"),
    ],
)
def test_the_choice_is_the_least_loss_that_fits(memory: float, native: bool, flags: str) -> None:
    choice = choose(replace(CARD, memory_gib=memory, native_bf16=native), VICUNA)
    assert choice.flags == flags
    if memory == 6.0:
        assert choice.reasons[-1].startswith("nothing fits one card")


def test_reasons_name_sizes_errors_and_what_does_not_run() -> None:
    choice = choose(replace(CARD, memory_gib=14.0), VICUNA)
    assert "int8: 12.4 GiB of weights are more than 85% of 14.0" in choice.reasons
    assert any("off by 9.0% with it" in reason for reason in choice.reasons)
    broken = replace(
        CARD, memory_gib=22.0, products=(*CARD.products[:3], Product("int8", None, why="no kernel"), CARD.products[4])
    )
    assert choose(broken, VICUNA).quantize == "nf4"
    assert "int8 does not run: no kernel" in choose(broken, VICUNA).reasons
    assert choose(CARD, None).flags == "--precision float16 --quantize none"


def test_a_cpu_is_told_of_faster_products(here: Probe) -> None:
    slow = replace(here, products=(Product("float32", 1.0, 0.0), *here.products[1:2], Product("bfloat16", 3.0, 3e-3)))
    assert choose(slow, None).flags == "--precision float32 --quantize none"
    assert any("3.0 × as fast" in reason for reason in choose(slow, None).reasons)


def test_the_command_prints_its_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    main(["--seconds", "0.005", "--model", "vicuna-7b", "--json", str(tmp_path / "p.json")])
    out = capsys.readouterr().out
    for word in ("CPU", "matrix product", "bfloat16", "nf4", "attention", "flash", "take --precision float32"):
        assert word in out
    assert json.loads((tmp_path / "p.json").read_text())["choice"]["precision"] == "float32"
