"""Every step that a GPU would capture may be captured, and what may not is refused in words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from rewardprop_fast import lora, models, ops
from rewardprop_fast.lora.inject import adapter_layers
from rewardprop_fast.nn import accelerate, blocks
from rewardprop_fast.rollout import Sampler, graph
from rewardprop_fast.rollout.graph import CaptureError, Strict
from tests.memory.conftest import make_pipeline
from tests.rollout.chains import T, latents, sampler_of

#: Without gradient, of T.
STEPS = 2


def called(sampler: Sampler, x: Tensor) -> Tensor:
    return sampler.run(x, 0, STEPS, gradients=False)


def replayed(sampler: Sampler, x: Tensor, strict: Strict) -> Tensor:
    return replace(sampler, graphs=strict).run(x, 0, STEPS, gradients=False)


def bundled(dtype: torch.dtype = torch.float32) -> Any:
    pipe = models.load_pipeline("bundled", dtype=dtype)
    pipe.unet.requires_grad_(False)
    lora.inject(pipe.unet, rank=2)
    accelerate(pipe)
    return pipe


PIPELINES: dict[str, Callable[..., Any]] = {
    "sd": make_pipeline,
    "sdxl": lambda dtype=torch.float32: make_pipeline("sdxl", dtype),
    "bundled": bundled,
}


@pytest.mark.parametrize("kind", PIPELINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replays_are_calls_to_the_last_bit(kind: str, dtype: torch.dtype) -> None:
    pipe = make_pipeline("sd", dtype) if kind == "sd" else PIPELINES[kind](dtype=dtype)
    sampler, x, strict = sampler_of(pipe), latents(pipe), Strict()
    expected = called(sampler, x)
    for _ in range(2):
        assert torch.equal(replayed(sampler, x, strict), expected)
    assert (strict.captures, strict.replays) == (1, 2 * STEPS)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_run_with_all_that_happens_in_it(kind: str) -> None:
    pipe, strict = make_pipeline(kind), Strict()
    sampler, x = sampler_of(pipe), latents(pipe)
    seen = [replayed(sampler, x, strict)]

    def check(sampler: Sampler, x: Tensor, captures: int) -> None:
        result = replayed(sampler, x, strict)
        assert torch.equal(result, called(sampler, x))
        assert not any(torch.equal(result, other) for other in seen)
        seen.append(result)
        assert strict.captures == captures

    # an update, in place
    optimizer = torch.optim.AdamW(lora.lora_parameters(pipe.unet).values(), lr=0.05)
    replace(sampler, graphs=strict).run(x, T - 1, T, gradients=True).square().sum().backward()
    optimizer.step()
    check(sampler, x, 1)
    # other guidance, other prompts, other noise
    check(replace(sampler, guidance_scale=5.0), x, 1)
    conditioning = replace(sampler.conditioning, positive=sampler.conditioning.positive + 1)
    check(replace(sampler, conditioning=conditioning), x, 1)
    check(sampler, x + 1, 1)
    # other values of the adapter, in place
    state = {name: 1.5 * tensor for name, tensor in lora.lora_state_dict(pipe.unet).items()}
    lora.load_lora_state_dict(pipe.unet, state)
    check(sampler, x, 1)
    # another strength; none
    lora.set_strength(pipe.unet, 0.5)
    check(sampler, x, 2)
    pipe.unet.disable_adapters()
    check(sampler, x, 3)
    pipe.unet.enable_adapters()
    # another adapter beside it
    layer = next(name for name in adapter_layers(pipe.unet) if name.endswith("to_q"))
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=[layer], init_lora_weights=False), "more")
    accelerate(pipe)
    check(sampler, x, 4)
    # a weight in other memory
    weight = pipe.unet.conv_in.weight
    weight.data = weight.data.clone() * 1.5
    check(sampler, x, 5)
    # other batches, without and with noise of its own, without guidance
    check(sampler_of(pipe, 1), latents(pipe, 1), 6)
    check(sampler_of(pipe, eta=1.0), x, 7)
    check(sampler_of(pipe, guided=False), x, 8)
    # and the first again
    assert torch.equal(replayed(sampler, x, strict), called(sampler, x))


def test_the_reference_of_every_operator_may_be_captured() -> None:
    pipe, strict = make_pipeline(), Strict(inside=True)
    sampler, x = sampler_of(pipe), latents(pipe)
    with ops.backend("reference"):
        assert torch.equal(replayed(sampler, x, strict), called(sampler, x))
    (program,) = strict._programs.values()
    names = [operation.name for operation in program.graph.script]
    last = names.index("rewardprop_fast.guided_ddim_step.default")
    assert names[last + 1 :].count("aten.mul.Tensor") == 2  # a x + b eps


def test_diffusers_own_modules_may_be_captured() -> None:
    pipe, strict = make_pipeline(fast=False), Strict()
    sampler, x = sampler_of(pipe), latents(pipe)
    assert torch.equal(replayed(sampler, x, strict), called(sampler, x))
    assert strict.captures == 1


MIXED = {
    "item": lambda x: x * x.mean().item(),
    "if": lambda x: x if x.mean() > 10 else x + 0,
    "tolist": lambda x: x + len(x.flatten().tolist()),
    "numpy": lambda x: x + float(x.numpy().mean()),
    "to cpu": lambda x: x.to("cpu") + 0,
    "cpu": lambda x: x.cpu() + 0,
    "nonzero": lambda x: x + x.nonzero().shape[0],
    "mask": lambda x: x + x[x > 0].sum(),
    "masked_select": lambda x: x + x.masked_select(x > 0).sum(),
    "unique": lambda x: x + x.unique().shape[0],
    "randn": lambda x: x + torch.randn_like(x),
    "dropout": lambda x: nn.functional.dropout(x, 0.5, True),
    "tensor": lambda x: x + torch.tensor([1.0]),
}


@pytest.mark.parametrize(
    ("what", "operation", "reason"),
    [
        ("item", "Tensor.item", "reads a value on the host"),
        ("if", "Tensor.__bool__", "reads a value on the host"),
        ("tolist", "Tensor.tolist", "reads a value on the host"),
        ("numpy", "Tensor.numpy", "reads a value on the host"),
        ("to cpu", 'Tensor.to("cpu")', "copies between host and device"),
        ("cpu", "Tensor.cpu", "reads a value on the host"),
        ("nonzero", "aten.nonzero.default", "depends on values"),
        ("mask", "aten.index.Tensor", "depends on values"),
        ("masked_select", "aten.masked_select.default", "depends on values"),
        ("unique", "aten._unique2.default", "depends on values"),
        ("randn", "aten.randn_like.default", "random numbers"),
        ("dropout", "aten.bernoulli_.float", "random numbers"),
        ("tensor", "aten.lift_fresh.default", "upload from the host"),
    ],
)
def test_what_may_not_be_captured_is_named(
    what: str, operation: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = make_pipeline()
    plain = blocks.FastUpsample2D.forward

    def mixed(self: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return plain(self, MIXED[what](hidden), *args, **kwargs)

    monkeypatch.setattr(blocks.FastUpsample2D, "forward", mixed)
    with pytest.raises(CaptureError) as error:
        replayed(sampler_of(pipe), latents(pipe), Strict())
    text = str(error.value)
    assert text.startswith(f"{operation} in up_blocks.")
    assert ".upsamplers.0 cannot be part of a captured step: " in text
    assert reason in text


def test_the_dispatcher_alone_finds_a_value_that_is_read_on_the_host() -> None:
    """Where it is C++ that reads it, and no method of a tensor's."""
    pipe = make_pipeline()
    pipe.unet.conv_norm_out.register_buffer("one", torch.ones(()))
    plain = type(pipe.unet.conv_norm_out).forward

    class Reading(type(pipe.unet.conv_norm_out)):
        def forward(self, x: Tensor) -> Tensor:
            torch.ops.aten._local_scalar_dense(self.one)
            return plain(self, x)

    Reading.__module__ = "rewardprop_fast.tests"
    pipe.unet.conv_norm_out.__class__ = Reading
    with pytest.raises(CaptureError, match=r"_local_scalar_dense.default in conv_norm_out"):
        replayed(sampler_of(pipe), latents(pipe), Strict())


