"""The layouts of published checkpoints, small, and what the authors' own code makes of them.

Written from the public sources named in rewards/convert.py, on the published keys alone, so that
what has been converted can be held against it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WIDTH, LAYERS, PATCH, GRID, FEATURES, TOKENS = 32, 2, 7, 4, 24, 77
HEADS = 16


def _random(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
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
    shapes: dict[str, tuple[int, ...]] = {
        "positional_embedding": (TOKENS, WIDTH),
        "text_projection": (WIDTH, FEATURES),
        "token_embedding.weight": (vocabulary, WIDTH),
        "ln_final.weight": (WIDTH,),
        "ln_final.bias": (WIDTH,),
        "visual.class_embedding": (WIDTH,),
        "visual.positional_embedding": (GRID**2 + 1, WIDTH),
        "visual.proj": (WIDTH, FEATURES),
        "visual.conv1.weight": (WIDTH, 3, PATCH, PATCH),
        "visual.ln_pre.weight": (WIDTH,),
        "visual.ln_pre.bias": (WIDTH,),
        "visual.ln_post.weight": (WIDTH,),
        "visual.ln_post.bias": (WIDTH,),
    }
    for tower in ("", "visual."):
        for layer in range(LAYERS):
            p = f"{tower}transformer.resblocks.{layer}."
            shapes |= {
                f"{p}ln_1.weight": (WIDTH,),
                f"{p}ln_1.bias": (WIDTH,),
                f"{p}attn.in_proj_weight": (3 * WIDTH, WIDTH),
                f"{p}attn.in_proj_bias": (3 * WIDTH,),
                f"{p}attn.out_proj.weight": (WIDTH, WIDTH),
                f"{p}attn.out_proj.bias": (WIDTH,),
                f"{p}ln_2.weight": (WIDTH,),
                f"{p}ln_2.bias": (WIDTH,),
                f"{p}mlp.c_fc.weight": (48, WIDTH),
                f"{p}mlp.c_fc.bias": (48,),
                f"{p}mlp.c_proj.weight": (WIDTH, 48),
                f"{p}mlp.c_proj.bias": (WIDTH,),
            }
    return {**_random(shapes, seed), "logit_scale": torch.tensor(3.0)}


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
    shapes: dict[str, tuple[int, ...]] = {
        "blip.visual_encoder.cls_token": (1, 1, BLIP),
        "blip.visual_encoder.pos_embed": (1, GRID**2 + 1, BLIP),
        "blip.visual_encoder.patch_embed.proj.weight": (BLIP, 3, PATCH, PATCH),
        "blip.visual_encoder.patch_embed.proj.bias": (BLIP,),
        "blip.visual_encoder.norm.weight": (BLIP,),
        "blip.visual_encoder.norm.bias": (BLIP,),
        "blip.text_encoder.embeddings.word_embeddings.weight": (vocabulary, BLIP_TEXT),
        "blip.text_encoder.embeddings.position_embeddings.weight": (64, BLIP_TEXT),
        "blip.text_encoder.embeddings.LayerNorm.weight": (BLIP_TEXT,),
        "blip.text_encoder.embeddings.LayerNorm.bias": (BLIP_TEXT,),
        "blip.vision_proj.weight": (256, BLIP),
        "blip.vision_proj.bias": (256,),
        "blip.text_proj.weight": (256, BLIP_TEXT),
        "blip.text_proj.bias": (256,),
    }
    for layer in range(LAYERS):
        p = f"blip.visual_encoder.blocks.{layer}."
        shapes |= {
            f"{p}norm1.weight": (BLIP,),
            f"{p}norm1.bias": (BLIP,),
            f"{p}attn.qkv.weight": (3 * BLIP, BLIP),
            f"{p}attn.qkv.bias": (3 * BLIP,),
            f"{p}attn.proj.weight": (BLIP, BLIP),
            f"{p}attn.proj.bias": (BLIP,),
            f"{p}norm2.weight": (BLIP,),
            f"{p}norm2.bias": (BLIP,),
            f"{p}mlp.fc1.weight": (160, BLIP),
            f"{p}mlp.fc1.bias": (160,),
            f"{p}mlp.fc2.weight": (BLIP, 160),
            f"{p}mlp.fc2.bias": (BLIP,),
        }
        p = f"blip.text_encoder.encoder.layer.{layer}."
        for attention, source in (("attention", BLIP_TEXT), ("crossattention", BLIP)):
            for part, inputs in (("query", BLIP_TEXT), ("key", source), ("value", source)):
                shapes[f"{p}{attention}.self.{part}.weight"] = (BLIP_TEXT, inputs)
                shapes[f"{p}{attention}.self.{part}.bias"] = (BLIP_TEXT,)
            shapes |= _bert_output(f"{p}{attention}.output", BLIP_TEXT)
        shapes |= {
            f"{p}intermediate.dense.weight": (160, BLIP_TEXT),
            f"{p}intermediate.dense.bias": (160,),
            **_bert_output(f"{p}output", 160),
        }
    found = _random(shapes, seed)
    found["blip.text_encoder.embeddings.position_ids"] = torch.arange(64)[None]
    return found


def _bert_output(prefix: str, inputs: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.dense.weight": (BLIP_TEXT, inputs),
        f"{prefix}.dense.bias": (BLIP_TEXT,),
        f"{prefix}.LayerNorm.weight": (BLIP_TEXT,),
        f"{prefix}.LayerNorm.bias": (BLIP_TEXT,),
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
