"""Costs of operations: FLOPs against PyTorch's own count of plain networks, bytes by hand."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from rewardprop_fast import lora
from rewardprop_fast.memory import Cost, CostCounter, cost_of, make_fake
from rewardprop_fast.models import architectures
from rewardprop_fast.nn import accelerate

aten = torch.ops.aten
BF16 = torch.bfloat16


class Counting(TorchDispatchMode):
    """Tells a counter of every operation, and keeps the costs in order."""

    def __init__(self) -> None:
        super().__init__()
        self.counter = CostCounter()
        self.seen: list[tuple[str, Cost]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        self.seen.append((str(func), self.counter.see(func, args, kwargs, output)))
        return output


def costs(function: Callable[[], Any]) -> list[tuple[str, Cost]]:
    with Counting() as counting:
        function()
    return counting.seen


def one(func: Any, *args: Any, **kwargs: Any) -> Cost:
    return cost_of(func, args, kwargs, func(*args, **kwargs))


def floats(*shape: int) -> Tensor:
    return torch.zeros(*shape)


# --- FLOPs ---


@pytest.mark.parametrize(
    ("func", "args", "flops"),
    [
        (aten.mm.default, (floats(3, 5), floats(5, 7)), 2 * 3 * 5 * 7),
        (aten.addmm.default, (floats(7), floats(3, 5), floats(5, 7)), 2 * 3 * 5 * 7),
        (aten.bmm.default, (floats(2, 3, 5), floats(2, 5, 7)), 2 * 2 * 3 * 5 * 7),
        (
            aten.baddbmm.default,
            (floats(2, 3, 7), floats(2, 3, 5), floats(2, 5, 7)),
            2 * 2 * 3 * 5 * 7,
        ),
        (aten.mv.default, (floats(3, 5), floats(5)), 2 * 3 * 5),
        (aten.addmv.default, (floats(3), floats(3, 5), floats(5)), 2 * 3 * 5),
        (aten.dot.default, (floats(5), floats(5)), 2 * 5),
        (aten.add.Tensor, (floats(5), floats(5)), 0),
    ],
)
def test_products(func: Any, args: tuple[Any, ...], flops: int) -> None:
    assert one(func, *args).flops == flops


@pytest.mark.parametrize(
    ("needed", "products"),
    [((True, False), 1), ((False, True), 1), ((True, True), 2), ((False, False), 0)],
)
def test_a_convolution_and_each_of_its_gradients_multiply_alike(
    needed: tuple[bool, bool], products: int
) -> None:
    x, weight = floats(2, 4, 9, 7), floats(6, 2, 3, 3)
    geometry = ([2, 1], [1, 1], [1, 1], False, [0, 0], 2)
    y = aten.convolution(x, weight, None, *geometry)
    assert y.shape == (2, 6, 5, 7)
    forward = 2 * y.numel() * 2 * 9
    assert one(aten.convolution.default, x, weight, None, *geometry).flops == forward
    args = (torch.ones_like(y), x, weight, None, *geometry, (*needed, False))
    found = one(aten.convolution_backward.default, *args)
    assert found.flops == products * forward
    # Only what a needed gradient is made of is read: for that of x the weight, and the reverse.
    moved = y.numel() * any(needed) + (x.numel() + weight.numel()) * sum(needed)
    if any(needed):
        assert found.nbytes == 4 * moved


def test_attention_counts_its_five_products_backward() -> None:
    q, k, v = floats(2, 3, 16, 8), floats(2, 3, 11, 8), floats(2, 3, 11, 8)
    product = 2 * 2 * 3 * 16 * 11 * 8

    def attend() -> None:
        leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
        torch.nn.functional.scaled_dot_product_attention(*leaves).sum().backward()

    found = dict(costs(attend))
    name = "aten._scaled_dot_product_flash_attention_for_cpu"
    assert found[f"{name}.default"].flops == 2 * product
    assert found[f"{name}_backward.default"].flops == 5 * product


@pytest.mark.parametrize("backend", ["flash", "efficient", "cudnn"])
def test_the_gpu_s_forms_of_attention_have_formulas(backend: str) -> None:
    q, k, v = (torch.zeros(2, 3, n, 8, dtype=BF16, device="meta") for n in (16, 11, 11))
    func = getattr(aten, f"_scaled_dot_product_{backend}_attention").default
    args = (q, k, v) if backend == "flash" else (q, k, v, None, False)
    output = (torch.empty_like(q), q.new_empty(2, 3, 16, dtype=torch.float32))
    cost = cost_of(func, args, {}, output)
    assert cost.flops == 2 * 2 * (2 * 3 * 16 * 11 * 8)
    assert cost.dtype == BF16


# --- whole networks ---


def ours(model: Any, call: Callable[[Any], Tensor]) -> tuple[int, int, CostCounter]:
    """FLOPs of the accelerated network forward and backward, on fake tensors."""
    mode = FakeTensorMode()
    accelerate(model)
    make_fake(model, mode)
    with mode, Counting() as counting:
        output = call(model)
        forward = counting.counter.flops
        output.float().sum().backward()
    return forward, counting.counter.flops - forward, counting.counter


def pytorchs(model: Any, call: Callable[[Any], Tensor]) -> tuple[int, int]:
    """The same of the plain diffusers network, by FlopCounterMode on meta tensors."""
    with torch.device("meta"):
        with FlopCounterMode(display=False) as counter:
            output = call(model)
        forward = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            output.float().sum().backward()
    return forward, counter.get_total_flops()


def unet_call(size: int) -> Callable[[Any], Tensor]:
    def call(model: Any) -> Tensor:
        inputs = architectures.unet_inputs(model, 2, size, BF16)
        inputs["sample"].requires_grad_()
        output: Tensor = model(**inputs).sample
        return output

    return call


@pytest.mark.parametrize(("name", "size", "adapted"), [("sd15", 64, True), ("sdxl", 128, False)])
def test_a_unet_multiplies_as_much_as_diffusers_own(name: str, size: int, adapted: bool) -> None:
    """The fused attention, which computes its scores once more backward, costs that much more."""
    models = []
    for _ in range(2):
        with torch.device("meta"):
            models.append(architectures.unet(name, BF16))
        if adapted:
            lora.inject(models[-1], rank=4)
            models[-1].to("meta")
    models[1].set_attn_processor(AttnProcessor())  # plain products, which PyTorch can count
    scores = scores_of(models[1], size)
    forward, backward, counter = ours(models[0], unet_call(size))
    expected = pytorchs(models[1], unet_call(size))
    assert (forward, backward - scores) == expected
    assert {cost.dtype for cost in counter.costs if cost.flops} == {BF16}


def scores_of(model: Any, size: int) -> int:
    """One product Q K^T of every attention in a UNet that sees two images of size^2."""
    shapes, total = unet_levels(model, size), 0
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            queries = shapes[name.split(".transformer_blocks")[0].rsplit(".attentions", 1)[0]]
            keys = 77 if module.is_cross_attention else queries
            total += 2 * 2 * queries * keys * module.inner_dim
    return total


def unet_levels(model: Any, size: int) -> dict[str, int]:
    """Tokens within each block of a UNet: a level down has a quarter of them."""
    levels = len(model.down_blocks)
    tokens = {f"down_blocks.{i}": (size >> i) ** 2 for i in range(levels)}
    tokens |= {f"up_blocks.{i}": (size >> (levels - 1 - i)) ** 2 for i in range(levels)}
    return tokens | {"mid_block": (size >> (levels - 1)) ** 2}


def test_the_vae_s_decoder_multiplies_as_much_as_diffusers_own() -> None:
    def call(model: Any) -> Tensor:
        latents = torch.randn(1, 4, 32, 32, dtype=BF16, requires_grad=True)
        output: Tensor = model.decode(latents).sample
        return output

    models = []
    for _ in range(2):
        with torch.device("meta"):
            models.append(architectures.autoencoder(BF16))
    models[1].set_attn_processor(AttnProcessor())
    forward, backward, _ = ours(models[0], call)
    assert (forward, backward - 2 * 1024 * 1024 * 512) == pytorchs(models[1], call)


# --- bytes ---


def test_views_and_given_memory_move_nothing() -> None:
    x = floats(4, 6)

    def run() -> None:
        x.view(24).detach().expand(2, 24).unbind()
        x.t()[1:].unsqueeze(0).squeeze_()
        aten._unsafe_view(x, [24])
        torch.empty(8)
        torch.empty_like(x)
        x.new_empty(3)

    found = costs(run)
    assert len(found) >= 9
    assert all(cost.nbytes == 0 for _, cost in found)


@pytest.mark.parametrize(
    ("func", "args", "kwargs", "elements"),
    [
        (aten.add.Tensor, (floats(10), floats(10)), {}, 30),
        (aten.add.Tensor, (floats(10), floats(10)[:1]), {}, 21),
        (aten.add.Tensor, (floats(4, 5), floats(5).expand(4, 5)), {}, 20 + 5 + 20),
        (aten.clone.default, (floats(5).expand(4, 5),), {}, 5 + 20),
        (aten.clone.default, (floats(4, 5)[:, ::5],), {}, 4 + 4),
        (aten.add_.Tensor, (floats(10), floats(10)), {}, 30),
        (aten.mul_.Scalar, (floats(10), 2.0), {}, 20),
        (aten.copy_.default, (floats(10), floats(10)), {}, 20),
        (aten.fill_.Scalar, (floats(10), 1.0), {}, 10),
        (aten.zero_.default, (floats(10),), {}, 10),
        (aten.ones.default, ([10],), {}, 10),
        (aten.sum.default, (floats(10),), {}, 11),
        (aten.add.out, (floats(10), floats(10)), {"out": floats(10)}, 30),
        (aten.cat.default, ([floats(4), floats(6)],), {}, 20),
        (aten.mm.default, (floats(3, 5), floats(5, 7)), {}, 15 + 35 + 21),
        (aten._foreach_add_.List, ([floats(4), floats(6)], [floats(4), floats(6)]), {}, 30),
        (aten.embedding.default, (floats(1000, 8), torch.zeros(3).long()), {}, 24 + 24 + 6),
        (aten.index_select.default, (floats(90, 8), 0, torch.zeros(3).long()), {}, 24 + 24 + 6),
        (aten.nonzero.default, (floats(10),), {}, 10),
    ],
)
def test_bytes_by_hand(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], elements: int
) -> None:
    expected = Cost(one(func, *args, **kwargs).flops, 4 * elements, torch.float32)
    assert one(func, *args, **kwargs) == expected


def test_bytes_of_a_group_norm_and_a_lora_linear() -> None:
    x = torch.zeros(2, 8, 4, 4, dtype=BF16)
    func = torch.ops.rewardprop_fast.group_norm_silu.default
    found = one(func, x, floats(8), floats(8), 4, 1e-5, True)
    assert found == Cost(0, 2 * 256 * 2 + 2 * 8 * 4 + 2 * 8 * 4, BF16)
    rows, weight = torch.zeros(3, 8, dtype=BF16), torch.zeros(6, 8, dtype=BF16)
    adapters = (floats(2, 8), floats(12), [2], [1.0])
    func = torch.ops.rewardprop_fast.lora_linear.default
    found = one(func, rows, [weight], [None], *adapters)
    half = 3 * 8 + 6 * 8 + 3 * 6 + 3 * 2
    assert found == Cost(2 * 3 * (8 * 6 + 8 * 2 + 12), 2 * half + 4 * (16 + 12), BF16)
    parts = [floats(2, 8), floats(6, 2)]  # kept for backward, and not read
    assert one(func, rows, [weight], [None], *adapters, parts) == found
    func = torch.ops.rewardprop_fast.lora_linear_backward.default
    backward = ([torch.zeros(3, 6, dtype=BF16)], [weight], rows, torch.zeros(3, 2, dtype=BF16))
    for dx in (True, False):
        found = one(func, *backward, *adapters, [3, 8], [dx, True, True])
        half = 3 * 6 + 3 * 8 + 3 * 2 + dx * (6 * 8 + 3 * 8)  # the weight and dx go together
        assert found.nbytes == 2 * half + 2 * 4 * (16 + 12)


# --- the counter ---


def test_a_counter_gives_the_cost_of_the_call_it_sees() -> None:
    """Whatever may be mistaken for an earlier call: strides, dtypes, lists, flags, keywords."""
    counter, total = CostCounter(), 0
    x, half = floats(4, 6), torch.zeros(4, 6, dtype=BF16)
    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
        (aten.clone.default, (x,), {}),
        (aten.clone.default, (floats(6).expand(4, 6),), {}),
        (aten.clone.default, (half,), {}),
        (aten.sum.dim_IntList, (x, [0]), {}),
        (aten.sum.dim_IntList, (x, [1]), {}),
        (aten.sum.dim_IntList, (x, [0, 1]), {}),
        (aten._to_copy.default, (x,), {"dtype": BF16}),
        (aten._to_copy.default, (x,), {"dtype": torch.float64}),
        (aten.cat.default, ([x, x],), {}),
        (aten.cat.default, ([x, x.clone()],), {}),
        (aten.cat.default, ([x, x], 1), {}),
        (aten.nonzero.default, (x,), {}),
        (aten.nonzero.default, (x + 1,), {}),
    ]
    for func, args, kwargs in calls * 2:
        output = func(*args, **kwargs)
        expected = cost_of(func, args, kwargs, output)
        assert counter.see(func, args, kwargs, output) == expected, (func, args)
        total += expected.nbytes
    assert counter.nbytes == total
    assert counter.flops == 0


def test_numbers_that_change_at_every_step_do_not_fill_the_counter() -> None:
    counter, x = CostCounter(), floats(3)
    for step in range(50):
        counter.see(aten.mul.Tensor, (x, 0.5 + step), {}, x)
    assert len(counter._known) == 1
    assert counter.costs == {Cost(0, 24, torch.float32): 50}


def test_a_call_seen_before_costs_microseconds() -> None:
    """A tenth of what dispatching a fake operation costs; the bound holds on a busy machine."""
    counter, x, y = CostCounter(), floats(64, 64), floats(64, 64)
    args, output = (x, y), floats(64, 64)
    counter.see(aten.mm.default, args, {}, output)
    best = float("inf")
    for _ in range(20):
        begin = time.perf_counter()
        for _ in range(100):
            counter.see(aten.mm.default, args, {}, output)
        best = min(best, (time.perf_counter() - begin) / 100)
    assert best < 20e-6
