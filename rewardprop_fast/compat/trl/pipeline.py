"""TRL's wrapper of a Stable Diffusion pipeline."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from peft import LoraConfig

from rewardprop_fast import lora, models
from rewardprop_fast.errors import ConfigError
from rewardprop_fast.lora.files import DIFFUSERS_FILE


class DefaultDDPOStableDiffusionPipeline:
    """A Stable Diffusion pipeline with a DDIM scheduler, ready for `AlignPropTrainer`.

    Subclasses may give another LoRA by overriding `get_trainable_layers`.

    Args:
        pretrained_model_name: a hub name, a folder, or "bundled".
        pretrained_model_revision: branch, tag or commit on the hub.
        use_lora: must be True; this library trains LoRA weights alone.

    Raises:
        ConfigError: use_lora is False.
        ModelError: the model cannot be loaded or trained.
    """

    def __init__(
        self,
        pretrained_model_name: str,
        *,
        pretrained_model_revision: str = "main",
        use_lora: bool = True,
    ) -> None:
        if not use_lora:
            raise ConfigError(
                "use_lora is False; this library trains LoRA weights alone. Leave it out, and for "
                "more freedom override get_trainable_layers with a LoraConfig of a higher rank."
            )
        self.use_lora = True
        self.pretrained_model = pretrained_model_name
        self.pretrained_revision = pretrained_model_revision
        self.sd_pipeline = models.load_pipeline(
            pretrained_model_name, revision=pretrained_model_revision
        )
        self.sd_pipeline.scheduler = DDIMScheduler.from_config(self.sd_pipeline.scheduler.config)
        self.sd_pipeline.unet.requires_grad_(False)

    @classmethod
    def of(cls, pipe: Any) -> DefaultDDPOStableDiffusionPipeline:
        """The wrapper of a pipeline that is there already, SD or SDXL."""
        wrapper = cls.__new__(cls)
        wrapper.use_lora = True
        wrapper.pretrained_model, wrapper.pretrained_revision = "", "main"
        wrapper.sd_pipeline = pipe
        return wrapper

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Images, as from the diffusers pipeline; without TRL's latents and log probabilities."""
        return self.sd_pipeline(*args, **kwargs)

    def rgb_with_grad(self, *args: Any, **kwargs: Any) -> Any:
        """Not here: the trainer runs the chain itself."""
        raise NotImplementedError(
            "rgb_with_grad is not part of this library; a differentiable sample is what "
            "RewardPropTrainer.training_step gives the gradients of (examples/own_loop.py)."
        )

    def scheduler_step(self, *args: Any, **kwargs: Any) -> Any:
        """Not here: it belongs to DDPO."""
        raise NotImplementedError("scheduler_step belongs to DDPO, which this library has not.")

    @property
    def unet(self) -> Any:
        return self.sd_pipeline.unet

    @property
    def vae(self) -> Any:
        return self.sd_pipeline.vae

    @property
    def tokenizer(self) -> Any:
        return self.sd_pipeline.tokenizer

    @property
    def scheduler(self) -> Any:
        return self.sd_pipeline.scheduler

    @property
    def text_encoder(self) -> Any:
        return self.sd_pipeline.text_encoder

    @property
    def autocast(self) -> Any:
        return contextlib.nullcontext

    def set_progress_bar_config(self, *args: Any, **kwargs: Any) -> None:
        self.sd_pipeline.set_progress_bar_config(*args, **kwargs)

    def get_trainable_layers(self) -> Any:
        """The UNet with a new float32 LoRA adapter: rank and alpha 4 on attention's projections.

        A LoRA in the model's own folder (pytorch_lora_weights.safetensors) is where it starts from.
        """
        unet = self.sd_pipeline.unet
        unet.requires_grad_(False)
        unet.add_adapter(
            LoraConfig(
                r=4,
                lora_alpha=4,
                init_lora_weights="gaussian",
                target_modules=["to_k", "to_q", "to_v", "to_out.0"],
            )
        )
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.to(torch.float32)
        start = Path(self.pretrained_model, DIFFUSERS_FILE) if self.pretrained_model else None
        if start is not None and start.is_file():
            lora.load(unet, start)
        return unet

    def save_pretrained(self, output_dir: str | Path) -> None:
        """Write the LoRA for `pipe.load_lora_weights(output_dir)`, and in kohya's format.

        The base model is not written again: it has not changed.
        """
        lora.save_lora(self.sd_pipeline, output_dir)
