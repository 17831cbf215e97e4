"""Write a UNet's LoRA adapter for other programs; `load` reads such files back.

Two formats, both safetensors:

diffusers   `unet.<module>.lora_A.weight` and `.lora_B.weight`, rank and alpha in the file's
            metadata. `pipe.load_lora_weights(folder)` reads it. Programs that ignore the metadata
            take alpha = rank, so give those the other format when alpha is not the rank.
kohya       `lora_unet_<module>.lora_down.weight`, `.lora_up.weight` and `.alpha`: what ComfyUI,
            A1111 and kohya's sd-scripts read, and diffusers too.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from peft import LoraConfig
from safetensors.torch import save
from torch import nn

from rewardprop_fast.errors import ExportError
from rewardprop_fast.files import atomic_write, make_folder
from rewardprop_fast.lora.files import (
    DIFFUSERS_FILE,
    DOWN,
    KOHYA_FILE,
    UP,
    LayerLoRA,
    check_finite,
    check_suffix,
    read_safetensors,
    unet_of,
)
from rewardprop_fast.lora.inject import (
    adapter_layers,
    lora_state_dict,
    resolve_adapter_name,
)
from rewardprop_fast.lora.kohya import kohya_names
from rewardprop_fast.lora.kohya import pipeline_kind as kind_of

FORMATS = ("diffusers", "kohya")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def save_lora(
    model: Any,
    folder: str | os.PathLike[str],
    formats: Iterable[str] = FORMATS,
    pipeline_kind: str | None = None,
    dtype: torch.dtype = torch.float32,
    adapter_name: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, Path]:
    """Writes the adapter into `folder`, by default in both formats. Each file appears at once.

    Args:
        model: a pipeline with a `unet`, or the UNet.
        folder: created if missing. Gets `pytorch_lora_weights.safetensors` (diffusers) and
            `lora_kohya.safetensors` (kohya).
        formats: some of "diffusers", "kohya".
        pipeline_kind: "sd" or "sdxl"; None decides by the UNet.
        dtype: of the stored weights. float32 keeps every bit; float16 halves the file.
        adapter_name: which adapter; None if there is only one.
        metadata: further text for the files' headers.

    Returns:
        Format -> path of the file.

    Raises:
        ExportError: a bad format, kind or dtype, or an adapter that cannot be written faithfully.
        ConfigError: the UNet has no such adapter.
    """
    wanted = tuple(formats)
    unknown = [name for name in wanted if name not in FORMATS]
    if unknown or not wanted:
        raise ExportError(
            f"LoRA formats are {list(wanted)!r}; choose from {', '.join(map(repr, FORMATS))}."
        )
    paths = {}
    if "diffusers" in wanted:
        paths["diffusers"] = save_diffusers(
            model,
            folder,
            pipeline_kind=pipeline_kind,
            dtype=dtype,
            adapter_name=adapter_name,
            metadata=metadata,
        )
    if "kohya" in wanted:
        paths["kohya"] = save_kohya(
            model,
            Path(folder, KOHYA_FILE),
            pipeline_kind=pipeline_kind,
            dtype=dtype,
            adapter_name=adapter_name,
            metadata=metadata,
        )
    return paths


def save_diffusers(
    model: Any,
    folder: str | os.PathLike[str],
    pipeline_kind: str | None = None,
    dtype: torch.dtype = torch.float32,
    adapter_name: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes `folder/pytorch_lora_weights.safetensors`, for `pipe.load_lora_weights(folder)`.

    Arguments and errors as in `save_lora`.
    """
    unet = unet_of(model)
    adapter_name = resolve_adapter_name(unet, adapter_name)
    kind = _checked_kind(unet, pipeline_kind)
    layers = _exported_layers(unet, adapter_name, dtype)
    weights = {}
    for name, layer in layers.items():
        weights[name + DOWN], weights[name + UP] = layer.down, layer.up

    config = unet.peft_config[adapter_name]
    # Only the fields that decide the adapter's function: peft refuses a header with fields it does
    # not know, so writing all fields of this peft version would lock out readers with an older one.
    header: dict[str, Any] = {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "target_modules": sorted(config.target_modules),
    }
    if config.rank_pattern:
        header["rank_pattern"] = dict(config.rank_pattern)
    if config.alpha_pattern:
        header["alpha_pattern"] = dict(config.alpha_pattern)

    pipeline = StableDiffusionXLPipeline if kind == "sdxl" else StableDiffusionPipeline
    destination = Path(folder, DIFFUSERS_FILE)
    make_folder(destination.parent)
    # diffusers writes files in pieces; ours must appear whole.
    with tempfile.TemporaryDirectory() as scratch:
        pipeline.save_lora_weights(
            scratch,
            unet_lora_layers=weights,
            weight_name=DIFFUSERS_FILE,
            unet_lora_adapter_metadata=header,
        )
        tensors, theirs = read_safetensors(Path(scratch, DIFFUSERS_FILE))
    atomic_write(destination, save(tensors, metadata=_texts(metadata) | theirs))
    return destination


