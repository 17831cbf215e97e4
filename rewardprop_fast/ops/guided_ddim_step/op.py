"""The guided DDIM step: public function, torch.library registration, gradient, legality.

Shape legend: B images, C latent channels, h and w latent height and width.

| argument     | shape                                | dtype                               | grad |
|--------------|--------------------------------------|-------------------------------------|------|
| model_output | (2B, C, h, w), unguided (B, C, h, w) | float32, bfloat16, float16, float64 | yes  |
| latents      | (B, C, h, w)                         | float32, float64                    | yes  |
| coefficients | (3,): a, b, sigma                    | float32, float64                    | no   |
| noise        | (B, C, h, w) or None                 | that of latents                     | no   |
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rewardprop_fast.ops.guided_ddim_step import cuda, native, reference, triton
from rewardprop_fast.ops.registration import define, differentiable
from rewardprop_fast.ops.registry import Implementation, Operator, choose


def _example(device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    model_output = torch.zeros(2, 4, 8, 8, dtype=dtype, device=device)
    latents = torch.zeros(1, 4, 8, 8, device=device)
    return model_output, latents, torch.zeros(3, device=device), 7.5, None


GUIDED_DDIM_STEP = Operator(
    "guided_ddim_step",
    (
        Implementation("native", native.why_not, native.forward, native.backward),
        Implementation("cuda", cuda.why_not, cuda.forward, cuda.backward),
        Implementation("triton", triton.why_not, triton.forward, triton.backward),
        Implementation("reference", lambda *_: None, reference.forward, reference.backward),
    ),
    _example,
)

_MODEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LATENT_DTYPES = (torch.float32, torch.float64)


def guided_ddim_step(
    model_output: Tensor,
    latents: Tensor,
    coefficients: Tensor,
    guidance_scale: float | Tensor | None,
    noise: Tensor | None = None,
) -> Tensor:
    """One denoising step: classifier-free guidance, then the DDIM update.

    ``eps = u + w (c - u)`` and ``x_prev = a x + b eps (+ sigma noise)``, with u the first and c the
    second half of ``model_output`` along the batch (diffusers' order: unconditional first). DDIM
    with eta = 0 or > 0, and epsilon, v or sample prediction, are all this form with other
    coefficients.

    Args:
        model_output: the network's output, (2B, C, h, w) with guidance, (B, C, h, w) without.
        latents: x_t, (B, C, h, w), float32 or float64; the result has its dtype and memory format.
        coefficients: (3,) tensor [a, b, sigma] on the same device; read there, so a captured graph
            can be replayed with other values.
        guidance_scale: w, or None for a network output that is not doubled. As a tensor, (), it is
            read on the device like the coefficients: guidance is then four small operations of
            PyTorch's before the fused update, of the same bits; no gradient flows to it.
        noise: standard normal, like ``latents``; None leaves the sigma term out.

    Returns:
        x_{t-1}, (B, C, h, w). Gradients flow to ``model_output`` and ``latents`` and no activation
        is kept for them; a second derivative is refused by autograd.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    if isinstance(guidance_scale, Tensor):
        _check_scale(guidance_scale, latents)
        _check(model_output, latents, coefficients, 1.0, noise)
        dtype = reference.compute_dtype(model_output.dtype, latents.dtype, coefficients.dtype)
        weight = guidance_scale.detach().to(dtype)
        model_output, guidance_scale = reference.guided(model_output.to(dtype), weight), None
    scale = None if guidance_scale is None else float(guidance_scale)
    result: Tensor = _FORWARD(model_output, latents, coefficients, scale, noise)
    return result


def _forward(
    model_output: Tensor,
    latents: Tensor,
    coefficients: Tensor,
    guidance_scale: float | None,
    noise: Tensor | None,
) -> Tensor:
    _check(model_output, latents, coefficients, guidance_scale, noise)
    # One layout for all, so that every backend sees flat arrays whose elements correspond; no copy
    # in the usual case.
    layout = _memory_format(latents)
    args = (
        model_output.contiguous(memory_format=layout),
        latents.contiguous(memory_format=layout),
        coefficients.contiguous(),
        guidance_scale,
        None if noise is None else noise.contiguous(memory_format=layout),
    )
    return choose(GUIDED_DDIM_STEP, *args).implementation.forward(*args)


def _forward_fake(
    model_output: Tensor,
    latents: Tensor,
    coefficients: Tensor,
    guidance_scale: float | None,
    noise: Tensor | None,
) -> Tensor:
    _check(model_output, latents, coefficients, guidance_scale, noise)
    return torch.empty_like(latents, memory_format=_memory_format(latents))


def _backward(
    grad: Tensor, coefficients: Tensor, guidance_scale: float | None, model_dtype: torch.dtype
) -> Tensor:
    _check_backward(grad, coefficients, model_dtype)
    grad = grad.contiguous(memory_format=_memory_format(grad))
    coefficients = coefficients.contiguous()
    # The gradient has the shape and dtype of x_prev, so it stands for the latents where legality is
    # asked; what stands for the model's output needs its dtype and device alone.
    stand_in = grad if grad.dtype == model_dtype else grad.new_empty(0, dtype=model_dtype)
    choice = choose(GUIDED_DDIM_STEP, stand_in, grad, coefficients, guidance_scale, None)
    return choice.implementation.backward(grad, coefficients, guidance_scale, model_dtype)


def _backward_fake(
    grad: Tensor, coefficients: Tensor, guidance_scale: float | None, model_dtype: torch.dtype
) -> Tensor:
    _check_backward(grad, coefficients, model_dtype)
    batch = grad.shape[0] * (1 if guidance_scale is None else 2)
    layout = _memory_format(grad)
    return grad.new_empty((batch, *grad.shape[1:]), dtype=model_dtype).contiguous(
        memory_format=layout
    )


def _save(ctx: Any, args: tuple[Any, ...], output: Tensor) -> None:
    """The three coefficients and nothing else."""
    model_output, _, coefficients, guidance_scale, _ = args
    ctx.save_for_backward(coefficients)
    ctx.guidance_scale = guidance_scale
    ctx.model_dtype = model_output.dtype


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (coefficients,) = ctx.saved_tensors
    model_output_needed, latents_needed, *_ = ctx.needs_input_grad
    grad_model_output = grad_latents = None
    if model_output_needed:
        grad_model_output = _BACKWARD(grad, coefficients, ctx.guidance_scale, ctx.model_dtype)
    if latents_needed:
        grad_latents = coefficients[0] * grad
    return grad_model_output, grad_latents, None, None, None


_FORWARD = define(
    "guided_ddim_step(Tensor model_output, Tensor latents, Tensor coefficients, "
    "float? guidance_scale, Tensor? noise) -> Tensor",
    _forward,
    _forward_fake,
)
_BACKWARD = define(
    "guided_ddim_step_backward(Tensor grad, Tensor coefficients, float? guidance_scale, "
    "ScalarType model_dtype) -> Tensor",
    _backward,
    _backward_fake,
)
differentiable(_FORWARD, _save, _gradients)


# --- legality ---


def _memory_format(tensor: Tensor) -> torch.memory_format:
    """channels_last where the tensor is exactly that, otherwise contiguous."""
    if not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def _check_scale(guidance_scale: Tensor, latents: Tensor) -> None:
    if guidance_scale.shape != () or not guidance_scale.is_floating_point():
        raise ValueError(
            f"guidance_scale is a tensor {tuple(guidance_scale.shape)} {guidance_scale.dtype}; "
            "expected one floating point number, ()."
        )
    if guidance_scale.device != latents.device:
        raise ValueError(
            f"guidance_scale is on {guidance_scale.device}, the latents on {latents.device}; "
            "expected one device. A number may be given as a float."
        )


def _check(
    model_output: Tensor,
    latents: Tensor,
    coefficients: Tensor,
    guidance_scale: float | None,
    noise: Tensor | None,
) -> None:
    shape = latents.shape
    if len(shape) != 4:
        raise ValueError(f"latents have shape {tuple(shape)}; expected (B, C, h, w).")
    expected = shape if guidance_scale is None else (2 * shape[0], *shape[1:])
    if model_output.shape != expected:
        kind = "without guidance" if guidance_scale is None else "with guidance"
        raise ValueError(
            f"model_output has shape {tuple(model_output.shape)}; {kind} and latents "
            f"{tuple(shape)} it must be {tuple(expected)}."
        )
    _check_coefficients(coefficients)
    _check_dtype("model_output", model_output.dtype, _MODEL_DTYPES)
    _check_dtype("latents", latents.dtype, _LATENT_DTYPES)
    if noise is not None and (noise.shape != shape or noise.dtype != latents.dtype):
        raise ValueError(
            f"noise is {tuple(noise.shape)} {noise.dtype}; it must be like the latents, "
            f"{tuple(shape)} {latents.dtype}."
        )
    device = latents.device
    if model_output.device != device or coefficients.device != device:
        name, tensor = (
            ("coefficients", coefficients)
            if model_output.device == device
            else ("model_output", model_output)
        )
        raise ValueError(f"{name} is on {tensor.device}, latents on {device}; use one device.")
    if noise is not None and noise.device != device:
        raise ValueError(f"noise is on {noise.device}, latents on {device}; use one device.")


def _check_backward(grad: Tensor, coefficients: Tensor, model_dtype: torch.dtype) -> None:
    if grad.dim() != 4:
        raise ValueError(f"gradients have shape {tuple(grad.shape)}; expected (B, C, h, w).")
    _check_coefficients(coefficients)
    _check_dtype("gradients", grad.dtype, _LATENT_DTYPES)
    _check_dtype("gradients of the model's output", model_dtype, _MODEL_DTYPES)
    if coefficients.device != grad.device:
        raise ValueError(
            f"coefficients are on {coefficients.device}, gradients on {grad.device}; use one "
            "device."
        )


def _check_coefficients(coefficients: Tensor) -> None:
    if coefficients.shape != (3,):
        raise ValueError(
            f"coefficients have shape {tuple(coefficients.shape)}; expected (3,): a, b, sigma."
        )
    _check_dtype("coefficients", coefficients.dtype, _LATENT_DTYPES)


def _check_dtype(name: str, dtype: torch.dtype, allowed: tuple[torch.dtype, ...]) -> None:
    if dtype not in allowed:
        names = ", ".join(str(one).removeprefix("torch.") for one in allowed)
        raise ValueError(f"{name} have dtype {dtype}; allowed are {names}.")
