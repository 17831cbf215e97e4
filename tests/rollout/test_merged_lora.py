"""Steps without gradients on W + s B A: equal to rounding, and gone outside."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rewardprop_fast import lora, nn, ops
from rewardprop_fast.errors import ConfigError
from rewardprop_fast.nn.merged import Merged
from rewardprop_fast.rollout.graph import Strict
from rewardprop_fast.training.config import RolloutConfig, TrainConfig
from tests.memory.conftest import make_pipeline
from tests.rollout.chains import T, latents, sampler_of


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def prefix(sampler: Any, x: Tensor) -> Tensor:
    return sampler.run(x, 0, 2, gradients=False)


@pytest.fixture
def lora_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the LoRA operators that were called."""
    found: list[str] = []
    for name in ("lora_linear", "lora_linears", "layer_norm_lora_linears"):
        original = getattr(ops, name)

        def noted(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            found.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(ops, name, noted)
    return found


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_the_prefix_is_the_same_to_rounding(kind: str, lora_calls: list[str]) -> None:
    pipe = make_pipeline(kind)
    sampler, x = sampler_of(pipe), latents(pipe)
    expected = prefix(sampler, x)
    assert lora_calls
    lora_calls.clear()
    found = prefix(replace(sampler, merge_lora=True), x)
    assert not lora_calls
    with lora.disabled(pipe.unet):
        base = prefix(sampler, x)
    assert distance(base, expected) > 1e-2  # the adapters count
    assert 0 < distance(found, expected) < 1e-5
    assert torch.equal(prefix(sampler, x), expected)  # nothing is left


def test_steps_with_gradients_run_on_the_adapters() -> None:
    pipe = make_pipeline()
    sampler, x = sampler_of(pipe), latents(pipe)
    whole = replace(sampler, merge_lora=True).run(x, T - 1, T, gradients=True)
    assert torch.equal(whole, sampler.run(x, T - 1, T, gradients=True))
    with nn.merged_lora(pipe.unet):
        inside = sampler.run(x, T - 1, T, gradients=True)
    assert torch.equal(inside, whole)


def test_adapters_that_are_off_stay_off() -> None:
    pipe = make_pipeline()
    sampler, x = sampler_of(pipe), latents(pipe)
    with lora.disabled(pipe.unet):
        base = prefix(sampler, x)
    with nn.merged_lora(pipe.unet), lora.disabled(pipe.unet):
        assert torch.equal(prefix(sampler, x), base)
    with lora.disabled(pipe.unet):
        assert torch.equal(prefix(replace(sampler, merge_lora=True), x), base)


def test_every_chain_merges_the_adapters_of_now() -> None:
    pipe = make_pipeline()
    sampler, x = sampler_of(pipe), latents(pipe)
    merging = replace(sampler, merge_lora=True)
    first = prefix(merging, x)
    for change in (lambda: lora.set_strength(pipe.unet, 0.5), lambda: double(pipe.unet)):
        change()
        second = prefix(merging, x)
        assert distance(second, prefix(sampler, x)) < 1e-5
        assert distance(second, first) > 1e-3
        first = second


def double(unet: Any) -> None:
    with torch.no_grad():
        for parameter in lora.lora_parameters(unet).values():
            parameter.mul_(2)


def test_bfloat16_rounds_what_is_merged() -> None:
    pipe = make_pipeline("sd", torch.bfloat16)
    sampler, x = sampler_of(pipe), latents(pipe)
    found, expected = prefix(replace(sampler, merge_lora=True), x), prefix(sampler, x)
    assert 1e-5 < distance(found, expected) < 0.05


def test_captured_steps_are_told_apart() -> None:
    pipe, strict = make_pipeline(), Strict()
    sampler, x = sampler_of(pipe), latents(pipe)
    plain, merging = prefix(sampler, x), prefix(replace(sampler, merge_lora=True), x)
    assert not torch.equal(plain, merging)
    for _ in range(2):
        captured = replace(sampler, graphs=strict)
        assert torch.equal(prefix(captured, x), plain)
        assert torch.equal(prefix(replace(captured, merge_lora=True), x), merging)
    double(pipe.unet)  # in place, as an optimizer: what was captured holds on
    merging = replace(sampler, merge_lora=True)
    assert torch.equal(prefix(replace(merging, graphs=strict), x), prefix(merging, x))


def test_restoring_a_network_frees_its_merged_weights() -> None:
    pipe = make_pipeline()
    prefix(replace(sampler_of(pipe), merge_lora=True), latents(pipe))

    def copies() -> int:
        return sum(
            isinstance(value, Merged)
            for layer in pipe.unet.modules()
            for value in vars(layer).values()
        )

    assert copies() > 0
    nn.restore(pipe.unet)
    assert copies() == 0


def test_it_takes_the_librarys_operators() -> None:
    with pytest.raises(ConfigError, match=r"rollout\.merge_lora: got true with accelerate false"):
        TrainConfig(rollout=RolloutConfig(merge_lora=True), accelerate=False).validate()
