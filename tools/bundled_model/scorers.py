"""Stages 2 and 3: image-text scorers and style classifiers, two each, for real and noisy input."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from loop import Loop
from pictures import STYLES, Batch, Pictures
from pools import Pool
from text import LENGTH, build_tokenizer

from rewardprop_fast.rewards.scorer import Scorer, StyleClassifier

DECODED = 6_000  # pictures that went through the VAE, with noise on their latents


@torch.no_grad()
def decoded(vae: AutoencoderKL, data: Pictures, batch: int = 50) -> Pool:
    """Pictures as the pipeline shows them: decoded, with noise of up to 60 % on their latents."""
    images, labels, captions = [], [], []
    for seed in range(3_000_000, 3_000_000 + DECODED // batch):
        rng = torch.Generator().manual_seed(seed)
        sampled = data.sample(batch, seed)
        labels.append(torch.stack([sampled.subject, sampled.style, sampled.background]))
        captions += sampled.captions
        drawn = sampled.images * 2 - 1
        with torch.autocast("cpu", dtype=torch.bfloat16):
            latents = vae.encode(
                drawn.contiguous(memory_format=torch.channels_last)
            ).latent_dist.mean.float()
            level = (
                torch.rand(batch, 1, 1, 1, generator=rng).square() * 0.6 / vae.config.scaling_factor
            )
            noisy = latents + level * torch.randn(latents.shape, generator=rng)
            output = vae.decode(noisy.contiguous(memory_format=torch.channels_last)).sample.float()
        images.append(((output / 2 + 0.5).clamp(0, 1) * 255).byte())
    return {"images": torch.cat(images), "labels": torch.cat(labels, 1)}, captions


class Views:
    """Training batches: half fresh pictures, half decoded ones; blurred and noised at random.

    `copy` 0 and 1 share no decoded picture and no pairing of a picture with a background.
    """

    def __init__(self, data: Pictures, pool: Pool, copy: int, seed: int) -> None:
        self.data, self.seed = data, seed
        self.pool, self.captions = pool
        self.rows = torch.arange(copy, len(self.pool["images"]), 2)

    def batch(self, count: int, step: int) -> Batch:
        rng = torch.Generator().manual_seed(self.seed * 100_003 + step)
        fresh = self.data.sample(count // 2, seed=(self.seed + 5) * 10_000_000 + step)
        rows = self.rows[torch.randint(len(self.rows), (count - count // 2,), generator=rng)]
        images = torch.cat([fresh.images, self.pool["images"][rows].float() / 255])
        captions = fresh.captions + [self.captions[row] for row in rows.tolist()]
        new = torch.stack([fresh.subject, fresh.style, fresh.background])
        labels = torch.cat([new, self.pool["labels"][:, rows]], 1)
        blurred = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
        mix = torch.rand(count, 1, 1, 1, generator=rng) * (
            torch.rand(count, 1, 1, 1, generator=rng) < 0.4
        )
        noise = torch.rand(count, 1, 1, 1, generator=rng).square() * 0.2
        images = images.lerp(blurred, mix) + noise * torch.randn(images.shape, generator=rng)
        return Batch(
            images.clamp(0, 1).contiguous(memory_format=torch.channels_last), captions, *labels
        )


def train_scorer(
    folder: Path, node_modules: Path, pool: Pool, copy: int, steps: int, batch: int = 96
) -> Scorer:
    torch.manual_seed(100 + copy)
    tokenizer = build_tokenizer(folder / "tokenizer")
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": LENGTH,
        "projection_dim": 128,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = Scorer({"widths": [32, 64, 128, 192], "features": 128, "text": text})
    model.text.set_attn_implementation("eager")
    model.to(memory_format=torch.channels_last)
    views = Views(Pictures(node_modules, half=copy), pool, copy, seed=copy)
    loop = Loop(folder, model, steps=steps, learning_rate=2e-3, ema=0.998, weight_decay=0.05)

    def loss_at(step: int) -> dict[str, torch.Tensor]:
        drawn = views.batch(batch, step)
        tokens = tokenizer(
            drawn.captions, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        with torch.autocast("cpu", dtype=torch.bfloat16):
            image, text = model.image(drawn.images), model.text(tokens).text_embeds
        image, text = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
        logits = image @ text.T * model.log_temperature.clamp(max=3.4).exp()
        # equal captions are equally right
        same = torch.tensor([[a == b for b in drawn.captions] for a in drawn.captions]).float()
        target = same / same.sum(1, keepdim=True)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        hits = (logits.argmax(1) == torch.arange(batch)).float().mean()
        return {"loss": loss, "top1": hits}

    loop.run(loss_at, log_every=100)
    loop.use_ema()
    return model


def train_classifier(
    folder: Path, node_modules: Path, pool: Pool, copy: int, steps: int, batch: int = 96
) -> StyleClassifier:
    torch.manual_seed(200 + copy)
    model = StyleClassifier({"widths": [24, 48, 96, 128], "styles": list(STYLES)}).to(
        memory_format=torch.channels_last
    )
    views = Views(Pictures(node_modules, half=copy), pool, copy, seed=20 + copy)
    loop = Loop(folder, model, steps=steps, learning_rate=2e-3, ema=0.998, weight_decay=0.05)

    def loss_at(step: int) -> dict[str, torch.Tensor]:
        drawn = views.batch(batch, step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(drawn.images).float()
        loss = F.cross_entropy(logits, drawn.style, label_smoothing=0.05)
        return {"loss": loss, "accuracy": (logits.argmax(1) == drawn.style).float().mean()}

    loop.run(loss_at, log_every=100)
    loop.use_ema()
    return model
