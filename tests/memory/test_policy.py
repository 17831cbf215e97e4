"""Plans at work: a training step's gradients to the last bit, and modules left as they were."""

from __future__ import annotations

import copy
import io
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewardprop_fast import ops
from rewardprop_fast.errors import ConfigError
from rewardprop_fast.memory import MemoryTracker, policy
from rewardprop_fast.memory.plan import Plan, Policy
from rewardprop_fast.memory.policy import Runner
from rewardprop_fast.memory.recompute import RecomputeError
from rewardprop_fast.memory.verify import DivergenceError
from rewardprop_fast.methods import AlignProp, DRaFT, DRaFTLV
from rewardprop_fast.methods.base import Method
from rewardprop_fast.nn import accelerate, restore
from rewardprop_fast.randomness import Draws, latents
from rewardprop_fast.training.config import SamplingConfig, TrainConfig
from rewardprop_fast.training.engine import Engine, negative_mean
from tests.memory.conftest import make_pipeline

STEPS = 3
KEEP, R = Policy.KEEP, Policy.RECOMPUTE
BLOCKS = {"transformer block": R, "resnet": R}
NESTED = {"step": R, "transformer block": R, "feed-forward": R, "attention": R}
DECODE = {"decoder block": R, "resnet": R, "attention": R}
REWARD = {"reward block": R}

PLANS = {
    "step": Plan(({"step": R},)),
    "transformer block": Plan(({"transformer block": R},)),
    "attention": Plan(({"attention": R},)),
    "feed-forward": Plan(({"feed-forward": R},)),
    "resnet": Plan(({"resnet": R},), {"resnet": R}),
    "decoder block": Plan(decode={"decoder block": R}),
    "reward block": Plan(reward=REWARD),
    "nested": Plan((NESTED,), DECODE, REWARD),
    "by step": Plan((NESTED, {"feed-forward": R}, {}), DECODE),
    "whole steps": Plan(({"resnet": R}, {"step": R, "feed-forward": R}, {"step": R, **BLOCKS})),
    "by name": Plan(({"unet.*": R, "unet.mid_block.*": KEEP},), {"*.resnets.0": R}),
}


class Judge(nn.Module):
    """A reward with layers, as rewards are."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.layers = nn.Sequential(
                nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.GELU()),
                nn.Sequential(nn.Conv2d(6, 6, 3, 2), nn.GELU()),
                nn.Conv2d(6, 1, 1),
            )
        self.requires_grad_(False)

    def forward(self, images: Tensor, prompts: list[str], metadata: list[Any]) -> Tensor:
        return self.layers(images.float()).flatten(1).mean(1)


def trained(pipe: Any) -> list[nn.Parameter]:
    return [p for p in pipe.unet.parameters() if p.requires_grad]


def step(pipe: Any, method: Method, reward: Any) -> list[Tensor]:
    """Loss, images and gradients of one training step, and the generator's state behind it."""
    sampling = SamplingConfig(steps=STEPS, guidance_scale=3.0, eta=0.5)
    config = TrainConfig(method=method, sampling=sampling, batch_size=1)
    engine = Engine(pipe, reward, config, negative_mean)
    draws = Draws(0, 1, (0,))
    torch.manual_seed(9)
    result = engine.step(["a red apple"], [{}], latents(0, 1, (0,), engine.latent_shape), draws)
    gradients = [p.grad for p in trained(pipe)]
    for p in trained(pipe):
        p.grad = None
    assert all(gradient is not None for gradient in gradients)
    return [result.loss, result.images, *gradients, torch.get_rng_state()]


@contextmanager
def at_work(plan: Plan, pipe: Any, reward: Any = None, **options: Any) -> Iterator[Any]:
    applied = policy.apply(plan, pipe.unet, pipe.vae, reward, **options)
    try:
        yield applied
    finally:
        applied.remove()


def arguments() -> tuple[Tensor, int, Tensor]:
    """Of the UNet."""
    generator = torch.Generator().manual_seed(3)
    sizes = ((1, 4, 8, 8), (1, 7, 16))
    sample, prompts = (torch.randn(size, generator=generator) for size in sizes)
    return sample, 5, prompts


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


# --- the same gradients ---


