"""A decoder's backward pass in bands: the same gradients, less memory."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rewardprop_fast.memory import CostCounter, MemoryTracker
from rewardprop_fast.memory.bands import (
    band_decoder,
    banded_head,
    banded_resnet,
    why_not_resnet,
)
from rewardprop_fast.memory.recompute import recompute
from rewardprop_fast.models import architectures
from rewardprop_fast.nn import accelerate

F64, BF16 = torch.float64, torch.bfloat16
MIB = 2**20


def resnet(inputs: int, outputs: int, dtype: torch.dtype = F64, **changes: Any) -> Any:
    """A frozen block whose norms have weights of their own, some of them zero."""
    torch.manual_seed(0)
    settings = {"temb_channels": None, "groups": 4, "eps": 1e-6, **changes}
    block = ResnetBlock2D(in_channels=inputs, out_channels=outputs, **settings)
    for norm in (block.norm1, block.norm2):
        norm.weight.data.normal_(1, 0.5)
        norm.weight.data[1] = 0
        norm.bias.data.normal_()
    return block.to(dtype).requires_grad_(False).eval()


def image(*shape: int, dtype: torch.dtype = F64, last: bool = True, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, dtype=F64, generator=generator).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if last else x


def gradient(function: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output and input gradient, for a gradient of the output that is fixed by its shape."""
    x = x.detach().requires_grad_()
    y = function(x)
    grad = image(*y.shape, seed=2, last=not y.is_contiguous()).to(y.dtype)
    y.backward(grad)
    assert x.grad is not None
    return y.detach(), x.grad


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


# --- one block ---


@settings(max_examples=40, deadline=None)
@given(
    channels=st.sampled_from([(8, 8), (16, 8), (8, 16)]),
    batch=st.integers(1, 2),
    height=st.integers(1, 19),
    rows=st.integers(1, 20),
    last=st.booleans(),
    factor=st.sampled_from([1.0, 2.0**0.5]),
)
@example(channels=(16, 8), batch=2, height=17, rows=8, last=True, factor=1.0)
@example(channels=(8, 8), batch=1, height=17, rows=8, last=True, factor=1.0)
@example(channels=(16, 8), batch=2, height=9, rows=1, last=True, factor=1.0)
def test_a_resnet_has_the_gradient_that_diffusers_own_has(
    channels: tuple[int, int], batch: int, height: int, rows: int, last: bool, factor: float
) -> None:
    block = resnet(*channels, output_scale_factor=factor)
    x = image(batch, channels[0], height, 5, last=last)
    y, exact = gradient(lambda x: block(x, None), x)
    banded, found = gradient(lambda x: banded_resnet(block, x, rows), x)
    assert error(banded, y) < 1e-12
    assert error(found, exact) < 1e-10
    assert found.shape == x.shape


@pytest.mark.parametrize("channels", [(8, 8), (16, 8)])
def test_forward_is_the_accelerated_block_s_to_the_last_bit(channels: tuple[int, int]) -> None:
    block = resnet(*channels, dtype=BF16)
    accelerate(block)
    x = image(2, channels[0], 13, 7, dtype=BF16)
    y, _ = gradient(lambda x: block(x, None), x)
    for rows in (2, 64):
        banded, _ = gradient(lambda x, rows=rows: banded_resnet(block, x, rows), x)
        assert torch.equal(banded, y)


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("channels", [(32, 32), (64, 32)])
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_the_error_is_at_most_twice_that_of_the_block_itself(
    dtype: torch.dtype, channels: tuple[int, int], mean: float
) -> None:
    """Also far from zero, where what is affine in x takes large numbers from each other."""
    block = resnet(*channels, dtype=dtype)
    exact_block = copy.deepcopy(block).double()
    accelerate(block)
    x = (image(1, channels[0], 40, 24) + mean).to(dtype)
    _, exact = gradient(lambda x: exact_block(x, None), x.double())
    _, plain = gradient(lambda x: block(x, None), x)
    _, found = gradient(lambda x: banded_resnet(block, x, 16), x)
    assert error(found, exact) <= 2 * error(plain, exact)


