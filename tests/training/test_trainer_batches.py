"""Accumulation, and draws that know their sample and not their batch."""

from __future__ import annotations

import pytest
import torch

from rewardprop_fast.methods import AlignProp, DRaFT, DRaFTLV
from rewardprop_fast.training.config import OptimizerConfig
from rewardprop_fast.training.report import read_metrics

SMOOTH = OptimizerConfig(max_grad_norm=None, epsilon=1.0, learning_rate=0.1)  # no sign-like update


@pytest.mark.parametrize("method", [DRaFT(k=1), DRaFTLV(n=2), AlignProp()], ids=str)
def test_two_batches_of_two_are_one_of_four(method, make_trainer, tmp_path):
    outcomes = []
    for batch, times in ((4, 1), (2, 2), (1, 4)):
        trainer = make_trainer(
            method=method,
            directory=tmp_path / f"{batch}x{times}",
            batch_size=batch,
            accumulation_steps=times,
            sampling={"eta": 0.5},
            optimizer=SMOOTH,
            steps=2,
            dtype="float64",
            trained=True,
        )
        before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
        result = trainer.train(until=1)
        (row,) = read_metrics(result.directory)
        change = torch.cat(
            [(p.detach() - before[name]).flatten() for name, p in trainer.parameters.items()]
        )
        outcomes.append((row, change))
    first, change = outcomes[0]
    for row, other in outcomes[1:]:
        for key in ("loss", "reward_mean", "reward_std", "grad_norm", "k"):
            assert row[key] == pytest.approx(first[key], rel=1e-6), key
        assert float((other - change).norm() / change.norm()) < 1e-9
    assert change.norm() > 1e-4


@pytest.mark.parametrize("method", [DRaFT(k=1), DRaFTLV(n=1)], ids=str)
def test_a_sample_is_the_same_in_every_batch(method, make_trainer):
    trainer = make_trainer(method=method, dtype="float64", sampling={"eta": 0.5}, trained=True)
    texts = ["a red apple", "a dog", "a boat"]
    together = trainer.training_step(texts, seed=4)
    alone = trainer.training_step(texts[:1], seed=4)
    copies = len(alone.images)
    torch.testing.assert_close(together.images[:: len(texts)], alone.images, rtol=0, atol=1e-12)
    assert copies == 1 + getattr(method, "n", 0)
    other = trainer.training_step(texts[:1], seed=5)
    assert (other.images - alone.images).abs().max() > 1e-3
    trainer.step = 1
    later = trainer.training_step(texts[:1], seed=4)
    assert (later.images - alone.images).abs().max() > 1e-3


def test_seed_and_latents_default_to_the_runs(make_trainer):
    trainer = make_trainer(seed=21, dtype="float64", trained=True)
    own = trainer.training_step(["a dog"])
    assert torch.equal(own.images, trainer.training_step(["a dog"], seed=21).images)
    given = trainer.training_step(["a dog"], torch.zeros(1, 4, 8, 8))
    assert (given.images - own.images).abs().max() > 1e-3


def test_lv_decodes_and_scores_once(make_trainer, reward, monkeypatch):
    calls: dict[str, list[int]] = {"reward": [], "decode": [], "unet": [], "unet, no_grad": []}

    def counted(images, prompts, metadata):
        calls["reward"].append(len(images))
        assert len(prompts) == len(metadata) == len(images)
        return reward(images, prompts, metadata)

    trainer = make_trainer(method=DRaFTLV(n=2), sampling={"steps": 3}, reward=counted)
    calls["reward"].clear()  # the probe before training
    vae, unet = trainer.pipe.vae, trainer.pipe.unet
    decode, forward = vae.decode, unet.forward
    monkeypatch.setattr(
        vae, "decode", lambda z, **k: calls["decode"].append(len(z)) or decode(z, **k)
    )

    def predict(x, *args, **kwargs):
        calls["unet" if torch.is_grad_enabled() else "unet, no_grad"].append(len(x))
        return forward(x, *args, **kwargs)

    monkeypatch.setattr(unet, "forward", predict)
    result = trainer.training_step(["a dog", "a boat"], metadata=[{"wave": 1.0}, {}])
    # 1 + 2 endpoints of 2 images; guidance doubles what the UNet sees
    assert calls == {"reward": [6], "decode": [6], "unet": [12], "unet, no_grad": [4, 4, 4]}
    assert result.prompts == ["a dog", "a boat"] * 3
    assert result.metadata == [{"wave": 1.0}, {}] * 3
    assert result.images.shape == (6, 3, 16, 16)
    assert result.latents.shape == (6, 4, 8, 8)
    assert result.rewards.shape == (6,)
    assert set(result.seconds) == {
        *("prefix", "suffix", "decode", "reward", "decode_backward", "backward")
    }
    assert not result.images.requires_grad


def test_gradients_left_by_training_step_are_no_part_of_the_run(make_trainer):
    outcomes = []
    for meddle in (False, True):
        trainer = make_trainer(trained=True, optimizer=SMOOTH)
        if meddle:
            trainer.training_step(["a boat"], seed=9)
            assert any(p.grad is not None for p in trainer.parameters.values())
        outcomes.append(trainer.update()["grad_norm"])
    assert outcomes[0] == outcomes[1] > 0


def test_a_sample_at_half_strength_does_not_weaken_training(make_trainer):
    trainer = make_trainer(trained=True)
    before = trainer.training_step(["a boat"], seed=9).images
    trainer.sample(["a boat"], strength=0.5)
    assert torch.equal(trainer.training_step(["a boat"], seed=9).images, before)


def test_diversity_is_that_of_different_images(make_trainer, monkeypatch):
    """DRaFT-LV's copies of one image are alike by construction and would hide a collapse."""
    trainer = make_trainer(method=DRaFTLV(n=2), trained=True)
    seen = []
    step = trainer.engine.step

    def spy(*arguments):
        seen.append(step(*arguments))
        return seen[-1]

    monkeypatch.setattr(trainer.engine, "step", spy)
    row = trainer.update()
    first, second = seen[0].images[:2]  # the batch; its copies follow
    assert len(seen[0].images) == 6
    assert row["diversity"] == pytest.approx(float((first - second).square().mean().sqrt()))
