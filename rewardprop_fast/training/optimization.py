"""The update: AdamW on the LoRA, its learning rate over time, and an average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rewardprop_fast.training.config import OptimizerConfig

_MOMENTS = ("exp_avg", "exp_avg_sq")
_STATE = ("step", *_MOMENTS)


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of update `step` (0-based) of `steps`: linear warm-up, then the schedule."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    if config.schedule == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    if config.schedule == "linear":
        return config.learning_rate * max(0.0, 1 - done)
    return config.learning_rate


class LoRAOptimizer:
    """AdamW (1711.05101) over named fp32 parameters, in place, with clipping and optional EMA.

    With `config.offload` moments and average are in host memory, and the update is done there: the
    gradients are copied to it and the parameters back, 8 bytes a parameter and step.

    Args:
        parameters: name -> parameter, in a stable order.
        steps: length of the run, which the schedule needs.
        offload: None for what the config says, which on a CPU changes nothing.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        config: OptimizerConfig,
        steps: int,
        offload: bool | None = None,
    ) -> None:
        self.parameters, self.config, self.steps = dict(parameters), config, steps
        if offload is None:
            offload = config.offload and any(not p.is_cpu for p in self.parameters.values())
        self._host = _on_host(self.parameters) if offload else None
        self._updated = self._host or self.parameters
        self.adamw = torch.optim.AdamW(
            self._updated.values(),
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
        )
        self.average: dict[str, Tensor] | None = None
        if config.ema_decay is not None:
            self.average = {k: p.detach().clone() for k, p in self._updated.items()}

    def gradient_norm(self) -> Tensor:
        """Norm of the gradient over all parameters, (); clips the gradient to max_grad_norm."""
        limit = self.config.max_grad_norm
        return torch.nn.utils.clip_grad_norm_(
            self.parameters.values(), math.inf if limit is None else limit
        )

    def clear(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def update(self, step: int) -> float:
        """Apply the gradients as update `step` (0-based) and clear them; returns the rate used."""
        rate = learning_rate(self.config, step, self.steps)
        for group in self.adamw.param_groups:
            group["lr"] = rate
        self._to_host()
        self.adamw.step()
        self._from_host()
        self.clear()
        if self.average is not None:
            # the usual ramp: early averages follow, later ones remember
            decay = min(self.config.ema_decay or 0.0, (1 + step) / (10 + step))
            for name, parameter in self._updated.items():
                self.average[name].lerp_(parameter.detach(), 1 - decay)
        return rate

    @torch.no_grad()
    def _to_host(self) -> None:
        """Values, too: somebody may have written to the parameters since."""
        for name, copy in (self._host or {}).items():
            parameter = self.parameters[name]
            copy.copy_(parameter)
            copy.grad = None if parameter.grad is None else parameter.grad.to("cpu")

    @torch.no_grad()
    def _from_host(self) -> None:
        for name, copy in (self._host or {}).items():
            self.parameters[name].copy_(copy)
            copy.grad = None

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the parameters hold their average (where one is kept); outside, themselves."""
        if self.average is None:
            yield
            return
        own = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._fill(self.average)
        try:
            yield
        finally:
            self._fill(own)

    @torch.no_grad()
    def _fill(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Tensor groups for a checkpoint: "optimizer", and "average" where one is kept."""
        moments = {
            f"{key}/{name}": self.adamw.state[p][key].detach().clone()
            for name, p in self._updated.items()
            for key in _STATE
            if p in self.adamw.state
        }
        groups = {"optimizer": moments}
        if self.average is not None:
            groups["average"] = {name: tensor.clone() for name, tensor in self.average.items()}
        return groups

    def held(self) -> list[Tensor]:
        """What it keeps of a parameter's size: the moments, and the average where one is kept."""
        moments = [state[key] for state in self.adamw.state.values() for key in _MOMENTS]
        return [*moments, *(self.average or {}).values()]

    def load(self, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take back what `state` gave. Raises KeyError where a parameter is missing."""
        moments = groups["optimizer"]
        self.adamw.state.clear()
        for name, p in self._updated.items() if moments else ():
            self.adamw.state[p] = {
                # torch keeps the step counter on the CPU whatever the parameter's device
                key: moments[f"{key}/{name}"].clone().to("cpu" if key == "step" else p.device)
                for key in _STATE
            }
        if self.average is not None:
            for name, tensor in groups["average"].items():
                self.average[name].copy_(tensor)


def _on_host(parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Copies of them, in memory that a GPU copies to and from directly."""
    copies = {}
    for name, parameter in parameters.items():
        memory = torch.empty_like(parameter, device="cpu", pin_memory=parameter.is_cuda)
        copies[name] = nn.Parameter(memory.copy_(parameter.detach()))
    return copies
