"""Read a LoRA file, in diffusers' or kohya's format, into a UNet's adapter.

A file is checked completely before anything in the UNet changes.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from rewardprop_fast.errors import ExportError
from rewardprop_fast.lora.files import (
    DIFFUSERS_FILE,
    DOWN,
    KOHYA_FILE,
    UP,
    LayerLoRA,
    check_finite,
    read_safetensors,
    unet_of,
)
from rewardprop_fast.lora.inject import (
    adapter_layers,
    attach,
    load_lora_state_dict,
    lora_parameters,
    refuse_second_adapter,
    resolve_adapter_name,
)
from rewardprop_fast.lora.kohya import PREFIX, kohya_names
from rewardprop_fast.lora.kohya import pipeline_kind as kind_of


def load(
    model: Any, path: str | os.PathLike[str], adapter_name: str | None = None
) -> list[nn.Parameter]:
    """Reads a LoRA of either format into the UNet's adapter.

    If the UNet has an adapter, the file must match its layers, rank and alpha, and its weights are
    overwritten in place. If it has none, one is attached that fits the file; all else is frozen.

    Args:
        model: a pipeline with a `unet`, or the UNet.
        path: a .safetensors file, or a folder written by `save_lora`.
        adapter_name: the adapter to fill; None: the only one, or "default" for a new one.

    Returns:
        The adapter's parameters.

    Raises:
        ExportError: not a LoRA, damaged, a pickle, for another model, or not plain UNet LoRA. The
            adapter is then as it was.
    """
    unet = unet_of(model)
    file = _lora_file(Path(path))
    layers = read(unet, file)
    if getattr(unet, "peft_config", {}):
        adapter_name = resolve_adapter_name(unet, adapter_name)
        _check_alpha(unet, layers, adapter_name, file)
    else:
        adapter_name = adapter_name or "default"
        attach(unet, _config_for(layers), seed=0, adapter_name=adapter_name)
    fill(unet, layers, adapter_name)
    return list(lora_parameters(unet, adapter_name).values())


def read(model: Any, path: str | os.PathLike[str]) -> dict[str, LayerLoRA]:
    """The layers of a LoRA file of either format, by module name; the model is not changed.

    Arguments and errors as in `load`: every layer is there in the model and has its width.
    """
    unet, file = unet_of(model), _lora_file(Path(path))
    layers = _read_layers(unet, file)
    _check_layers(unet, layers, file)
    return layers


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The text in the header of a LoRA file, or of the one in a folder. Raises ExportError."""
    return read_safetensors(_lora_file(Path(path)))[1]


def put(model: Any, layers: Mapping[str, LayerLoRA], adapter_name: str = "default") -> None:
    """Attach a new adapter that holds these layers. Raises ConfigError if there is one already."""
    unet = unet_of(model)
    refuse_second_adapter(unet)
    attach(unet, _config_for(layers), seed=0, adapter_name=adapter_name)
    fill(unet, layers, adapter_name)


def fill(model: Any, layers: Mapping[str, LayerLoRA], adapter_name: str | None = None) -> None:
    """Write weights into an adapter that has these layers and ranks. Raises ExportError."""
    weights = {}
    for name, layer in layers.items():
        weights[name + DOWN], weights[name + UP] = layer.down, layer.up
    load_lora_state_dict(unet_of(model), weights, adapter_name)


def _lora_file(path: Path) -> Path:
    """`path`, or the LoRA file inside it if it is a folder."""
    if not path.is_dir():
        return path
    for name in (DIFFUSERS_FILE, KOHYA_FILE):
        if (path / name).is_file():
            return path / name
    found = sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        raise ExportError(
            f"{path} holds {len(found)} .safetensors files, none of them named {DIFFUSERS_FILE} or "
            f"{KOHYA_FILE}; give the path of the LoRA file itself."
        )
    return found[0]


