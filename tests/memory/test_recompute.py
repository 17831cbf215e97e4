"""Recomputation changes when values are made, never the values: compared with plain autograd."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from rewardprop_fast import ops
from rewardprop_fast.memory import MemoryTracker
from rewardprop_fast.memory.recompute import RecomputeError, is_second_run, recompute
from rewardprop_fast.ops import registry
from rewardprop_fast.ops.packing import drop_packs, packed_bytes

KIB = 1024


class Operations(TorchDispatchMode):
    """The names of what runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func).removeprefix("aten.").removesuffix(".default"))
        return func(*args, **(kwargs or {}))


def plainly(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def network(seed: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 32),
        nn.GELU(),
        nn.LayerNorm(32),
        nn.Linear(32, 32),
        nn.Tanh(),
        nn.Linear(32, 6),
    )


def gradients(
    run: Callable[..., Any], function: Callable[[Tensor], Tensor], model: nn.Module
) -> Any:
    x = torch.linspace(-1, 1, 24).view(4, 6).requires_grad_()
    loss = run(function, x).sin().square().sum()
    return [loss.detach(), *torch.autograd.grad(loss, [x, *model.parameters()])]


def assert_equal(found: Any, expected: Any) -> None:
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# --- the same values ---


@pytest.mark.parametrize("verify", [False, True])
def test_gradients_are_those_of_plain_autograd(verify: bool) -> None:
    model = network()
    expected = gradients(plainly, model, model)
    found = gradients(lambda f, x: recompute(f, x, verify=verify), model, model)
    assert_equal(found, expected)
    assert expected[1].abs().max() > 0


def test_calls_within_each_other_three_deep() -> None:
    model = network()
    runs: list[str] = []

    def part(name: str, layers: nn.Module) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            runs.append(name)
            return layers(x)

        return run

    inner, outer = part("inner", model[1:3]), part("outer", model[3:])

    def middle(x: Tensor) -> Tensor:
        return recompute(inner, model[0](x), name="inner")

    def whole(x: Tensor) -> Tensor:
        runs.append("whole")
        return recompute(outer, recompute(middle, x, name="middle"), name="outer")

    expected = gradients(plainly, model, model)
    runs.clear()
    found = gradients(lambda f, x: recompute(f, x, name="whole", verify=True), whole, model)
    assert_equal(found, expected)
    # Forward; then the outermost up to the input of "outer", and each of those in it for itself:
    # the middle one up to the input of "inner".
    assert runs == ["whole", "inner", "outer", "whole", "inner", "outer", "inner"]


