"""The transformer block in three parts, against diffusers' own block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor

import rewardprop_fast as rpf
from rewardprop_fast import lora
from rewardprop_fast.nn.blocks import FastBasicTransformerBlock
from tests.nn.passes import fill

PARTS = ("self_attention", "cross_attention", "feed_forward")


def block(**options: Any) -> BasicTransformerBlock:
    settings = {"cross_attention_dim": 24, **options}
    made = BasicTransformerBlock(32, 4, 8, **settings).double().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():  # norms of their own too, not 1 and 0
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).double()
    return made


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, context = (
        torch.randn(2, 15, 32, generator=generator),
        torch.randn(2, 7, 24, generator=generator),
    )
    return x.double().requires_grad_(), context.double().requires_grad_()


def run(module: Any, **options: Any) -> list[Tensor]:
    x, context = inputs()
    output = module(x, encoder_hidden_states=context, **options)
    weights = torch.ones_like(output).cumsum(1)
    gradients = torch.autograd.grad((output * weights).sum(), [x, context], allow_unused=True)
    return [output.detach(), *(g for g in gradients if g is not None)]


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which parts were called."""
    called: list[str] = []

    def spy(name: str) -> Callable[..., Any]:
        original = getattr(FastBasicTransformerBlock, name)

        def method(module: Any, *args: Any) -> Any:
            called.append(name)
            return original(module, *args)

        return method

    for name in PARTS:
        monkeypatch.setattr(FastBasicTransformerBlock, name, spy(name))
    return called


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"only_cross_attention": True},
        {"double_self_attention": True, "cross_attention_dim": None},
        {"attention_bias": True, "activation_fn": "gelu", "norm_elementwise_affine": False},
        {"upcast_attention": True, "final_dropout": True},
    ],
)
def test_is_diffusers_block(options: dict[str, Any], parts: list[str]) -> None:
    module = block(**options)
    if options.get("double_self_attention"):
        # its second attention has keys of the block's own width and gets what is given
        x, _ = inputs()
        plain = module(x)
        rpf.accelerate(module)
        assert_close([module(x)], [plain])
    else:
        plain = run(module)
        assert rpf.accelerate(module).swapped[""] == "FastBasicTransformerBlock"
        assert_close(run(module), plain)
    assert parts == list(PARTS)


def test_parts_may_be_called_by_themselves(parts: list[str]) -> None:
    module = block()
    rpf.accelerate(module)
    x, context = inputs()
    whole = module(x, encoder_hidden_states=context)
    one_by_one = module.self_attention(x, None)
    one_by_one = module.cross_attention(one_by_one, context)
    assert torch.equal(module.feed_forward(one_by_one), whole)
    assert parts == 2 * list(PARTS)


@pytest.mark.parametrize(
    "options",
    [
        {"attention_mask": torch.zeros(2, 1, 15).double()},
        {"encoder_attention_mask": torch.tensor(2 * [[[0.0] * 4 + [-1e4] * 3]]).double()},
        {"cross_attention_kwargs": {"scale": 1.0}},
    ],
)
def test_what_it_does_not_cover_runs_as_diffusers_block(
    options: dict[str, Any], parts: list[str]
) -> None:
    module = block()
    plain = run(module, **options)
    rpf.accelerate(module)
    assert_close(run(module, **options), plain)
    assert parts == []


def test_chunked_feed_forward_runs_as_diffusers_block(parts: list[str]) -> None:
    module = block()
    plain = run(module)
    rpf.accelerate(module)
    module.set_chunk_feed_forward(5, dim=1)
    assert_close(run(module), plain)
    assert parts == []
    module.set_chunk_feed_forward(None)
    run(module)
    assert parts == list(PARTS)


def test_a_timestep_and_class_labels_make_no_difference(parts: list[str]) -> None:
    module = block()
    plain = run(module, timestep=torch.tensor([3, 4]), class_labels=torch.tensor([1, 1]))
    rpf.accelerate(module)
    assert_close(run(module, timestep=torch.tensor([3, 4]), class_labels=None), plain)
    assert parts == list(PARTS)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"norm_type": "ada_norm", "num_embeds_ada_norm": 4}, "its normalisation is ada_norm"),
        (
            {"positional_embeddings": "sinusoidal", "num_positional_embeddings": 20},
            "it adds positions",
        ),
        ({"cross_attention_dim": None}, "it has no cross-attention"),
        ({"attention_type": "gated"}, "it attends to grounding boxes"),
    ],
)
def test_blocks_of_other_models_are_left(options: dict[str, Any], reason: str) -> None:
    module = block(**options)
    assert rpf.accelerate(module).left[""] == f"BasicTransformerBlock: {reason}"
    assert type(module) is BasicTransformerBlock


def test_there_and_back(pipeline: Any) -> None:
    pipe = pipeline()
    module = pipe.unet.mid_block.attentions[0].transformer_blocks[0]
    keys = list(module.state_dict())
    rpf.accelerate(pipe)
    assert type(module) is FastBasicTransformerBlock
    assert list(module.state_dict()) == keys
    rpf.restore(pipe)
    assert type(module) is BasicTransformerBlock


