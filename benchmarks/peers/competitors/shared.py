"""What competitors share: inputs, and names of LoRA parameters."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def inputs(job: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """x_T (B, 4, h, w) float32, and the LoRA's values by name."""
    tensors = load_file(Path(job["folder"], "inputs.safetensors"))
    return tensors.pop("latents")[: job["batch"]], tensors


def lora_parameters(unet: nn.Module) -> dict[str, nn.Parameter]:
    """By names without the adapter's."""
    return {
        name.replace(".default.", "."): parameter
        for name, parameter in unet.named_parameters()
        if "lora_" in name and parameter.requires_grad
    }


@torch.no_grad()
def fill(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    """Every parameter gets its value; there must be one for each, and no other."""
    if parameters.keys() != values.keys():
        raise ValueError(f"other LoRA layers: {sorted(parameters.keys() ^ values.keys())[:3]}")
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def take_gradients(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The gradients, which are gone from the parameters afterwards."""
    found = {name: parameter.grad.clone() for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None
    return found


def tensors_of(*modules: Any) -> Iterable[Tensor]:
    """Parameters and buffers."""
    return [
        tensor
        for module in modules
        if isinstance(module, nn.Module)
        for tensor in (*module.parameters(), *module.buffers())
    ]
