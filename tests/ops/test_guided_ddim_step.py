"""The operator against its formula, its reference, diffusers and autograd."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rewardprop_fast import ops
from rewardprop_fast.ops import guided_ddim_step, native

OP = torch.ops.rewardprop_fast.guided_ddim_step.default
OP_BACKWARD = torch.ops.rewardprop_fast.guided_ddim_step_backward.default

needs_native = pytest.mark.skipif(
    native.why_missing() is not None, reason=f"the native module is {native.why_missing()}"
)

COEFFICIENTS = torch.tensor([1.0371, -0.2213, 0.0817])


def inputs(
    shape: tuple[int, ...] = (2, 4, 5, 7),
    *,
    guided: bool = True,
    with_noise: bool = False,
    model_dtype: torch.dtype = torch.float32,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, float | None, Tensor | None]:
    batch, *rest = shape
    model_output = torch.randn((2 if guided else 1) * batch, *rest, dtype=dtype).to(model_dtype)
    latents = torch.randn(shape, dtype=dtype)
    noise = torch.randn(shape, dtype=dtype) if with_noise else None
    return model_output, latents, COEFFICIENTS.to(dtype), 7.5 if guided else None, noise


def in_float64(args: tuple) -> tuple:
    return tuple(a.double() if isinstance(a, Tensor) else a for a in args)


def outputs_and_gradients(backend: str, args: tuple, weight: Tensor) -> list[Tensor]:
    """x_prev and the gradients of model_output and latents, for the loss sum(weight * x_prev)."""
    model_output, latents = args[0].detach().requires_grad_(), args[1].detach().requires_grad_()
    with ops.backend(backend, strict=True):
        x_prev = guided_ddim_step(model_output, latents, *args[2:])
        gradients = torch.autograd.grad(x_prev, (model_output, latents), weight)
    return [x_prev.detach(), *gradients]


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_is_one_step_of_diffusers_ddim(eta: float, prediction_type: str) -> None:
    scheduler = DDIMScheduler(clip_sample=False, prediction_type=prediction_type)
    scheduler.set_timesteps(20)
    t, previous = 501, 451
    alpha, alpha_previous = scheduler.alphas_cumprod[t], scheduler.alphas_cumprod[previous]
    sigma = eta * ((1 - alpha_previous) / (1 - alpha) * (1 - alpha / alpha_previous)).sqrt()
    direction = (1 - alpha_previous - sigma**2).sqrt()
    if prediction_type == "epsilon":  # x_0 = (x - sqrt(1 - alpha) eps) / sqrt(alpha)
        a = (alpha_previous / alpha).sqrt()
        b = direction - (alpha_previous * (1 - alpha) / alpha).sqrt()
    else:  # x_0 = sqrt(alpha) x - sqrt(1 - alpha) v, eps = sqrt(alpha) v + sqrt(1 - alpha) x
        a = (alpha_previous * alpha).sqrt() + direction * (1 - alpha).sqrt()
        b = direction * alpha.sqrt() - (alpha_previous * (1 - alpha)).sqrt()
    model_output, latents, _, _, noise = inputs(with_noise=True)
    uncond, cond = model_output.chunk(2)

    ours = guided_ddim_step(model_output, latents, torch.stack([a, b, sigma]), 7.5, noise)
    theirs = scheduler.step(
        uncond + 7.5 * (cond - uncond), t, latents, eta=eta, variance_noise=noise
    ).prev_sample

    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@needs_native
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_noise", [False, True])
@pytest.mark.parametrize("guided", [False, True])
def test_native_is_as_near_to_float64_as_the_reference(
    guided: bool, with_noise: bool, model_dtype: torch.dtype
) -> None:
    args = inputs((3, 4, 33, 17), guided=guided, with_noise=with_noise, model_dtype=model_dtype)
    weight = torch.randn(3, 4, 33, 17)
    exact = outputs_and_gradients("reference", in_float64(args), weight.double())
    fast = outputs_and_gradients("native", args, weight)
    plain = outputs_and_gradients("reference", args, weight)
    for truth, ours, theirs in zip(exact, fast, plain, strict=True):
        error, allowed = ((x.double() - truth).abs().max() for x in (ours, theirs))
        assert 0 < allowed < 0.2
        assert error <= 2 * allowed


@needs_native
@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(*(st.integers(1, n) for n in (3, 5, 19, 19))),
    guided=st.booleans(),
    with_noise=st.booleans(),
    model_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    layouts=st.tuples(*[st.sampled_from(["contiguous", "channels_last", "strided"])] * 4),
)
def test_native_equals_the_reference_bit_by_bit(
    shape: tuple[int, ...],
    guided: bool,
    with_noise: bool,
    model_dtype: torch.dtype,
    layouts: tuple[str, ...],
) -> None:
    model_output, latents, coefficients, scale, noise = inputs(
        shape, guided=guided, with_noise=with_noise, model_dtype=model_dtype
    )
    weight = laid_out(torch.randn(shape), layouts[3])
    args = (
        laid_out(model_output, layouts[0]),
        laid_out(latents, layouts[1]),
        coefficients,
        scale,
        None if noise is None else laid_out(noise, layouts[2]),
    )
    fast = outputs_and_gradients("native", args, weight)
    plain = outputs_and_gradients("reference", args, weight)
    for ours, theirs in zip(fast, plain, strict=True):
        assert torch.equal(ours, theirs)


@needs_native
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16])
def test_is_the_same_a_hundred_times(model_dtype: torch.dtype) -> None:
    args = inputs((2, 4, 13, 11), with_noise=True, model_dtype=model_dtype)
    weight = torch.randn(2, 4, 13, 11)
    first = outputs_and_gradients("native", args, weight)
    for _ in range(100):
        again = outputs_and_gradients("native", args, weight)
        assert all(map(torch.equal, again, first))


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "strided":  # every other element of a transposed, wider array
        wide = torch.zeros(*tensor.shape[:2], tensor.shape[3], 2 * tensor.shape[2]).to(tensor.dtype)
        view = wide[..., ::2].transpose(2, 3)
        view.copy_(tensor)
        return view
    return tensor.contiguous()


@needs_native
def test_every_element_of_a_large_array_is_written_on_several_threads() -> None:
    # Above the size at which the loop is shared out, and no multiple of a cache line.
    args = inputs((3, 4, 129, 131), with_noise=True)
    weight = torch.randn(3, 4, 129, 131)
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            fast = outputs_and_gradients("native", args, weight)
            plain = outputs_and_gradients("reference", args, weight)
            for ours, theirs in zip(fast, plain, strict=True):
                assert torch.equal(ours, theirs)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)


@needs_native
def test_infinities_and_nan_pass_through() -> None:
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38, -0.0, 1e-42])
    latents = special.repeat(6).reshape(1, 1, 6, 6)
    model_output = latents.mT.repeat(2, 1, 1, 1).contiguous()
    for model_dtype in (torch.float32, torch.bfloat16):
        args = (model_output.to(model_dtype), latents, COEFFICIENTS, 7.5, None)
        fast = outputs_and_gradients("native", args, latents)
        plain = outputs_and_gradients("reference", args, latents)
        for ours, theirs in zip(fast, plain, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@needs_native
def test_bfloat16_gradients_are_rounded_to_nearest_ties_to_even() -> None:
    # float32 values half-way between two bfloat16 values, and their neighbours on either side.
    halfway = (torch.arange(0x3F80, 0x3FC0, dtype=torch.int32) << 16) + 0x8000
    bits = torch.cat([halfway - 1, halfway, halfway + 1])
    grad = bits.view(torch.float32).reshape(1, 3, 8, 8)
    identity = torch.tensor([0.0, 1.0, 0.0])
    with ops.backend("native", strict=True):
        rounded = OP_BACKWARD(grad, identity, None, torch.bfloat16)
    assert torch.equal(rounded, grad.to(torch.bfloat16))
    assert not torch.equal(rounded, (grad * (1 + 2**-20)).to(torch.bfloat16))


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("with_noise", [False, True])
@pytest.mark.parametrize("guided", [False, True])
def test_gradcheck_in_float64(guided: bool, with_noise: bool, backend: str) -> None:
    double = torch.float64
    args = inputs(
        (1, 2, 3, 5), guided=guided, with_noise=with_noise, dtype=double, model_dtype=double
    )
    leaves = (args[0].requires_grad_(), args[1].requires_grad_())
    with ops.backend(backend, strict=True):
        assert torch.autograd.gradcheck(lambda m, x: guided_ddim_step(m, x, *args[2:]), leaves)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("guided", [False, True])
def test_opcheck(guided: bool, model_dtype: torch.dtype, layout: str) -> None:
    model_output, latents, coefficients, scale, noise = inputs(
        guided=guided, with_noise=True, model_dtype=model_dtype
    )
    assert noise is not None
    args = (
        laid_out(model_output, layout).requires_grad_(),
        laid_out(latents, layout).requires_grad_(),
        coefficients,
        scale,
        laid_out(noise, layout),
    )
    torch.library.opcheck(OP, args)
    grad = laid_out(torch.randn(latents.shape), layout)
    torch.library.opcheck(OP_BACKWARD, (grad, coefficients, scale, model_dtype))


def two_steps(model_output: Tensor, latents: Tensor, noise: Tensor) -> Tensor:
    first = guided_ddim_step(model_output, latents, COEFFICIENTS, 7.5, noise)
    return guided_ddim_step(model_output.sin(), first, COEFFICIENTS, 7.5).square()


def test_traces_into_one_graph_with_the_same_gradient() -> None:
    model_output, latents, _, _, noise = inputs(with_noise=True)
    leaves = (model_output.requires_grad_(), latents.requires_grad_())
    eager = two_steps(*leaves, noise)
    traced = torch.compile(two_steps, fullgraph=True, backend="aot_eager")(*leaves, noise)
    assert torch.equal(traced, eager)
    torch.testing.assert_close(
        torch.autograd.grad(traced.sum(), leaves), torch.autograd.grad(eager.sum(), leaves)
    )


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
def test_compiles_into_one_graph() -> None:
    model_output, latents, _, _, noise = inputs(with_noise=True)
    with torch.no_grad():
        compiled = torch.compile(two_steps, fullgraph=True)(model_output, latents, noise)
        torch.testing.assert_close(compiled, two_steps(model_output, latents, noise))


def test_keeps_the_coefficients_and_nothing_else_for_backward() -> None:
    args = inputs(with_noise=True)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        guided_ddim_step(args[0].requires_grad_(), args[1].requires_grad_(), *args[2:])
    assert [tensor.numel() for tensor in kept] == [3]


def test_makes_no_node_where_no_gradient_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from rewardprop_fast.ops.guided_ddim_step import op

    def refuse(*_: object) -> None:
        raise AssertionError("an autograd node was made")

    monkeypatch.setattr(op._FORWARD.function, "apply", refuse)
    args = inputs(with_noise=True)
    assert not guided_ddim_step(*args).requires_grad
    args[0].requires_grad_()
    with torch.no_grad():
        assert not guided_ddim_step(*args).requires_grad
    with pytest.raises(AssertionError, match="node was made"):
        guided_ddim_step(*args)


def test_gives_gradients_only_to_what_asks_for_them() -> None:
    args = inputs(with_noise=True)
    guided_ddim_step(args[0].requires_grad_(), *args[1:]).sum().backward()
    assert args[0].grad is not None
    assert args[1].grad is None
    # Halves of the batch share b * gradient as (1 - w) and w.
    uncond, cond = args[0].grad.chunk(2)
    torch.testing.assert_close(uncond, torch.full_like(uncond, -6.5) * COEFFICIENTS[1])
    torch.testing.assert_close(cond, torch.full_like(cond, 7.5) * COEFFICIENTS[1])


def test_a_second_derivative_is_refused() -> None:
    args = inputs()
    loss = guided_ddim_step(args[0].requires_grad_(), *args[1:]).square().sum()
    (grad,) = torch.autograd.grad(loss, args[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_result_has_the_dtype_and_layout_of_the_latents(layout: str) -> None:
    model_output, latents, *rest = inputs(model_dtype=torch.bfloat16)
    result = guided_ddim_step(model_output, laid_out(latents, layout), *rest)
    assert result.dtype == torch.float32
    assert result.stride() == laid_out(latents, layout).stride()


def test_an_empty_batch_is_no_error() -> None:
    assert guided_ddim_step(*inputs((0, 4, 5, 7))).shape == (0, 4, 5, 7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(2, 4, 5, 7)}, r"with guidance and latents \(2, 4, 5, 7\) it must be \(4,"),
        ({3: None}, r"without guidance and latents \(2, 4, 5, 7\) it must be \(2, 4, 5, 7\)"),
        ({1: torch.zeros(2, 4, 5)}, r"latents have shape \(2, 4, 5\); expected \(B, C, h, w\)"),
        ({2: torch.zeros(2)}, r"coefficients have shape \(2,\); expected \(3,\)"),
        ({4: torch.zeros(2, 4, 5, 6)}, r"noise is \(2, 4, 5, 6\).*must be like the latents"),
        ({4: torch.zeros(2, 4, 5, 7).double()}, r"noise is .* torch.float64; it must be like"),
        ({1: torch.zeros(2, 4, 5, 7).half()}, r"latents have dtype torch.float16; allowed are"),
        ({0: torch.zeros(4, 4, 5, 7).int()}, r"model_output have dtype torch.int32; allowed are"),
        ({0: torch.zeros(4, 4, 5, 7, device="meta")}, r"model_output is on meta, latents on cpu"),
        ({2: torch.zeros(3, device="meta")}, r"coefficients is on meta, latents on cpu"),
        ({4: torch.zeros(2, 4, 5, 7, device="meta")}, r"noise is on meta, latents on cpu"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(change: dict[int, object], message: str) -> None:
    args: list[Any] = list(inputs())
    for position, value in change.items():
        args[position] = value
    with pytest.raises(ValueError, match=message):
        guided_ddim_step(*args)


@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_noise", [True, False])
def test_guidance_may_be_a_tensor(model_dtype: torch.dtype, with_noise: bool) -> None:
    *args, scale, noise = inputs(with_noise=with_noise, model_dtype=model_dtype)
    args[0].requires_grad_()
    args[1].requires_grad_()
    results = []
    for guidance in (scale, torch.tensor(scale)):
        out = guided_ddim_step(*args, guidance, noise)
        results.append((out, *torch.autograd.grad(out.square().sum(), args[:2])))
    for by_number, by_tensor in zip(*results, strict=True):
        torch.testing.assert_close(by_tensor, by_number, rtol=1e-6, atol=1e-6)
    assert torch.equal(results[0][0], results[1][0])


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        (torch.ones(1), r"guidance_scale is a tensor \(1,\)"),
        (torch.tensor(3), "torch.int64; expected one floating point number"),
        (torch.ones((), device="meta"), "guidance_scale is on meta, the latents on cpu"),
    ],
)
def test_a_guidance_tensor_that_does_not_fit_is_refused(scale: Tensor, words: str) -> None:
    model_output, latents, coefficients, _, _ = inputs()
    with pytest.raises(ValueError, match=words):
        guided_ddim_step(model_output, latents, coefficients, scale)
    with pytest.raises(ValueError, match="with guidance and latents"):
        guided_ddim_step(model_output[1:], latents, coefficients, torch.ones(()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(2, 4, 5)}, r"gradients have shape \(2, 4, 5\); expected \(B, C, h, w\)"),
        (
            {0: torch.zeros(2, 4, 5, 7).bfloat16()},
            "gradients have dtype torch.bfloat16; allowed are",
        ),
        ({1: torch.zeros(1)}, r"coefficients have shape \(1,\); expected \(3,\)"),
        ({1: torch.zeros(3).half()}, "coefficients have dtype torch.float16; allowed are"),
        ({1: torch.zeros(3, device="meta")}, "coefficients are on meta, gradients on cpu"),
        ({3: torch.int32}, "model's output have dtype torch.int32; allowed are float32"),
    ],
)
def test_a_backward_pass_of_something_else_is_refused(
    change: dict[int, object], message: str
) -> None:
    args: list[Any] = [torch.zeros(2, 4, 5, 7), COEFFICIENTS, 7.5, torch.float32]
    for position, value in change.items():
        args[position] = value
    with pytest.raises(ValueError, match=message):
        OP_BACKWARD(*args)
