"""DeepSpeed ZeRO behind a few calls: its settings, and its state gathered whole, to go on with any number of workers.

What DeepSpeed saves by itself fits only the number of workers that saved it. LoRA's state is a few million numbers, so
it is gathered here: float32 weights, Adam's moments and step, and the loss scale of float16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from rella.config import TuneConfig
from rella.lm.sharing import whole
from rella.stages import Precision

Tensors = dict[str, torch.Tensor]
"""Parameter name → whole tensor on the CPU."""

MOMENTS = ("exp_avg", "exp_avg_sq")
_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""The fields of DeepSpeed's dynamic loss scale that change while it trains."""


@dataclass
class OptimiserState:
    """All that an optimiser step leaves behind, whole and on the CPU: it fits any number of workers and any stage."""

    weights: Tensors
    """float32 master weights of the trained parameters."""
    moments: dict[str, Tensors]
    """`exp_avg` and `exp_avg_sq` of AdamW, float32, by parameter."""
    steps: int
    """AdamW's own count; steps that float16 skipped for an overflow are not in it."""
    scale: dict[str, float] = field(default_factory=dict)
    """The loss scale's fields; empty but for float16."""


def deepspeed_config(
    config: TuneConfig, precision: Precision, trained: int, settings: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return DeepSpeed's settings for a run.

    Args:
        config: stage, clipping.
        precision: of the base.
        trained: number of trained parameters; the buffers that gradients pass through are as large, not gigabytes.
        settings: more, from `rella.lm.zero_settings`; nothing in them contradicts the rest.
    """
    ours: dict[str, Any] = {
        # Passes are counted by us: their number changes from step to step with the rows' lengths.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.clip,
        "zero_optimization": {"stage": config.zero_stage, "reduce_bucket_size": max(trained, 1)},
        # torch's AdamW on a few million LoRA weights: nothing to compile, and nothing to gain from a fused one.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "fp16": {"enabled": precision == "float16", "initial_scale_power": 14},
        "bf16": {"enabled": precision == "bfloat16"},
        "steps_per_print": 10**9,
        # It makes the host wait for the card twice in every pass.
        "timers": {"throughput": {"enabled": False}},
    }
    return _merged(ours, settings or {})


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    both = {k: _merged(v, above[k]) for k, v in below.items() if isinstance(v, Mapping) and k in above}
    return {**below, **above, **both}


class Engine:
    """A module and AdamW on its trainable parameters under DeepSpeed; every worker makes the same calls.

    Args:
        root: the module whose `forward` is trained; frozen but for LoRA.
        config: stage, clipping, weight decay.
        precision: arithmetic of the base.
        state: where to go on; the parameters then start from its weights.
        settings: more of DeepSpeed's, from `rella.lm.zero_settings`.
    """

    def __init__(
        self,
        root: nn.Module,
        config: TuneConfig,
        precision: Precision,
        state: OptimiserState | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        import deepspeed

        self.trained = {n: p for n, p in root.named_parameters() if p.requires_grad}
        if state is not None:
            with torch.no_grad():
                for name, parameter in self.trained.items():
                    parameter.copy_(state.weights[name])
        parameters = list(self.trained.values())
        count = sum(p.numel() for p in parameters)
        optimiser = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
        self.engine, self.optimiser, *_ = deepspeed.initialize(
            model=root,
            model_parameters=parameters,
            optimizer=optimiser,
            config=deepspeed_config(config, precision, count, settings),
        )
        self.device: torch.device = self.engine.device
        if state is not None:
            self._restore(state)

    @property
    def root(self) -> nn.Module:
        """The module; calling it outside a step needs `torch.no_grad()` and, in stage 3, all workers together."""
        module: nn.Module = self.engine.module
        return module

    @property
    def loss_scale(self) -> float:
        """What float16 losses are multiplied with; 1 otherwise."""
        return float(getattr(getattr(self.optimiser, "loss_scaler", None), "cur_scale", 1.0))

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add the gradients of a pass's loss to the step's; after its `last` pass take the step."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)
        self.engine.step()

    def set_rate(self, rate: float) -> None:
        """Set the learning rate of the next step."""
        for group in self.optimiser.param_groups:
            group["lr"] = rate

    def weights(self) -> Tensors:
        """Return the trained parameters as the model computes with them, whole, on the CPU."""
        with whole(self.trained.values()):
            return {n: p.detach().to("cpu", copy=True) for n, p in self.trained.items()}

    def state(self) -> OptimiserState:
        """Return the state after the last step; every worker takes part and gets all of it."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        whole = {n: safe_get_full_fp32_param(p).to("cpu", copy=True) for n, p in self.trained.items()}
        moments = {
            key: {n: safe_get_full_optimizer_state(p, key).to("cpu", copy=True) for n, p in self.trained.items()}
            for key in MOMENTS
        }
        steps = int(self._inner().state[self._partitions()[0]]["step"])
        return OptimiserState(whole, moments, steps, self._scale())

    def destroy(self) -> None:
        """Take DeepSpeed's hooks off the module; in stage 3 its parameters stay sharded."""
        self.engine.destroy()

    def _restore(self, state: OptimiserState) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        for flat in self._partitions():
            # AdamW makes its moments in its first step; that step is behind us.
            moments = {key: torch.zeros_like(flat) for key in MOMENTS}
            self._inner().state[flat] = {"step": torch.tensor(float(state.steps)), **moments}
        if hasattr(self.optimiser, "_lazy_init_hp_params_optimizer_state"):
            self.optimiser._lazy_init_hp_params_optimizer_state()
        for name, parameter in self.trained.items():
            # The parameters themselves were rounded from these weights; the masters must not be.
            safe_set_full_fp32_param(parameter, state.weights[name].to(self.device))
            for key in MOMENTS:
                safe_set_full_optimizer_state(parameter, state.moments[key][name].to(self.device), key)
        self._restore_scale(state.scale)

    def _scale(self) -> dict[str, float]:
        scaler = getattr(self.optimiser, "loss_scaler", None)
        dynamic = getattr(scaler, "dynamic", False)
        return {name: float(getattr(scaler, name)) for name in _SCALE} if dynamic else {}

    def _restore_scale(self, scale: Mapping[str, float]) -> None:
        scaler = getattr(self.optimiser, "loss_scaler", None)
        for name, value in scale.items():
            setattr(scaler, name, type(getattr(scaler, name))(value))

    def _inner(self) -> torch.optim.Optimizer:
        """The AdamW that DeepSpeed steps, on this worker's share of the float32 weights."""
        inner: torch.optim.Optimizer = self.optimiser.optimizer
        return inner

    def _partitions(self) -> list[torch.Tensor]:
        """The flat float32 tensors whose state the inner optimiser holds."""
        stage_3: list[torch.Tensor] | None = getattr(self.optimiser, "fp32_partitioned_groups_flat", None)
        return stage_3 or [p for group in self._inner().param_groups for p in group["params"]]
