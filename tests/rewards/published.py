"""The layouts of published checkpoints, small, and what the authors' own code makes of them.

Written from the public sources named in rewards/convert.py, on the published keys alone, so that
what has been converted can be held against it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

WIDTH, LAYERS, PATCH, GRID, FEATURES, TOKENS = 32, 2, 7, 4, 24, 77
HEADS = 16

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Encoder:
    """Of a transformer: width of its tokens, of the layer in the middle of an MLP, and depth."""

    width: int
    hidden: int
    layers: int


def _random(shapes: Shapes, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for key, shape in shapes.items():
        if len(shape) > 1:
            spread = 0.7 / shape[-1] ** 0.5 if "embed" not in key and "token" not in key else 0.5
            found[key] = spread * torch.randn(*shape, generator=generator)
        else:
            one = 1.0 if key.endswith("weight") else 0.0
            found[key] = one + 0.1 * torch.randn(*shape, generator=generator)
    return found


def open_clip(vocabulary: int, seed: int = 0) -> dict[str, Tensor]:
    """CLIP as open_clip names it."""
    small = Encoder(WIDTH, 48, LAYERS)
    shapes = open_clip_shapes(vocabulary, small, small, PATCH, GRID, FEATURES)
    return {**_random(shapes, seed), "logit_scale": torch.tensor(3.0)}


def open_clip_shapes(
    vocabulary: int, vision: Encoder, text: Encoder, patch: int, grid: int, features: int
) -> Shapes:
    """All but the logit_scale, which has no dimensions."""
    shapes: Shapes = {
        "positional_embedding": (TOKENS, text.width),
        "text_projection": (text.width, features),
        "token_embedding.weight": (vocabulary, text.width),
        "ln_final.weight": (text.width,),
        "ln_final.bias": (text.width,),
        "visual.class_embedding": (vision.width,),
        "visual.positional_embedding": (grid**2 + 1, vision.width),
        "visual.proj": (vision.width, features),
        "visual.conv1.weight": (vision.width, 3, patch, patch),
        "visual.ln_pre.weight": (vision.width,),
        "visual.ln_pre.bias": (vision.width,),
        "visual.ln_post.weight": (vision.width,),
        "visual.ln_post.bias": (vision.width,),
    }
    for tower, encoder in (("", text), ("visual.", vision)):
        width, hidden = encoder.width, encoder.hidden
        for layer in range(encoder.layers):
            p = f"{tower}transformer.resblocks.{layer}."
            shapes |= {
                f"{p}ln_1.weight": (width,),
                f"{p}ln_1.bias": (width,),
                f"{p}attn.in_proj_weight": (3 * width, width),
                f"{p}attn.in_proj_bias": (3 * width,),
                f"{p}attn.out_proj.weight": (width, width),
                f"{p}attn.out_proj.bias": (width,),
                f"{p}ln_2.weight": (width,),
                f"{p}ln_2.bias": (width,),
                f"{p}mlp.c_fc.weight": (hidden, width),
                f"{p}mlp.c_fc.bias": (hidden,),
                f"{p}mlp.c_proj.weight": (width, hidden),
                f"{p}mlp.c_proj.bias": (width,),
            }
    return shapes


def open_clip_scores(tensors: dict[str, Tensor], pixels: Tensor, tokens: Tensor) -> Tensor:
    """open_clip's CLIP.forward: the diagonal of image_features @ text_features.T."""

    def norm(x: Tensor, key: str) -> Tensor:
        return F.layer_norm(x, (WIDTH,), tensors[f"{key}.weight"], tensors[f"{key}.bias"], 1e-5)

    def linear(x: Tensor, key: str) -> Tensor:
        return F.linear(x, tensors[f"{key}.weight"], tensors[f"{key}.bias"])

    def blocks(x: Tensor, prefix: str, mask: Tensor | None) -> Tensor:
        for layer in range(LAYERS):
            p = f"{prefix}transformer.resblocks.{layer}"
            y = norm(x, f"{p}.ln_1").transpose(0, 1)
            y, _ = F.multi_head_attention_forward(
                y,
                y,
                y,
                WIDTH,
                HEADS,
                tensors[f"{p}.attn.in_proj_weight"],
                tensors[f"{p}.attn.in_proj_bias"],
                None,
                None,
                False,
                0.0,
                tensors[f"{p}.attn.out_proj.weight"],
                tensors[f"{p}.attn.out_proj.bias"],
                need_weights=False,
                attn_mask=mask,
            )
            x = x + y.transpose(0, 1)
            hidden = F.gelu(linear(norm(x, f"{p}.ln_2"), f"{p}.mlp.c_fc"))
            x = x + linear(hidden, f"{p}.mlp.c_proj")
        return x

    x = F.conv2d(pixels, tensors["visual.conv1.weight"], stride=PATCH).flatten(2).transpose(1, 2)
    first = tensors["visual.class_embedding"].expand(len(x), 1, WIDTH)
    x = torch.cat([first, x], dim=1) + tensors["visual.positional_embedding"]
    x = blocks(norm(x, "visual.ln_pre"), "visual.", None)
    images = norm(x[:, 0], "visual.ln_post") @ tensors["visual.proj"]

    y = tensors["token_embedding.weight"][tokens]
    y = y + tensors["positional_embedding"][: tokens.shape[1]]
    mask = torch.full((tokens.shape[1],) * 2, float("-inf")).triu(1)
    y = norm(blocks(y, "", mask), "ln_final")
    texts = y[torch.arange(len(y)), tokens.argmax(dim=-1)] @ tensors["text_projection"]
    return (F.normalize(images, dim=-1) * F.normalize(texts, dim=-1)).sum(-1)