def _read_layers(unet: nn.Module, file: Path) -> dict[str, LayerLoRA]:
    tensors, metadata = read_safetensors(file)
    if any(key.startswith(PREFIX) for key in tensors):
        parts, alphas = _parse_kohya(unet, tensors, metadata, file)
    elif any(key.startswith("unet.") and ".lora_" in key for key in tensors):
        parts, alphas = _parse_diffusers(tensors, metadata, file)
    else:
        example = next(iter(tensors), None)
        raise ExportError(
            f"{file} holds no UNet LoRA: no key begins with 'unet.' or '{PREFIX}'"
            + (f"; its first key is {example!r}." if example else "; it is empty.")
        )
    layers = {}
    for module, pair in parts.items():
        if set(pair) != {"down", "up"}:
            raise ExportError(f"{file}: {module} has only its {'/'.join(pair)} half.")
        check_finite(module, pair["down"], pair["up"], f"{file}: the weights")
        if not (math.isfinite(alphas[module]) and alphas[module] > 0):
            raise ExportError(f"{file}: alpha of {module} is {alphas[module]}; it must be above 0.")
        layers[module] = LayerLoRA(pair["down"], pair["up"], alphas[module])
    return layers


_Parsed = tuple[dict[str, dict[str, torch.Tensor]], dict[str, float]]


def _parse_diffusers(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], file: Path
) -> _Parsed:
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix("unet.")
        half = "down" if key.endswith(DOWN) else "up" if key.endswith(UP) else None
        if name == key or half is None or tensor.ndim < 2:
            raise ExportError(_unsupported(file, key))
        parts.setdefault(name.removesuffix(DOWN).removesuffix(UP), {})[half] = tensor
    try:
        header = json.loads(metadata.get(LORA_ADAPTER_METADATA_KEY, "{}"))
        pattern = {k: float(v) for k, v in (header.get("unet.alpha_pattern") or {}).items()}
        stated = header.get("unet.lora_alpha")
        default = None if stated is None else float(stated)
        plain = not any(header.get(f"unet.{field}") for field in ("use_rslora", "use_dora"))
    except (ValueError, AttributeError, TypeError) as error:
        raise ExportError(f"{file}: the adapter's metadata cannot be read ({error}).") from error
    if not plain:
        raise ExportError(f"{file} is an rsLoRA or DoRA; only plain LoRA can be read.")
    alphas = {}
    for module, pair in parts.items():
        rank = next(iter(pair.values())).shape[0 if "down" in pair else 1]
        alpha = next((a for key, a in pattern.items() if _names_layer(key, module)), default)
        alphas[module] = float(rank) if alpha is None else alpha
    return parts, alphas


def _names_layer(pattern: str, module: str) -> bool:
    """Whether a key of peft's alpha_pattern means `module`.

    peft takes the key for a regular expression. A stranger's expression is not run here; what tools
    write is a name or a name's end, dots escaped or not, with ^ for the whole name.
    """
    name = pattern.removeprefix("^").replace("\\.", ".")
    return module == name or (not pattern.startswith("^") and module.endswith("." + name))


def _parse_kohya(
    unet: nn.Module, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], file: Path
) -> _Parsed:
    modules = list(_base_layers(unet))
    known = {name: module for module, name in kohya_names(unet, modules, "sd").items()}
    # SDXL files in the wild use either spelling; the original UNet's is the one we write.
    if kind_of(unet) == "sdxl":
        known |= {name: module for module, name in kohya_names(unet, modules, "sdxl").items()}
    parts: dict[str, dict[str, torch.Tensor]] = {}
    alphas: dict[str, float] = {}
    stated = _float_or_nan(metadata.get("ss_network_alpha"))
    for key, tensor in tensors.items():
        name, _, field = key.partition(".")
        fits = {"lora_down.weight": tensor.ndim >= 2, "lora_up.weight": tensor.ndim >= 2}
        fits["alpha"] = tensor.numel() == 1 and tensor.is_floating_point()
        if not (name.startswith(PREFIX) and fits.get(field, False)):
            raise ExportError(_unsupported(file, key))
        if name not in known:
            raise ExportError(
                f"{file}: this {type(unet).__name__} has no layer for {key!r}; "
                "the LoRA belongs to a different model."
            )
        module = known[name]
        if field == "alpha":
            alpha = float(tensor.item())
            # The tensor holds alpha rounded to float32; the header may hold all its digits.
            same = torch.tensor(stated, dtype=tensor.dtype).item() == alpha
            alphas[module] = stated if same else alpha
        else:
            half = "down" if field == "lora_down.weight" else "up"
            parts.setdefault(module, {})[half] = tensor
    for module, pair in parts.items():
        rank = next(iter(pair.values())).shape[0 if "down" in pair else 1]
        alphas.setdefault(module, float(rank))
    return parts, alphas


