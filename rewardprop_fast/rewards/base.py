"""What a reward is, and how one that cannot be trained on is refused before any long work starts.

A reward is any callable ``(images, prompts, metadata) -> values``:

- ``images``: (B, 3, H, W) float tensor in [0, 1], on the training device, with a gradient history;
- ``prompts``: list of B strings; ``metadata``: list of B dicts (whatever came with the prompts);
- ``values``: (B,) float tensor, one per image, higher is better, differentiable in ``images``.

Attributes that are read where they exist: ``name`` (str, for reports), ``members`` (the rewards an
ensemble is made of, each of which is checked by itself), ``differentiable`` (False says that there
is no gradient by nature) and ``compute_in`` (a method that takes the run's dtype).
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from rewardprop_fast.errors import NonFiniteRewardError, RewardError

Reward = Callable[[Tensor, list[str], list[dict[str, Any]]], Tensor]

_CONTRACT = "a reward is called as reward(images, prompts, metadata) and returns a (B,) tensor"
_NO_GRADIENT_ADVICE = (
    "Methods that differentiate the reward (DRaFT, AlignProp and the like) cannot use it. Make it "
    "differentiable: no torch.no_grad(), .detach(), .item(), numpy, rounding or argmax between the "
    "images and the result. For a reward that cannot be made differentiable the method is DDPO "
    "(`method: {name: ddpo}`; policy gradient, arXiv 2305.13301)."
)


def name_of(reward: object) -> str:
    """The name a reward is reported under: its ``name``, or that of its function or class."""
    name = getattr(reward, "name", None)
    if isinstance(name, str) and name:
        return name
    if isinstance(reward, functools.partial):
        return name_of(reward.func)
    name = getattr(reward, "__name__", type(reward).__name__)
    return "lambda" if name == "<lambda>" else str(name)


def prepare(reward: Reward, device: torch.device | str, dtype: torch.dtype | None = None) -> Reward:
    """Freeze a reward module and move it to ``device``, in place; other callables pass through.

    Without the freeze, every step would compute and keep gradients of the reward model's own
    weights. ``dtype``, the run's compute dtype, is offered to every module in it with a method
    ``compute_in``; the others stay in what they were made in.
    """
    if isinstance(reward, nn.Module):
        reward.eval().requires_grad_(False).to(device)
        for module in reward.modules():
            compute_in = getattr(module, "compute_in", None)
            if dtype is not None and callable(compute_in):
                compute_in(dtype)
    return reward


def is_differentiable(reward: object) -> bool:
    """False where a reward, or a member of it, says of itself that it has no gradient."""
    members = getattr(reward, "members", ())
    return bool(getattr(reward, "differentiable", True)) and all(map(is_differentiable, members))


def check_signature(reward: object) -> None:
    """Refuse what cannot be called as ``reward(images, prompts, metadata)``. Raises RewardError."""
    name = name_of(reward)
    if not callable(reward):
        raise RewardError(
            f"The reward {name!r} is a {type(reward).__name__}, not callable; {_CONTRACT}."
        )
    if inspect.isclass(reward):
        raise RewardError(f"The reward {name!r} is a class; give an instance of it: {name}(...).")
    # nn.Module.__call__ takes (*args, **kwargs) and would hide what forward accepts.
    target = reward.forward if isinstance(reward, nn.Module) else reward
    try:
        signature = inspect.signature(target)
    except (
        TypeError,
        ValueError,
    ):  # some C functions have no signature; the probe calls them anyway
        return
    try:
        signature.bind(None, None, None)
    except TypeError as error:
        raise RewardError(
            f"The reward {name!r} has the arguments {signature}, but {_CONTRACT}, "
            f"also when it ignores some of the three ({error})."
        ) from error


def evaluate(
    reward: Reward, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]
) -> Tensor:
    """Call a reward and hold its result to the contract; used at every step.

    Returns (B,), finite, fp32 where the reward computed in half precision, so that means and
    weighted sums are not taken in half. Raises RewardError for a wrong type, shape or non-finite
    values, and for anything the reward itself raises (chained). Running out of GPU memory is passed
    on as it is.
    """
    name = name_of(reward)
    try:
        values = reward(images, list(prompts), list(metadata))
    except (RewardError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:
        raise RewardError(f"The reward {name!r} raised {type(error).__name__}: {error}") from error
    _check_values(name, values, batch_size=images.shape[0], prompts=prompts)
    return values if values.dtype == torch.float64 else values.float()


def check(
    reward: Reward,
    images: Tensor,
    prompts: Sequence[str],
    metadata: Sequence[dict[str, Any]],
    needs_gradient: bool = True,
) -> Tensor:
    """Call a reward once and refuse, with a RewardError, one that cannot be trained on.

    Refused are a wrong signature, an exception, a wrong type or shape, non-finite values, no
    gradient with respect to the images (none at all, or zero everywhere) and a non-finite gradient.
    The members of an ensemble are checked one by one, since a member without gradient would hide
    behind the others. ``images`` (B, 3, H, W) is not changed, and no ``.grad`` is filled anywhere.
    ``needs_gradient``: False for a method that does not differentiate the reward (DDPO); nothing is
    asked of the gradient then. Returns the values (B,).
    """
    check_signature(reward)
    name = name_of(reward)
    if needs_gradient and not getattr(reward, "differentiable", True):
        raise RewardError(f"The reward {name!r} has no gradient by nature. {_NO_GRADIENT_ADVICE}")
    for member in getattr(reward, "members", ()):
        check(member, images, prompts, metadata, needs_gradient)
    if not needs_gradient:
        with torch.no_grad():
            return evaluate(reward, images.detach(), prompts, metadata).detach()
    with torch.inference_mode(False), torch.enable_grad():
        leaf = images.detach().clone().requires_grad_(True)
        values = evaluate(reward, leaf, prompts, metadata)
        if not values.requires_grad:
            raise RewardError(
                f"The reward {name!r} gives no gradient to the images. {_NO_GRADIENT_ADVICE}"
            )
        try:
            (gradient,) = torch.autograd.grad(values.sum(), leaf, allow_unused=True)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            raise RewardError(
                f"The backward pass of the reward {name!r} raised {type(error).__name__}: {error}"
            ) from error
    if gradient is None:
        raise RewardError(
            f"The reward {name!r} has a gradient, but none that reaches the images. "
            f"{_NO_GRADIENT_ADVICE}"
        )
    if not bool(torch.isfinite(gradient).all()):
        raise RewardError(
            f"The gradient of the reward {name!r} with respect to the images is not finite, "
            "though its values are. Usual causes: sqrt or a norm at zero, log or division without "
            "a floor."
        )
    if not bool(gradient.any()):
        raise RewardError(
            f"The gradient of the reward {name!r} is zero at every pixel of a test image. "
            f"{_NO_GRADIENT_ADVICE}"
        )
    return values.detach()


def probe(
    reward: Reward,
    height: int,
    width: int,
    prompts: Sequence[str] = (),
    metadata: Sequence[dict[str, Any]] = (),
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    needs_gradient: bool = True,
) -> Tensor:
    """`check` on two synthetic images: what the trainer runs before it starts.

    The first prompts and metadata of the run are used, so that a reward that looks things up there
    is tested on real ones. Raises RewardError; returns the two values.
    """
    images = probe_images(height, width).to(device=device, dtype=dtype)
    batch_size = images.shape[0]
    return check(
        reward,
        images,
        _cycle(prompts or ["a photo of a cat", "a photo of a dog"], batch_size),
        _cycle(metadata or [{}], batch_size),
        needs_gradient,
    )


def probe_images(height: int, width: int) -> Tensor:
    """Two smooth, coloured, slightly noisy images (2, 3, H, W) in [0.05, 0.95]; always the same.

    Neither flat nor saturated: clamps, norms and JPEG would give zero gradient there to rewards
    that are perfectly good. A private generator keeps the user's random state untouched.
    """
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(2, 3, 4, 4, generator=generator)
    blobs = nn.functional.interpolate(
        coarse, size=(height, width), mode="bilinear", align_corners=False, antialias=False
    )
    noise = torch.randn(2, 3, height, width, generator=generator)
    ramp = torch.linspace(-0.2, 0.2, width).expand(height, width)
    return (0.5 + ramp + 0.1 * blobs + 0.03 * noise).clamp(0.05, 0.95)


def _cycle(items: Sequence[Any], length: int) -> list[Any]:
    return [items[index % len(items)] for index in range(length)]


def _check_values(name: str, values: object, batch_size: int, prompts: Sequence[str]) -> None:
    if not isinstance(values, Tensor):
        raise RewardError(f"The reward {name!r} returned a {type(values).__name__}; {_CONTRACT}.")
    if values.shape != (batch_size,):
        if values.ndim == 0:
            hint = " Return one value per image; do not average over the batch."
        elif values.numel() == batch_size:
            hint = " Flatten it: values.reshape(-1)."
        else:
            hint = ""
        raise RewardError(
            f"The reward {name!r} returned the shape {tuple(values.shape)} for {batch_size} "
            f"images; expected ({batch_size},).{hint}"
        )
    if not values.is_floating_point():
        raise RewardError(
            f"The reward {name!r} returned {values.dtype}, which has no gradient. "
            f"{_NO_GRADIENT_ADVICE}"
        )
    if not is_fake(values) and not bool(torch.isfinite(values).all()):
        numbers = values.detach().tolist()
        index = next(i for i, value in enumerate(numbers) if not math.isfinite(value))
        prompt = f" (prompt {prompts[index]!r})" if index < len(prompts) else ""
        raise NonFiniteRewardError(
            f"The reward {name!r} returned {numbers[index]} for image {index} of "
            f"{batch_size}{prompt}."
        )


def is_fake(tensor: Tensor) -> bool:
    """Whether it has a shape and no values (`memory`'s dry runs), so that nothing can be read."""
    return isinstance(tensor, FakeTensor) or tensor.device.type == "meta"
