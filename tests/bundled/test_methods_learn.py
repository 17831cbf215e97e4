"""A short run with each method raises its own reward on the bundled model, at fixed noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import rewardprop_fast as rpf
from rewardprop_fast.methods import METHODS, Method
from rewardprop_fast.training.config import (
    EarlyStoppingConfig,
    OptimizerConfig,
    OutputConfig,
    SamplingConfig,
    TrainConfig,
)

PROMPTS = ["a fox on a peach background", "a bus on a pale blue background"]

#: Of four updates on two images each.
SETTINGS: dict[str, dict[str, Any]] = {
    "draft": {"k": 2},
    "draft_plus": {"k": 1, "kl_coeff": 0.01},
    "refl": {"last": 0.5},
    "drtune": {"k": 2},
}
GRADIENT_METHODS = [name for name, method in METHODS.items() if method.needs_reward_gradient]


def make(
    method: Method,
    tmp_path: Any,
    sampling: dict[str, Any],
    reward: str = "brightness",
    **more: Any,
) -> rpf.RewardPropTrainer:
    chosen = SamplingConfig(guidance_scale=1.0, height=32, width=32, **sampling)
    config = TrainConfig(
        method=method,
        sampling=chosen,
        output=OutputConfig(
            directory=str(tmp_path / "run"), images_every=0, grid_size=8, tensorboard=False
        ),
        dtype="float32",
        device="cpu",
        **more,
    )
    return rpf.RewardPropTrainer(
        rpf.models.load_bundled(), rpf.rewards.build(reward), PROMPTS, config, progress="silent"
    )


@pytest.mark.parametrize("name", GRADIENT_METHODS)
def test_a_short_run_raises_the_reward(name, tmp_path):
    trainer = make(
        METHODS[name](**SETTINGS.get(name, {})),
        tmp_path,
        {"steps": 4},
        optimizer=OptimizerConfig(learning_rate=1e-2, weight_decay=0.0),
        batch_size=2,
        steps=4,
    )
    before = trainer.evaluate(base=True)
    for _ in range(4):
        trainer.update()
    after = trainer.evaluate()
    assert after.prompts == before.prompts
    gain = after.rewards - before.rewards
    # of each picture, and together more than any rounding
    assert (gain > 0).sum() >= 7
    assert gain.mean() > 0.005


def test_srpo_raises_the_difference_that_its_words_make(tmp_path):
    method = METHODS["srpo"](positive="a fluent style", negative="a noto style")
    trainer = make(
        method,
        tmp_path,
        {"steps": 4},
        reward="alignment",
        optimizer=OptimizerConfig(learning_rate=1e-2, weight_decay=0.0),
        batch_size=2,
        steps=4,
    )

    @torch.no_grad()
    def difference(*, base: bool = False) -> torch.Tensor:
        seen = trainer.evaluate(base=base)
        return method.score(trainer.reward, seen.images, seen.prompts, [{} for _ in seen.prompts])

    before = difference(base=True)
    for _ in range(4):
        trainer.update()
    gain = difference() - before
    assert (gain > 0).sum() >= 7
    assert gain.mean() > 0.02


@pytest.mark.parametrize("target", [1.0, 0.0])
def test_ddpo_raises_the_reward_with_hundreds_of_samples(target, tmp_path):
    """Three updates of 256 small images; towards white as towards black, so that no drift helps."""
    config = TrainConfig(
        method=METHODS["ddpo"](clip_range=0.1, history=1024),
        sampling=SamplingConfig(steps=5, guidance_scale=1.0, eta=1.0, height=16, width=16),
        optimizer=OptimizerConfig(learning_rate=1e-3, weight_decay=0.0),
        output=OutputConfig(directory=str(tmp_path / "run"), grid_size=64, tensorboard=False),
        batch_size=128,
        accumulation_steps=2,
        steps=3,
        dtype="float32",
        device="cpu",
    )
    reward = rpf.rewards.build("brightness", target=target)
    trainer = rpf.RewardPropTrainer(
        rpf.models.load_bundled(), reward, PROMPTS[:1], config, progress="silent"
    )
    before = trainer.evaluate(base=True)
    for _ in range(3):
        trainer.update()
    gain = (trainer.evaluate().rewards - before.rewards).mean()
    assert gain > 0.003


def test_a_run_that_collapses_is_stopped_by_its_pictures(tmp_path):
    """A rate far too high makes every picture white: the reward is delighted, the gauge is not."""
    trainer = make(
        METHODS["draft"](**SETTINGS["draft"]),
        tmp_path,
        {"steps": 3},
        optimizer=OptimizerConfig(learning_rate=0.03, weight_decay=0.0, max_grad_norm=1.0),
        early_stopping=EarlyStoppingConfig(every=2, diversity_share=0.5),
        batch_size=2,
        steps=30,
    )
    result = trainer.train()
    summary = result.summary
    assert result.step < 30
    assert "the images' diversity fell to" in summary["stopped_early"]
    assert summary["diversity_after"] < 0.5 * summary["diversity_before"]
    assert summary["reward_after"] > summary["reward_before"]  # which alone would not have told
