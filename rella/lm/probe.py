"""A look at this machine's card in under a minute: `python -m rella.lm.probe [--model NAME] [--json FILE]`.

Measures what decides how a base model should be loaded: the rate of matrix products by precision, error and speed of
quantised ones, and which attention kernels run. Ends with the flags to take, and why.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from rella.backbones import BACKBONES
from rella.lm.loading import DTYPES, best_device
from rella.plan import QUANTIZED
from rella.shapes import Shape, shape_of
from rella.stages import Precision, Quantize

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
COMFORTABLE = 0.85
"""Share of a card's memory that weights may take; the rest is for passes."""
LARGEST_ERROR = 0.05
"""Of a quantised layer's output, relative to its length, for it to be proposed without a warning."""


@dataclass(frozen=True)
class Product:
    """A layer's matrix product in one precision or quantisation."""

    name: str
    tflops: float | None
    """10^12 operations per second; None where it does not run here."""
    error: float | None = None
    """Length of the difference to the float32 product over that product's length."""
    why: str = ""
    """Why it does not run."""


@dataclass(frozen=True)
class Kernel:
    """An attention kernel."""

    name: str
    milliseconds: float | None
    why: str = ""


@dataclass(frozen=True)
class Choice:
    """What to load a base with."""

    precision: Precision
    quantize: Quantize
    reasons: tuple[str, ...]

    @property
    def flags(self) -> str:
        """As a job takes them."""
        return f"--precision {self.precision} --quantize {self.quantize}"


@dataclass(frozen=True)
class Probe:
    """What was found."""

    device: str
    memory_gib: float | None
    """None for a CPU."""
    native_bf16: bool
    products: tuple[Product, ...]
    attention: tuple[Kernel, ...]

    def product(self, name: str) -> Product:
        """Return one of the products."""
        return next(p for p in self.products if p.name == name)


def probe(device: torch.device, tokens: int, width: int, seconds: float = 0.5) -> Probe:
    """Look at a device.

    Args:
        device: a CPU or one GPU.
        tokens: rows of the products.
        width: of the layer: (tokens, width) × (width, 4 · width).
        seconds: for each measurement.
    """
    cuda = device.type == "cuda"
    torch.manual_seed(0)
    layer = nn.Linear(width, 4 * width, bias=False).requires_grad_(False)
    x = torch.randn(tokens, width)
    exact = x.to(device) @ layer.weight.to(device).t()
    products = [_plain(layer, x, exact, dtype, device, seconds) for dtype in ("float32", "float16", "bfloat16")]
    half: Precision = "float16" if cuda else "float32"
    products += [_quantized(layer, x, exact, kind, half, device, seconds) for kind in ("int8", "nf4")]
    kernels = [_kernel(name, device, half, min(tokens, 1024), seconds) for name in KERNELS]
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30 if cuda else None
    name = torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} threads"
    native = torch.cuda.get_device_capability(device) >= (8, 0) if cuda else False
    return Probe(name, memory, native, tuple(products), tuple(kernels))


