"""Attention with other processors, masks and keyword arguments, and blocks in one graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

import rewardprop_fast as rpf
from rewardprop_fast import ops
from rewardprop_fast.nn import blocks
from tests.nn.passes import outputs
from tests.ops import oracle


def attention(**options: Any) -> Attention:
    return Attention(32, heads=4, dim_head=8, **options).double().requires_grad_(False)


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of q in the calls of `ops.attention`."""
    shapes: list[torch.Size] = []
    original = ops.attention

    def spy(q: Tensor, *args: Any) -> Tensor:
        shapes.append(q.shape)
        return original(q, *args)

    monkeypatch.setattr(blocks.ops, "attention", spy)
    return shapes


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cross_attention_dim": 24},
        {"residual_connection": True, "rescale_output_factor": 2.0, "norm_num_groups": 4},
        {"bias": True, "out_dim": None, "dropout": 0.0},
    ],
)
@pytest.mark.parametrize("image", [False, True])
def test_is_diffusers_attention(
    options: dict[str, Any], image: bool, attended: list[torch.Size]
) -> None:
    module = attention(**options)
    x = torch.randn(2, 32, 3, 5).double() if image else torch.randn(2, 15, 32).double()
    if image:
        x = x.contiguous(memory_format=torch.channels_last)
    context = None
    if "cross_attention_dim" in options:
        context = torch.randn(2, 7, 24).double()

    def run() -> list[Tensor | None]:
        return oracle.output_and_gradients(
            lambda x, context: module(x, context), (x, context), torch.ones_like(x).cumsum(1)
        )

    plain = run()
    rpf.accelerate(module)
    for found, expected in zip(run(), plain, strict=True):
        if expected is not None:
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert attended == [torch.Size([2, 4, 15, 8])]


def test_a_mask_goes_to_diffusers_processor(attended: list[torch.Size]) -> None:
    module, x = attention(), torch.randn(2, 6, 32).double()
    mask = torch.zeros(2, 1, 6).double()
    mask[:, :, 3:] = -10000.0
    plain = module(x, attention_mask=mask)
    rpf.accelerate(module)
    assert torch.equal(module(x, attention_mask=mask), plain)
    assert attended == []


def test_a_processor_set_later_is_the_one_that_runs(
    pipeline: Any, attended: list[torch.Size]
) -> None:
    pipe = pipeline()
    rpf.accelerate(pipe)
    calls: list[int] = []

    class Own(AttnProcessor2_0):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return super().__call__(*args, **kwargs)

    pipe.unet.set_attn_processor(Own())
    outputs(pipe)
    assert len(calls) == len(pipe.unet.attn_processors)
    unet_calls = len(calls)
    attended.clear()
    pipe.unet.set_attn_processor(AttnProcessor2_0())
    outputs(pipe)
    assert len(calls) == unet_calls
    assert len(attended) == unet_calls + len(pipe.vae.attn_processors) // 2


def test_another_processor_is_left_and_reported(pipeline: Any) -> None:
    pipe = pipeline()
    pipe.unet.set_attn_processor(AttnProcessor())
    left = rpf.accelerate(pipe.unet).left
    assert set(left.values()) == {"Attention: its processor is AttnProcessor"}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"qk_norm": "layer_norm"}, "it has a norm_q"),
        ({"cross_attention_norm": "layer_norm"}, "it has a norm_cross"),
        ({"spatial_norm_dim": 4}, "it has a spatial_norm"),
        ({"added_kv_proj_dim": 8, "processor": AttnProcessor2_0()}, "it has a added_kv_proj_dim"),
    ],
)
def test_attention_of_other_models_is_left(options: dict[str, Any], reason: str) -> None:
    assert rpf.accelerate(attention(**options)).left[""] == f"Attention: {reason}"


def test_fused_projections_still_work(pipeline: Any) -> None:
    pipe = pipeline(targets=None)
    images = outputs(pipe)
    rpf.accelerate(pipe)
    pipe.fuse_qkv_projections(vae=False)
    torch.testing.assert_close(outputs(pipe), images, rtol=1e-3, atol=1e-3)


# --- in one graph ---


def fullgraph(module: nn.Module, *args: Any, **kwargs: Any) -> None:
    plain = module(*args, **kwargs)
    torch.compiler.reset()
    rpf.accelerate(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    found = compiled(*args, **kwargs)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)
    trained = [p for p in module.parameters() if p.requires_grad]
    leaves = [arg for arg in args if isinstance(arg, Tensor) and arg.requires_grad] + trained
    torch.testing.assert_close(
        torch.autograd.grad(found.sin().sum(), leaves),
        torch.autograd.grad(plain.sin().sum(), leaves),
        rtol=1e-3,
        atol=1e-4,
    )


def test_a_resnet_block_compiles_into_one_graph(pipeline: Any) -> None:
    block = pipeline().unet.up_blocks[0].resnets[0]
    x = torch.randn(2, block.in_channels, 8, 8).contiguous(memory_format=torch.channels_last)
    fullgraph(block, x.requires_grad_(), torch.randn(2, block.time_emb_proj.in_features))


def test_a_transformer_block_with_a_lora_compiles_into_one_graph(pipeline: Any) -> None:
    block = pipeline().unet.mid_block.attentions[0].transformer_blocks[0]
    tokens = torch.randn(2, 16, 16).requires_grad_()
    fullgraph(block, tokens, encoder_hidden_states=torch.randn(2, 7, 16))
