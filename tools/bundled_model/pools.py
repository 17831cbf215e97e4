"""Pictures prepared once and kept: tensors and their captions in one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from rewardprop_fast.files import atomic_write

Pool = tuple[dict[str, torch.Tensor], list[str]]


def kept(file: Path, make: Callable[[], Pool]) -> Pool:
    """What `file` holds; made and written first where it does not exist. Whole or not there."""
    if not file.exists():
        tensors, captions = make()
        file.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        atomic_write(file, save(tensors, metadata={"captions": json.dumps(captions)}))
    with safe_open(file, "pt") as opened:
        captions = json.loads(opened.metadata()["captions"])
        return {name: opened.get_tensor(name) for name in opened.keys()}, captions  # noqa: SIM118
