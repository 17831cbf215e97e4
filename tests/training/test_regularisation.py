"""Distance to the base model, pretraining loss, early stopping."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from rewardprop_fast import lora, randomness
from rewardprop_fast.errors import ConfigError
from rewardprop_fast.methods import DRaFT, DRaFTPlus
from rewardprop_fast.models.decode import decode, encode_images
from rewardprop_fast.randomness import Stream
from rewardprop_fast.rewards import ColourReward
from rewardprop_fast.training.config import (
    EarlyStoppingConfig,
    LoRAConfig,
    OptimizerConfig,
    RegularisationConfig,
)
from rewardprop_fast.training.report import read_metrics

TEXTS = ["a red apple", "a dog on the beach"]


def gradients(trainer: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in trainer.parameters.items()}


def test_any_method_may_be_held_near_the_base_model(make_trainer):
    plus = make_trainer(method=DRaFTPlus(k=1, kl_coeff=0.3), trained=True)
    held = make_trainer(
        method=DRaFT(k=1), regularisation=RegularisationConfig(kl_coeff=0.3), trained=True
    )
    free = make_trainer(method=DRaFT(k=1), trained=True)
    kl = [t.training_step(TEXTS).penalties.get("kl") for t in (plus, held, free)]
    assert kl[0] == kl[1] > 0
    assert kl[2] is None
    for name, gradient in gradients(plus).items():
        assert torch.equal(gradient, held.parameters[name].grad)
    assert any((g != free.parameters[n].grad).any() for n, g in gradients(plus).items())
    # at the start the model is the base model, and nothing holds it
    fresh = make_trainer(method=DRaFTPlus(k=1, kl_coeff=0.3))
    assert fresh.training_step(TEXTS).penalties["kl"] == 0


@pytest.mark.parametrize("kind", ["sd", "sd-v", "sdxl"])
def test_the_pretraining_loss_is_that_of_a_naive_loop(kind, make_trainer):
    settings = RegularisationConfig(pretraining_coeff=0.7, pretraining_samples=3)
    both = make_trainer(
        kind, method=DRaFT(k=1), dtype="float64", trained=True, regularisation=settings
    )
    alone = make_trainer(kind, method=DRaFT(k=1), dtype="float64", trained=True)
    result = both.training_step(TEXTS, seed=5)
    alone.training_step(TEXTS, seed=5)
    engine, unet = both.engine, both.pipe.unet
    known = engine.pretraining.latents
    assert len(known) == 3
    # they are samples of the base model
    with lora.disabled(unet), torch.no_grad():
        draws = randomness.Draws(0, 0, (0, 1))
        x_t = randomness.latents(0, 0, (0, 1), engine.latent_shape, stream=Stream.PRETRAINING)
        sampler = engine.sampler(engine.pretraining.texts[:2], draws)
        torch.testing.assert_close(known[:2], sampler.run(x_t.double(), 0, 2, gradients=False))

    table = both.pipe.scheduler.alphas_cumprod.double()
    loss = torch.zeros((), dtype=torch.float64)
    for sample in (0, 1):
        source = randomness.generator(5, Stream.PRETRAINING, 0, sample)
        index = int(torch.randint(3, (), generator=source))
        t = int(torch.randint(1000, (), generator=source))
        eps = torch.randn(engine.latent_shape, generator=source).double()[None]
        alpha, x_0 = table[t], known[index][None]
        noisy = alpha.sqrt() * x_0 + (1 - alpha).sqrt() * eps
        wanted = eps
        if kind == "sd-v":
            wanted = alpha.sqrt() * eps - (1 - alpha).sqrt() * x_0
        said = engine.encoder([engine.pretraining.texts[index]])
        rest = {"added_cond_kwargs": said.positive_added} if said.positive_added else {}
        output = unet(noisy, t, encoder_hidden_states=said.positive, **rest).sample
        loss = loss + (output - wanted).square().mean() / 2
    torch.testing.assert_close(result.penalties["pretraining_loss"], loss.detach())
    names, parameters = zip(*both.parameters.items(), strict=True)
    for name, gradient in zip(names, torch.autograd.grad(loss, parameters), strict=True):
        added = both.parameters[name].grad - alone.parameters[name].grad
        torch.testing.assert_close(added, 0.7 * gradient, rtol=1e-7, atol=1e-12)


def test_pictures_of_a_folder_with_captions(make_trainer, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, colour in (("b", (200, 30, 40)), ("a", (10, 90, 250))):
        Image.new("RGB", (40, 20), colour).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a plain {name}\n")
    settings = RegularisationConfig(pretraining_coeff=1.0, pretraining_images=str(folder))
    trainer = make_trainer(regularisation=settings)
    known = trainer.engine.pretraining
    assert known.texts == ["a plain a", "a plain b"]
    assert known.latents.shape == (2, *trainer.engine.latent_shape)
    vae = trainer.pipe.vae
    blue = torch.tensor([10, 90, 250]).view(1, 3, 1, 1) / 255
    picture = blue.expand(1, 3, trainer.engine.height, trainer.engine.width)
    with torch.no_grad():
        wanted = vae.encode(2 * picture - 1).latent_dist.mean * vae.config.scaling_factor
        torch.testing.assert_close(known.latents[:1], wanted, rtol=1e-4, atol=1e-4)
        assert torch.equal(decode(vae, encode_images(vae, picture)), decode(vae, wanted))
    (folder / "a.txt").unlink()
    with pytest.raises(ConfigError, match=r"a\.png has no a\.txt"):
        make_trainer(regularisation=settings)
    settings = RegularisationConfig(pretraining_coeff=1.0, pretraining_images=str(tmp_path / "no"))
    with pytest.raises(ConfigError, match="which is no folder"):
        make_trainer(regularisation=settings)


RUN: dict[str, Any] = {
    "method": DRaFT(k=1),
    "lora": LoRAConfig(rank=2),
    "optimizer": OptimizerConfig(learning_rate=0.02),
    "output": {"checkpoint_every": 1, "images_every": 0},
    "steps": 5,
}


class Falling:
    """A held-out reward that is told what to say of the evaluation images, call by call."""

    name = "falling"

    def __init__(self, *values: float) -> None:
        self.values = list(values)

    def __call__(self, images: Tensor, prompts: Any, metadata: Any) -> Tensor:
        # a training step's own images are two, and so are those of the evaluation: told by turns
        return images.mean((1, 2, 3)) * 0 + self.values.pop(0)


def test_a_run_stops_where_the_held_out_reward_falls(make_trainer, tmp_path):
    # tried, base, then step, look, step, look, step, look, after
    heldout = Falling(0, 1.0, 0, 1.5, 0, 1.4, 0, 1.2, 1.2)
    trainer = make_trainer(
        reward=ColourReward(),
        trainer={"heldout_reward": heldout},
        early_stopping=EarlyStoppingConfig(every=1, heldout_fall=0.2),
        **RUN,
    )
    result = trainer.train()
    assert (result.step, result.exit_code, heldout.values) == (3, 0, [])
    assert "fell to 1.2, more than 0.2 below its best, 1.5" in result.summary["stopped_early"]
    stored = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert stored["stopped_early"] == result.summary["stopped_early"]


def test_the_best_is_remembered_by_a_checkpoint(make_trainer):
    stopping = EarlyStoppingConfig(every=1, heldout_fall=0.2)
    first = make_trainer(
        reward=ColourReward(),
        trainer={"heldout_reward": Falling(0, 1.0, 0, 1.5, 0, 1.4)},
        early_stopping=stopping,
        **RUN,
    )
    assert first.train(until=2).step == 2
    second = make_trainer(
        reward=ColourReward(),
        trainer={"heldout_reward": Falling(0, 1.0, 0, 1.2, 1.2)},
        early_stopping=stopping,
        **RUN,
    )
    second.resume()
    result = second.train()
    assert result.step == 3
    assert "below its best, 1.5" in result.summary["stopped_early"]


def test_a_run_stops_where_images_become_alike(make_trainer, monkeypatch, tmp_path):
    from rewardprop_fast.training import early_stopping

    seen = iter([0.5, 0.4, 0.3, 0.2])
    monkeypatch.setattr(early_stopping, "diversity", lambda images: next(seen))
    trainer = make_trainer(
        early_stopping=EarlyStoppingConfig(every=1, diversity_share=0.7),
        **RUN,
    )
    result = trainer.train()
    assert result.step == 2
    assert "fell to 0.3, below 0.7 of the base model's 0.5" in result.summary["stopped_early"]
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2]


def test_a_held_out_reward_must_be_there_to_fall(make_trainer):
    with pytest.raises(ConfigError, match="there is no held-out reward to look at"):
        make_trainer(early_stopping=EarlyStoppingConfig(heldout_fall=0.1))


def test_what_is_regularised_is_in_the_metrics(make_trainer, tmp_path):
    settings = RegularisationConfig(kl_coeff=0.1, pretraining_coeff=0.1, pretraining_samples=1)
    trainer = make_trainer(regularisation=settings, **{**RUN, "steps": 2})
    trainer.train()
    rows = read_metrics(Path(tmp_path / "run"))
    assert rows[0]["kl"] == 0 < rows[1]["kl"]
    assert all(row["pretraining_loss"] > 0 for row in rows)
