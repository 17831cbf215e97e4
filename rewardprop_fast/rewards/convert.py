"""Published reward checkpoints, which are pickles, into folders of safetensors.

The only place where a pickle is read, by a command of its own, and with ``weights_only``: torch's
restricted reader, which makes tensors and plain containers and refuses all else.

Sources of the key layouts: simple_inference.py of christophschuhmann/improved-aesthetic-predictor;
hpsv2/src/open_clip of tgxs002/HPSv2 (a copy of open_clip) and its ViT-H-14.json; ImageReward.py,
train/src/models/{blip,blip_pretrain,med,vit}.py of THUDM/ImageReward.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rewardprop_fast.errors import ModelError
from rewardprop_fast.rewards.head import check_head
from rewardprop_fast.rewards.image_reward import MODEL_TYPE, fit
from rewardprop_fast.rewards.pretrained import load_tokenizer

WEIGHTS = "model.safetensors"
_HEADS_OF_CLIP_H = 16  # of both towers of ViT-H-14: widths 1280 and 1024, heads of 80 and of 64
_BLIP_HEAD_WIDTH = 64  # of both encoders: 16 heads for 1024 features, 12 for 768


def convert(kind: str, source: Path, output: Path, tokenizer: str | None = None) -> list[Path]:
    """Write the folder that the reward ``kind`` reads; returns its files.

    Args:
        kind: one of `KINDS`.
        source: the published file.
        output: made if missing.
        tokenizer: folder or hub name of the tokenizer to put beside it.

    Raises:
        ModelError: not the file of that reward, or unsafe to read.
    """
    config, tensors = KINDS[kind](read_checkpoint(source), str(source))
    output.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        load_tokenizer(output, tokenizer, kind).save_pretrained(output)
    whole = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(whole, output / WEIGHTS, metadata={"format": "pt"})
    if config is not None:
        (output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return sorted(path for path in output.iterdir() if path.is_file())


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a pickle, taken out of what surrounds them.

    Raises:
        ModelError: no such file, or it holds anything but tensors and plain values.
    """
    if not path.is_file():
        raise ModelError(f"There is no file {path}.")
    try:
        if path.suffix == ".safetensors":
            data: Any = load_file(path)
        else:
            data = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path} holds more than tensors and plain values, or is no checkpoint; it was not "
            f"read, since it could run any code: {str(error).splitlines()[0]}"
        ) from error
    except (OSError, RuntimeError, EOFError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read as a checkpoint: {error}") from error
    for key in ("state_dict", "model"):
        if isinstance(data, Mapping) and isinstance(data.get(key), Mapping):
            data = data[key]
    if not isinstance(data, Mapping) or not data:
        raise ModelError(f"{path} holds a {type(data).__name__}, not named tensors.")
    found = {str(key).removeprefix("module."): value for key, value in data.items()}
    strange = [key for key, value in found.items() if not isinstance(value, Tensor)]
    if strange:
        raise ModelError(f"{path} holds something other than a tensor at {strange[0]!r}.")
    return found


def aesthetic(tensors: Mapping[str, Tensor], where: str) -> tuple[None, dict[str, Tensor]]:
    """The head as it is published: ``layers.{0,2,4,6,7}.{weight,bias}``."""
    check_head(tensors, "aesthetic", where)
    return None, dict(tensors)


# --- HPSv2: open_clip's CLIP -> transformers' ---

_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_CLIP_KEYS = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # sic
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
#: Used as x @ projection there, as a Linear's weight here.
_PROJECTIONS = {
    "text_projection": "text_projection.weight",
    "visual.proj": "visual_projection.weight",
}
_RESBLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")


def hps(tensors: Mapping[str, Tensor], where: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """HPSv2's CLIP ViT-H/14, whose layout is open_clip's, as a transformers CLIPModel."""
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        block = _RESBLOCK.fullmatch(key)
        if block is not None:
            tower = "vision_model" if block[1] else "text_model"
            found |= _clip_block(f"{tower}.encoder.layers.{block[2]}", block[3], tensor, where)
        elif key in _CLIP_KEYS:
            found[_CLIP_KEYS[key]] = tensor
        elif key in _PROJECTIONS:
            found[_PROJECTIONS[key]] = tensor.T
        elif key != "attn_mask":  # a buffer of constants
            raise _not_the_file("hps", where, f"the key {key!r} is not known")
    missing = {*_CLIP_KEYS.values(), *_PROJECTIONS.values()} - found.keys()
    if missing:
        raise _not_the_file("hps", where, f"{min(missing)} is missing")
    config = _clip_config(found)
    from transformers import CLIPConfig, CLIPModel

    with torch.device("meta"):
        model = CLIPModel(CLIPConfig(**config))
    own = {k: v for k, v in model.state_dict().items() if not k.endswith("position_ids")}
    _same(own, found, "hps", where)
    return config, found


def _clip_block(prefix: str, rest: str, tensor: Tensor, where: str) -> dict[str, Tensor]:
    name, _, kind = rest.rpartition(".")
    if rest in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = rest.rpartition("_")[2]
        parts = zip("qkv", tensor.chunk(3), strict=True)
        return {f"{prefix}.self_attn.{letter}_proj.{kind}": part for letter, part in parts}
    if name not in _BLOCK:
        raise _not_the_file("hps", where, f"the key ...{rest!r} is not known")
    return {f"{prefix}.{_BLOCK[name]}.{kind}": tensor}


def _clip_config(found: Mapping[str, Tensor]) -> dict[str, Any]:
    vision, text = "vision_model", "text_model"
    patch = found[f"{vision}.embeddings.patch_embedding.weight"]
    positions = len(found[f"{vision}.embeddings.position_embedding.weight"])
    words = found[f"{text}.embeddings.token_embedding.weight"]
    both = {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "num_attention_heads": _HEADS_OF_CLIP_H}
    return {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "projection_dim": len(found["visual_projection.weight"]),
        "vision_config": {
            **both,
            "hidden_size": patch.shape[0],
            "patch_size": patch.shape[-1],
            "image_size": round((positions - 1) ** 0.5) * patch.shape[-1],
            **_depth(found, vision, "mlp.fc1"),
        },
        "text_config": {
            **both,
            "hidden_size": words.shape[1],
            "vocab_size": words.shape[0],
            "max_position_embeddings": len(found[f"{text}.embeddings.position_embedding.weight"]),
            # the last two of CLIP's tokens
            "bos_token_id": words.shape[0] - 2,
            "eos_token_id": words.shape[0] - 1,
            "pad_token_id": words.shape[0] - 1,
            **_depth(found, text, "mlp.fc1"),
        },
    }


def _depth(found: Mapping[str, Tensor], tower: str, wide: str) -> dict[str, int]:
    pattern = re.compile(rf"{tower}\.encoder\.layers?\.(\d+)\.{re.escape(wide)}\.weight")
    layers = {int(m[1]): tensor for key, tensor in found.items() if (m := pattern.fullmatch(key))}
    return {
        "num_hidden_layers": len(layers),
        "intermediate_size": next(iter(layers.values())).shape[0] if layers else 0,
    }


# --- ImageReward: BLIP's own layout -> transformers' ---

_VISION_KEYS = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    "norm.weight": "post_layernorm.weight",
    "norm.bias": "post_layernorm.bias",
}
_VISION_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
#: Projections of BLIP's contrastive loss, which the reward does not use, and a counted-up buffer.
_UNUSED = ("vision_proj.", "text_proj.", "text_encoder.embeddings.position_ids")


def image_reward(
    tensors: Mapping[str, Tensor], where: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """ImageReward.pt: ``blip.visual_encoder.*`` (a ViT), ``blip.text_encoder.*``, ``mlp.*``."""
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix("blip.")
        if key.startswith("mlp."):
            found[f"head.{key.removeprefix('mlp.')}"] = tensor
        elif name.startswith("visual_encoder."):
            found[f"vision.{_vision_key(name.removeprefix('visual_encoder.'), where)}"] = tensor
        elif name.startswith(_UNUSED):
            continue
        elif name.startswith("text_encoder."):  # transformers has kept these names
            found[f"text.{name.removeprefix('text_encoder.')}"] = tensor
        else:
            raise _not_the_file("image_reward", where, f"the key {key!r} is not known")
    config = _blip_config(found, where)
    check_head(
        {key.removeprefix("head."): value for key, value in found.items() if key[:5] == "head."},
        "image_reward",
        where,
    )
    fit(config, found, where)
    return config, found


def _vision_key(name: str, where: str) -> str:
    if name in _VISION_KEYS:
        return _VISION_KEYS[name]
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name)
    if block is None or block[2] not in _VISION_BLOCK:
        raise _not_the_file("image_reward", where, f"the key ...{name!r} is not known")
    return f"encoder.layers.{block[1]}.{_VISION_BLOCK[block[2]]}.{block[3]}"


def _blip_config(found: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    try:
        patch = found["vision.embeddings.patch_embedding.weight"]
        positions = found["vision.embeddings.position_embedding"].shape[1]
        words = found["text.embeddings.word_embeddings.weight"]
        places = found["text.embeddings.position_embeddings.weight"]
    except KeyError as error:
        raise _not_the_file("image_reward", where, f"{error} is missing") from None
    return {
        "model_type": MODEL_TYPE,
        "vision_config": {
            "hidden_size": patch.shape[0],
            "patch_size": patch.shape[-1],
            "image_size": round((positions - 1) ** 0.5) * patch.shape[-1],
            "num_attention_heads": patch.shape[0] // _BLIP_HEAD_WIDTH,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-6,  # timm's ViT in BLIP; transformers' default is another
            **_depth(found, "vision", "mlp.fc1"),
        },
        "text_config": {
            "vocab_size": words.shape[0],
            "hidden_size": words.shape[1],
            "encoder_hidden_size": patch.shape[0],
            "max_position_embeddings": places.shape[0],
            "num_attention_heads": words.shape[1] // _BLIP_HEAD_WIDTH,  # 12; the default is 8
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-12,
            **_depth(found, "text", "intermediate.dense"),
        },
    }


def _same(own: Mapping[str, Tensor], found: Mapping[str, Tensor], kind: str, where: str) -> None:
    for key in sorted(own.keys() | found.keys()):
        if key not in own or key not in found or own[key].shape != found[key].shape:
            raise _not_the_file(kind, where, f"{key} is missing, unknown or of another shape")


def _not_the_file(kind: str, where: str, why: str) -> ModelError:
    return ModelError(f"{where} is not the published checkpoint of {kind!r}: {why}.")


#: What can be converted: published tensors -> (config.json, tensors).
KINDS: Mapping[
    str, Callable[[Mapping[str, Tensor], str], tuple[dict[str, Any] | None, dict[str, Tensor]]]
] = {"aesthetic": aesthetic, "hps": hps, "image_reward": image_reward}