def test_x_and_the_statistics_are_kept_and_nothing_else() -> None:
    block, kept = resnet(16, 8), []
    x = image(2, 16, 12, 5).requires_grad_()

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        banded_resnet(block, x, 4)
    assert [tuple(tensor.shape) for tensor in kept] == [tuple(x.shape), *[(2, 4)] * 4]
    assert kept[0].data_ptr() == x.data_ptr()
    with MemoryTracker() as tracker:
        tracker.count([x, *block.parameters()])
        before = tracker.live_bytes
        y = banded_resnet(block, x, 4)
        assert tracker.live_bytes - before == y.nbytes + 4 * 2 * 4 * 8


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("channels", [(8, 8), (16, 8), (8, 16)])
def test_the_gradient_lies_in_memory_as_x_does(channels: tuple[int, int], last: bool) -> None:
    block, x = resnet(*channels), image(2, channels[0], 11, 6, last=last).requires_grad_()
    y = banded_resnet(block, x, 3)
    (found,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert found.stride() == x.stride()
    assert found.untyped_storage().nbytes() == x.untyped_storage().nbytes()


def test_a_gradient_that_is_no_dense_image() -> None:
    """As ``sum().backward()`` gives it: one number, spread."""
    block, x = resnet(8, 8), image(1, 8, 11, 6).requires_grad_()
    (exact,) = torch.autograd.grad(block(x, None).sum(), x)
    (found,) = torch.autograd.grad(banded_resnet(block, x, 3).sum(), x)
    assert error(found, exact) < 1e-10


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda b: b.requires_grad_(True), "trained"),
        (lambda b: b.float(), "dtype"),
        (lambda b: setattr(b, "nonlinearity", nn.GELU()), "GELU"),
        (lambda b: setattr(b, "time_emb_proj", nn.Linear(1, 1)), "time embedding"),
        (lambda b: setattr(b, "downsample", nn.AvgPool2d(2)), "resizes"),
        (lambda b: setattr(b, "dropout", nn.Dropout(0.5)), "drops out"),
        (lambda b: b.conv1.register_forward_hook(lambda *_: None), "hooks"),
        (lambda b: setattr(b.conv2, "stride", (2, 2)), "3x3"),
        (lambda b: setattr(b, "conv1", nn.Sequential(b.conv1)), "3x3"),
        (lambda b: setattr(b.conv_shortcut, "stride", (2, 2)), "1x1"),
    ],
)
def test_what_it_cannot_take_is_refused_in_words(change: Any, reason: str) -> None:
    block, x = resnet(16, 8), image(1, 16, 4, 4).requires_grad_()
    assert why_not_resnet(block, x) is None
    change(block)
    with pytest.raises(ValueError, match=reason):
        banded_resnet(block, x)


def test_no_rows_and_no_resnet_are_refused() -> None:
    x = image(1, 8, 4, 4).requires_grad_()
    with pytest.raises(ValueError, match="rows is 0"):
        banded_resnet(resnet(8, 8), x, 0)
    with pytest.raises(ValueError, match="Linear"):
        banded_resnet(nn.Linear(8, 8), x)  # type: ignore[arg-type]
    norm, conv = nn.GroupNorm(2, 8).double(), nn.Conv2d(8, 3, 3, padding=1).double()
    with torch.no_grad(), pytest.raises(ValueError, match="rows is -1"):
        banded_head(norm, conv, x, -1)


# --- the end of a decoder ---


@pytest.mark.parametrize("height", [1, 2, 13])
@pytest.mark.parametrize("rows", [1, 4, 64])
def test_the_head(height: int, rows: int) -> None:
    norm, conv = nn.GroupNorm(4, 16).double(), nn.Conv2d(16, 3, 3, padding=1).double()
    norm.weight.data.normal_()
    norm.bias.data.normal_()
    norm.requires_grad_(False), conv.requires_grad_(False)
    x = image(2, 16, height, 5)
    y, exact = gradient(lambda x: conv(nn.functional.silu(norm(x))), x)
    banded, found = gradient(lambda x: banded_head(norm, conv, x, rows), x)
    assert error(banded, y) < 1e-12
    assert error(found, exact) < 1e-10
    conv.requires_grad_(True)
    with pytest.raises(ValueError, match="trained"):
        banded_head(norm, conv, x, rows)


# --- a decoder ---

SMALL: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}


