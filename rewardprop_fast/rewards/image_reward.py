"""ImageReward: a BLIP that reads the prompt with the picture before it, and scores the two."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewardprop_fast.errors import ModelError
from rewardprop_fast.rewards.head import make_head
from rewardprop_fast.rewards.preprocess import Preprocess, at_least_fp32
from rewardprop_fast.rewards.pretrained import load_tensors, load_tokenizer, locate, read_json
from rewardprop_fast.rewards.text import PromptCache

#: ``model_type`` in the config.json that `rewardprop convert-reward image_reward` writes.
MODEL_TYPE = "image_reward"

#: Tokens a prompt is cut or padded to; mean and spread of the raw score over the authors' data.
#: All from ImageReward/ImageReward.py of THUDM/ImageReward.
TOKENS, MEAN, STD = 35, 0.16717362830052426, 1.0333394966054072


class ImageReward(nn.Module):
    """ImageReward v1.0 (arXiv 2304.05977), about -2 to 2.

    BLIP's ViT-L/16 at 224 pixels; its text encoder attends to all image tokens in every layer; the
    head is that of the aesthetic predictor, on the first token; the score is standardised with the
    authors' constants.

    Args:
        model: folder that `rewardprop convert-reward image_reward` wrote.
        tokenizer: folder or hub name of BERT's uncased tokenizer, where the model's has none.

    Raises:
        ModelError: not there, of another architecture, not safetensors, or without a tokenizer.
    """

    name = "image_reward"

    def __init__(self, model: str, tokenizer: str | None = None) -> None:
        super().__init__()
        location, local = locate(model, self.name)
        config = read_json(location, "config.json") if local else None
        if config is None or config.get("model_type") != MODEL_TYPE:
            raise ModelError(
                f"The reward {self.name!r}: {model} is no folder of ImageReward. Make one with "
                "`rewardprop convert-reward image_reward ImageReward.pt --output FOLDER`."
            )
        tensors = load_tensors(Path(location), self.name, "model")
        self.vision, self.text, head = build(config, tensors, location)
        self.head = make_head(head, self.name, self.text.config.hidden_size, location)
        side = self.vision.config.image_size
        self.preprocess = Preprocess((side, side), offset="even")
        self.dtype = torch.float32
        words = load_tokenizer(location, tokenizer, self.name, self.text.config.vocab_size)

        def encode(prompts: list[str]) -> Tensor:
            found = words(
                prompts,
                padding="max_length",
                truncation=True,
                max_length=TOKENS,
                return_tensors="pt",
            )
            return torch.stack([found.input_ids, found.attention_mask], dim=1)

        self.prompts = PromptCache(self.name, encode, (2, TOKENS), torch.int64)

    def compute_in(self, dtype: torch.dtype) -> None:
        """The run's compute dtype."""
        self.dtype = dtype
        self.vision.to(dtype)
        self.text.to(dtype)

    def forward(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        tokens, seen = self.prompts(prompts, images.device, images).unbind(dim=1)
        with torch.autocast(images.device.type, enabled=False):
            pixels = self.preprocess(images).to(self.dtype)
            image_tokens = self.vision(pixel_values=pixels).last_hidden_state
            # Not through the text model's own forward: that looks at the mask's values to choose a
            # kernel, which tensors without values do not have.
            padding = (1 - seen[:, None, None]).to(self.dtype) * torch.finfo(self.dtype).min
            first = self.text.encoder(
                self.text.embeddings(input_ids=tokens),
                attention_mask=padding,
                encoder_hidden_states=image_tokens,
            ).last_hidden_state[:, 0]
            return (self.head(at_least_fp32(first)) - MEAN) / STD


def build(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str
) -> tuple[Any, Any, dict[str, Tensor]]:
    """(image encoder, text encoder, tensors of the head), with their weights, frozen, in fp32.

    Args, Raises: as `fit`.
    """
    networks, parts = fit(config, tensors, where)
    for part, network in networks.items():
        network.to_empty(device="cpu")
        for name, buffer in network.named_buffers():
            if name.endswith("position_ids"):
                buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))
        network.load_state_dict(parts[part], strict=False)
        network.float().eval().requires_grad_(False)
    return networks["vision"], networks["text"], parts["head"]


def fit(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str
) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """({"vision", "text"}: encoders on "meta"; {"vision", "text", "head"}: tensors that fit them).

    Args:
        config: with ``vision_config`` and ``text_config``, of transformers' BLIP.
        tensors: their weights under ``vision.`` and ``text.``, the head's under ``head.``.

    Raises:
        ModelError: something is missing, too much, or of another shape.
    """
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    try:
        with torch.device("meta"):
            vision = BlipVisionModel(BlipVisionConfig(**config["vision_config"]))
            text = BlipTextModel(BlipTextConfig(**config["text_config"]), add_pooling_layer=False)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"The reward 'image_reward': {where}/config.json describes no BLIP: {error}"
        ) from error
    parts: dict[str, dict[str, Tensor]] = {"vision": {}, "text": {}, "head": {}}
    for key, tensor in tensors.items():
        part, _, rest = key.partition(".")
        if part not in parts:
            raise ModelError(f"The reward 'image_reward': {where} has the unknown key {key!r}.")
        parts[part][rest] = tensor
    networks = {"vision": vision, "text": text}
    for part, network in networks.items():
        own = network.state_dict()
        # buffers that are counted up, of versions of transformers that saved them
        own = {key: value for key, value in own.items() if not key.endswith("position_ids")}
        differing = [
            f"{part}.{key}"
            for key in sorted(own.keys() | parts[part].keys())
            if key not in own or key not in parts[part] or own[key].shape != parts[part][key].shape
        ]
        if differing:
            raise ModelError(
                f"The reward 'image_reward': the weights in {where} are of another architecture "
                f"than its config.json: {len(differing)} differ, among them "
                f"{', '.join(differing[:3])}."
            )
    return networks, parts