def _float_or_nan(text: str | None) -> float:
    try:
        return float(text) if text is not None else math.nan
    except ValueError:
        return math.nan


def _unsupported(file: Path, key: str) -> str:
    return (
        f"{file}: {key!r} is not part of a plain LoRA on the UNet. Text-encoder LoRAs, LoHa, LoKr "
        "and DoRA cannot be read here; for sampling, pipe.load_lora_weights may know the file."
    )


def _base_layers(unet: nn.Module) -> dict[str, Any]:
    """Linear and convolution layers by the names they have without an adapter."""
    layers: dict[str, Any] = {}
    wrapped: list[str] = []
    for name, module in unet.named_modules():
        if any(name.startswith(prefix) for prefix in wrapped[-1:]):
            continue  # inside the peft layer visited last: named_modules goes depth first
        if isinstance(module, LoraLayer):
            wrapped.append(name + ".")
            layers[name] = module.get_base_layer()
        elif isinstance(module, nn.Linear | nn.Conv2d):
            layers[name] = module
    return layers


def _check_layers(unet: nn.Module, layers: Mapping[str, LayerLoRA], file: Path) -> None:
    """Every layer exists in the model and has its width, before anything is changed."""
    base = _base_layers(unet)
    for name, layer in layers.items():
        if name not in base:
            raise ExportError(
                f"{file}: this {type(unet).__name__} has no layer {name!r}; "
                "the LoRA belongs to a different model."
            )
        outer, *inner = base[name].weight.shape
        down = (layer.rank, *inner)
        up = (outer, layer.rank) + (1,) * (len(inner) - 1)
        if tuple(layer.down.shape) != down or tuple(layer.up.shape) != up:
            raise ExportError(
                f"{file}: the LoRA of {name} has shapes {tuple(layer.down.shape)} and "
                f"{tuple(layer.up.shape)}, this model needs {down} and {up}; "
                "the LoRA belongs to a different model."
            )


def _check_alpha(
    unet: nn.Module, layers: Mapping[str, LayerLoRA], adapter_name: str, file: Path
) -> None:
    for name, own in adapter_layers(unet, adapter_name).items():
        if name not in layers:
            continue  # load_lora_state_dict reports missing layers, all together
        alpha, rank = layers[name].alpha, layers[name].rank
        # kohya's tensor holds alpha as float32.
        if rank == own.r[adapter_name] and not math.isclose(
            alpha, own.lora_alpha[adapter_name], rel_tol=1e-6
        ):
            raise ExportError(
                f"{file} was trained with alpha {alpha:g} but the adapter has alpha "
                f"{own.lora_alpha[adapter_name]:g}: the same weights would act "
                f"{own.lora_alpha[adapter_name] / alpha:g} times as strongly. "
                f"Set lora.alpha to {alpha:g}."
            )


def _config_for(layers: Mapping[str, LayerLoRA]) -> LoraConfig:
    """An adapter that fits a file: its commonest rank and alpha, with the exceptions by name."""
    rank = Counter(layer.rank for layer in layers.values()).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in layers.values()).most_common(1)[0][0]
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft annotates int but computes alpha / r
        target_modules=list(layers),
        lora_dropout=0.0,
        rank_pattern={
            "^" + re.escape(name): layer.rank
            for name, layer in layers.items()
            if layer.rank != rank
        },
        alpha_pattern={
            "^" + re.escape(name): layer.alpha
            for name, layer in layers.items()
            if layer.alpha != alpha
        },
    )