@pytest.fixture(scope="module")
def plainly() -> Callable[..., tuple[Any, Any, list[Tensor]]]:
    """A pipeline and a reward, and what a step of a method gives without a plan; made once each."""
    pipes: dict[Any, Any] = {}
    results: dict[Any, list[Tensor]] = {}
    reward = Judge()

    def make(
        method: Method, kind: str = "sd", dtype: torch.dtype = torch.float32
    ) -> tuple[Any, Any, list[Tensor]]:
        if (kind, dtype) not in pipes:
            pipes[kind, dtype] = make_pipeline(kind, dtype)
        pipe = pipes[kind, dtype]
        assert not runners(pipe.unet) + runners(pipe.vae) + runners(reward)
        if (kind, dtype, method) not in results:
            results[kind, dtype, method] = step(pipe, method, reward)
        return pipe, reward, results[kind, dtype, method]

    return make


@pytest.mark.parametrize("name", PLANS)
def test_every_kind_of_segment_and_several_within_each_other(plainly: Any, name: str) -> None:
    method = DRaFT(STEPS) if name in ("step", "nested", "whole steps") else DRaFT(1)
    pipe, reward, expected = plainly(method)
    assert sum(gradient.abs().max() > 0 for gradient in expected[2:-1]) == len(trained(pipe))
    with at_work(Plan.from_json(PLANS[name].to_json()), pipe, reward):
        assert equal(step(pipe, method, reward), expected)


@pytest.mark.parametrize("name", ["nested", "by step"])
def test_verify_finds_nothing_where_nothing_changed(plainly: Any, name: str) -> None:
    pipe, reward, expected = plainly(DRaFT(2))
    with at_work(PLANS[name], pipe, reward, verify=True):
        assert equal(step(pipe, DRaFT(2), reward), expected)


@pytest.mark.parametrize(
    ("kind", "dtype", "method", "name"),
    [
        ("sd", torch.float32, DRaFTLV(2), "nested"),
        ("sd", torch.float32, AlignProp(), "by step"),
        ("sd", torch.float32, AlignProp(trl_compat=True), "by step"),
        ("sd", torch.bfloat16, DRaFT(STEPS), "nested"),
        ("sd", torch.bfloat16, DRaFTLV(1), "by step"),
        ("sdxl", torch.float32, DRaFT(1), "nested"),
        ("sdxl", torch.float32, DRaFT(STEPS), "by step"),
        ("sdxl", torch.bfloat16, DRaFTLV(1), "nested"),
        ("sdxl", torch.bfloat16, AlignProp(), "by step"),
    ],
)
def test_every_method(
    plainly: Any, kind: str, dtype: torch.dtype, method: Method, name: str
) -> None:
    pipe, reward, expected = plainly(method, kind, dtype)
    with at_work(PLANS[name], pipe, reward):
        assert equal(step(pipe, method, reward), expected)


def test_modules_that_are_diffusers_own(pipeline: Any) -> None:
    pipe, reward = pipeline(fast=False), Judge()
    expected = step(pipe, DRaFT(1), reward)
    with at_work(Plan(({"step": R, **BLOCKS},), DECODE, REWARD), pipe, reward, verify=True):
        assert equal(step(pipe, DRaFT(1), reward), expected)


def test_dropout_draws_the_same_masks(pipeline: Any) -> None:
    pipe, reward = pipeline(), Judge()
    for module in pipe.unet.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
            module.train()  # this alone: the segments around it are in evaluation mode
    expected = step(pipe, DRaFT(2), reward)
    pipe.unet.eval()
    assert not equal(step(pipe, DRaFT(2), reward)[:1], expected[:1])
    pipe.unet.train()
    with at_work(PLANS["by step"], pipe, reward, verify=True):
        assert equal(step(pipe, DRaFT(2), reward), expected)
    with at_work(PLANS["nested"], pipe, reward):
        assert equal(step(pipe, DRaFT(2), reward), expected)


def test_a_loop_of_ones_own_with_autocast_and_gradients_added_up(pipeline: Any) -> None:
    pipe = pipeline()
    start, _, prompts = arguments()

    def loop() -> list[Tensor]:
        for scale in (1.0, 0.5):
            with torch.autocast("cpu", torch.bfloat16):
                x = start
                for _ in range(2):
                    x = (
                        x
                        + scale * pipe.unet(sample=x, timestep=5, encoder_hidden_states=prompts)[0]
                    )
                images = pipe.vae.decode(x).sample
            images.float().square().mean().backward()
        found = [p.grad for p in trained(pipe)]
        for p in trained(pipe):
            p.grad = None
        return found

    expected = loop()
    for name in ("nested", "by step"):
        with at_work(PLANS[name], pipe):
            assert equal(loop(), expected)