BLIP, BLIP_TEXT, HEAD_WIDTH = 128, 192, 64


def image_reward(vocabulary: int, seed: int = 0) -> dict[str, Tensor]:
    """ImageReward as its authors name it, but for the head."""
    vision, text = Encoder(BLIP, 160, LAYERS), Encoder(BLIP_TEXT, 160, LAYERS)
    found = _random(image_reward_shapes(vocabulary, vision, text, PATCH, GRID, 64), seed)
    found["blip.text_encoder.embeddings.position_ids"] = torch.arange(64)[None]
    return found


def image_reward_shapes(
    vocabulary: int, vision: Encoder, text: Encoder, patch: int, grid: int, places: int
) -> Shapes:
    """All but a counted-up buffer and the head."""
    v, t = vision.width, text.width
    shapes: Shapes = {
        "blip.visual_encoder.cls_token": (1, 1, v),
        "blip.visual_encoder.pos_embed": (1, grid**2 + 1, v),
        "blip.visual_encoder.patch_embed.proj.weight": (v, 3, patch, patch),
        "blip.visual_encoder.patch_embed.proj.bias": (v,),
        "blip.visual_encoder.norm.weight": (v,),
        "blip.visual_encoder.norm.bias": (v,),
        "blip.text_encoder.embeddings.word_embeddings.weight": (vocabulary, t),
        "blip.text_encoder.embeddings.position_embeddings.weight": (places, t),
        "blip.text_encoder.embeddings.LayerNorm.weight": (t,),
        "blip.text_encoder.embeddings.LayerNorm.bias": (t,),
        "blip.vision_proj.weight": (256, v),
        "blip.vision_proj.bias": (256,),
        "blip.text_proj.weight": (256, t),
        "blip.text_proj.bias": (256,),
    }
    for layer in range(vision.layers):
        p = f"blip.visual_encoder.blocks.{layer}."
        shapes |= {
            f"{p}norm1.weight": (v,),
            f"{p}norm1.bias": (v,),
            f"{p}attn.qkv.weight": (3 * v, v),
            f"{p}attn.qkv.bias": (3 * v,),
            f"{p}attn.proj.weight": (v, v),
            f"{p}attn.proj.bias": (v,),
            f"{p}norm2.weight": (v,),
            f"{p}norm2.bias": (v,),
            f"{p}mlp.fc1.weight": (vision.hidden, v),
            f"{p}mlp.fc1.bias": (vision.hidden,),
            f"{p}mlp.fc2.weight": (v, vision.hidden),
            f"{p}mlp.fc2.bias": (v,),
        }
    for layer in range(text.layers):
        p = f"blip.text_encoder.encoder.layer.{layer}."
        for attention, source in (("attention", t), ("crossattention", v)):
            for part, inputs in (("query", t), ("key", source), ("value", source)):
                shapes[f"{p}{attention}.self.{part}.weight"] = (t, inputs)
                shapes[f"{p}{attention}.self.{part}.bias"] = (t,)
            shapes |= _bert_output(f"{p}{attention}.output", t, t)
        shapes |= {
            f"{p}intermediate.dense.weight": (text.hidden, t),
            f"{p}intermediate.dense.bias": (text.hidden,),
            **_bert_output(f"{p}output", text.hidden, t),
        }
    return shapes


