"""The update against torch's own AdamW; schedules, average, state."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from rewardprop_fast.training.config import OptimizerConfig
from rewardprop_fast.training.optimization import LoRAOptimizer, learning_rate


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (3, 4), "b": (5,)}
    return {k: nn.Parameter(torch.randn(s, generator=generator)) for k, s in shapes.items()}


def give_gradients(named: dict[str, nn.Parameter], step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in named.values():
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)


def rates(**settings) -> list[float]:
    config = OptimizerConfig(learning_rate=1.0, **settings)
    return [learning_rate(config, step, 8) for step in range(8)]


def test_schedules():
    assert rates() == [1.0] * 8
    assert rates(warmup_steps=2) == [0.5, 1.0, *[1.0] * 6]
    assert rates(schedule="linear") == pytest.approx([1 - i / 8 for i in range(8)])
    assert rates(schedule="linear", warmup_steps=4) == pytest.approx(
        [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]
    )
    cosine = [(1 + math.cos(math.pi * i / 8)) / 2 for i in range(8)]
    assert rates(schedule="cosine") == pytest.approx(cosine)
    # longer than planned: it stays at the end, it does not rise again
    config = OptimizerConfig(learning_rate=1.0, schedule="cosine")
    assert learning_rate(config, 12, 8) == pytest.approx(0, abs=1e-12)
    linear = OptimizerConfig(learning_rate=1.0, schedule="linear")
    assert learning_rate(linear, 12, 8) == 0


@pytest.mark.parametrize("limit", [None, 0.5])
def test_the_update_is_adamw_with_clipping(limit):
    config = OptimizerConfig(
        learning_rate=0.1, betas=(0.8, 0.9), weight_decay=0.3, epsilon=1e-3,
        max_grad_norm=limit, schedule="linear",
    )  # fmt: skip
    mine, theirs = parameters(), parameters()
    optimizer = LoRAOptimizer(mine, config, steps=4)
    reference = torch.optim.AdamW(
        theirs.values(), lr=0.1, betas=(0.8, 0.9), weight_decay=0.3, eps=1e-3
    )
    for step in range(3):
        give_gradients(mine, step)
        give_gradients(theirs, step)
        wanted = torch.stack([p.grad.norm() for p in theirs.values()]).norm()
        if limit is not None:
            for parameter in theirs.values():
                parameter.grad *= min(1.0, limit / float(wanted))
        norm = optimizer.gradient_norm()
        torch.testing.assert_close(norm, wanted)  # as it was before clipping
        reference.param_groups[0]["lr"] = rate = 0.1 * (1 - step / 4)
        reference.step()
        assert optimizer.update(step) == pytest.approx(rate)
        assert all(p.grad is None for p in mine.values())
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-5, atol=1e-6)


def test_a_gradient_that_is_not_finite_shows_in_the_norm():
    named = parameters()
    optimizer = LoRAOptimizer(named, OptimizerConfig(), 4)
    for bad in (math.nan, math.inf):
        give_gradients(named, 0)
        named["b"].grad[2] = bad
        assert not torch.isfinite(optimizer.gradient_norm())


def test_the_average_follows_with_a_ramp():
    named = parameters()
    optimizer = LoRAOptimizer(named, OptimizerConfig(learning_rate=0.1, ema_decay=0.15), 10)
    average = named["a"].detach().clone()
    for step in range(4):
        give_gradients(named, step)
        optimizer.update(step)
        decay = min(0.15, (1 + step) / (10 + step))  # 0.1 at first, 0.15 from the second on
        average = decay * average + (1 - decay) * named["a"].detach()
        own = named["a"].detach().clone()
        with optimizer.averaged():
            torch.testing.assert_close(named["a"].detach(), average)
        assert torch.equal(named["a"], own)
        assert not torch.allclose(own, average)


def test_the_parameters_come_back_after_an_error():
    named = parameters()
    optimizer = LoRAOptimizer(named, OptimizerConfig(ema_decay=0.5), 10)
    give_gradients(named, 0)
    optimizer.update(0)
    own = named["a"].detach().clone()

    def fail() -> None:
        with optimizer.averaged():
            assert not torch.equal(named["a"], own)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert torch.equal(named["a"], own)


def test_without_an_average_nothing_is_exchanged():
    named = parameters()
    optimizer = LoRAOptimizer(named, OptimizerConfig(), 10)
    with optimizer.averaged():
        named["a"].data.zero_()
    assert not named["a"].any()
    assert "average" not in optimizer.state()


def test_on_the_host_it_is_the_same_to_the_last_bit():
    config = OptimizerConfig(learning_rate=0.1, ema_decay=0.9, schedule="cosine")
    here, there = (LoRAOptimizer(parameters(), config, 6, offload) for offload in (False, True))
    own = {id(p) for p in there.parameters.values()}
    for step in range(5):
        for optimizer in (here, there):
            give_gradients(optimizer.parameters, step)
            if step == 3:
                optimizer.parameters["a"].data.mul_(2)  # somebody else's doing
                del optimizer.parameters["b"].grad
            optimizer.update(step)
            assert all(p.grad is None for p in optimizer.parameters.values())
        if step == 1:  # goes on from what was saved, whichever of the two it was
            saved, also = here.state(), there.state()
            assert saved["optimizer"].keys() == also["optimizer"].keys()
            here.load(also)
            there.load(saved)
        for name, parameter in here.parameters.items():
            assert torch.equal(parameter, there.parameters[name])
            assert torch.equal(here.average[name], there.average[name])
    assert {id(p) for p in there.parameters.values()} == own
    assert not own & {id(p) for p in there.adamw.state}


@pytest.mark.parametrize("ema", [None, 0.9])
def test_state_goes_on_bit_by_bit(ema):
    config = OptimizerConfig(learning_rate=0.1, ema_decay=ema)
    first = LoRAOptimizer(parameters(), config, 6)
    for step in range(2):
        give_gradients(first.parameters, step)
        first.update(step)
    saved = first.state()
    weights = {name: p.detach().clone() for name, p in first.parameters.items()}
    second = LoRAOptimizer(parameters(seed=9), config, 6)
    for name, parameter in second.parameters.items():
        parameter.data.copy_(weights[name])
    second.load(saved)
    for step in range(2, 5):
        for optimizer in (first, second):
            give_gradients(optimizer.parameters, step)
            optimizer.update(step)
    for group, tensors in first.state().items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, second.state()[group][name]), (group, name)
    for name, parameter in first.parameters.items():
        assert torch.equal(parameter, second.parameters[name])
    # what was saved is a copy
    assert float(saved["optimizer"]["step/a"]) == 2


def test_state_before_the_first_update_and_state_that_lacks_something():
    first = LoRAOptimizer(parameters(), OptimizerConfig(), 6)
    assert first.state() == {"optimizer": {}}
    second = LoRAOptimizer(parameters(), OptimizerConfig(), 6)
    give_gradients(second.parameters, 0)
    second.update(0)
    saved = second.state()
    second.load(first.state())
    assert second.state() == {"optimizer": {}}
    del saved["optimizer"]["exp_avg/b"]
    with pytest.raises(KeyError, match="exp_avg/b"):
        first.load(saved)