def save_kohya(
    model: Any,
    file: str | os.PathLike[str],
    pipeline_kind: str | None = None,
    dtype: torch.dtype = torch.float32,
    adapter_name: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes one file for ComfyUI, A1111 and kohya's sd-scripts. Its name is what they list.

    Arguments and errors as in `save_lora`; `file` must end in .safetensors.
    """
    unet = unet_of(model)
    adapter_name = resolve_adapter_name(unet, adapter_name)
    kind = _checked_kind(unet, pipeline_kind)
    destination = Path(file)
    check_suffix(destination)
    layers = _exported_layers(unet, adapter_name, dtype)
    names = kohya_names(unet, layers, kind)
    weights = {}
    for name, layer in layers.items():
        weights[names[name] + ".lora_down.weight"] = layer.down
        weights[names[name] + ".lora_up.weight"] = layer.up
        weights[names[name] + ".alpha"] = torch.tensor(layer.alpha, dtype=torch.float32)
    header = _kohya_header(model, kind, unet.peft_config[adapter_name], destination.stem)
    make_folder(destination.parent)
    atomic_write(destination, save(weights, metadata=_texts(metadata) | header))
    return destination


def _texts(metadata: Mapping[str, str] | None) -> dict[str, str]:
    return {str(key): str(value) for key, value in (metadata or {}).items()}


def _checked_kind(unet: nn.Module, pipeline_kind: str | None) -> str:
    if pipeline_kind not in (None, "sd", "sdxl"):
        raise ExportError(f"pipeline_kind is {pipeline_kind!r}; it must be 'sd', 'sdxl' or None.")
    return pipeline_kind or kind_of(unet)


def _exported_layers(
    unet: nn.Module, adapter_name: str, dtype: torch.dtype
) -> dict[str, LayerLoRA]:
    """The adapter's layers in the file's dtype, after the checks that the file can hold them."""
    if dtype not in _DTYPES:
        raise ExportError(
            f"dtype is {dtype}; a LoRA can be stored as {', '.join(map(str, _DTYPES))}."
        )
    weights = lora_state_dict(unet, adapter_name)
    layers = {}
    for name, layer in adapter_layers(unet, adapter_name).items():
        if (
            layer.use_rslora.get(adapter_name)
            or layer.lora_bias.get(adapter_name)
            or adapter_name in layer.lora_variant
        ):
            raise ExportError(
                f"The adapter {adapter_name!r} is not plain LoRA at {name} (rsLoRA, DoRA or a LoRA "
                "bias); only plain LoRA can be exported."
            )
        down, up = weights[name + DOWN], weights[name + UP]
        check_finite(name, down, up, "The adapter's weights")
        down, up = down.to(dtype), up.to(dtype)
        check_finite(name, down, up, f"After rounding to {dtype} the weights; use float32:")
        layers[name] = LayerLoRA(down, up, float(layer.lora_alpha[adapter_name]))
    return layers


def _kohya_header(model: Any, kind: str, config: LoraConfig, title: str) -> dict[str, str]:
    """What sd-scripts writes about a LoRA; A1111 sorts LoRAs by base model with it."""
    prediction = "epsilon"
    if scheduler := getattr(model, "scheduler", None):
        prediction = scheduler.config.get("prediction_type", "epsilon")
    v_prediction = prediction == "v_prediction"
    # Linear projections and a 1024-wide text encoder are what distinguishes SD 2.x from 1.x.
    version_2 = kind == "sd" and bool(unet_of(model).config.get("use_linear_projection"))
    if kind == "sdxl":
        base, architecture = "sdxl_base_v1-0", "stable-diffusion-xl-v1-base"
    elif version_2:
        base = "sd_v2"
        architecture = "stable-diffusion-v2-" + ("768-v" if v_prediction else "512")
    else:
        base, architecture = "sd_v1", "stable-diffusion-v1"
    if v_prediction and kind == "sd":
        base += "_v"
    return {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config.r),
        "ss_network_alpha": str(float(config.lora_alpha)),
        "ss_base_model_version": base,
        "ss_v2": str(version_2),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture + "/lora",
        "modelspec.implementation": (
            "https://github.com/Stability-AI/generative-models" if kind == "sdxl" else "diffusers"
        ),
        "modelspec.prediction_type": "v" if v_prediction else "epsilon",
        "modelspec.title": title,
    }
