"""A memory plan in somebody else's loop: `accelerate(pipe, plan=...)`, and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import rewardprop_fast as rpf
from rewardprop_fast.errors import ConfigError
from rewardprop_fast.memory.plan import Plan, Policy
from rewardprop_fast.memory.policy import Runner
from rewardprop_fast.memory.verify import DivergenceError
from tests.memory.conftest import make_pipeline

R = Policy.RECOMPUTE
PLAN = Plan(({"transformer block": R, "resnet": R}, {"step": R}), {"resnet": R})


def step(pipe: Any) -> dict[str, torch.Tensor]:
    """Two UNet calls, a decoding, a loss, as a loop of one's own has them."""
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    embeddings = torch.randn(2, 77, 16, generator=generator)
    for _ in range(2):
        noise = pipe.unet(latents, torch.tensor(7), embeddings, return_dict=False)[0]
        latents = latents - 0.1 * noise
    pipe.vae.decode(latents).sample.square().mean().backward()
    gradients = {}
    for name, parameter in pipe.unet.named_parameters():
        if parameter.grad is not None:
            gradients[name], parameter.grad = parameter.grad, None
    return gradients


def runners(pipe: Any) -> int:
    return sum(
        isinstance(value, Runner)
        for network in (pipe.unet, pipe.vae)
        for module in network.modules()
        for value in vars(module).values()
    )


def test_gradients_are_bitwise_those_without_a_plan(tmp_path: Any) -> None:
    pipe = make_pipeline(fast=False)
    rpf.accelerate(pipe)
    kept = step(pipe)
    file = tmp_path / "plan.json"
    file.write_text(PLAN.to_json())
    rpf.accelerate(pipe, plan=str(file))
    assert runners(pipe) > 0
    planned = step(pipe)
    assert kept.keys() == planned.keys()
    for name, gradient in kept.items():
        assert torch.equal(gradient, planned[name]), name


def test_another_plan_takes_the_first_ones_place_and_restore_undoes_all() -> None:
    pipe = make_pipeline(fast=False)
    before = {name: dict(vars(module)) for name, module in pipe.unet.named_modules()}
    rpf.accelerate(pipe, plan=PLAN)
    many = runners(pipe)
    rpf.accelerate(pipe, plan=Plan(({"unet.mid_block.resnets.0": R},)))
    assert runners(pipe) == 1 < many
    rpf.restore(pipe)
    assert runners(pipe) == 0
    for name, module in pipe.unet.named_modules():
        assert vars(module).keys() == before[name].keys(), name


def test_verify_names_the_operation_that_a_change_in_between_reached_first() -> None:
    pipe = make_pipeline()
    rpf.accelerate(pipe, plan=Plan(({"resnet": R},)), verify=True)
    assert step(pipe)
    noise = pipe.unet(torch.ones(1, 4, 8, 8), 7, torch.ones(1, 77, 16), return_dict=False)[0]
    with torch.no_grad():
        pipe.unet.mid_block.resnets[1].conv1.weight.mul_(2)
    with pytest.raises(
        DivergenceError, match=r"'unet\.mid_block\.resnets\.1' computed other .*conv"
    ):
        noise.sum().backward()


def test_what_the_loop_cannot_do_is_refused() -> None:
    pipe = make_pipeline()
    with pytest.raises(ConfigError, match="phases are known to this library's trainer alone"):
        rpf.accelerate(pipe, plan=Plan(residency="phases"))
    with pytest.raises(ConfigError, match="A plan needs a pipeline with a UNet and a VAE"):
        rpf.accelerate(pipe.unet, plan=PLAN)
    with pytest.raises(ConfigError, match="offloads, but there is no offloader"):
        rpf.accelerate(pipe, plan=Plan(({"resnet": Policy.OFFLOAD},)))
    assert runners(pipe) == 0
