"""Which backend each call of a model's operators would get on a device, and why.

The model runs on fake tensors: no weights are needed, nothing is computed, and the device need not
be there.
"""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves

from rewardprop_fast import lora, ops
from rewardprop_fast.errors import ConfigError
from rewardprop_fast.memory import make_fake
from rewardprop_fast.models import architectures
from rewardprop_fast.models.shapes import load_shapes
from rewardprop_fast.nn import accelerate
from rewardprop_fast.ops import registry, triton_runtime

#: A card of 24 GB, where no other is named and none is there.
_CAPABILITY = {"sm_80": (8, 0), "sm_86": (8, 6), "sm_89": (8, 9), "sm_90": (9, 0)}

#: Of the LoRA on the attention projections that training puts there.
_RANK = 16


@dataclass(frozen=True)
class Row:
    """Calls of one operator that get one backend for one reason."""

    operator: str
    calls: int
    backend: str
    reason: str
    example: str  # the shapes of one of them


def of_model(
    model: str = "bundled", device: str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> list[Row]:
    """The operators of one guided denoising step with a LoRA and of one decoding, by backend.

    Args:
        model: "bundled", "sd15", "sdxl", or a pipeline's folder or hub name.
        device: "cpu", "cuda" (the card that is there, else one like an RTX 3090), or a compute
            capability: "sm_80", "sm_86", "sm_89", "sm_90".

    Raises:
        ConfigError: the device has another name.
        ModelError: the model cannot be found.
    """
    kind, capability = _device(device)
    shapes = load_shapes(model, dtype)
    unet = shapes.unet
    lora.inject(unet, _RANK)
    size = int(unet.config.sample_size)
    mode = FakeTensorMode()
    with (
        registry.observing() as seen,
        triton_runtime.recording(capability) if kind == "meta" else nullcontext(),
        torch.no_grad(),
    ):
        for network in (unet, shapes.vae):
            accelerate(network)
            if kind == "cpu":
                make_fake(network, mode)
            else:
                network.to("meta")
            # "meta" stands for a GPU: fake tensors of "cuda" need a torch that is built for it.
            with mode if kind == "cpu" else torch.device("meta"):
                if network is unet:
                    predicted = network(**architectures.unet_inputs(network, 2, size, dtype)).sample
                    ops.guided_ddim_step(
                        predicted, torch.zeros(1, *predicted.shape[1:]), torch.zeros(3), 7.5
                    )
                else:
                    channels = network.config.latent_channels
                    network.decode(torch.randn(1, channels, size, size, dtype=dtype))
    return _rows(seen)


def render(rows: list[Row]) -> str:
    """The rows as lines of text, an operator's most frequent calls first."""
    lines = []
    width = max((len(row.backend) for row in rows), default=0)
    for operator in dict.fromkeys(row.operator for row in rows):
        lines.append(operator)
        for row in (row for row in rows if row.operator == operator):
            lines.append(f"  {row.calls:>4} x {row.backend:<{width}}  {row.example}")
            lines.append(f"         {row.reason}")
    return "\n".join(lines)


def _device(name: str) -> tuple[str, tuple[int, int]]:
    if name in _CAPABILITY:
        return "meta", _CAPABILITY[name]
    if name not in ("cpu", "cuda"):
        allowed = ", ".join(map(repr, ("cpu", "cuda", *_CAPABILITY)))
        raise ConfigError(f"The device is {name!r}; allowed are {allowed}.")
    if name == "cpu" or not torch.cuda.is_available():
        return "cpu" if name == "cpu" else "meta", triton_runtime.DEFAULT_CAPABILITY
    return "meta", torch.cuda.get_device_capability()


def _rows(seen: list[registry.Observation]) -> list[Row]:
    calls: Counter[tuple[str, str, str]] = Counter()
    examples: dict[tuple[str, str, str], str] = {}
    for one in seen:
        reason = one.choice.explain().partition(" ")[2].strip("()")
        reason = reason.replace("are on meta", "are on a GPU")
        key = (one.operator, one.choice.implementation.backend, reason)
        calls[key] += 1
        examples.setdefault(key, _shapes(one.arguments))
    order = {name: index for index, name in enumerate(dict.fromkeys(key[0] for key in calls))}
    return [
        Row(operator, count, backend, reason, examples[operator, backend, reason])
        for (operator, backend, reason), count in sorted(
            calls.items(), key=lambda item: (order[item[0][0]], -item[1])
        )
    ]


def _shapes(arguments: tuple[Any, ...]) -> str:
    """The tensors among the arguments, "2x4x64x64 bfloat16"; those inside lists too."""
    flat = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]
    if not flat:
        return ""
    shapes = ", ".join("x".join(map(str, tensor.shape)) or "scalar" for tensor in flat)
    return f"{shapes} {str(flat[0].dtype).removeprefix('torch.')}"
