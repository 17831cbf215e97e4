"""The functional core inside a loop of your own: `training_step` gives gradients, you update.

python examples/own_loop.py
"""

from __future__ import annotations

import torch

import rewardprop_fast as rpf


def main(steps: int = 12) -> tuple[float, float]:
    trainer = rpf.RewardPropTrainer(
        rpf.models.load_bundled(),
        rpf.rewards.build("jpeg_compressibility", quality=50),
        config=rpf.TrainConfig(
            method=rpf.DRaFTLV(n=2), sampling=rpf.SamplingConfig(steps=20, guidance_scale=5.0)
        ),
    )
    prompts = ["a penguin on a teal background", "a fox on a white background"]
    optimizer = torch.optim.AdamW(trainer.parameters.values(), lr=4e-3)

    def reward(seed: int) -> float:
        """Forward and backward; the gradients wait in `.grad`."""
        return float(trainer.training_step(prompts, seed=seed).rewards.mean())

    before = reward(seed=0)  # noise that training does not see
    optimizer.zero_grad()
    for step in range(1, steps + 1):
        print(f"step {step}: reward {reward(seed=step):.3f}")
        optimizer.step()
        optimizer.zero_grad()
    after = reward(seed=0)
    print(f"from the same noise: reward {before:.3f} before, {after:.3f} after")
    return before, after


if __name__ == "__main__":
    main()
