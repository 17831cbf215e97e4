"""Small image-text scorer and style classifier: the rewards of the bundled model.

Both are CLIP-like in use (cosine similarity of two towers; softmax over classes) and small enough
to ship: they stand in for CLIP, PickScore or HPSv2 where no weights can be downloaded. Stored as
`config.json` + `model.safetensors` (fp16).
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from rewardprop_fast.errors import ConfigError, ModelError

BUNDLED = Path(__file__).parent / "bundled"
COPIES = ("reward", "heldout")
SIZE = 64  # pixels the towers were trained at


class ResidualDown(nn.Module):
    """Two 3x3 convolutions, the first of stride 2, beside a pooled 1x1 shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)
        self.norm1 = nn.GroupNorm(8, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.norm2 = nn.GroupNorm(8, outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.norm1(self.conv1(x)))
        return F.silu(self.norm2(self.conv2(h)) + self.shortcut(F.avg_pool2d(x, 2)))


class ImageTower(nn.Module):
    """(B, 3, 64, 64) in [0, 1] -> (B, features)."""

    def __init__(self, widths: tuple[int, ...], features: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 5, stride=2, padding=2)
        self.blocks = nn.Sequential(*(ResidualDown(a, b) for a, b in pairwise(widths)))
        self.head = nn.Linear(widths[-1], features)

    def forward(self, images: Tensor) -> Tensor:
        h = self.blocks(F.silu(self.stem(images * 2 - 1)))
        return self.head(h.mean((2, 3)))


class Scorer(nn.Module):
    """Image tower and text tower with a learned temperature (the form of CLIP, 2103.00020)."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.image = ImageTower(tuple(config["widths"]), config["features"])
        self.text = CLIPTextModelWithProjection(CLIPTextConfig(**config["text"]))
        self.log_temperature = nn.Parameter(torch.tensor(config.get("log_temperature", 2.3)))

    def encode_images(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> unit vectors (B, features)."""
        return F.normalize(self.image(images), dim=-1)

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Token ids (B, L) -> unit vectors (B, features)."""
        return F.normalize(self.text(tokens).text_embeds, dim=-1)

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Cosine similarity of each image with its own prompt, (B,)."""
        return (self.encode_images(images) * self.encode_tokens(tokens)).sum(-1)


class StyleClassifier(nn.Module):
    """P(style | image): logits (B, number of styles)."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.image = ImageTower(tuple(config["widths"]), len(config["styles"]))

    @property
    def styles(self) -> tuple[str, ...]:
        return tuple(self.config["styles"])

    def forward(self, images: Tensor) -> Tensor:
        return self.image(images)


KINDS: dict[str, type[Scorer] | type[StyleClassifier]] = {
    "scorer": Scorer,
    "style_classifier": StyleClassifier,
}


def save(model: Scorer | StyleClassifier, folder: Path) -> None:
    """Write `config.json` and fp16 `model.safetensors`."""
    kind = next(name for name, cls in KINDS.items() if isinstance(model, cls))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"kind": kind, **model.config}, indent=2) + "\n")
    tensors = {name: t.detach().half().contiguous() for name, t in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")


def load(folder: Path) -> Scorer | StyleClassifier:
    """Read a folder written by `save`: fp32, eval mode, frozen.

    Raises:
        ModelError: the folder lacks its files or holds another kind of model.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{folder} holds no scorer (config.json + model.safetensors): {error}"
        ) from error
    kind = config.pop("kind", None)
    if kind not in KINDS:
        raise ModelError(
            f"{folder}/config.json says kind {kind!r}; known kinds are {sorted(KINDS)}"
        )
    model = KINDS[kind](config)
    model.load_state_dict({name: t.float() for name, t in tensors.items()})
    return model.requires_grad_(False).eval()


def tokenize(tokenizer: CLIPTokenizer, prompts: list[str], device: torch.device | str) -> Tensor:
    """Token ids (B, L), padded to the tokenizer's length."""
    batch = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
    return batch.input_ids.to(device)


def load_bundled(task: str, copy: str) -> Scorer | StyleClassifier:
    """One of the networks that ship: task "alignment" or "style", copy "reward" or "heldout".

    Raises:
        ConfigError: there is no such copy.
    """
    if copy not in COPIES:
        raise ConfigError(f"copy is {copy!r}; allowed are {' and '.join(COPIES)}.")
    return load(BUNDLED / f"{task}_{copy}")


def load_tokenizer(copy: str) -> CLIPTokenizer:
    """The tokenizer a bundled image-text scorer was trained with: each copy has its own."""
    return CLIPTokenizer.from_pretrained(BUNDLED / f"alignment_{copy}" / "tokenizer")


def to_input(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Images of any size as the towers take them: in ``dtype``, 64x64, antialiased where they
    shrink.
    """
    images = images.to(dtype)
    if images.shape[-2:] != (SIZE, SIZE):
        images = F.interpolate(images, (SIZE, SIZE), mode="bilinear", antialias=True)
    return images