def test_one_function_many_times_on_shared_weights() -> None:
    model = nn.Linear(6, 6)

    def chain(run: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
        def loop(x: Tensor) -> Tensor:
            for _ in range(4):
                x = x + run(lambda x: model(x).tanh(), x)
            return x

        return loop

    assert_equal(
        gradients(plainly, chain(recompute), model), gradients(plainly, chain(plainly), model)
    )


def test_nested_arguments_and_outputs() -> None:
    x, y = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    table = torch.tensor([2, 0, 1])

    def function(values: dict[str, Any], scale: float, *, extra: tuple[Any, ...]) -> dict[str, Any]:
        product = values["x"][extra[0]].exp() * values["y"] * scale
        return {"product": product, "parts": (product.sin(), None, "name")}

    def run(call: Callable[..., Any]) -> Any:
        output = call(function, {"x": x, "y": y}, 0.5, extra=(table, None))
        assert output["parts"][1:] == (None, "name")
        loss = (output["product"].cos() + output["parts"][0]).sum()
        return torch.autograd.grad(loss, [x, y])

    assert_equal(run(recompute), run(plainly))


def test_without_gradients_it_is_the_function_itself() -> None:
    x = torch.randn(3, requires_grad=True)
    with torch.no_grad(), Operations() as ran:
        recompute(torch.exp, x)
    assert ran.names == ["exp"]


def test_twice_backward_with_retain_graph_and_grad_of_a_part() -> None:
    model = network()
    x = torch.randn(4, 6, requires_grad=True)
    expected = torch.autograd.grad(model(x).sin().sum(), list(model.parameters()))
    loss = recompute(model, x).sin().sum()
    for _ in range(2):
        assert_equal(
            torch.autograd.grad(loss, list(model.parameters()), retain_graph=True), expected
        )
    weight = model[3].weight
    assert torch.equal(torch.autograd.grad(loss, weight, retain_graph=True)[0], expected[4])
    loss.backward()
    assert torch.equal(model[0].weight.grad, expected[0])
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_node_that_asks_for_its_tensors_twice() -> None:
    class Asking(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x.exp())
            return x.exp()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (first,), (second,) = ctx.saved_tensors, ctx.saved_tensors
            return grad * (first + second) / 2

    x = torch.randn(5, requires_grad=True)
    found = torch.autograd.grad(recompute(Asking.apply, x.sin()).sum(), x)
    assert torch.equal(found[0], torch.autograd.grad(x.sin().exp().sum(), x)[0])


def test_packed_copies_of_frozen_weights_are_made_once() -> None:
    weight = nn.Parameter(torch.randn(32, 32, 3, 3), requires_grad=False)
    x = torch.randn(2, 32, 8, 8).to(memory_format=torch.channels_last).requires_grad_()

    def twice(x: Tensor) -> Tensor:
        return ops.frozen_conv2d(
            ops.frozen_conv2d(x, weight, None, padding=1), weight, None, padding=1
        )

    plainly(twice, x).sum().backward()
    both = packed_bytes([weight])
    drop_packs([weight])
    recompute(twice, x).sum().backward()
    assert packed_bytes([weight]) == both > weight.nbytes  # for forward and for backward
    drop_packs([weight])


def test_on_fake_tensors() -> None:
    with FakeTensorMode():
        model = network()
        found = gradients(recompute, model, model)
    assert [g.shape for g in found[2:]] == [p.shape for p in model.parameters()]


# --- random numbers and other surroundings ---


def dropped(x: Tensor) -> Tensor:
    return F.dropout(x.exp(), 0.5).sin() + torch.randn(x.shape) * x


@pytest.mark.parametrize("verify", [False, True])
def test_the_same_masks_and_the_generator_goes_on_as_if_nothing_had_run_twice(verify: bool) -> None:
    x = torch.randn(50, requires_grad=True)

    def run(call: Callable[..., Any], **options: Any) -> list[Tensor]:
        torch.manual_seed(4)
        y = call(dropped, call(dropped, x, **options), **options)
        between = torch.rand(3)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        return [y.detach(), gradient, between, torch.rand(3), torch.get_rng_state()]

    assert_equal(run(recompute, verify=verify), run(plainly))


def test_autocast_at_the_call_holds_for_the_second_run_too() -> None:
    model = network()

    def run(call: Callable[..., Any], **options: Any) -> Any:
        x = torch.linspace(-1, 1, 24).view(4, 6).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = x
            for _ in range(2):  # the second time, autocast has the cast weights already
                y = call(model, y, **options)
        loss = y.float().sin().sum()
        return torch.autograd.grad(loss, [x, *model.parameters()])

    expected = run(plainly)
    assert_equal(run(recompute), expected)
    assert_equal(run(recompute, verify=True), expected)
    assert torch.is_autocast_cache_enabled()


def test_without_autocast_at_the_call_there_is_none_in_the_second_run() -> None:
    model = network()

    def run(call: Callable[..., Any]) -> Any:
        x = torch.linspace(-1, 1, 24).view(4, 6).requires_grad_()
        loss = call(model, x).sin().square().sum()
        with torch.autocast("cpu", torch.bfloat16):
            return torch.autograd.grad(loss, [x, *model.parameters()])

    assert_equal(run(recompute), run(plainly))


def test_the_wish_for_a_backend_is_the_one_at_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    wishes: list[str] = []

    def function(x: Tensor) -> Tensor:
        wishes.append(registry.current().name)
        return ops.geglu(x).exp()  # its gradient is asked for first, under no wish of its own

    x = torch.randn(2, 8, requires_grad=True)
    with ops.backend("reference"):
        first = recompute(function, x)
    monkeypatch.setenv(registry.ENVIRONMENT_VARIABLE, "reference")
    second = recompute(function, x)
    monkeypatch.delenv(registry.ENVIRONMENT_VARIABLE)
    third = recompute(function, x)
    with ops.backend("native"):
        (first + second + third).sum().backward()
        assert registry.current().name == "native"
    assert wishes[:3] == ["reference", "reference", "auto"]
    assert sorted(wishes[3:]) == ["auto", "reference", "reference"]


# --- what is kept, and for how long ---


def floats(kib: int) -> Tensor:
    return torch.empty(kib * KIB // 4).uniform_()


def chain(x: Tensor) -> Tensor:
    for _ in range(6):
        x = x.exp().neg()  # exp keeps its result
    return x


def test_nothing_but_the_input_is_kept_and_peaks_are_as_by_hand() -> None:
    x = floats(4).requires_grad_()

    def run(call: Callable[..., Any]) -> tuple[int, int, int, int]:
        with MemoryTracker() as tracker:
            with tracker.phase("forward"):
                y = call(chain, x)
            kept = tracker.live_bytes // one
            with tracker.phase("backward"):
                (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
            del y
            assert gradient.shape == x.shape
        peaks = tracker.peak_by_phase
        return kept, tracker.live_bytes // one, peaks["forward"] // one, peaks["backward"] // one

    one = 4 * KIB
    # Plain: x, six results of exp and y are kept, and the last sign changes its argument while the
    # result before is still there. Backward: these, the gradient given and two on its way.
    assert run(plainly) == (8, 2, 9, 11)
    # Recomputed: x and y are kept; in the forward pass there are x, an exp's result, the neg's
    # before it and the neg's of it. Backward: x, y, the gradient given, that of the last exp's
    # result, then six results of exp, the last of them made from the neg's before it.
    assert run(recompute) == (2, 2, 4, 11)


def test_what_backward_has_used_is_let_go_at_once() -> None:
    x = floats(4).requires_grad_()
    y = recompute(chain, x)
    live: list[int] = []
    node: Any = y.grad_fn
    while node is not None and node.name() != "torch::autograd::AccumulateGrad":
        node.register_hook(lambda *_: live.append(tracker.live_bytes))
        node = node.next_functions[0][0]
    with MemoryTracker() as tracker:
        torch.autograd.grad(y, x, torch.ones_like(y))
    after_exp = live[1::2]
    assert len(after_exp) == 6
    assert [a - b for a, b in pairwise(after_exp)][:4] == [4 * KIB] * 4


def test_what_holds_the_inputs_goes_with_the_graph() -> None:
    x = torch.randn(8, requires_grad=True)
    between = x * 2
    gone = weakref.ref(between.untyped_storage())
    y = recompute(torch.exp, between)
    del between
    assert gone() is not None
    del y
    gc.collect()
    assert gone() is None


def test_the_second_run_ends_behind_the_last_tensor_that_is_needed() -> None:
    def function(x: Tensor) -> Tensor:
        return x.exp().neg().sum(0)  # exp's result is the last that is saved

    x = torch.randn(3, 5, requires_grad=True)
    y = recompute(function, x)
    with Operations() as ran:
        torch.autograd.grad(y, x, torch.ones_like(y))
    assert ran.names.count("exp") == 1
    assert ran.names.count("neg") == 1  # of the backward pass
    assert not any(name.startswith("sum") for name in ran.names)


def test_the_second_run_does_not_go_on_for_what_nobody_holds_any_more() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.exp(), x.sin().sinh().tan()

    x = torch.randn(3, requires_grad=True)
    y, unused = recompute(function, x)
    del unused
    with Operations() as ran:
        torch.autograd.grad(y.sum(), x)
    assert "exp" in ran.names
    assert not {"sin", "sinh", "tan"} & set(ran.names)


def test_hooks_around_the_call_get_the_inputs_and_nothing_else() -> None:
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> int:
        packed.append(tensor)
        return len(packed) - 1

    x, table = torch.randn(4, requires_grad=True), torch.tensor([1, 0, 3, 2])
    function = lambda x, table: x.exp()[table].sin()  # noqa: E731
    expected = torch.autograd.grad(function(x, table).sum(), x)
    with torch.autograd.graph.saved_tensors_hooks(pack, packed.__getitem__):
        y = recompute(function, x, table)
    assert [tensor.data_ptr() for tensor in packed] == [x.data_ptr(), table.data_ptr()]
    assert_equal(torch.autograd.grad(y.sum(), x), expected)
    assert len(packed) == 2


def test_says_whether_a_second_run_is_under_way() -> None:
    seen: list[bool] = []

    def function(x: Tensor) -> Tensor:
        seen.append(is_second_run())
        return x.exp()

    x = torch.randn(2, requires_grad=True)
    recompute(function, x).sum().backward()
    assert seen == [False, True]
    assert not is_second_run()


# --- what goes wrong is said ---


def test_an_input_written_to_after_the_call_is_autograds_error() -> None:
    x = torch.randn(4, requires_grad=True) * 1
    y = recompute(torch.exp, x)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_saved_tensor_written_to_inside_is_an_error() -> None:
    def function(x: Tensor) -> Tensor:
        saved = x.exp()
        return saved.add_(1).sin()  # sin's save comes behind the writing, so that it is seen

    x = torch.randn(4, requires_grad=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        function(x).sum().backward()
    with pytest.raises(RecomputeError, match=r"'block' has written into float32 of shape \(4,\)"):
        recompute(function, x, name="block").sum().backward()


def test_other_shapes_fewer_tensors_and_a_backward_pass_inside() -> None:
    x = torch.randn(4, requires_grad=True)
    state = {"rows": 4, "second": True}

    def rows(x: Tensor) -> Tensor:
        return x[: state["rows"]].exp().sum()

    y = recompute(rows, x, name="rows")
    state["rows"] = 3
    with pytest.raises(
        RecomputeError, match=r"'rows' saved float32 of shape \(3,\).*first saved.*\(4,\)"
    ):
        y.backward()

    def fewer(x: Tensor) -> Tensor:
        x = x.exp()
        return x.sin() if state["second"] else x

    y = recompute(fewer, x)
    state["second"] = False
    with pytest.raises(RecomputeError, match="A recomputed function saved fewer tensors"):
        y.sum().backward()

    def inside(x: Tensor) -> Tensor:
        z = x.exp().sin().sum()
        if is_second_run():
            torch.autograd.grad(z, x)
        return z.exp()

    with pytest.raises(RecomputeError, match="A backward pass inside"):
        recompute(inside, x).backward()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("second", [False, True])
def test_an_exception_leaves_generators_hooks_and_wishes_in_order(
    error: type[BaseException], second: bool
) -> None:
    broken = True

    def function(x: Tensor) -> Tensor:
        y = F.dropout(x.exp(), 0.5)
        if broken and is_second_run() == second:
            raise error("as it happens")
        return y.sin()

    def run() -> Tensor:
        torch.manual_seed(1)
        with ops.backend("reference"), torch.autocast("cpu", torch.bfloat16):
            y = recompute(function, x)
        state = torch.get_rng_state()
        try:
            return torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
        except BaseException:
            assert torch.equal(torch.get_rng_state(), state)
            outcome.append(y)
            raise

    x = torch.randn(6, requires_grad=True)
    outcome: list[Tensor] = []
    with pytest.raises(error, match="as it happens"):
        run()
    assert registry.current().name == "auto"
    assert not torch.is_autocast_enabled("cpu")
    assert not is_second_run()
    kept = x.exp()
    assert kept.grad_fn._saved_result is not None  # no hooks are left over
    broken = False
    expected = run()
    if second:  # the graph of the run that was interrupted is whole
        assert torch.equal(torch.autograd.grad(outcome[0].sum(), x)[0], expected)


def test_with_retain_graph_nothing_made_again_is_kept() -> None:
    x = floats(4).requires_grad_()
    with MemoryTracker() as tracker:
        y = recompute(chain, x)
        (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
        assert gradient.shape == x.shape
        assert tracker.live_bytes == 3 * 4 * KIB  # x, y and the gradient


def test_what_catches_every_exception_does_not_catch_the_end_of_a_second_run() -> None:
    """A reward's evaluation turns whatever is raised into an error of its own."""

    def careful(x: Tensor) -> Tensor:
        try:
            return (x * 2).sin().exp() + 1
        except Exception as error:
            raise ValueError("mine") from error

    x = torch.randn(3, requires_grad=True)
    (plain,) = torch.autograd.grad(careful(x).sum(), x)
    (again,) = torch.autograd.grad(recompute(careful, x).sum(), x)
    assert torch.equal(plain, again)
