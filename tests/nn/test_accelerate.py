"""Accelerated models compute what plain ones do, and go back to what they were."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewardprop_fast as rpf
from rewardprop_fast.errors import ModelError
from rewardprop_fast.nn import table
from tests.nn.conftest import KINDS
from tests.nn.passes import cast, outputs, with_gradients
from tests.ops import oracle


def classes(pipe: Any) -> list[type]:
    return [type(m) for network in (pipe.unet, pipe.vae) for m in network.modules()]


def state(pipe: Any) -> dict[str, Tensor]:
    return {
        f"{part}.{name}": tensor
        for part in ("unet", "vae")
        for name, tensor in getattr(pipe, part).state_dict().items()
    }


# --- the same results ---


@pytest.mark.parametrize("kind", KINDS)
def test_computes_the_same_in_float64(kind: str, pipeline: Any) -> None:
    pipe = cast(pipeline(kind), torch.float64)
    images, gradients = with_gradients(pipe)
    rpf.accelerate(pipe)
    fast_images, fast_gradients = with_gradients(pipe)
    assert oracle.relative_error(fast_images, images) < 1e-12
    assert oracle.relative_error(fast_gradients, gradients) < 1e-12
    assert gradients.norm() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_is_as_exact_as_the_plain_model(kind: str, dtype: torch.dtype, pipeline: Any) -> None:
    exact = with_gradients(cast(pipeline(kind), torch.float64))
    pipe = cast(pipeline(kind), dtype)
    plain = with_gradients(pipe)
    rpf.accelerate(pipe)
    oracle.assert_as_exact_as_torch(with_gradients(pipe), plain, exact)


def test_is_as_exact_in_channels_first_memory(pipeline: Any) -> None:
    exact = with_gradients(cast(pipeline(), torch.float64))
    pipe = pipeline()
    for network in (pipe.unet, pipe.vae):
        network.to(memory_format=torch.contiguous_format)
    plain = with_gradients(pipe)
    rpf.accelerate(pipe)
    oracle.assert_as_exact_as_torch(with_gradients(pipe), plain, exact)


def test_encodes_the_same(pipeline: Any) -> None:
    vae = pipeline("bundled").vae.double()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    plain = vae.encode(images).latent_dist.mean
    rpf.accelerate(vae)
    torch.testing.assert_close(vae.encode(images).latent_dist.mean, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", ["train", "checkpointing"])
def test_trains_in_the_usual_modes(mode: str, pipeline: Any) -> None:
    """Training mode switches dropout on, of p = 0 here; checkpointing runs blocks twice."""
    pipe = cast(pipeline(), torch.float64)
    plain = with_gradients(pipe)
    rpf.accelerate(pipe)
    pipe.unet.train()
    if mode == "checkpointing":
        pipe.unet.enable_gradient_checkpointing()
    for found, expected in zip(with_gradients(pipe), plain, strict=True):
        assert oracle.relative_error(found, expected) < 1e-12


def test_autocast_runs_the_original_forward(pipeline: Any) -> None:
    pipe = pipeline()
    with torch.autocast("cpu", torch.bfloat16):
        plain = with_gradients(pipe)
        rpf.accelerate(pipe)
        fast = with_gradients(pipe)
    assert all(map(torch.equal, fast, plain))


def test_keeps_less_for_backward(pipeline: Any) -> None:
    pipe = pipeline("sd1", targets="attention")

    def kept() -> int:
        weights = {p.untyped_storage().data_ptr() for p in (*pipe.unet.parameters(),)}
        weights |= {p.untyped_storage().data_ptr() for p in pipe.vae.parameters()}
        tensors = oracle.kept_for_backward(lambda: outputs(pipe))
        return sum(
            tensor.untyped_storage().nbytes()
            for tensor in tensors
            if tensor.untyped_storage().data_ptr() not in weights
        )

    plain = kept()
    rpf.accelerate(pipe)
    assert kept() < 0.75 * plain


# --- what is swapped, and back ---


@pytest.mark.parametrize("kind", KINDS)
def test_restores_exactly(kind: str, pipeline: Any) -> None:
    pipe = pipeline(kind)
    before, tensors = classes(pipe), state(pipe)
    parameters = [id(p) for p in (*pipe.unet.parameters(), *pipe.vae.parameters())]
    images = outputs(pipe)
    report = rpf.accelerate(pipe)
    after = state(pipe)
    assert list(after) == list(tensors)
    outputs(pipe).sum().backward()
    assert all(torch.equal(after[name], tensors[name]) for name in tensors)
    assert [id(p) for p in (*pipe.unet.parameters(), *pipe.vae.parameters())] == parameters

    assert rpf.restore(pipe) == len(report.swapped)
    assert classes(pipe) == before
    assert torch.equal(outputs(pipe), images)
    assert rpf.ops.packed_bytes(pipe.unet) == 0
    assert rpf.restore(pipe) == 0


def test_swaps_everything_that_the_table_knows(pipeline: Any) -> None:
    report = rpf.accelerate(pipe := pipeline())
    assert report.left == {}
    originals = {line.original for line in table.REPLACEMENTS}
    remaining = {
        name
        for part in ("unet", "vae")
        for name, module in getattr(pipe, part).named_modules()
        if type(module) in originals and "lora_" not in name
    }
    assert remaining == set()
    kinds = set(report.swapped.values())
    assert kinds == {line.__name__ for line in table.ORIGINALS} - {"FastLoraConv2d"}
    assert report.swapped["unet.conv_norm_out"] == "FastGroupNormSiLU"
    assert report.swapped["unet.conv_act"] == "AbsorbedSiLU"
    assert report.swapped["vae.decoder.conv_act"] == "AbsorbedSiLU"
    assert "x FastResnetBlock2D" in str(report)


def test_a_second_call_changes_nothing(pipeline: Any) -> None:
    pipe = pipeline()
    first = rpf.accelerate(pipe)
    images, kinds = outputs(pipe), classes(pipe)
    second = rpf.accelerate(pipe)
    assert second.swapped == {}
    assert second.kept == first.swapped
    assert classes(pipe) == kinds
    assert torch.equal(outputs(pipe), images)
    assert f"{len(first.swapped)} were swapped before" in str(second)


def test_takes_a_single_network(pipeline: Any) -> None:
    pipe = pipeline()
    report = rpf.accelerate(pipe.vae.decoder)
    assert report.swapped["conv_norm_out"] == "FastGroupNormSiLU"
    assert all(type(m) not in table.ORIGINALS for m in pipe.unet.modules())
    assert rpf.restore(pipe) == len(report.swapped)


def test_refuses_what_holds_no_network() -> None:
    with pytest.raises(ModelError, match="dict is no torch module and has no unet or vae"):
        rpf.accelerate({})
    with pytest.raises(ModelError, match="has no unet or vae"):
        rpf.restore("unet")


def test_trained_weights_are_left_and_train_on(pipeline: Any) -> None:
    pipe = cast(pipeline(), torch.float64)
    # Not the first block: PyTorch's own GroupNorm crashes where its input needs no gradient.
    block = pipe.unet.up_blocks[0].resnets[0].requires_grad_(True)
    plain = with_gradients(pipe)
    report = rpf.accelerate(pipe)
    assert report.left["unet.up_blocks.0.resnets.0.conv1"] == "Conv2d: its weight is trained"
    assert type(block.norm1) is nn.GroupNorm
    for found, expected in zip(with_gradients(pipe), plain, strict=True):
        assert oracle.relative_error(found, expected) < 1e-12


def test_weights_thawed_later_get_their_gradients(pipeline: Any) -> None:
    pipe = cast(pipeline(targets=None), torch.float64)
    rpf.accelerate(pipe)
    pipe.unet.requires_grad_(True)
    fast = with_gradients(pipe)
    rpf.restore(pipe)
    for found, expected in zip(fast, with_gradients(pipe), strict=True):
        assert oracle.relative_error(found, expected) < 1e-12


def test_classes_of_ones_own_are_left(pipeline: Any) -> None:
    class OwnConv(nn.Conv2d):
        pass

    pipe = pipeline()
    pipe.unet.conv_in.__class__ = OwnConv
    pipe.unet.conv_out.forward = pipe.unet.conv_out.forward
    pipe.unet.up_blocks[0].resnets[0].time_embedding_norm = "scale_shift"
    left = rpf.accelerate(pipe).left
    assert left["unet.conv_in"] == "Conv2d: OwnConv is a subclass of it"
    assert left["unet.conv_out"] == "Conv2d: its forward has been replaced"
    assert left["unet.up_blocks.0.resnets.0"] == "ResnetBlock2D: its time embedding scales"
    assert type(pipe.unet.conv_in) is OwnConv


def test_an_activation_with_a_hook_is_not_absorbed(pipeline: Any) -> None:
    pipe = pipeline()
    seen: list[Tensor] = []
    pipe.unet.conv_act.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    outputs(pipe)
    rpf.accelerate(pipe)
    outputs(pipe)
    assert type(pipe.unet.conv_act) is nn.SiLU
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["norm1", "norm2", "nonlinearity", "conv1", "time_emb_proj", "conv_shortcut"]
)
def test_hooks_inside_a_block_are_called(name: str, pipeline: Any) -> None:
    pipe = pipeline()
    block = pipe.unet.up_blocks[0].resnets[0]
    rpf.accelerate(pipe)
    calls: list[str] = []
    getattr(block, name).register_forward_hook(lambda *_: calls.append(name))
    outputs(pipe)
    assert calls


# --- copies and files ---


def test_deep_copies_are_accelerated_and_independent(pipeline: Any) -> None:
    pipe = pipeline()
    rpf.accelerate(pipe)
    images = outputs(pipe)
    twin = copy.deepcopy(pipe)
    assert classes(twin) == classes(pipe)
    assert torch.equal(outputs(twin), images)
    with torch.no_grad():
        for parameter in twin.unet.parameters():
            parameter.mul_(1.5)
    assert not torch.equal(outputs(twin), images)
    assert torch.equal(outputs(pipe), images)
    rpf.restore(twin)
    assert classes(twin) != classes(pipe)


def test_state_is_saved_and_loaded_as_before(pipeline: Any) -> None:
    plain, fast = pipeline(), pipeline()
    rpf.accelerate(fast)
    outputs(fast)
    with torch.no_grad():
        for parameter in fast.unet.parameters():
            parameter.mul_(1.1)
    buffer = io.BytesIO()
    torch.save(fast.unet.state_dict(), buffer)
    buffer.seek(0)
    plain.unet.load_state_dict(torch.load(buffer))
    torch.testing.assert_close(outputs(plain), outputs(fast), rtol=1e-4, atol=1e-4)
    fast.unet.load_state_dict(pipeline().unet.state_dict())
    torch.testing.assert_close(outputs(pipeline()), outputs(fast), rtol=1e-4, atol=1e-4)


def test_a_model_is_cast_after_it_was_accelerated(pipeline: Any) -> None:
    pipe = pipeline()
    rpf.accelerate(pipe)
    outputs(pipe)
    fast = with_gradients(cast(pipe, torch.bfloat16))
    plain = with_gradients(cast(pipeline(), torch.bfloat16))
    exact = with_gradients(cast(pipeline(), torch.float64))
    oracle.assert_as_exact_as_torch(fast, plain, exact)


def test_save_pretrained_writes_the_plain_model(pipeline: Any, tmp_path: Any) -> None:
    pipe = pipeline(targets=None)
    rpf.accelerate(pipe)
    images = outputs(pipe)
    pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path)
    assert all(type(module) not in table.ORIGINALS for module in again.unet.modules())
    torch.testing.assert_close(outputs(again), images, rtol=1e-4, atol=1e-4)