def _time(work: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Return the seconds of the fastest call within about `seconds`."""
    best, until = float("inf"), time.perf_counter() + seconds
    work()
    while True:
        _wait(device)
        started = time.perf_counter()
        work()
        _wait(device)
        best = min(best, time.perf_counter() - started)
        if time.perf_counter() >= until:
            return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _measured(name: str, module: nn.Module, x: torch.Tensor, exact: torch.Tensor, seconds: float) -> Product:
    with torch.inference_mode():
        found = module(x).float()
        error = float((found - exact).norm() / exact.norm())
        took = _time(lambda: module(x), x.device, seconds)
    return Product(name, 2 * exact.numel() * x.shape[1] / took / 1e12, error)


def _plain(
    layer: nn.Linear, x: torch.Tensor, exact: torch.Tensor, dtype: Precision, device: torch.device, seconds: float
) -> Product:
    made = nn.Linear(layer.in_features, layer.out_features, bias=False)
    made.load_state_dict(layer.state_dict())
    try:
        return _measured(dtype, made.to(device, DTYPES[dtype]), x.to(device, DTYPES[dtype]), exact, seconds)
    except RuntimeError as error:
        return Product(dtype, None, why=str(error).splitlines()[0][:80])


def _quantized(
    layer: nn.Linear,
    x: torch.Tensor,
    exact: torch.Tensor,
    kind: Quantize,
    dtype: Precision,
    device: torch.device,
    seconds: float,
) -> Product:
    if importlib.util.find_spec("bitsandbytes") is None:
        return Product(kind, None, why="bitsandbytes is not installed")
    import bitsandbytes as bnb

    sizes = layer.in_features, layer.out_features
    made: nn.Module = (
        bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False, threshold=6.0)
        if kind == "int8"
        else bnb.nn.Linear4bit(
            *sizes, bias=False, quant_type="nf4", compute_dtype=DTYPES[dtype], compress_statistics=True
        )
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Of the bits of any product in 16 bits a quantised layer has the error of its weights on top.
            made.load_state_dict({"weight": layer.weight.to(torch.float16)})
            return _measured(kind, made.to(device), x.to(device, DTYPES[dtype]), exact, seconds)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return Product(kind, None, why=str(error).splitlines()[0][:80])


def _kernel(name: str, device: torch.device, dtype: Precision, length: int, seconds: float) -> Kernel:
    q = torch.randn(4, 8, length, 64, device=device, dtype=DTYPES[dtype])
    try:
        with warnings.catch_warnings(), sdpa_kernel(KERNELS[name]), torch.inference_mode():
            warnings.simplefilter("ignore")
            took = _time(lambda: scaled_dot_product_attention(q, q, q, is_causal=True), device, seconds)
    except RuntimeError as error:
        return Kernel(name, None, str(error).splitlines()[0][:80])
    return Kernel(name, 1000 * took)


def choose(found: Probe, shape: Shape | None) -> Choice:
    """Return what to load a base with here.

    Args:
        found: of this device.
        shape: of the base; without it memory has no say.
    """
    if found.memory_gib is None:
        return Choice("float32", "none", _on_cpu(found))
    precision: Precision = "bfloat16" if found.native_bf16 else "float16"
    reasons = [f"the card has {'' if found.native_bf16 else 'no '}bfloat16 of its own"]
    if shape is None:
        return Choice(precision, "none", tuple(reasons))
    rest = shape.parameters(True) - shape.matmul_parameters
    room = COMFORTABLE * found.memory_gib
    sizes: dict[Quantize, float] = {"none": 2.0 * shape.matmul_parameters, **{
        kind: QUANTIZED[kind] * shape.matmul_parameters for kind in ("int8", "nf4")
    }}  # fmt: skip
    for kind, size in sizes.items():
        gib = (size + 2 * rest) / 2**30
        if kind != "none" and found.product(kind).tflops is None:
            reasons.append(f"{kind} does not run: {found.product(kind).why}")
        elif gib > room:
            reasons.append(
                f"{kind}: {gib:.1f} GiB of weights are more than {COMFORTABLE:.0%} of {found.memory_gib:.1f}"
            )
        else:
            reasons.append(f"{kind}: {gib:.1f} GiB of weights fit")
            error = 0.0 if kind == "none" else found.product(kind).error or 0.0
            if error > LARGEST_ERROR:
                reasons.append(
                    f"a layer's output is off by {error:.1%} with it: look at validation before you trust it"
                )
            return Choice(precision, kind, tuple(reasons))
    reasons.append("nothing fits one card: --tune.zero-stage 3 shards the base while tuning")
    return Choice(precision, "none", tuple(reasons))


def _on_cpu(found: Probe) -> tuple[str, ...]:
    exact, half = found.product("float32").tflops, found.product("bfloat16").tflops
    reasons = ["a CPU has memory enough, and float32 rounds least"]
    if exact and half and half > 1.5 * exact:
        reasons.append(
            f"bfloat16 products are {half / exact:.1f} × as fast here: --precision bfloat16 where that matters"
        )
    return tuple(reasons)


def lines(found: Probe, choice: Choice) -> list[str]:
    """Return the table that is printed."""
    memory = "" if found.memory_gib is None else f", {found.memory_gib:.1f} GiB"
    out = [f"{found.device}{memory}", "", f"{'matrix product':<18}{'TFLOP/s':>9}{'error':>10}"]
    for p in found.products:
        speed = "-" if p.tflops is None else f"{p.tflops:.3g}"
        error = "-" if p.error is None else f"{p.error:.1e}"
        out.append(f"{p.name:<18}{speed:>9}{error:>10}  {p.why}".rstrip())
    out += ["", f"{'attention':<18}{'ms':>9}"]
    for k in found.attention:
        took = "-" if k.milliseconds is None else f"{k.milliseconds:.3g}"
        out.append(f"{k.name:<18}{took:>9}  {k.why}".rstrip())
    return [*out, "", f"take {choice.flags}", *(f"  {reason}" for reason in choice.reasons)]


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, look, print."""
    parser = argparse.ArgumentParser(prog="python -m rella.lm.probe", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--model", choices=sorted(BACKBONES), help="base whose weights have to fit, by its preset's name"
    )
    parser.add_argument("--seconds", type=float, default=0.5, help="for each measurement (default %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args(arguments)
    device = best_device()
    tokens, width = (8192, 5120) if device.type == "cuda" else (512, 512)
    found = probe(device, tokens, width, options.seconds)
    backbone = BACKBONES.get(options.model)
    choice = choose(found, None if backbone is None else shape_of(backbone.architecture, backbone.model_type))
    print("\n".join(lines(found, choice)))
    if options.json:
        options.json.write_text(json.dumps({**asdict(found), "choice": asdict(choice)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
