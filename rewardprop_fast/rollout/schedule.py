"""The DDIM schedule as tensors: what every step needs, computed once in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rewardprop_fast.errors import ModelError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class Schedule:
    """DDIM (2010.02502, equation 12) with T steps, in sampling order: index 0 is the noisiest.

    Every prediction type is the same linear update `x_prev = a x + b output + sigma noise`.

    Attributes:
        timesteps: (T,) int64, what the UNet is told.
        coefficients: (T, 3) of [a, b, sigma], float64 until `to` is asked for less.
        signal: (T,) sqrt(alpha_bar_t) at the input of each step; alpha of DRaFT-LV.
        noise: (T,) sqrt(1 - alpha_bar_t) at the input of each step; sigma of DRaFT-LV.
        eta: share of DDPM-like noise, 0 for the deterministic sampler.
        prediction: what the UNet's output is: "epsilon", "v_prediction" or "sample".
        whole: the timesteps of the schedule that this is the end of, or None where it is whole.
    """

    timesteps: Tensor
    coefficients: Tensor
    signal: Tensor
    noise: Tensor
    eta: float
    prediction: str = "epsilon"
    whole: Tensor | None = None

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def all_timesteps(self) -> Tensor:
        """(T,), those that `last` has left out included; ours are the last of them."""
        return self.timesteps if self.whole is None else self.whole

    def last(self, count: int) -> Schedule:
        """The last steps alone; what is computed for all of them beforehand still is."""
        return replace(
            self,
            timesteps=self.timesteps[-count:],
            coefficients=self.coefficients[-count:],
            signal=self.signal[-count:],
            noise=self.noise[-count:],
            whole=self.all_timesteps,
        )

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Schedule:
        """On another device, and with other floating point numbers if `dtype` is given."""
        return Schedule(
            self.timesteps.to(device),
            self.coefficients.to(device, dtype),
            self.signal.to(device, dtype),
            self.noise.to(device, dtype),
            self.eta,
            self.prediction,
            None if self.whole is None else self.whole.to(device),
        )

    def leap(self, start: int, stop: int) -> Tensor:
        """Row [a, b, 0] that leads from the input of step `start` straight to that of `stop`, (3,).

        Without noise of its own. `stop` = T is the clean image: the row gives the predicted x_0.
        """
        clean = stop == len(self)
        to_signal = torch.ones_like(self.signal[start]) if clean else self.signal[stop]
        to_noise = torch.zeros_like(self.noise[start]) if clean else self.noise[stop]
        a, b = _linear(self.signal[start], self.noise[start], to_signal, to_noise, self.prediction)
        return torch.stack([a, b, torch.zeros_like(a)]).to(self.coefficients.dtype)

    @classmethod
    def from_scheduler(cls, scheduler: Any, steps: int, eta: float = 0.0) -> Schedule:
        """The DDIM schedule with the noise levels of any diffusers scheduler of an SD pipeline.

        Args:
            scheduler: a diffusers scheduler; its betas, spacing, offset and prediction type count,
                its own update rule does not (SD checkpoints often come with PNDM or Euler).
            steps: T, number of UNet calls per image.
            eta: 0 is DDIM, 1 has the noise of DDPM.

        Raises:
            ModelError: the scheduler clips or thresholds x_0, predicts something unknown, or
                predicts epsilon where there is no signal.
        """
        # here, not above: reading a config imports this file and should not wait for diffusers
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler

        ddim = DDIMScheduler.from_config(scheduler.config)
        config = ddim.config
        if config.prediction_type not in PREDICTION_TYPES:
            raise ModelError(
                f"The scheduler predicts {config.prediction_type!r}; supported are "
                f"{', '.join(PREDICTION_TYPES)}."
            )
        clips = bool(config.clip_sample) and "clip_sample" in scheduler.config
        if clips or config.thresholding:
            raise ModelError(
                "The scheduler clips its prediction (clip_sample or thresholding), which latent "
                "diffusion does not use. Set both to false in scheduler_config.json."
            )
        if not 1 <= steps <= config.num_train_timesteps:
            raise ModelError(
                f"{steps} sampling steps asked for; the model knows 1 to "
                f"{config.num_train_timesteps}."
            )
        ddim.set_timesteps(steps)
        timesteps = ddim.timesteps.to("cpu", torch.int64)
        table = ddim.alphas_cumprod.double()
        alpha = table[timesteps]
        previous = timesteps - config.num_train_timesteps // steps
        final = torch.as_tensor(ddim.final_alpha_cumprod).double()
        alpha_previous = torch.where(previous >= 0, table[previous.clamp(min=0)], final)
        rows = _coefficients(alpha, alpha_previous, eta, config.prediction_type)
        if not torch.isfinite(rows).all():
            raise ModelError(
                "The scheduler starts from pure noise (rescale_betas_zero_snr), where a predicted "
                "epsilon says nothing about the image. Such models predict v: set prediction_type "
                "to v_prediction, or rescale_betas_zero_snr to false, in scheduler_config.json."
            )
        kind = str(config.prediction_type)
        return cls(timesteps, rows, alpha.sqrt(), (1 - alpha).sqrt(), float(eta), kind)


def _coefficients(alpha: Tensor, previous: Tensor, eta: float, prediction: str) -> Tensor:
    """Rows [a, b, sigma] from alpha_bar at a step's input and output, (T,) float64 each."""
    signal, noise = alpha.sqrt(), (1 - alpha).sqrt()
    sigma = eta * ((1 - previous) / (1 - alpha) * (1 - alpha / previous)).clamp(min=0).sqrt()
    direction = (1 - previous - sigma.square()).clamp(min=0).sqrt()
    a, b = _linear(signal, noise, previous.sqrt(), direction, prediction)
    return torch.stack([a, b, sigma], dim=1)


def _linear(
    signal: Tensor, noise: Tensor, to_x0: Tensor, direction: Tensor, prediction: str
) -> tuple[Tensor, Tensor]:
    """a and b of `a x + b output` = to_x0 * x0 + direction * eps, x0 and eps being linear in both.

    x = signal * x0 + noise * eps.
    """
    if prediction == "epsilon":
        return to_x0 / signal, direction - to_x0 * noise / signal
    if prediction == "v_prediction":
        return to_x0 * signal + direction * noise, direction * signal - to_x0 * noise
    return direction / noise, to_x0 - direction * signal / noise
