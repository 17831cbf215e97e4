"""A pipeline's networks by their shapes alone: enough to convert a LoRA or to plan memory."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from rewardprop_fast import hub
from rewardprop_fast.errors import ModelError
from rewardprop_fast.models.load import cannot_load, locate


def load_skeleton(
    path: str | Path,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    with_vae: bool = False,
) -> Any:
    """`.unet` on the meta device (no weights, no memory) and `.scheduler.config` of a pipeline.

    Reads two small JSON files, also from the hub; a third for the `.vae`, where it is asked for.
    Arguments and errors as in `load_pipeline`.
    """
    location, local = locate(path, revision=revision, local_files_only=local_files_only)
    arguments: dict[str, Any] = {}
    if not local:
        offline = local_files_only or not hub.reachable()
        arguments = {"revision": revision, "local_files_only": offline}
    try:
        config = UNet2DConditionModel.load_config(location, subfolder="unet", **arguments)
        if with_vae:
            vae_config = AutoencoderKL.load_config(location, subfolder="vae", **arguments)
        scheduler = DDIMScheduler.load_config(location, subfolder="scheduler", **arguments)
    except (OSError, ValueError) as error:
        raise ModelError(cannot_load(location, local, error)) from error
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
        vae = AutoencoderKL.from_config(vae_config) if with_vae else None
    return SimpleNamespace(unet=unet, vae=vae, scheduler=SimpleNamespace(config=scheduler))
