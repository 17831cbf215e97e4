"""DDPO: its gradient against torch.distributions, advantages, epochs, any reward, resuming."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.distributions import Normal

from rewardprop_fast.errors import ConfigError, RewardError
from rewardprop_fast.methods import DDPO, DRaFT
from rewardprop_fast.randomness import Draws
from rewardprop_fast.training import checkpoint
from rewardprop_fast.training.config import LoRAConfig, OptimizerConfig
from rewardprop_fast.training.policy_gradient import RewardHistory
from rewardprop_fast.training.report import read_metrics
from tests.training.conftest import fill
from tests.training.test_gradients import (
    FACTS,
    TEXTS,
    Naive,
    library_gradients,
    relative,
    weights_of,
)


def png_size(images: Tensor, prompts: list[str], metadata: list[Any]) -> Tensor:
    """Bytes of real files: nothing to differentiate."""
    sizes = []
    for image in (images * 255).byte().permute(0, 2, 3, 1).cpu().numpy():
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        sizes.append(len(buffer.getvalue()) / 1000)
    return torch.tensor(sizes)


@pytest.mark.parametrize(
    ("kind", "guidance", "eta"), [("sd", 5, 1.0), ("sd-v", 1, 0.5), ("sdxl", 5, 1.0)]
)
def test_the_gradient_is_that_of_log_probabilities(kind, guidance, eta, pipeline, make_trainer):
    steps, advantages = 3, torch.tensor([1.5, -0.5], dtype=torch.float64)
    trainer = make_trainer(
        kind,
        method=DDPO(clip_range=2e-3),
        sampling={"steps": steps, "guidance_scale": guidance, "eta": eta},
        dtype="float64",
        trained=True,
    )
    naive = Naive(pipeline(kind), weights_of(trainer), torch.float64)
    draws, engine = Draws(1, 0, (0, 1)), trainer.engine
    latents = torch.randn(2, *engine.latent_shape, dtype=torch.float64)
    sampled = trainer.policy.sample(TEXTS, FACTS, latents, draws)

    scheduler = naive.scheduler(steps)
    conditions = naive.conditions(TEXTS, guidance > 1, None, engine.height, engine.width)
    noise = draws.step_noise(steps, engine.latent_shape).double()
    common = {"scheduler": scheduler, "guidance": guidance, "eta": eta}

    def density(i: int, x: Tensor) -> Normal:
        still = torch.zeros_like(noise)
        mean = naive.chain(x, conditions, steps=range(i, i + 1), noise=still, **common)
        t = scheduler.timesteps[i]
        variance = scheduler._get_variance(t, t - scheduler.config.num_train_timesteps // steps)
        return Normal(mean, eta * variance.sqrt())

    with torch.no_grad():
        states = [latents]
        for i in range(steps):
            here = {"steps": range(i, i + 1), "noise": noise}
            states.append(naive.chain(states[-1], conditions, **here, **common))
        then = [density(i, states[i]).log_prob(states[i + 1]).mean((1, 2, 3)) for i in range(steps)]
    torch.testing.assert_close(sampled.trajectory, torch.stack(states), rtol=0, atol=1e-10)

    # under other weights than those that drew, where some ratios are clipped and some are not
    for parameters in (trainer.parameters, naive.parameters):
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.mul_(1.01)
    done = trainer.policy.backward(sampled, advantages)
    ratios, total = [], torch.zeros((), dtype=torch.float64)
    for i in range(steps):
        now = density(i, states[i]).log_prob(states[i + 1]).mean((1, 2, 3))
        ratio = (now - then[i]).exp()
        ratios.append(ratio.detach())
        gain = torch.minimum(advantages * ratio, advantages * ratio.clamp(1 - 2e-3, 1 + 2e-3))
        total = total - gain.mean() / steps
    total.backward()
    torch.testing.assert_close(done.result.loss, total.detach(), rtol=1e-9, atol=1e-12)
    assert relative(library_gradients(trainer), naive.gradients())[0] < 1e-7
    outside = (torch.stack(ratios) - 1).abs() > 2e-3
    assert float(done.clipped) == pytest.approx(float(outside.double().mean()))
    assert 0 < outside.double().mean() < 1


def test_at_the_weights_that_drew_every_ratio_is_one(make_trainer):
    trainer = make_trainer(method=DDPO(), sampling={"steps": 3, "eta": 1.0}, trained=True)
    sampled = trainer.policy.sample(TEXTS, FACTS, torch.randn(2, 4, 8, 8), Draws(0, 0, (0, 1)))
    done = trainer.policy.backward(sampled, torch.tensor([1.0, -1.0]))
    assert done.clipped == 0
    assert abs(float(done.result.loss)) < 1e-5
    assert sum(float(g.norm()) for g in library_gradients(trainer).values()) > 0


def test_advantages_are_a_prompts_own_once_it_has_enough():
    history = RewardHistory(DDPO(history=4, least_history=3, advantage_clip=1.3))
    first = history.advantages(["a", "a", "b"], torch.tensor([1.0, 2.0, 6.0]))
    whole = torch.tensor([1.0, 2.0, 6.0])
    wanted = (whole - whole.mean()) / whole.std(correction=0)
    torch.testing.assert_close(first, wanted.clamp(-1.3, 1.3), rtol=1e-5, atol=0)
    second = history.advantages(["a", "b"], torch.tensor([3.0, 8.0]), keep=False)
    own = torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(
        second[0], (3 - own.mean()) / own.std(correction=0), atol=1e-4, rtol=0
    )
    assert float(second[1]) == pytest.approx(1, abs=1e-5)  # of the two of this update
    assert history.rewards == {"a": [1.0, 2.0], "b": [6.0]}
    history.advantages(["a"] * 5, torch.arange(5.0))
    assert history.rewards["a"] == [1.0, 2.0, 3.0, 4.0]
    alike = history.advantages(["c", "c", "c"], torch.full((3,), 7.0))
    assert torch.equal(alike, torch.zeros(3))


RUN: dict[str, Any] = {
    "method": DDPO(inner_epochs=2, clip_range=1e-2, history=4, least_history=2),
    "sampling": {"eta": 1.0},
    "lora": LoRAConfig(rank=2),
    "optimizer": OptimizerConfig(learning_rate=0.01, ema_decay=0.9),
    "output": {"checkpoint_every": 1, "images_every": 0},
    "reward": png_size,
    "accumulation_steps": 2,
    "batch_size": 2,
    "steps": 4,
}


def numbers(folder: Any) -> list[dict[str, Any]]:
    varying = ("seconds", "peak_memory")
    return [
        {k: v for k, v in row.items() if not k.startswith(varying)} for row in read_metrics(folder)
    ]


def test_a_resumed_run_is_the_same_run(make_trainer, tmp_path):
    make_trainer(directory=tmp_path / "whole", **RUN).train()
    make_trainer(**RUN).train(until=2)
    trainer = make_trainer(**RUN)
    assert trainer.resume() == 2
    trainer.train()
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")
    mine, theirs = (checkpoint.load(tmp_path / name) for name in ("run", "whole"))
    for group, tensors in theirs.tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(mine.tensors[group][name], tensor)
    assert mine.state["reward_history"] == theirs.state["reward_history"] != {}
    # two epochs: the second finds weights that have moved
    assert all(row["k"] == 2 for row in numbers(tmp_path / "whole"))
    steps = theirs.tensors["optimizer"]
    assert {int(v) for k, v in steps.items() if k.startswith("step/")} == {8}


def test_minibatches_are_updates_of_their_own(make_trainer):
    """Two passes in two minibatches, against the same four updates by hand."""
    method = DDPO(inner_epochs=2, minibatches=2, clip_range=1e-2, history=4, least_history=2)
    optimizer = OptimizerConfig(learning_rate=0.01, max_grad_norm=None)
    settings = {**RUN, "method": method, "optimizer": optimizer}
    one, other = make_trainer(**settings), make_trainer(**settings)
    row = one.update()
    batches = [other._drawn(batch) for batch in range(2)]
    sampled = [other.policy.sample(p, f, other._latents(d), d) for p, f, d in batches]
    rewards = torch.cat([each.result.rewards for each in sampled])
    texts = [prompt for prompts, _, _ in batches for prompt in prompts]
    advantages = other.policy.history.advantages(texts, rewards).split(2)
    norms = []
    for batch in (0, 1, 0, 1):
        other.policy.backward(sampled[batch], advantages[batch])
        norms.append(float(other.optimizer.gradient_norm()))
        other.optimizer.update(0)
    for name, parameter in other.parameters.items():
        assert torch.equal(one.parameters[name], parameter), name
    assert row["grad_norm"] == max(norms)


def test_minibatches_are_whole_batches(make_trainer):
    with pytest.raises(ConfigError, match=r"accumulation_steps: got 2 .* in 3 minibatches"):
        make_trainer(**{**RUN, "method": DDPO(minibatches=3)})


def test_a_reward_without_gradient_is_for_ddpo_alone(make_trainer):
    assert make_trainer(reward=png_size, method=DDPO(), sampling={"eta": 1.0}).policy is not None
    with pytest.raises(RewardError, match="DDPO"):
        make_trainer(reward=png_size, method=DRaFT(1))


def test_a_loss_of_ones_own_has_no_place(make_trainer):
    with pytest.raises(ConfigError, match="ddpo has an objective of its own"):
        make_trainer(
            method=DDPO(), sampling={"eta": 1.0}, trainer={"loss": lambda rewards: -rewards.sum()}
        )


def test_a_budget_that_is_kept(make_trainer):
    sampling = {"eta": 1.0, "steps": 3}
    free = make_trainer(reward=png_size, method=DDPO(), sampling=sampling, trained=True)
    tight = make_trainer(
        reward=png_size, method=DDPO(), sampling=sampling, trained=True, memory_budget="64MiB"
    )
    for trainer in (free, tight):
        fill(trainer.parameters)
        trainer.training_step(TEXTS, seed=3)
    for name, gradient in library_gradients(free).items():
        assert torch.equal(gradient, tight.parameters[name].grad), name


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (DDPO(clip_range=0.0), "clip_range is 0.0"),
        (DDPO(inner_epochs=0), "inner_epochs is 0"),
        (DDPO(minibatches=0), "minibatches is 0"),
        (DDPO(advantage_clip=0.0), "advantage_clip is 0.0"),
        (DDPO(history=4), "history is 4 and least_history 16"),
        (DDPO(least_history=1), "least_history 1"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense(method, words):
    (problem,) = method.validate(10)
    assert words in problem
