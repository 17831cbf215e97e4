"""Checkpoints of a run through TRL's interface: safe files, the LoRA in diffusers' format.

PROJECT_DIR/checkpoints/step_000005/pytorch_lora_weights.safetensors  for load_lora_weights
                                    optimizer.safetensors, random.safetensors, state.json
"""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rewardprop_fast import lora
from rewardprop_fast.errors import CheckpointError
from rewardprop_fast.lora.files import DIFFUSERS_FILE
from rewardprop_fast.training import checkpoint

_LORA = DIFFUSERS_FILE.removesuffix(".safetensors")


def save(trainer: Any, folder: Path, epoch: int, keep: int) -> Path:
    """Write the trainer's state after ``epoch``; all but the ``keep`` newest go."""
    unet = trainer.sd_pipeline.unet
    moments = {}
    for name, parameter in trainer.parameters.items():
        for key, value in trainer.optimizer.state.get(parameter, {}).items():
            moments[f"{key}/{name}"] = torch.as_tensor(value)
    scaler = trainer.accelerator.scaler
    state = {
        "epoch": epoch,
        "global_step": trainer._global_step,
        "batches": trainer._batches,
        "scaler": None if scaler is None else scaler.state_dict(),
        "random": _generators(),
    }
    tensors = {
        _LORA: {f"unet.{name}": value for name, value in lora.lora_state_dict(unet).items()},
        "optimizer": moments,
        "generators": _torch_generators(),
    }
    return checkpoint.save(folder, epoch, tensors, state, keep)


def load(trainer: Any, path: Path) -> tuple[int, int, int]:
    """Bring the trainer to where a checkpoint stands: (first epoch, global step, batches).

    TRL's own checkpoints hold the optimizer and the generators as pickle, which is not read: from
    them the LoRA and the epoch are taken.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    theirs = _of_trl(path)
    if theirs is not None:
        lora.load(trainer.sd_pipeline.unet, theirs / DIFFUSERS_FILE)
        warnings.warn(
            f"{theirs} was written by TRL: its LoRA goes on, its optimizer and random numbers are "
            "pickle files, which are not read; the moments start from zero.",
            stacklevel=4,
        )
        return int(theirs.name.rpartition("_")[2]) + 1, 0, 0
    found = checkpoint.load(path)
    try:
        weights = {k.removeprefix("unet."): v for k, v in found.tensors[_LORA].items()}
        lora.load_lora_state_dict(trainer.sd_pipeline.unet, weights)
        _fill(trainer, found.tensors["optimizer"])
        if trainer.accelerator.scaler is not None and found.state["scaler"] is not None:
            trainer.accelerator.scaler.load_state_dict(found.state["scaler"])
        _set_generators(found.state["random"], found.tensors["generators"])
        state = found.state
        return int(state["epoch"]) + 1, int(state["global_step"]), int(state["batches"])
    except KeyError as error:
        raise CheckpointError(f"{found.path} lacks {error}; it cannot be resumed.") from error


def _of_trl(path: Path) -> Path | None:
    """The checkpoint of TRL's that is meant, if one is."""
    if (path / DIFFUSERS_FILE).is_file() and path.name.startswith("checkpoint_"):
        return path
    if not path.is_dir() or checkpoint.latest(path) is not None:
        return None
    numbers = [
        int(entry.name.removeprefix("checkpoint_"))
        for entry in path.glob("checkpoint_*")
        if entry.name.removeprefix("checkpoint_").isdigit() and (entry / DIFFUSERS_FILE).is_file()
    ]
    return path / f"checkpoint_{max(numbers)}" if numbers else None


def _fill(trainer: Any, moments: dict[str, Tensor]) -> None:
    state: dict[Any, dict[str, Tensor]] = {}
    parameters = trainer.parameters
    for key, value in moments.items():
        kind, _, name = key.partition("/")
        parameter = parameters[name]
        where = "cpu" if kind == "step" else parameter.device
        state.setdefault(parameter, {})[kind] = value.to(where)
    trainer.optimizer.state.clear()
    trainer.optimizer.state.update(state)


def _generators() -> dict[str, Any]:
    """Python's and numpy's global generators, in JSON."""
    version, numbers, following = random.getstate()
    kind, keys, position, has, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(numbers), following],
        "numpy": [str(kind), [int(k) for k in keys], int(position), int(has), float(cached)],
    }


def _torch_generators() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_generators(numbers: dict[str, Any], states: dict[str, Tensor]) -> None:
    version, values, following = numbers["python"]
    random.setstate((version, tuple(values), following))
    kind, keys, position, has, cached = numbers["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has, cached))
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