def test_a_tensor_from_nowhere_and_a_write_to_a_weight_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipe, stranger = make_pipeline(), torch.ones(())
    sampler, x = sampler_of(pipe), latents(pipe)
    plain = blocks.FastUpsample2D.forward
    with monkeypatch.context() as patch:
        patch.setattr(blocks.FastUpsample2D, "forward", lambda s, h, *_: plain(s, h * stranger))
        with pytest.raises(CaptureError, match=r"aten.mul.Tensor in up_blocks.*neither a static"):
            replayed(sampler, x, Strict())
    with monkeypatch.context() as patch:
        patch.setattr(
            blocks.FastUpsample2D, "forward", lambda s, h, *_: plain(s, h + s.conv.bias.mul_(1)[0])
        )
        with pytest.raises(CaptureError, match=r"writes to weight up_blocks.*conv.bias"):
            replayed(sampler, x, Strict())


def test_a_step_that_goes_another_way_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers that Python tells, operations that come and go: a replay would not know of them."""
    pipe = make_pipeline()
    sampler, x = sampler_of(pipe), latents(pipe)
    plain, calls = blocks.FastUpsample2D.forward, [0]

    def factor(scale: Callable[[int], float]) -> None:
        def forward(self: Any, hidden: Tensor, *args: Any) -> Tensor:
            calls[0] += 1
            return plain(self, hidden * scale(calls[0]), *args)

        monkeypatch.setattr(blocks.FastUpsample2D, "forward", forward)

    factor(lambda count: 1.0 + count // 5)
    with pytest.raises(
        CaptureError,
        match=r"aten.mul.Tensor in up_blocks.*is told .\d.0.; when it was captured, .\d.0",
    ):
        replayed(sampler, x, Strict())

    def more(self: Any, hidden: Tensor, *args: Any) -> Tensor:
        calls[0] += 1
        return plain(self, hidden.abs() if calls[0] > 3 else hidden, *args)

    calls[0] = 0
    monkeypatch.setattr(blocks.FastUpsample2D, "forward", more)
    with pytest.raises(CaptureError, match=r"is aten.abs.default in up_blocks.*; when it was"):
        replayed(sampler, x, Strict())


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[Any, Tensor], None]]:
    """Functions that see each replay of a strict graph and what it gave."""
    watchers: list[Callable[[Any, Tensor], None]] = []
    plain = graph.strict._StrictGraph.replay

    def replay(self: Any) -> Tensor:
        output = plain(self)
        for watcher in watchers:
            watcher(self, output)
        return output

    monkeypatch.setattr(graph.strict._StrictGraph, "replay", replay)
    return watchers


def test_a_weight_that_moves_within_a_chain_is_refused(replays: list[Any]) -> None:
    pipe = make_pipeline()
    weight = pipe.unet.conv_in.weight

    def move(*_: Any) -> None:
        weight.data = weight.data.clone()

    replays.append(move)
    with pytest.raises(CaptureError, match=r"conv_in.weight has been given other memory"):
        replayed(sampler_of(pipe), latents(pipe), Strict())


def test_what_is_not_copied_and_what_is_read_too_late_is_nan(replays: list[Any]) -> None:
    pipe, strict = make_pipeline(), Strict()
    outputs: list[Tensor] = []

    def look(found: Any, output: Tensor) -> None:
        assert output.isfinite().all()
        assert all(earlier.isnan().all() for earlier in outputs)
        outputs.append(output)
        spent = {name for name, tensor in found.buffers.items() if tensor.isnan().any()}
        assert spent == {"latents", "coefficients", "embedding", "rows"}

    replays.append(look)
    result = replayed(sampler_of(pipe), latents(pipe), strict)
    assert result.isfinite().all()
    assert len(outputs) == STEPS
    assert outputs[-1].isnan().all()
    (program,) = strict._programs.values()
    floating = [t for t in program.buffers.values() if t.is_floating_point()]
    assert all(tensor.isnan().all() for tensor in floating)


def test_on_a_gpu_nothing_would_leave_the_device() -> None:
    """Meta tensors stand for a GPU's: a copy to the host is one to another device there."""
    from rewardprop_fast.rollout.graph.unet_state import UNetState
    from rewardprop_fast.rollout.graph.watching import Watch
    from rewardprop_fast.rollout.hoisting import hoist, without_time

    for kind in ("sd", "sdxl"):
        pipe = make_pipeline(kind)
        sampler, unet = sampler_of(pipe), pipe.unet.to("meta")
        schedule, conditioning = sampler.schedule.to("meta"), sampler.conditioning.to("meta")
        with torch.no_grad():
            conditions = hoist(
                unet, schedule.timesteps, conditioning.embeddings(), conditioning.added()
            )
            step, shared = graph.Step.of(unet, conditions, None)
            assert conditions.moments is not None
            moment = conditions.moments[0]
            told = {
                **shared,
                "latents": latents(pipe).to("meta"),
                "timestep": schedule.timesteps[0],
                "coefficients": schedule.coefficients[0],
                "embedding": moment.embedding,
                "rows": moment.rows,
                "guidance": torch.ones((), device="meta"),
            }
            state = UNetState.of(unet)
            watch = Watch(told, state)
            with without_time(unet, conditions), watch():
                output = step(told)
        assert output.shape == latents(pipe).shape
        assert len(watch.operations) > 100