def test_an_adapter_added_later_is_trained(pipeline: Any) -> None:
    pipe = pipeline(targets=None)
    rpf.accelerate(pipe)
    lora.inject(pipe.unet, rank=2, target_modules="all-linear")
    fill(pipe.unet)
    module = pipe.unet.mid_block.attentions[0].transformer_blocks[0]
    x, context = torch.randn(2, 9, 16), torch.randn(2, 7, 16)
    trained = [p for p in module.parameters() if p.requires_grad]
    found = []
    for change in (lambda _: None, rpf.accelerate, rpf.restore):
        change(pipe)
        output = module(x, encoder_hidden_states=context)
        found.append([output.detach(), *torch.autograd.grad(output.sin().sum(), trained)])
    torch.testing.assert_close(found[0], found[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], found[2], rtol=1e-4, atol=1e-5)


# --- what the LoRA layers keep of their normalisation ---


def adapted_block(pipeline: Any) -> tuple[Any, Any]:
    pipe = pipeline(targets="all-linear")
    rpf.accelerate(pipe)
    return pipe, pipe.unet.mid_block.attentions[0].transformer_blocks[0]


@pytest.fixture
def normed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each call of `ops.layer_norm_lora_linears` took."""
    found: list[int] = []
    original = rpf.ops.layer_norm_lora_linears

    def spy(x: Any, weight: Any, bias: Any, eps: Any, layers: Any, *args: Any) -> Any:
        found.append(len(layers))
        return original(x, weight, bias, eps, layers, *args)

    monkeypatch.setattr(rpf.ops, "layer_norm_lora_linears", spy)
    return found


def block_gradients(module: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    x, context = (
        torch.randn(2, 9, 16, generator=generator),
        torch.randn(2, 7, 16, generator=generator),
    )
    x.requires_grad_()
    output = module(x, encoder_hidden_states=context)
    trained = [x, *(p for p in module.parameters() if p.requires_grad)]
    gradients = torch.autograd.grad(output.sin().sum(), trained, allow_unused=True)
    return [output.detach(), *(g for g in gradients if g is not None)]


def test_normalisations_are_made_again_bitwise(
    pipeline: Any, normed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, module = adapted_block(pipeline)
    found = block_gradients(module)
    assert normed == [3, 1, 1]  # q, k and v; q; the gate
    monkeypatch.setattr("rewardprop_fast.nn.lora._is_made_again", lambda *_: False)
    normed.clear()
    expected = block_gradients(module)
    assert normed == []
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("change", ["hook", "trained", "replaced"])
def test_a_normalisation_that_does_more_is_called(
    pipeline: Any, normed: list[int], number: int, change: str
) -> None:
    _, module = adapted_block(pipeline)
    expected = block_gradients(module)
    norm = getattr(module, f"norm{number}")
    calls: list[int] = []
    if change == "hook":
        norm.register_forward_hook(lambda *_: calls.append(1))
    elif change == "trained":
        norm.weight.requires_grad_()
    else:
        norm.forward = lambda x: (calls.append(1), type(norm).forward(norm, x))[1]
    normed.clear()
    found = block_gradients(module)
    assert len(normed) == 2
    assert bool(calls) == (change != "trained")
    assert torch.equal(found[0], expected[0])
    if change != "trained":
        assert all(map(torch.equal, found, expected))
    else:
        assert len(found) == len(expected) + 1


def test_hooks_on_attention_and_gate_see_what_diffusers_gives_them(
    pipeline: Any, normed: list[int]
) -> None:
    _, module = adapted_block(pipeline)
    expected = block_gradients(module)
    seen: list[Tensor] = []
    for part in (module.attn1, module.attn2, module.ff):
        part.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    normed.clear()
    found = block_gradients(module)
    assert all(map(torch.equal, found, expected))
    assert normed == []
    for tensor in seen:  # normalised: of mean 0 and variance 1 up to weights of 1 and 0
        torch.testing.assert_close(tensor.mean(-1), torch.zeros(2, 9), atol=1e-5, rtol=0)
    assert len(seen) == 3


def test_other_processors_adapters_and_autocast_take_the_plain_way(
    pipeline: Any, normed: list[int]
) -> None:
    pipe, module = adapted_block(pipeline)

    def count() -> int:
        normed.clear()
        block_gradients(module)
        return len(normed)

    assert count() == 3
    with torch.autocast("cpu", torch.bfloat16):
        assert count() == 0
    pipe.unet.disable_adapters()
    assert count() == 0
    pipe.unet.enable_adapters()
    module.attn1.to_q.merge()
    assert count() == 2
    module.attn1.to_q.unmerge()
    module.attn2.processor = OwnProcessor()
    assert count() == 2
    with torch.no_grad():
        normed.clear()
        module(torch.randn(2, 9, 16), encoder_hidden_states=torch.randn(2, 7, 16))
        assert normed == []


class OwnProcessor(AttnProcessor2_0):
    pass