def test_backends_wished_for_at_the_call_are_those_of_the_second_run(
    pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, reward = pipeline(), Judge()
    monkeypatch.setenv("REWARDPROP_BACKEND", "reference")
    expected = step(pipe, DRaFT(2), reward)
    monkeypatch.delenv("REWARDPROP_BACKEND")
    with at_work(PLANS["nested"], pipe, reward, verify=True):
        with ops.backend("reference"):
            assert equal(step(pipe, DRaFT(2), reward), expected)
            y = pipe.unet(*arguments())[0]
        y.sum().backward()  # verify would find another backend's rounding


# --- which steps, which runs ---


class Calls:
    """Counts how often each module's own forward runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: type[nn.Module], method: str) -> None:
        self.count = 0
        original = getattr(kind, method)

        def counted(module: Any, *args: Any) -> Any:
            self.count += torch.is_grad_enabled()
            return original(module, *args)

        monkeypatch.setattr(kind, method, counted)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_each_step_has_its_own_rules(plainly: Any, monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    pipe, reward, _ = plainly(DRaFT(1))
    kind = type(pipe.unet.mid_block.attentions[0].transformer_blocks[0])
    calls, number = Calls(monkeypatch, kind, "feed_forward"), 7  # blocks in the UNet
    rules = [{}, {"feed-forward": R}, {"transformer block": R, "unet.mid_block.*": KEEP}]
    again = [0, number, number - 1]
    with at_work(Plan(tuple(rules)), pipe, reward):
        for _ in range(1 + (k == 2)):  # the second chain begins anew
            calls.count = 0
            step(pipe, DRaFT(k), reward)
            assert calls.count == k * number + sum(again[:k])


def test_steps_behind_the_last_rules_take_those(plainly: Any, monkeypatch: Any) -> None:
    pipe, reward, _ = plainly(DRaFT(1))
    kind = type(pipe.unet.mid_block.attentions[0].transformer_blocks[0])
    calls = Calls(monkeypatch, kind, "feed_forward")
    with at_work(Plan(({}, {"feed-forward": R})), pipe, reward):
        step(pipe, DRaFT(3), reward)
    assert calls.count == 7 * (3 + 2)


def test_an_exception_in_a_step_does_not_move_the_next_chain(
    plainly: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, reward, expected = plainly(DRaFT(2))
    with at_work(PLANS["by step"], pipe, reward) as applied:
        with monkeypatch.context() as patch:
            patch.setattr(pipe.vae.decoder.conv_out, "forward", _interrupted)
            with pytest.raises(KeyboardInterrupt):
                step(pipe, DRaFT(3), reward)
        assert applied.index == 2
        assert equal(step(pipe, DRaFT(2), reward), expected)
        assert applied.index == 1


def _interrupted(*_: Any) -> Any:
    raise KeyboardInterrupt


def test_without_gradients_nothing_is_done(pipeline: Any, monkeypatch: Any) -> None:
    pipe = pipeline()
    called: list[str] = []
    monkeypatch.setattr(policy, "recompute", lambda *a, name, **k: called.append(name))
    with at_work(PLANS["nested"], pipe) as applied, torch.no_grad():
        pipe.unet(*arguments())
        assert applied.index == -1
    assert called == []


def test_less_is_kept(pipeline: Any) -> None:
    pipe = pipeline("sdxl")

    def kept() -> int:
        with MemoryTracker() as tracker:
            tracker.count(pipe.unet)
            before = tracker.live_bytes
            added = {"text_embeds": torch.zeros(1, 16), "time_ids": torch.zeros(1, 6)}
            y = pipe.unet(
                torch.zeros(1, 4, 8, 8), 5, torch.zeros(1, 7, 32), added_cond_kwargs=added
            )[0]
            assert y.requires_grad
            return tracker.live_bytes - before

    plain = kept()
    found = []
    for rules in ({"attention": R}, {"transformer block": R}, BLOCKS, {"step": R}):
        with at_work(Plan((rules,)), pipe):
            found.append(kept())
    assert plain > found[0] > found[1] > found[2] > found[3]
    inputs = 4 * (4 * 64 + 7 * 32 + 16 + 6)
    assert found[3] == inputs + 4 * 4 * 64  # the arguments and the output


# --- where saved tensors go ---


class Away:
    """An offloader that only counts: by segment, what is sent there and comes back."""

    def __init__(self) -> None:
        self.sent: dict[str, int] = {}
        self.returned = 0

    @contextmanager
    def segment(self, name: str) -> Iterator[None]:
        def pack(tensor: Tensor) -> Tensor:
            self.sent[name] = self.sent.get(name, 0) + 1
            return tensor

        def unpack(tensor: Tensor) -> Tensor:
            self.returned += 1
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield


def test_offload_sends_what_is_saved_and_recompute_offload_the_inputs(plainly: Any) -> None:
    pipe, reward, expected = plainly(DRaFT(1))
    away = Away()
    block = "unet.mid_block.attentions.0.transformer_blocks.0"
    rules = {"transformer block": Policy.RECOMPUTE_OFFLOAD, block: KEEP, f"{block}.*": R}
    rules[f"{block}.feed_forward"] = Policy.OFFLOAD
    with at_work(Plan((rules,)), pipe, reward, offloader=away):
        assert equal(step(pipe, DRaFT(1), reward), expected)
    assert len(away.sent) == 7
    feed_forward = away.sent.pop(f"{block}.feed_forward")
    assert feed_forward > 2
    assert set(away.sent.values()) == {2}  # hidden_states, encoder_hidden_states
    assert away.returned == sum(away.sent.values()) + feed_forward


@pytest.mark.parametrize("inner", [Policy.OFFLOAD, Policy.RECOMPUTE_OFFLOAD, Policy.QUANTISE])
def test_a_second_run_sends_nothing_away_again(plainly: Any, inner: Policy) -> None:
    pipe, reward, expected = plainly(DRaFT(1))
    away, codec = Away(), Codec()
    alone = {"feed-forward": inner}
    with at_work(Plan((alone,)), pipe, reward, offloader=away, codec=codec):
        assert equal(step(pipe, DRaFT(1), reward), expected)
    once, encoded = dict(away.sent), codec.encoded
    assert sum(once.values()) + encoded > 0
    for outer in ({"transformer block": R}, {"step": R, "transformer block": R}):
        away.sent, codec.encoded = {}, 0
        with at_work(Plan(({**outer, **alone},)), pipe, reward, offloader=away, codec=codec):
            assert equal(step(pipe, DRaFT(1), reward), expected)
        assert (away.sent, codec.encoded) == (once, encoded)


class Codec:
    """Exact, so that gradients can be compared."""

    encoded = decoded = 0

    def encode(self, tensor: Tensor) -> tuple[Tensor]:
        self.encoded += 1
        return (tensor,)

    def decode(self, encoded: tuple[Tensor]) -> Tensor:
        self.decoded += 1
        return encoded[0]


def test_quantise_uses_the_codec(plainly: Any) -> None:
    (pipe, reward, expected), codec = plainly(DRaFT(1)), Codec()
    with at_work(Plan(({"feed-forward": Policy.QUANTISE},)), pipe, reward, codec=codec):
        assert equal(step(pipe, DRaFT(1), reward), expected)
    assert codec.encoded == codec.decoded > 6


# --- what goes wrong is said ---


def test_weights_that_change_in_between_are_named_with_their_segment(pipeline: Any) -> None:
    pipe = pipeline()
    block = pipe.unet.mid_block.attentions[0].transformer_blocks[0]
    with at_work(Plan(({"transformer block": R},)), pipe, verify=True):
        y = pipe.unet(*arguments())[0]
        with torch.no_grad():
            block.attn1.to_q.lora_A["default"].weight.add_(1)
        with pytest.raises(DivergenceError) as error:
            y.sum().backward()
    assert str(error.value).startswith(
        "The segment 'unet.mid_block.attentions.0.transformer_blocks.0' computed other values in "
        "aten.cat (operation "  # of the adapters of q, k and v
    )


@pytest.mark.parametrize(
    ("plan", "options", "message"),
    [
        (Plan(({"resnets": R},)), {}, "The plan's 'steps' has a rule for 'resnets', which names"),
        (Plan(decode={"feed-forward": R}), {}, "The plan's 'decode' has a rule for 'feed-forward'"),
        (Plan(reward=REWARD), {"reward": len}, r"'reward' has a rule for 'reward block'.*\(none\)"),
        (Plan(({}, {"step": Policy.OFFLOAD})), {}, "'steps' offloads, but there is no offloader"),
        (Plan(decode={"resnet": Policy.QUANTISE}), {}, "'decode' quantises, which needs a codec"),
    ],
)
def test_plans_that_cannot_be_applied(
    pipeline: Any, plan: Plan, options: dict[str, Any], message: str
) -> None:
    pipe = pipeline()
    with pytest.raises(ConfigError, match=message):
        policy.apply(plan, pipe.unet, pipe.vae, **options)
    assert not runners(pipe.unet) + runners(pipe.vae)


def test_rules_for_networks_that_are_not_given_do_not_count(pipeline: Any) -> None:
    pipe = pipeline()
    plan = Plan(({"nothing": Policy.OFFLOAD},), {"resnet": R}, REWARD)
    applied = policy.apply(plan, vae=pipe.vae)
    assert runners(pipe.vae)
    applied.remove()


def test_a_second_plan_is_refused_until_the_first_is_removed(pipeline: Any) -> None:
    pipe = pipeline()
    with at_work(Plan(decode={"decoder block": R}), pipe):
        with pytest.raises(ConfigError, match=r"A plan is at work in vae\.decoder"):
            policy.apply(Plan(decode={"resnet": R}), vae=pipe.vae)
        with at_work(Plan(({"resnet": R},)), Bare(pipe.unet)):  # another network
            pass
    with at_work(Plan(decode={"resnet": R}), pipe):
        pass


class Bare:
    vae = None

    def __init__(self, unet: Any) -> None:
        self.unet = unet


def test_a_backward_pass_behind_its_plan_is_refused(pipeline: Any) -> None:
    pipe = pipeline()
    with at_work(PLANS["nested"], pipe):
        y = pipe.unet(*arguments())[0]
    with pytest.raises(RecomputeError, match="plan was removed before the backward pass of unet"):
        y.sum().backward()


# --- modules are left as they were ---


def runners(root: nn.Module) -> list[Runner]:
    attributes = (value for module in root.modules() for value in vars(module).values())
    return [value for value in attributes if isinstance(value, Runner)]


def shapes(*roots: nn.Module) -> list[tuple[int, dict[str, int], type]]:
    return [
        (id(module), {key: id(value) for key, value in vars(module).items()}, type(module))
        for root in roots
        for module in root.modules()
    ]


def test_apply_and_remove_leave_no_trace(pipeline: Any) -> None:
    pipe, reward = pipeline(), Judge()
    pipe.vae.decoder.mid_block.forward = replaced = Wrapped(pipe.vae.decoder.mid_block)
    before = shapes(pipe.unet, pipe.vae, reward)
    with at_work(PLANS["nested"], pipe, reward):
        assert shapes(pipe.unet, pipe.vae, reward) != before
        step(pipe, DRaFT(1), reward)
        assert replaced.calls == 2  # once forward, and once again for the inputs of those inside
    assert shapes(pipe.unet, pipe.vae, reward) == before


class Wrapped:
    """A forward of somebody's own."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.calls = module, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return type(self.module).forward(self.module, *args, **kwargs)


def test_what_is_kept_is_not_touched(pipeline: Any) -> None:
    pipe, reward = pipeline(), Judge()
    with at_work(Plan(({"*": KEEP},), {"resnet": KEEP}), pipe, reward):
        assert not runners(pipe.unet) + runners(pipe.vae) + runners(reward)
    with at_work(Plan(({"resnet": R},) * 3), pipe, reward):
        assert {runner.segment.kind for runner in runners(pipe.unet)} == {"resnet"}
        assert not runners(pipe.vae)
    with at_work(Plan(({"resnet": R}, {})), pipe, reward):  # the UNet's own counts the steps
        assert {runner.segment.kind for runner in runners(pipe.unet)} == {"step", "resnet"}


def test_a_forward_put_around_the_plans_stays_when_the_plan_goes(pipeline: Any) -> None:
    pipe = pipeline()
    expected = pipe.unet(*arguments())[0].detach()
    applied = policy.apply(Plan(({"step": R},)), pipe.unet)
    inner = pipe.unet.forward

    def outer(*args: Any, **kwargs: Any) -> Any:  # what accelerate's hooks do
        return inner(*args, **kwargs)

    pipe.unet.forward = outer
    applied.remove()
    assert pipe.unet.forward is outer
    y = pipe.unet(*arguments())[0]
    assert torch.equal(y.detach(), expected)
    y.sum().backward()  # nothing is recomputed any more: that would be refused


def backward_of(unet: Any) -> list[Tensor]:
    parameters = [p for p in unet.parameters() if p.requires_grad]
    return list(torch.autograd.grad(unet(*arguments())[0].sin().sum(), parameters))


def test_copies_and_pickles_are_under_no_plan(pipeline: Any) -> None:
    name = "nested"
    pipe = pipeline()
    expected = backward_of(pipe.unet)
    keys = list(pipe.unet.state_dict())
    with at_work(PLANS[name], pipe):
        assert list(pipe.unet.state_dict()) == keys
        buffer = io.BytesIO()
        torch.save(pipe.unet, buffer)
        buffer.seek(0)
        copies = [
            copy.deepcopy(pipe.unet),
            pickle.loads(pickle.dumps(pipe.unet)),
            torch.load(buffer, weights_only=False),
        ]
        for made in copies:
            assert not runners(made)
            modules = set(made.modules())
            assert modules.isdisjoint(pipe.unet.modules())
            assert equal(backward_of(made), expected)
        assert equal(backward_of(pipe.unet), expected)
        block = copy.deepcopy(pipe.unet.mid_block)
        assert len(pickle.dumps(block)) < len(buffer.getvalue()) / 2  # not the whole network
    with at_work(PLANS[name], Bare(copies[0])):
        assert runners(copies[0])
        assert equal(backward_of(copies[0]), expected)
    assert not runners(copies[0])
    assert list(copies[0].state_dict()) == keys


def test_a_copy_takes_a_forward_of_somebodys_own_along(pipeline: Any) -> None:
    pipe = pipeline()
    block = pipe.unet.mid_block.resnets[0]
    block.forward = Wrapped(block)
    with at_work(Plan(({"resnet": R},)), pipe):
        made = copy.deepcopy(pipe.unet)
    forward = made.mid_block.resnets[0].forward
    assert isinstance(forward, Wrapped)
    assert forward.module is made.mid_block.resnets[0]


def test_restore_and_accelerate_while_a_plan_is_at_work(pipeline: Any) -> None:
    pipe, reward = pipeline(), Judge()
    fast = step(pipe, DRaFT(1), reward)
    restore(pipe)
    stock = step(pipe, DRaFT(1), reward)
    assert not equal(fast, stock)
    accelerate(pipe)
    before = shapes(pipe.unet, pipe.vae)
    with at_work(PLANS["nested"], pipe, reward):
        assert equal(step(pipe, DRaFT(1), reward), fast)
        restore(pipe)
        assert equal(step(pipe, DRaFT(1), reward), stock)  # what has its parts no more keeps them
        report = accelerate(pipe)
        assert set(report.left.values()) >= {
            "BasicTransformerBlock: its forward has been replaced",
            "ResnetBlock2D: its forward has been replaced",
        }
        step(pipe, DRaFT(1), reward)
    accelerate(pipe)
    assert shapes(pipe.unet, pipe.vae) == before
    assert equal(step(pipe, DRaFT(1), reward), fast)


def test_adapters_are_switched_while_a_plan_is_at_work(pipeline: Any) -> None:
    pipe = pipeline()
    with at_work(PLANS["nested"], pipe):
        pipe.unet.disable_adapters()
        plain = pipe.unet(*arguments())[0]
        pipe.unet.enable_adapters()
        assert not torch.equal(pipe.unet(*arguments())[0], plain)
        assert all(gradient.abs().max() > 0 for gradient in backward_of(pipe.unet))


def test_the_graph_goes_when_it_is_let_go_and_the_plan_keeps_nothing(pipeline: Any) -> None:
    pipe = pipeline()
    with at_work(PLANS["nested"], pipe):
        sample, timestep, prompts = arguments()
        gone = weakref.ref(sample.untyped_storage())
        y = pipe.unet(sample, timestep, prompts)[0]
        y.sum().backward()
        del sample, y
        assert gone() is None