def _bert_output(prefix: str, inputs: int, width: int) -> Shapes:
    return {
        f"{prefix}.dense.weight": (width, inputs),
        f"{prefix}.dense.bias": (width,),
        f"{prefix}.LayerNorm.weight": (width,),
        f"{prefix}.LayerNorm.bias": (width,),
    }


def image_reward_scores(
    tensors: dict[str, Tensor], pixels: Tensor, tokens: Tensor, seen: Tensor
) -> Tensor:
    """ImageReward.score: BLIP's ViT, BERT with cross attention, the layers of the head."""

    def linear(x: Tensor, key: str) -> Tensor:
        return F.linear(x, tensors[f"{key}.weight"], tensors[f"{key}.bias"])

    def norm(x: Tensor, key: str, eps: float) -> Tensor:
        weight = tensors[f"{key}.weight"]
        return F.layer_norm(x, weight.shape, weight, tensors[f"{key}.bias"], eps)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (x.unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)

    v = "blip.visual_encoder"
    patches = tensors[f"{v}.patch_embed.proj.weight"], tensors[f"{v}.patch_embed.proj.bias"]
    x = F.conv2d(pixels, *patches, stride=PATCH).flatten(2).transpose(1, 2)
    x = torch.cat([tensors[f"{v}.cls_token"].expand(len(x), 1, -1), x], dim=1)
    x = x + tensors[f"{v}.pos_embed"]
    for layer in range(LAYERS):
        p = f"{v}.blocks.{layer}"
        q, k, value = linear(norm(x, f"{p}.norm1", 1e-6), f"{p}.attn.qkv").chunk(3, dim=-1)
        x = x + linear(attend(q, k, value), f"{p}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{p}.norm2", 1e-6), f"{p}.mlp.fc1")), f"{p}.mlp.fc2")
    x = norm(x, f"{v}.norm", 1e-6)

    t = "blip.text_encoder"
    y = tensors[f"{t}.embeddings.word_embeddings.weight"][tokens]
    y = y + tensors[f"{t}.embeddings.position_embeddings.weight"][: tokens.shape[1]]
    y = norm(y, f"{t}.embeddings.LayerNorm", 1e-12)
    for layer in range(LAYERS):
        p = f"{t}.encoder.layer.{layer}"
        for name, source, mask in (
            ("attention", None, seen[:, None, None].bool()),
            ("crossattention", x, None),
        ):
            q = linear(y, f"{p}.{name}.self.query")
            of = y if source is None else source
            k, value = (linear(of, f"{p}.{name}.self.{part}") for part in ("key", "value"))
            out = linear(attend(q, k, value, mask), f"{p}.{name}.output.dense")
            y = norm(out + y, f"{p}.{name}.output.LayerNorm", 1e-12)
        hidden = F.gelu(linear(y, f"{p}.intermediate.dense"))
        y = norm(linear(hidden, f"{p}.output.dense") + y, f"{p}.output.LayerNorm", 1e-12)
    scores = y[:, 0]
    for number in (0, 2, 4, 6, 7):
        scores = linear(scores, f"mlp.layers.{number}")
    return (scores[:, 0] - 0.16717362830052426) / 1.0333394966054072


def vit_shapes(width: int, depth: int, patch: int, side: int, classes: int) -> Shapes:
    """The published keys of a ViTForImageClassification."""

    def own(name: str, outputs: int, inputs: int = width) -> Shapes:
        return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

    def norm(name: str) -> Shapes:
        return {f"{name}.weight": (width,), f"{name}.bias": (width,)}

    shapes: Shapes = {
        "vit.embeddings.cls_token": (1, 1, width),
        "vit.embeddings.position_embeddings": (1, (side // patch) ** 2 + 1, width),
        "vit.embeddings.patch_embeddings.projection.weight": (width, 3, patch, patch),
        "vit.embeddings.patch_embeddings.projection.bias": (width,),
    }
    for block in (f"vit.encoder.layer.{number}" for number in range(depth)):
        for part in ("query", "key", "value"):
            shapes |= own(f"{block}.attention.attention.{part}", width)
        shapes |= own(f"{block}.attention.output.dense", width)
        shapes |= own(f"{block}.intermediate.dense", 4 * width)
        shapes |= own(f"{block}.output.dense", width, 4 * width)
        shapes |= norm(f"{block}.layernorm_before") | norm(f"{block}.layernorm_after")
    return shapes | norm("vit.layernorm") | own("classifier", classes)
