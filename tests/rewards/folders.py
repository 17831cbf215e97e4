"""Small models with random weights, in the layout of the published folders."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from rewardprop_fast.models.random_init import _byte_tokenizer

SIDE = 28  # pixels the small towers take


def seeded(make: Any, seed: int = 0) -> Any:
    """A model with weights of a sensible size: what matters must reach the output."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make().eval()
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                spread = 0.7 / parameter[0].numel() ** 0.5 if "embed" not in name else 0.5
                torch.nn.init.normal_(parameter, std=spread)
            elif name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    return model.requires_grad_(False)


def clip_config(**text: Any) -> CLIPConfig:
    words = _byte_tokenizer()
    return CLIPConfig(
        text_config=CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=16,
            max_position_embeddings=77,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
            hidden_act="gelu",
            **text,
        ).to_dict(),
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=16,
            image_size=SIDE,
            patch_size=7,
            hidden_act="gelu",
        ).to_dict(),
        projection_dim=24,
    )


def clip_folder(folder: Path, seed: int = 0, tokenizer: bool = True) -> Path:
    """A CLIPModel and its tokenizer, as `save_pretrained` writes them."""
    model = seeded(lambda: CLIPModel(clip_config()), seed)
    model.logit_scale.data.fill_(3.0)
    model.save_pretrained(folder)
    if tokenizer:
        _byte_tokenizer().save_pretrained(folder)
    return folder


def head_tensors(width: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Of the published head: five linear layers with other things numbered in between."""
    generator = torch.Generator().manual_seed(seed)
    widths = (width, 1024, 128, 64, 16, 1)
    found = {}
    for number, inputs, outputs in zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False):
        weight = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
        found[f"layers.{number}.weight"] = weight
        found[f"layers.{number}.bias"] = torch.randn(outputs, generator=generator)
    return found


def head_file(path: Path, width: int = 24) -> Path:
    save_file(head_tensors(width), path)
    return path


def zeros_file(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A .safetensors file of fp32 zeros that takes no room: after its header it is a hole."""
    header, end = {}, 0
    for key, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[key] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path
