"""The main job in small: twelve steps of DRaFT-1 raise the reward and the one never trained on."""

from __future__ import annotations

import rewardprop_fast as rpf


def test_twelve_steps_raise_the_held_out_reward(tmp_path):
    config = rpf.TrainConfig(
        method=rpf.DRaFT(k=1),
        sampling=rpf.SamplingConfig(steps=10, guidance_scale=4.0),
        optimizer=rpf.OptimizerConfig(learning_rate=3e-3, weight_decay=0.0),
        output=rpf.OutputConfig(directory=str(tmp_path / "run"), images_every=0, grid_size=12),
        steps=12,
        batch_size=4,
        dtype="float32",
    )
    trainer = rpf.RewardPropTrainer(
        rpf.models.load_bundled(),
        rpf.rewards.build("style", style="fluent"),
        "bundled",
        config,
        heldout_reward=rpf.rewards.build("style", style="fluent", copy="heldout"),
        progress="silent",
    )
    summary = trainer.train().summary
    assert summary["reward_after"] > summary["reward_before"] + 0.3
    assert summary["heldout_after"] > summary["heldout_before"] + 0.3
