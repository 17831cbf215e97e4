"""One resumable training loop for every stage: AdamW, warm-up, constant rate, cool-down, EMA."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from rewardprop_fast.training import checkpoint

_ADAM = ("exp_avg", "exp_avg_sq", "step")


class Loop:
    """Trains `module` and keeps an exponential moving average of it.

    A checkpoint is written to `folder` about every two minutes and read back at the next start, so
    the stage may be killed at any moment. The loss function gets the step number and must draw its
    randomness from it.
    """

    def __init__(
        self,
        folder: Path,
        module: torch.nn.Module,
        *,
        steps: int,
        learning_rate: float,
        warmup: int = 100,
        cooldown: float = 0.3,
        ema: float = 0.999,
        weight_decay: float = 0.01,
    ) -> None:
        self.folder, self.module, self.steps = folder, module, steps
        self.learning_rate, self.warmup, self.cooldown, self.decay = (
            learning_rate,
            warmup,
            cooldown,
            ema,
        )
        self.names = [name for name, p in module.named_parameters() if p.requires_grad]
        self.params = [p for p in module.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in self.params if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in self.params if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.99), fused=True)
        self.ema = [p.detach().clone() for p in self.params]
        self.step, self.seconds = 0, 0.0
        if newest := checkpoint.latest(folder):
            self.load(newest)

    def rate(self) -> float:
        """Trapezoid: stopping early or going on longer only moves the cool-down."""
        left = (self.steps - self.step) / max(1, self.cooldown * self.steps)
        return self.learning_rate * max(0.0, min(1.0, (self.step + 1) / self.warmup, left))

    def run(self, loss_at: Callable[[int], dict[str, torch.Tensor]], log_every: int = 50) -> None:
        started, saved, sums, count = time.time(), time.time(), {}, 0
        while self.step < self.steps:
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate()
            terms = loss_at(self.step)
            terms["loss"].backward()
            norm = torch.nn.utils.clip_grad_norm_(self.params, 1.0)
            if not torch.isfinite(norm):
                raise RuntimeError(f"gradient is not finite at step {self.step}")
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            decay = min(self.decay, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(self.ema, [p.detach() for p in self.params], 1 - decay)
            for key, value in {**terms, "grad_norm": norm}.items():
                sums[key] = sums.get(key, 0.0) + float(value.detach())
            count += 1
            now = time.time()
            if self.step % log_every == 0 or self.step == self.steps:
                means = {key: round(value / count, 5) for key, value in sums.items()}
                sums, count = {}, 0
                elapsed = self.seconds + now - started
                print(
                    json.dumps({"step": self.step, **means, "seconds": round(elapsed)}), flush=True
                )
            if now - saved > 120 or self.step == self.steps:
                self.seconds, started, saved = self.seconds + now - started, now, now
                self.save()

    def save(self) -> None:
        state = self.optimizer.state
        tensors = {
            "model": {name: p.detach() for name, p in self.parameters()},
            "ema": dict(zip(self.names, self.ema, strict=True)),
            "buffers": dict(self.module.named_buffers()),
            **{key: {name: state[p][key] for name, p in self.parameters()} for key in _ADAM},
        }
        checkpoint.save(self.folder, self.step, tensors, {"seconds": self.seconds}, keep=1)

    def load(self, path: Path) -> None:
        found = checkpoint.load(path)
        for (name, p), average in zip(self.parameters(), self.ema, strict=True):
            p.data.copy_(found.tensors["model"][name])
            average.copy_(found.tensors["ema"][name])
            self.optimizer.state[p] = {key: found.tensors[key][name] for key in _ADAM}
        for name, buffer in self.module.named_buffers():
            buffer.copy_(found.tensors["buffers"][name])
        self.step, self.seconds = found.step, found.state["seconds"]

    def parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """What is trained, by name."""
        return zip(self.names, self.params, strict=True)

    def use_ema(self) -> None:
        """Put the averaged weights into the module, for export or evaluation."""
        with torch.no_grad():
            for p, average in zip(self.params, self.ema, strict=True):
                p.copy_(average)
