"""Offloading against the same run without it, to the last bit."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from rewardprop_fast import lora
from rewardprop_fast.memory import MemoryTracker
from rewardprop_fast.memory.offload import Offloader, OffloadError
from rewardprop_fast.memory.plan import Plan, Policy
from rewardprop_fast.memory.policy import apply
from rewardprop_fast.memory.recompute import recompute
from rewardprop_fast.models.random_init import tiny_stable_diffusion
from rewardprop_fast.nn import accelerate
from tests.memory.offloads import MIB, assert_same, blocks_as_segments, double

KIB = 1024


def offloader(least_bytes: int = 0, slab_bytes: int = 8 * MIB, **settings: object) -> Offloader:
    return Offloader(double(), slab_bytes, least_bytes, **settings)  # type: ignore[arg-type]


def chain(x: Tensor, weights: list[Tensor], away: Offloader) -> Tensor:
    for number, weight in enumerate(weights):
        with away.segment(f"layer {number}"):
            x = torch.tanh(x @ weight).exp()
    return x.sum()


@pytest.mark.parametrize("window", [0, 1, 3])
@pytest.mark.parametrize("stash", [0, 1, 2])
@pytest.mark.parametrize("lockstep", [False, True])
def test_gradients_are_those_without_it(window: int, stash: int, lockstep: bool) -> None:
    weights = [torch.randn(64, 64, requires_grad=True) for _ in range(6)]
    x = torch.randn(96, 64, requires_grad=True)
    loss = chain(x, weights, offloader(least_bytes=2**40))
    expected = torch.autograd.grad(loss, [x, *weights])
    device = double(lockstep=lockstep)
    away = Offloader(device, MIB, 0, window=window, stash=stash, verify=True)
    for _ in range(2):
        assert_same(torch.autograd.grad(chain(x, weights, away), [x, *weights]), expected)
        assert device.device_bytes_now == 0
        assert away.scheduler.slab.used == 0
    numbers = away.statistics()
    assert numbers.bytes_out >= numbers.bytes_back > 0
    assert (numbers.bytes_out > numbers.bytes_back) == (stash > 0)  # the last ones never leave
    assert numbers.peak_host_bytes <= MIB
    assert numbers.stayed_bytes == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fast", [False, True])
def test_a_unet_with_lora_and_every_block_a_segment(dtype: torch.dtype, fast: bool) -> None:
    pipe = tiny_stable_diffusion()
    unet = pipe.unet.requires_grad_(False).to(dtype)
    lora.inject(unet, 4, 4, "attention", seed=1)
    parameters = lora.lora_parameters(unet)
    for parameter in parameters.values():  # B begins as zeros, and A's gradient with it
        parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
    if fast:
        accelerate(pipe)
    blocks: dict[str, nn.Module] = {"mid": unet.mid_block}
    blocks |= {f"down {i}": block for i, block in enumerate(unet.down_blocks)}
    blocks |= {f"up {i}": block for i, block in enumerate(unet.up_blocks)}
    latents = torch.randn(2, 4, 8, 8, dtype=dtype, requires_grad=True)
    context = torch.randn(2, 5, 16, dtype=dtype)

    def step() -> list[Tensor]:
        x = latents
        for timestep in (400, 200):  # two calls, so that LoRA's gradients add up over both
            x = x - 0.1 * unet(x, torch.tensor(timestep), context).sample
        return list(torch.autograd.grad(x.square().sum(), [latents, *parameters.values()]))

    expected = step()
    assert any(grad.abs().max() > 0 for grad in expected)
    away = offloader(verify=True)
    with blocks_as_segments(blocks, away.segment):
        assert_same(step(), expected)
    numbers = away.statistics()
    assert numbers.bytes_back > 100 * KIB


def test_memory_is_let_go_of_in_between() -> None:
    """Five layers of 1 MiB: without offloading all are there when the backward pass begins."""
    weights = [torch.randn(512, 512) / 32 for _ in range(5)]
    x = torch.randn(512, 512, requires_grad=True)

    def peak(away: Offloader) -> int:
        with MemoryTracker() as tracker:
            tracker.count([x, *weights])
            y = x
            for number, weight in enumerate(weights):
                with away.segment(f"layer {number}"):
                    y = torch.tanh(y @ weight)
            after_forward = tracker.live_bytes
            y.sum().backward()
        return after_forward - 6 * MIB

    assert peak(offloader(least_bytes=2**40)) == 5 * MIB
    # no values: the host's slab is no tensor, so the tracker does not see it
    away = Offloader(double(values=False), 8 * MIB, 0, never=weights)
    # tanh's results: one is there in the stash, that of the last segment, which `y` is as well
    assert peak(away) == MIB
    assert away.statistics().peak_host_bytes == 5 * MIB


def test_each_storage_goes_once() -> None:
    away = offloader()
    x = torch.randn(16, 32, requires_grad=True)
    with away.segment("first"):
        y = x.exp()  # saves y
        z = y[:, 1:] * y.t()[2:, :].t().sum()  # saves views of it
    with away.segment("second"):
        w = (y * y).sum() + z.sum()
    assert away.statistics().bytes_out <= y.numel() * 4 + 2 * 64
    expected = torch.autograd.grad(w, x, retain_graph=True)
    del y
    assert_same(torch.autograd.grad(w, x), expected)


def test_views_keep_their_strides_and_nothing_is_copied_densely() -> None:
    seen: list[tuple[torch.Size, tuple[int, ...], int]] = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):  # type: ignore[no-untyped-def]
            ctx.save_for_backward(*tensors)
            return tensors[0].sum()

        @staticmethod
        def backward(ctx, grad):  # type: ignore[no-untyped-def]
            seen.extend((t.shape, t.stride(), t.storage_offset()) for t in ctx.saved_tensors)
            assert_same(ctx.saved_tensors, given)
            return (None,) * len(ctx.saved_tensors)

    base = torch.randn(2, 3, 4, 5)
    given = [
        base.to(memory_format=torch.channels_last).requires_grad_().mul(1),
        torch.randn(4, 6)[1:, ::2],
        torch.randn(5, 1).expand(5, 10_000),
        torch.randn(6, 4).t(),
        torch.randn(3).view(torch.int32),
        torch.arange(3) > 1,
        torch.randn(()),
        torch.randn(7, dtype=torch.float64).view(torch.float32)[3:],
    ]
    away = Offloader(double(), MIB, 0, stash=0, verify=True)
    with away.segment("views"):
        loss = Look.apply(*given)
    loss.backward()
    assert seen == [(t.shape, t.stride(), t.storage_offset()) for t in given]
    assert away.statistics().bytes_out == sum(t.untyped_storage().nbytes() for t in given)
    assert away.statistics().bytes_out < 4000


def test_parameters_and_what_is_small_or_named_stay() -> None:
    frozen = nn.Parameter(torch.randn(64, 64), requires_grad=False)
    trained = nn.Parameter(torch.randn(64, 64))
    leaf = torch.randn(64, 64, requires_grad=True)
    constant, module = torch.randn(64, 64), nn.BatchNorm1d(64).eval()
    constant_view = constant.detach().t()
    away = offloader(least_bytes=64 * 64 * 4, never=[module, constant])
    x = torch.randn(63, 64, requires_grad=True)
    with away.segment("all"):
        y = x @ frozen.t() @ trained.t() @ frozen.detach() @ leaf @ constant_view
        module(y).sum().backward()
    # the view that `detach` hides is copied, unless its parameter was named
    assert away.statistics().bytes_out == 64 * 64 * 4
    away = offloader(least_bytes=64 * 64 * 4)
    away.never(constant, frozen)
    with away.segment("all"):
        (x @ frozen.t() @ trained.t() @ frozen.detach() @ leaf @ constant_view).sum().backward()
    assert away.statistics().bytes_out == 0


def test_what_stays_is_looked_for_anew_in_each_step() -> None:
    constant = torch.randn(64, 64)
    away = offloader(least_bytes=64 * 64 * 4, never=[constant])
    x = torch.randn(64, 64, requires_grad=True)
    for steps in (1, 2, 3):
        with away.segment("one"):
            (x.exp() @ constant.detach().t()).sum().backward()
        assert away.statistics().bytes_out == steps * 64 * 64 * 4  # exp's result alone
        constant.data = constant.clone()


def test_what_does_not_fit_stays_and_is_counted() -> None:
    weights = [torch.randn(64, 64) / 8 for _ in range(4)]
    x = torch.randn(64, 64, requires_grad=True)
    with offloader(least_bytes=2**40).segment("none"):
        expected = torch.autograd.grad(chain(x, weights, offloader(least_bytes=2**40)), x)
    away = offloader(slab_bytes=3 * 64 * 64 * 4 + 100, never=weights)
    for _ in range(2):
        assert_same(torch.autograd.grad(chain(x, weights, away), x), expected)
    numbers = away.statistics()
    assert numbers.peak_host_bytes == numbers.bytes_out / 2 == 3 * 64 * 64 * 4
    assert numbers.stayed_bytes / 2 == 5 * 64 * 64 * 4  # tanh and exp of each layer: 8


def test_a_graph_that_is_kept_runs_backward_twice() -> None:
    weights = [torch.randn(32, 32, requires_grad=True) for _ in range(4)]
    x = torch.randn(8, 32, requires_grad=True)
    away = offloader(verify=True)
    loss = chain(x, weights, away)
    first = torch.autograd.grad(loss, [x, *weights], retain_graph=True)
    assert_same(torch.autograd.grad(loss, [x, *weights]), first)
    assert away.scheduler.is_idle


def test_two_graphs_at_once() -> None:
    weights = [torch.randn(32, 32, requires_grad=True) for _ in range(4)]
    x = torch.randn(8, 32, requires_grad=True)
    expected = torch.autograd.grad(chain(x, weights, offloader(2**40)), weights)
    away = offloader()
    losses = [chain(x, weights, away) for _ in range(3)]
    for index in (1, 0, 2):
        assert_same(torch.autograd.grad(losses[index], weights), expected)
    assert away.scheduler.is_idle
    assert away.scheduler.slab.used == 0


def test_segments_within_segments() -> None:
    x = torch.randn(16, 16, requires_grad=True)

    def run(away: Offloader) -> Tensor:
        with away.segment("outer"):
            y = x.exp()
            with away.segment("inner"):
                z = y.tanh().exp()
            w = (z * y).tanh()
        return w.sum()

    expected = torch.autograd.grad(run(offloader(2**40)), x)
    away = Offloader(double(), MIB, 0, stash=0, verify=True)
    assert_same(torch.autograd.grad(run(away), x), expected)
    assert away.scheduler.is_idle


def test_inputs_of_what_is_recomputed() -> None:
    """ "recompute+offload": the segment around a recomputed block takes its inputs along."""
    weights = [torch.randn(32, 32, requires_grad=True) for _ in range(4)]
    x = torch.randn(8, 32, requires_grad=True)

    def run(away: Offloader) -> list[Tensor]:
        y = x
        for number, weight in enumerate(weights):
            with away.segment(f"{number}"):
                y = recompute(lambda y, w: torch.tanh(y @ w).exp(), y, weight)
        return list(torch.autograd.grad(y.sum(), [x, *weights]))

    expected = run(offloader(2**40))
    away = Offloader(double(), MIB, 0, never=weights, stash=0, verify=True)
    assert_same(run(away), expected)
    assert away.statistics().bytes_out == 4 * 8 * 32 * 4
    assert away.scheduler.is_idle


def test_segments_inside_of_what_is_recomputed() -> None:
    """Run again in the backward pass, a segment sends nothing."""
    weights = [torch.randn(32, 32, requires_grad=True) for _ in range(3)]
    x = torch.randn(8, 32, requires_grad=True)

    def run(away: Offloader) -> list[Tensor]:
        def block(y: Tensor, w: Tensor) -> Tensor:
            y = (y @ w).exp()
            with away.segment("inside"):
                y = y.tanh() * y
            return y.tanh()

        y = x
        for weight in weights:
            y = recompute(block, y, weight)
        return list(torch.autograd.grad(y.sum(), [x, *weights]))

    expected = run(offloader(2**40))
    away = Offloader(double(), MIB, 0, stash=0, verify=True)
    assert_same(run(away), expected)
    assert away.statistics().bytes_out == 3 * 2 * 8 * 32 * 4
    assert away.scheduler.is_idle


def test_a_value_overwritten_while_it_is_saved_is_an_error() -> None:
    x = torch.randn(16, requires_grad=True)
    for least_bytes in (0, 2**20):
        away = offloader(least_bytes)
        with away.segment("one"):
            y = x.exp()
            loss = y.sum()
        with torch.no_grad():
            y.mul_(1)
        with pytest.raises(OffloadError, match="modified in place"):
            loss.backward()
        del loss
        away.reset()


def test_a_value_overwritten_before_its_memory_was_let_go_of_is_an_error() -> None:
    """The copy may have read either value; the same values here, so that nothing else tells."""
    x = torch.randn(16, requires_grad=True)
    away = offloader()
    with away.segment("one"):
        y = x.exp()
        loss = y.sum()
    with torch.no_grad():
        y.mul_(1)
    away.flush()
    with pytest.raises(OffloadError, match="modified in place"):
        loss.backward()


def test_values_before_and_after_a_change_are_two() -> None:
    x = torch.randn(16, requires_grad=True)
    away = offloader(stash=0)
    with away.segment("one"):
        y = x.exp()
        first = y.sum()
    with away.segment("two"), torch.no_grad():
        y.add_(1)
    with away.segment("three"):
        loss = first + y.sin().sum()
    # exp's result left before it was changed: autograd itself would have to refuse
    got = torch.autograd.grad(loss, x)
    x_ = x.detach().requires_grad_()
    y_ = x_.exp()
    expected = torch.autograd.grad(y_.sum() + (y_ + 1).sin().sum(), x_)
    assert_same(got, expected)


@pytest.mark.parametrize("held", [False, True])
def test_a_step_without_a_backward_pass_leaves_nothing(held: bool) -> None:
    weights = [torch.randn(32, 32, requires_grad=True) for _ in range(4)]
    x = torch.randn(8, 32, requires_grad=True)
    expected = torch.autograd.grad(chain(x, weights, offloader(2**40)), weights)
    device = double()
    away = Offloader(device, MIB, 0)
    loss = chain(x, weights, away)
    if held:
        away.reset()
        with pytest.raises(OffloadError, match="was forgotten"):
            loss.backward()
    del loss
    gc.collect()
    assert away.scheduler.slab.used == device.device_bytes_now == 0
    assert away.scheduler.is_idle
    assert_same(torch.autograd.grad(chain(x, weights, away), weights), expected)
    assert device.violations == []


def test_an_exception_inside_a_segment() -> None:
    away = offloader()
    x = torch.randn(16, requires_grad=True)

    def fail() -> None:
        with away.segment("outer"):
            y = x.exp()
            with away.segment("inner"):
                y.tanh().reshape(17)

    with pytest.raises(RuntimeError, match="17"):
        fail()
    gc.collect()
    assert away.scheduler.is_idle
    with away.segment("next"):
        loss = x.exp().sum()
    assert_same(torch.autograd.grad(loss, x), [x.detach().exp()])


def test_verify_names_what_changed() -> None:
    away = Offloader(double(), MIB, 0, stash=0, verify=True)
    x = torch.randn(16, 3, requires_grad=True)
    with away.segment("the one"):
        loss = x.exp().sum()
    memory = away.scheduler.memory.tensor
    assert memory is not None
    memory[5] += 1
    with pytest.raises(OffloadError, match=r"\(16, 3\) of the segment 'the one'.*other values"):
        loss.backward()


def test_on_fake_tensors() -> None:
    """A double without values counts what a run would hold, at no cost."""
    with FakeTensorMode():
        weights = [torch.empty(512, 512) for _ in range(5)]
        x = torch.empty(512, 512, requires_grad=True)
        device = double(values=False)
        away = Offloader(device, 8 * MIB, never=weights)
        with MemoryTracker() as tracker:
            chain(x, weights, away).backward()
    assert away.statistics().bytes_out == 10 * MIB - 2 * MIB  # as much as the slab takes
    assert away.statistics().stayed_bytes == 2 * MIB
    assert 8 * MIB < tracker.peak_bytes < 16 * MIB
    assert device.device_bytes_now == 0


def test_flush_frees_what_the_stash_holds() -> None:
    device = double()
    away = Offloader(device, MIB, 0)
    x = torch.randn(64, requires_grad=True)
    with away.segment("one"):
        loss = x.exp().sum()
    assert device.device_bytes_now == 256
    away.flush()
    assert device.device_bytes_now == 0
    assert_same(torch.autograd.grad(loss, x), [x.detach().exp()])
    assert away.statistics().bytes_back == 256


def test_what_is_let_go_of_really_is() -> None:
    device = double()
    away = Offloader(device, MIB, 0, stash=0)
    x = torch.randn(64, requires_grad=True)
    with away.segment("one"):
        y = x.exp()
        loss = (y * 1.0).sum()
        storage = weakref.ref(y.untyped_storage())
        del y
        assert storage() is not None
    assert storage() is None
    loss.backward()
    assert device.violations == []


@pytest.mark.parametrize("policy", ["offload", "recompute+offload"])
def test_at_work_in_a_plan(policy: str) -> None:
    """Rules of a plan send the same segments there, over two steps; the gradients are the same."""
    pipe = tiny_stable_diffusion()
    unet = pipe.unet.requires_grad_(False)
    lora.inject(unet, 4, 4, "attention", seed=1)
    parameters = list(lora.lora_parameters(unet).values())
    accelerate(pipe)
    latents, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)

    def step() -> list[Tensor]:
        x = latents
        for timestep in (400, 200):
            x = x - 0.1 * unet(x, timestep, context).sample
        return list(torch.autograd.grad(x.square().sum(), parameters))

    expected = step()
    device = double()
    away = Offloader(device, 8 * MIB, 0, never=[unet], verify=True)
    rules = {"transformer block": Policy(policy), "resnet": Policy.RECOMPUTE}
    applied = apply(Plan(steps=(rules,)), unet, offloader=away)
    try:
        assert_same(step(), expected)
    finally:
        applied.remove()
    assert away.statistics().bytes_back > 0
    assert device.violations == []
    assert device.device_bytes_now == 0
    assert away.scheduler.is_idle