@pytest.mark.parametrize("accelerated", [True, False])
def test_a_decoder_with_bands_and_without_them_again(accelerated: bool) -> None:
    torch.manual_seed(0)
    vae = architectures.autoencoder(F64, **SMALL)
    if accelerated:
        accelerate(vae)
    z = image(2, 4, 9, 6)
    y, exact = gradient(lambda z: vae.decode(z).sample, z)
    bands = band_decoder(vae.decoder, rows=5, least_pixels=100)
    counts = count_calls(vae.decoder)
    for _ in range(2):
        banded, found = gradient(lambda z: vae.decode(z).sample, z)
        assert error(banded, y) < 1e-12
        assert 0 < error(found, exact) < 1e-10
    assert counts == {"_BandedResnetBackward": 2 * 3, "_BandedHeadBackward": 2}  # the upper block
    with torch.no_grad():
        assert torch.equal(vae.decode(z).sample, y)
    assert counts == {"_BandedResnetBackward": 2 * 3, "_BandedHeadBackward": 2}
    bands.remove()
    plain, again = gradient(lambda z: vae.decode(z).sample, z)
    assert torch.equal(plain, y)
    assert torch.equal(again, exact)
    assert not any("forward" in vars(module) for module in vae.modules())


def test_bands_within_blocks_that_are_recomputed() -> None:
    torch.manual_seed(0)
    vae = architectures.autoencoder(torch.float32, **SMALL)
    accelerate(vae)
    band_decoder(vae.decoder, rows=5, least_pixels=1)
    z = image(2, 4, 9, 6, dtype=torch.float32)
    _, exact = gradient(lambda z: vae.decode(z).sample, z)
    for block in vae.decoder.up_blocks:
        block.forward = partial(recompute, block.forward)  # type: ignore[method-assign]
    _, found = gradient(lambda z: vae.decode(z).sample, z)
    assert torch.equal(found, exact)


def count_calls(decoder: nn.Module) -> dict[str, int]:
    """How often a module's output has come from each banded function."""
    counts: dict[str, int] = {}

    def note(module: nn.Module, args: Any, output: Any) -> None:
        name = type(getattr(output, "grad_fn", None)).__name__
        if name.startswith("_Banded"):
            counts[name] = counts.get(name, 0) + 1

    for module in decoder.modules():
        if isinstance(module, ResnetBlock2D) or module is decoder:
            module.register_forward_hook(note)
    return counts


class Measuring(MemoryTracker):
    """Live bytes, and FLOPs."""

    def __init__(self) -> None:
        super().__init__()
        self.counter = CostCounter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = super().__torch_dispatch__(func, types, args, kwargs)
        self.counter.see(func, args, kwargs or {}, output)
        return output


def decode_512(how: str) -> tuple[float, float]:
    """MiB at the peak beside the weights, and TFLOP, of decoding 512^2 and going back."""
    with torch.device("meta"):
        vae = architectures.autoencoder(BF16)
    accelerate(vae)
    if how == "bands":
        band_decoder(vae.decoder, rows=32, least_pixels=128 * 128)
    elif how == "recompute":
        for module in vae.decoder.modules():
            if isinstance(module, ResnetBlock2D):
                module.forward = recomputed(module.forward)  # type: ignore[method-assign]
    with torch.device("meta"), Measuring() as tracker:
        weights = tracker.count(vae.decoder)
        z = torch.empty(1, 4, 64, 64, dtype=BF16, requires_grad=True)
        image = vae.decode(z).sample
        image.backward(torch.empty_like(image))
    return (tracker.peak_bytes - weights) / MIB, tracker.counter.flops / 1e12


def recomputed(forward: Any) -> Any:
    return lambda x, temb=None: checkpoint(forward, x, temb, use_reentrant=False)


def test_the_peak_of_a_decoder() -> None:
    kept, recomputed, banded = map(decode_512, ("keep", "recompute", "bands"))
    # At 1024^2, four times as much: 3.996 GiB with everything kept, 2.856 with recomputed resnets.
    assert kept[0] == pytest.approx(3.996 * 256, abs=1)
    assert recomputed[0] == pytest.approx(2.856 * 256, abs=1)
    # Bands take the same share of the work and, of 32 rows and not 64, twice that of the memory.
    assert banded[0] < 0.92 * recomputed[0]
    assert banded[1] < 1.03 * recomputed[1]
