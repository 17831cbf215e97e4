"""DRaFT+: DRaFT-K that is held near the base model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rewardprop_fast.methods.draft import DRaFT


@dataclass(frozen=True)
class DRaFTPlus(DRaFT):
    """DRaFT-K with a KL penalty on its steps with gradients (2409.06493, section 3.2).

    With the same variance the KL divergence of one denoising step from the base model's is a
    multiple of the squared distance of their predictions, so the loss is

        -mean r + kl_coeff * mean ||eps_theta(x_t) - eps_base(x_t)||^2,

    the mean over images, steps with gradients and elements; eps is the guided prediction, and
    eps_base the same UNet's with the LoRA switched off, at the same x_t. At inference the paper
    goes from the base model to the tuned one along the chain: `rewardprop sample --aig`.

    Attributes:
        k: steps with gradients, the last K of the chain; null is all of them.
        kl_coeff: weight of the penalty. Every other method takes it as
            `train.regularisation.kl_coeff`.
    """

    name: ClassVar[str] = "draft_plus"

    k: int | None = 1
    kl_coeff: float = 0.1

    def validate(self, steps: int) -> list[str]:
        problems = super().validate(steps)
        if not self.kl_coeff > 0:
            problems.append(
                f"kl_coeff is {self.kl_coeff}; allowed: above 0. Without a penalty the method is "
                "draft."
            )
        return problems

    def kl_weight(self) -> float:
        return self.kl_coeff
