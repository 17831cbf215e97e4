"""Upsampling blocks: in one operator where that computes the same, else as diffusers does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers.models.upsampling import Upsample2D
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

import rewardprop_fast as rpf
from rewardprop_fast import ops
from rewardprop_fast.nn.blocks import FastUpsample2D


class Network(nn.Module):
    """What `accelerate` walks through, with one block in it."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.block = Upsample2D(32, **{"use_conv": True, "out_channels": 24, **settings})
        self.double().requires_grad_(False).to(memory_format=torch.channels_last)


def image(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*shape, dtype=torch.float64, generator=generator)
    return x.contiguous(memory_format=torch.channels_last).requires_grad_()


def calls(network: Network, monkeypatch: pytest.MonkeyPatch, *args: Any) -> tuple[Tensor, int]:
    """The block's result and how often the operator computed it."""
    count = 0
    own = ops.frozen_upsample_conv2d

    def counted(*arguments: Any) -> Tensor:
        nonlocal count
        count += 1
        return own(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(ops, "frozen_upsample_conv2d", counted)
        return network.block(*args), count


@pytest.mark.parametrize("settings", [{}, {"name": "Conv2d_0"}, {"bias": False}])
def test_is_one_operator(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = Network(**settings), image(2, 32, 5, 3)
    plain = network.block(x)
    rpf.accelerate(network)
    assert type(network.block) is FastUpsample2D
    y, count = calls(network, monkeypatch, x)
    assert count == 1
    torch.testing.assert_close(y, plain)
    assert y.stride() == plain.stride()
    rpf.restore(network)
    assert type(network.block) is Upsample2D


def with_a_lora(network: Network) -> None:
    inject_adapter_in_model(
        LoraConfig(r=2, target_modules=["conv"], init_lora_weights=False), network
    )
    network.double()


def with_a_hook(network: Network) -> None:
    network.block.conv.register_forward_hook(lambda _, __, output: 2 * output)


def with_a_trained_weight(network: Network) -> None:
    network.block.conv.requires_grad_(True)


@pytest.mark.parametrize("change", [with_a_lora, with_a_hook, with_a_trained_weight])
@pytest.mark.parametrize("first", ["accelerate", "change"])
def test_what_is_attached_to_the_convolution_counts(
    change: Any, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    plain, x = Network(), image(2, 32, 5, 3)
    if first == "accelerate":
        rpf.accelerate(plain)
    change(plain)
    network = copy.deepcopy(plain)
    rpf.restore(plain)
    rpf.accelerate(network)
    y, count = calls(network, monkeypatch, x)
    assert count == 0
    torch.testing.assert_close(y, plain.block(x))


@pytest.mark.parametrize("shape", [(2, 32, 5, 3), (64, 32, 2, 2)])
def test_other_sizes_are_diffusers_own(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    network, x = Network(), image(*shape)
    size = (9, 5) if shape[0] < 64 else None
    plain = network.block(x, size)
    rpf.accelerate(network)
    y, count = calls(network, monkeypatch, x, size)
    assert count == 0
    assert torch.equal(y, plain)
    assert y.stride() == plain.stride()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_conv": False}, "no upsampling with a convolution"),
        ({"use_conv_transpose": True}, "no upsampling with a convolution"),
        ({"interpolate": False}, "no upsampling with a convolution"),
        ({"norm_type": "rms_norm", "eps": 1e-5, "elementwise_affine": True}, "normalises"),
    ],
)
def test_other_blocks_are_left(settings: dict[str, Any], reason: str) -> None:
    network = Network(**settings)
    report = rpf.accelerate(network)
    assert type(network.block) is Upsample2D
    assert reason in report.left["block"]


@pytest.mark.parametrize("kernel", [1, 5])
def test_other_kernels_are_diffusers_own(kernel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = Network(kernel_size=kernel, padding=kernel // 2), image(2, 32, 5, 3)
    plain = network.block(x)
    rpf.accelerate(network)
    y, count = calls(network, monkeypatch, x)
    assert count == 0
    torch.testing.assert_close(y, plain)
