"""TRL's settings of an AlignProp run: its names, its defaults."""

# ruff: noqa: RUF009 - `_setting(...)` returns a dataclass field
# Not frozen, unlike this library's settings: scripts written for TRL assign to it.

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Optional

import torch

from rewardprop_fast.errors import ConfigError

#: TRL's words for the arithmetic ("none" stands in its help, "no" is what accelerate takes).
PRECISIONS = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "no": torch.float32,
    "none": torch.float32,
}


def _setting(default: Any, help: str, choices: list[str] | None = None) -> Any:
    metadata: dict[str, Any] = {"help": help}
    if choices:
        metadata["choices"] = choices
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class AlignPropConfig:
    """Settings by TRL 0.23.1's names; `transformers.HfArgumentParser` makes options of them.

    Raises:
        ImportError: 8-bit Adam is asked for and bitsandbytes is not installed.
    """

    exp_name: str = _setting(
        os.path.basename(sys.argv[0])[: -len(".py")], "Name of the experiment."
    )
    run_name: str = _setting("", "Name of the run.")
    seed: int = _setting(0, "Fixes LoRA, prompts, noise and truncation.")
    log_with: Optional[str] = _setting(  # noqa: UP045 - the parser wants it spelled so
        None, "Tracker: wandb, tensorboard, or another of accelerate's."
    )
    log_image_freq: int = _setting(1, "Updates between two calls of image_samples_hook.")
    tracker_kwargs: dict[str, Any] = _setting({}, "Passed on to the trackers, by tracker's name.")
    accelerator_kwargs: dict[str, Any] = _setting({}, "Passed on to accelerate's Accelerator.")
    project_kwargs: dict[str, Any] = _setting(
        {}, "Passed on to accelerate's ProjectConfiguration: project_dir, logging_dir, total_limit."
    )
    tracker_project_name: str = _setting("trl", "Project in the tracker.")
    logdir: str = _setting("logs", "Folder of logs and checkpoints without a project_dir.")
    num_epochs: int = _setting(100, "Updates of the run.")
    save_freq: int = _setting(1, "Updates between two checkpoints.")
    num_checkpoint_limit: int = _setting(5, "Checkpoints that are kept, without a total_limit.")
    mixed_precision: str = _setting(
        "fp16", "Of frozen weights and arithmetic; the LoRA is float32.", ["fp16", "bf16", "none"]
    )
    allow_tf32: bool = _setting(True, "TF32 products on GPUs that have them.")
    resume_from: str = _setting("", "Checkpoint, or folder of checkpoints, to go on from.")
    sample_num_steps: int = _setting(50, "DDIM steps.")
    sample_eta: float = _setting(1.0, "Noise of DDIM: 0 none, 1 as DDPM.")
    sample_guidance_scale: float = _setting(5.0, "Guidance weight; 1 and less is without.")
    train_batch_size: int = _setting(1, "Images drawn at once.")
    train_use_8bit_adam: bool = _setting(False, "bitsandbytes' AdamW8bit.")
    train_learning_rate: float = _setting(1e-3, "AdamW's step size.")
    train_adam_beta1: float = _setting(0.9, "AdamW's first decay rate.")
    train_adam_beta2: float = _setting(0.999, "AdamW's second decay rate.")
    train_adam_weight_decay: float = _setting(1e-4, "AdamW's decoupled decay.")
    train_adam_epsilon: float = _setting(1e-8, "AdamW's denominator offset.")
    train_gradient_accumulation_steps: int = _setting(1, "Batches averaged into one update.")
    train_max_grad_norm: float = _setting(1.0, "The gradient's norm is clipped to this.")
    negative_prompts: Optional[str] = _setting(  # noqa: UP045
        None, "What guidance leads away from: one text for all images."
    )
    truncated_backprop_rand: bool = _setting(
        True, "Draw anew at every step of the chain whether the prediction carries a gradient."
    )
    truncated_backprop_timestep: int = _setting(
        49, "First step with gradients, counted from 0 at the noisiest, where nothing is drawn."
    )
    truncated_rand_backprop_minmax: tuple[int, int] = _setting(
        (0, 50), "Range, both ends included, of what is drawn: step i counts from i >= draw on."
    )
    push_to_hub: bool = _setting(False, "For the script to read; the trainer does not.")

    def __post_init__(self) -> None:
        if self.train_use_8bit_adam and importlib.util.find_spec("bitsandbytes") is None:
            raise ImportError(
                "train_use_8bit_adam needs bitsandbytes: pip install bitsandbytes. Or leave it "
                "out: the moments of a rank-4 LoRA are small."
            )

    @property
    def output_dir(self) -> str:
        """`logdir`; scripts hand it to `AlignPropTrainer.save_model`."""
        return self.logdir

    def to_dict(self) -> dict[str, Any]:
        """All settings, those within a mapping as `outer/inner`: what a tracker shows."""
        return _flat({one.name: getattr(self, one.name) for one in fields(self)})

    def check(self) -> None:
        """Whether this can train. Raises ConfigError with every problem."""
        problems = list(self._problems())
        if problems:
            raise ConfigError("\n".join(["AlignPropConfig has problems:", *problems]))

    def _problems(self) -> Any:
        for name, value, least in (
            ("sample_num_steps", self.sample_num_steps, 1),
            ("train_batch_size", self.train_batch_size, 1),
            ("train_gradient_accumulation_steps", self.train_gradient_accumulation_steps, 1),
            ("save_freq", self.save_freq, 1),
            ("log_image_freq", self.log_image_freq, 1),
            ("num_checkpoint_limit", self.num_checkpoint_limit, 1),
        ):
            if value < least:
                yield f"  {name}: got {value}; allowed: at least {least}."
        if self.mixed_precision not in PRECISIONS:
            yield f"  mixed_precision: got {self.mixed_precision!r}; allowed: fp16, bf16, no."
        if self.negative_prompts is not None and not isinstance(self.negative_prompts, str):
            yield f"  negative_prompts: got {self.negative_prompts!r}; allowed: one text, or None."
        steps = self.sample_num_steps
        if not self.truncated_backprop_rand:
            if self.truncated_backprop_timestep >= steps:
                yield (
                    f"  truncated_backprop_timestep: got {self.truncated_backprop_timestep}; of "
                    f"{steps} steps none would carry a gradient. Allowed: below sample_num_steps."
                )
            return
        least, most = self.truncated_rand_backprop_minmax
        if least > most:
            yield f"  truncated_rand_backprop_minmax: got {(least, most)}; allowed: least, most."
        elif least >= steps:
            yield (
                f"  truncated_rand_backprop_minmax: got {(least, most)}; of {steps} steps none "
                "could ever carry a gradient. Allowed: the first below sample_num_steps."
            )


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}/")
        else:
            flat[prefix + key] = value
    return flat
