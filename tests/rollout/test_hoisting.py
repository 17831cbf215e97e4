"""What is computed once for a chain is what every step would have computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rewardprop_fast import restore
from rewardprop_fast.nn import blocks
from rewardprop_fast.rollout import Sampler, denoise
from tests.memory.conftest import make_pipeline
from tests.rollout.chains import T, latents, sampler_of

K = 2


def step_by_step(sampler: Sampler, x: Tensor, first: int, last: int) -> Tensor:
    """As diffusers computes it: everything at every step."""
    conditioning, schedule = sampler.conditioning, sampler.schedule
    for i in range(first, last):
        x = denoise(
            sampler.unet,
            x,
            schedule.timesteps[i],
            schedule.coefficients[i],
            conditioning.embeddings(),
            conditioning.added(),
            sampler.guidance_scale,
        )
    return x


def gradients(unet: Any, x0: Tensor) -> dict[str, Tensor]:
    trained = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(x0.square().sum(), list(trained.values()), allow_unused=True)
    return {name: g for name, g in zip(trained, found, strict=True) if g is not None}


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_latents_and_gradients_are_those_of_step_by_step(kind: str) -> None:
    pipe = make_pipeline(kind)
    sampler, x = sampler_of(pipe), latents(pipe)
    with torch.no_grad():
        plain = step_by_step(sampler, x, 0, T - K)
    hoisted = sampler.run(x, 0, T - K, gradients=False)
    torch.testing.assert_close(hoisted, plain, rtol=1e-5, atol=1e-5)
    # the same input from here on
    expected = gradients(pipe.unet, step_by_step(sampler, plain, T - K, T))
    got = gradients(pipe.unet, sampler.run(plain, T - K, T, gradients=True))
    assert got.keys() == expected.keys()
    assert any("attn2.to_k" in name for name in got)
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_gradients_or_without_no_bit_differs(kind: str, dtype: torch.dtype) -> None:
    pipe = make_pipeline(kind, dtype)
    sampler, x = sampler_of(pipe), latents(pipe)
    without = sampler.run(x, 0, T, gradients=False)
    assert torch.equal(sampler.run(x, 0, T, gradients=True), without)
    middle = sampler.run(x, 0, 3, gradients=False)
    assert torch.equal(sampler.run(middle, 3, T, gradients=False), without)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often keys and values are made, and times embedded."""
    counted: Counter[str] = Counter()

    def count(kind: type, method: str, title: str) -> None:
        original: Callable[..., Any] = getattr(kind, method)

        def counting(self: Any, *args: Any) -> Any:
            result = original(self, *args)
            if method == "forward" or isinstance(args[0], Tensor):
                counted[title] += 1
            return result

        monkeypatch.setattr(kind, method, counting)

    count(blocks.FastAttention, "keys_and_values", "keys")
    count(torch.nn.Linear, "forward", "linear")
    return counted


def test_it_is_computed_once(calls: Counter[str]) -> None:
    pipe = make_pipeline("sdxl")
    sampler, x = sampler_of(pipe), latents(pipe)
    layers = [m for m in pipe.unet.modules() if isinstance(m, blocks.FastBasicTransformerBlock)]
    sampler.run(x, 0, 1, gradients=False)
    once = dict(calls)
    assert once["keys"] == len(layers)
    calls.clear()
    sampler.run(x, 0, T, gradients=False)
    assert dict(calls) == once  # however many steps


def test_nothing_is_left_and_nothing_is_remembered() -> None:
    pipe = make_pipeline()
    sampler, x = sampler_of(pipe), latents(pipe)
    before = set(vars(pipe.unet))
    first = sampler.run(x, 0, T, gradients=False)
    assert set(vars(pipe.unet)) == before
    pipe.unet.disable_adapters()
    base = sampler.run(x, 0, T, gradients=False)
    assert not torch.equal(base, first)
    pipe.unet.enable_adapters()
    assert torch.equal(sampler.run(x, 0, T, gradients=False), first)


def test_a_unet_that_fails_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = make_pipeline()
    sampler, x = sampler_of(pipe), latents(pipe)
    before = set(vars(pipe.unet))
    monkeypatch.setattr(blocks.FastAttention, "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sampler.run(x, 0, T, gradients=False)
    assert set(vars(pipe.unet)) == before


@pytest.mark.parametrize(
    "part", ["attn2", "attn2.to_k", "resnet", "time_emb_proj", "time_embedding"]
)
def test_a_module_with_a_hook_is_called_at_every_step(part: str) -> None:
    pipe = make_pipeline()
    sampler, x = sampler_of(pipe), latents(pipe)
    expected = sampler.run(x, 0, T, gradients=False)
    unet = pipe.unet
    block = next(m for m in unet.modules() if isinstance(m, blocks.FastBasicTransformerBlock))
    resnet = unet.mid_block.resnets[0]
    module = {
        "attn2": block.attn2,
        "attn2.to_k": block.attn2.to_k,
        "resnet": resnet,
        "time_emb_proj": resnet.time_emb_proj,
        "time_embedding": unet.time_embedding,
    }[part]
    seen: list[Any] = []
    handle = module.register_forward_hook(lambda *arguments: seen.append(arguments[1]))
    got = sampler.run(x, 0, T, gradients=False)
    handle.remove()
    assert len(seen) == T
    assert all(type(argument) in (Tensor, type(None)) for call in seen for argument in call)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_diffusers_own_modules_compute_the_same() -> None:
    pipe = make_pipeline()
    sampler, x = sampler_of(pipe), latents(pipe)
    fast = sampler.run(x, 0, T, gradients=False)
    restore(pipe)
    torch.testing.assert_close(sampler.run(x, 0, T, gradients=False), fast, rtol=1e-3, atol=1e-3)
