"""peft's adapters on accelerated layers: every switch of peft's does what it did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

import rewardprop_fast as rpf
from rewardprop_fast import lora, ops
from rewardprop_fast.nn.lora import FastLoraLinear
from tests.nn.passes import fill, outputs, with_gradients
from tests.ops import oracle


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each call of an operator for LoRA layers took."""
    found: list[int] = []

    def spy(original: Callable[..., Any], several: bool) -> Callable[..., Any]:
        def run(x: Tensor, weights: Any, *args: Any) -> Any:
            found.append(len(weights) if several else 1)
            return original(x, weights, *args)

        return run

    normed = ops.layer_norm_lora_linears

    def normed_spy(x: Tensor, weight: Any, bias: Any, eps: float, weights: Any, *args: Any) -> Any:
        found.append(len(weights))
        return normed(x, weight, bias, eps, weights, *args)

    monkeypatch.setattr(ops, "layer_norm_lora_linears", normed_spy)
    monkeypatch.setattr(ops, "lora_linears", spy(ops.lora_linears, True))
    monkeypatch.setattr(ops, "lora_linear", spy(ops.lora_linear, False))
    return found


class Layers(nn.Module):
    """A linear layer and three convolutions that adapters go on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 24)
        self.pointwise = nn.Conv2d(24, 20, 1)
        self.strided = nn.Conv2d(20, 18, 1, stride=2)
        self.conv = nn.Conv2d(18, 16, 3, padding=1)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """(B, H, W, 16) -> (B, 16, H / 2, W / 2)."""
        image = self.linear(x, **kwargs).permute(0, 3, 1, 2)
        return self.conv(self.strided(self.pointwise(image)))


TARGETS = ["linear", "pointwise", "strided", "conv"]


def layers(*names: str, targets: Any = TARGETS, **config: Any) -> Layers:
    """Frozen layers in float64 with filled adapters of these names, all active."""
    model = Layers().requires_grad_(False)
    for rank, name in enumerate(names or ("default",), start=2):
        settings = {"r": rank, "lora_alpha": 2 * rank + 1, "target_modules": targets, **config}
        inject_adapter_in_model(LoraConfig(**settings), model, name)
    model.double()
    fill(model)
    for module in model.modules():
        if hasattr(module, "set_adapter"):
            module.set_adapter(list(names or ("default",)))
    return model


def results(model: nn.Module, **kwargs: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 6, 4, 16, generator=generator, dtype=torch.float64).requires_grad_()
    trained = [p for p in model.parameters() if p.requires_grad]
    y = model(x, **kwargs)
    leaves = [x, *trained]
    gradients = torch.autograd.grad(y.sin().sum(), leaves, allow_unused=True)
    filled = (
        torch.zeros_like(p) if g is None else g for p, g in zip(leaves, gradients, strict=True)
    )
    return [y.detach(), *filled]


def same_when_accelerated(model: nn.Module, **kwargs: Any) -> None:
    plain = results(model, **kwargs)
    rpf.accelerate(model)
    assert isinstance(model.linear, FastLoraLinear)
    for found, expected in zip(results(model, **kwargs), plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_a_plain_adapter_takes_the_operator(calls: list[int]) -> None:
    same_when_accelerated(layers())
    assert calls == [1, 1]  # the linear layer and the 1x1 convolution of stride 1


def test_several_active_adapters_are_one_call(calls: list[int]) -> None:
    same_when_accelerated(layers("one", "two", "three"))
    assert calls == [1, 1]


def test_adapters_are_chosen_and_scaled_at_any_time() -> None:
    plain, fast = layers("one", "two"), layers("one", "two")
    fast.load_state_dict(plain.state_dict())
    rpf.accelerate(fast)
    for change in (
        lambda layer: layer.set_adapter("two"),
        lambda layer: layer.set_scale("two", 0.3),
        lambda layer: layer.scale_layer(2.0),
        lambda layer: layer.set_adapter(["two", "one"]),
        lambda layer: layer.enable_adapters(False),
        lambda layer: layer.enable_adapters(True),
        lambda layer: layer.delete_adapter("two"),
    ):
        found = []
        for model in (plain, fast):
            for name in TARGETS:
                change(getattr(model, name))
            found.append(results(model))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("safe", [False, True])
def test_merges_and_unmerges(safe: bool, calls: list[int]) -> None:
    model = layers()
    plain = results(model)
    rpf.accelerate(model)
    results(model)
    before = len(calls)
    for name in TARGETS:
        getattr(model, name).merge(safe_merge=safe)
    merged = results(model)
    assert len(calls) == before
    torch.testing.assert_close(merged[:2], plain[:2], rtol=1e-9, atol=1e-9)
    for name in TARGETS:
        getattr(model, name).unmerge()
    for found, expected in zip(results(model), plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "config",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"lora_dropout": 0.5},
        {"use_rslora": True},
    ],
    ids=lambda config: next(iter(config)),
)
def test_variants_run_in_pefts_forward(config: dict[str, Any], calls: list[int]) -> None:
    model = layers(**config)
    if "lora_dropout" in config:
        model.train()
        torch.manual_seed(3)
        plain = results(model)
        rpf.accelerate(model)
        torch.manual_seed(3)
        torch.testing.assert_close(results(model), plain, rtol=1e-9, atol=1e-9)
        assert calls == []
        model.eval()
        same_when_accelerated(model)
        assert calls
        return
    same_when_accelerated(model)
    # The scale is all that changes with rsLoRA.
    assert bool(calls) == ("use_rslora" in config)


def test_a_batch_that_mixes_adapters_runs_in_pefts_forward(calls: list[int]) -> None:
    model = layers("one", "two", targets=["linear"])
    for module in model.modules():
        if hasattr(module, "set_adapter"):
            module.set_adapter("one")
    same_when_accelerated(model, adapter_names=["two", "__base__"])
    assert calls == []


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "base_layer"])
def test_hooks_inside_an_adapter_are_called(part: str, calls: list[int]) -> None:
    model = layers()
    rpf.accelerate(model)
    inner = getattr(model.linear, part)
    inner = inner if part == "base_layer" else inner["default"]
    seen: list[int] = []
    inner.register_forward_hook(lambda *_: seen.append(1))
    results(model)
    assert seen == [1]
    assert calls == [1]  # the 1x1 convolution alone


def test_a_trained_base_keeps_its_gradient() -> None:
    model = layers()
    model.linear.base_layer.requires_grad_(True)
    same_when_accelerated(model)


def test_float32_masters_on_a_bfloat16_network(calls: list[int]) -> None:
    exact = results(layers(targets=["linear"]))
    model = layers(targets=["linear"]).bfloat16()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    rpf.accelerate(model)
    y = model(torch.randn(2, 6, 4, 16, dtype=torch.bfloat16))
    y.sum().backward()
    assert calls == [1]
    assert model.linear.lora_A["default"].weight.grad.dtype == torch.float32
    assert y.dtype == torch.bfloat16
    assert exact[0].shape == y.shape


# --- in a whole model ---


def test_q_k_and_v_are_one_call(pipeline: Any, calls: list[int]) -> None:
    pipe = pipeline(targets="attention")
    rpf.accelerate(pipe)
    outputs(pipe)
    blocks = sum(
        "transformer_blocks" in n and n.endswith("attn1") for n, _ in pipe.unet.named_modules()
    )
    assert calls.count(3) == blocks  # self-attention
    assert calls.count(2) == blocks  # cross-attention: k and v
    assert calls.count(1) == 3 * blocks  # q of cross-attention, and both to_out


def test_a_hook_on_one_projection_makes_them_be_called(pipeline: Any, calls: list[int]) -> None:
    pipe = pipeline(targets="attention")
    rpf.accelerate(pipe)
    attention = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    seen: list[int] = []
    attention.to_k.register_forward_hook(lambda *_: seen.append(1))
    outputs(pipe)
    assert seen == [1]


def test_an_adapter_that_comes_later_is_picked_up(pipeline: Any, calls: list[int]) -> None:
    pipe, plain = pipeline(targets=None), pipeline(targets="attention")
    rpf.accelerate(pipe)
    lora.inject(pipe.unet, rank=3, target_modules="attention")
    fill(pipe.unet)
    # Already now: peft's own layers, on bases that are accelerated.
    expected = with_gradients(plain)
    for found, wanted in zip(with_gradients(pipe), expected, strict=True):
        assert oracle.relative_error(found, wanted) < 1e-4
    assert calls == []
    report = rpf.accelerate(pipe)
    assert set(report.swapped.values()) == {"FastLoraLinear"}
    for found, wanted in zip(with_gradients(pipe), expected, strict=True):
        assert oracle.relative_error(found, wanted) < 1e-4
    assert calls


def test_the_adapter_is_saved_and_loaded_by_peft(pipeline: Any, tmp_path: Any) -> None:
    pipe = pipeline(targets="attention")
    images = outputs(pipe)
    plain = {name: t.clone() for name, t in get_peft_model_state_dict(pipe.unet).items()}
    rpf.accelerate(pipe)
    saved = get_peft_model_state_dict(pipe.unet)
    assert list(saved) == list(plain)
    assert all(torch.equal(saved[name], plain[name]) for name in plain)
    StableDiffusionPipeline.save_lora_weights(tmp_path, saved)

    again = pipeline(targets=None)
    rpf.accelerate(again)
    again.load_lora_weights(tmp_path)
    rpf.accelerate(again)
    torch.testing.assert_close(outputs(again), images, rtol=1e-4, atol=1e-4)
    set_peft_model_state_dict(again.unet, {n: 0 * t for n, t in saved.items()}, "default_0")
    assert not torch.allclose(outputs(again), images)


def test_adapters_are_fused_and_unloaded_by_diffusers(pipeline: Any, tmp_path: Any) -> None:
    trained = pipeline(targets="attention")
    StableDiffusionPipeline.save_lora_weights(tmp_path, get_peft_model_state_dict(trained.unet))
    pipe = pipeline(targets=None)
    base = outputs(pipe)
    rpf.accelerate(pipe)
    pipe.load_lora_weights(tmp_path)
    rpf.accelerate(pipe)
    with_adapter = outputs(pipe)
    assert not torch.allclose(with_adapter, base, atol=1e-2)
    pipe.fuse_lora()
    torch.testing.assert_close(outputs(pipe), with_adapter, rtol=1e-3, atol=1e-3)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    torch.testing.assert_close(outputs(pipe), base, rtol=1e-3, atol=1e-3)
    assert not any("lora" in name for name in pipe.unet.state_dict())


def test_the_library_switches_its_own_adapter_off(pipeline: Any) -> None:
    pipe = pipeline(targets="attention")
    rpf.accelerate(pipe)
    with_adapter = outputs(pipe)
    with lora.disabled(pipe.unet):
        base = outputs(pipe)
    lora.set_strength(pipe.unet, 0.0)
    torch.testing.assert_close(outputs(pipe), base, rtol=1e-4, atol=1e-4)
    lora.set_strength(pipe.unet, 1.0)
    assert torch.equal(outputs(pipe), with_adapter)
