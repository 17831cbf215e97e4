"""What docs/bundled_model.md states, measured on the shipped files: figures and pictures.

    python tools/bundled_model/measure.py --data DIR --output docs/bundled_model

Writes measurements.json, samples_plain.png and samples_styled.png (50 subjects), styles.png,
backgrounds.png and reconstruction.png.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from pictures import BACKGROUNDS, STYLES, Pictures, caption
from PIL import Image

import rewardprop_fast.models as models
from rewardprop_fast.rewards.scorer import load_bundled, load_tokenizer, tokenize
from rewardprop_fast.training.report import image_grid

FIFTY = (
    """
dog|cat|rabbit|fox|bear|panda|tiger|cow|pig|frog|penguin|owl|bee|butterfly|snail|ladybug|turtle
octopus|crab|fish|whale|elephant|cactus|christmas tree|mushroom|rose|sunflower|red apple|lemon
banana|watermelon|strawberry|cherries|pineapple|carrot|fried egg|hamburger|pizza|donut|birthday cake
car|bus|bicycle|airplane|rocket|house|soccer ball|balloon|umbrella|heart
""".strip()
    .replace("\n", "|")
    .split("|")
)


def save(grid: Image.Image, file: Path) -> None:
    """At half size: the pictures live in git, where every version of them stays."""
    size = (grid.width // 2, grid.height // 2)
    grid.resize(size, Image.Resampling.LANCZOS).save(file, optimize=True)


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return -10 * torch.log10((a - b).square().mean((1, 2, 3)))


@torch.no_grad()
def reconstruction(pipe, data: Pictures, output: Path) -> dict[str, float]:
    """PSNR of encode and decode on pictures, placements and backgrounds drawn for this test."""
    images = data.sample(400, seed=99_000_001).images
    decoded = []
    for part in images.split(50):
        latents = pipe.vae.encode(part * 2 - 1).latent_dist.mean * pipe.vae.config.scaling_factor
        decoded.append(models.decode(pipe.vae, latents))
    values = psnr(images, torch.cat(decoded))
    pairs = torch.stack([images[:8], torch.cat(decoded)[:8]]).flatten(0, 1)
    save(image_grid(pairs, columns=8), output / "reconstruction.png")
    return {
        "psnr_mean_db": float(values.mean()),
        "psnr_worst_5_percent_db": float(values.quantile(0.05)),
    }


@torch.no_grad()
def retrieval(images: torch.Tensor, prompts: list[str], copy: str) -> float:
    """Share of images whose own prompt scores highest among all prompts given."""
    scorer, tokenizer = load_bundled("alignment", copy), load_tokenizer(copy)
    text = scorer.encode_tokens(tokenize(tokenizer, prompts, "cpu"))
    hits = (scorer.encode_images(images) @ text.T).argmax(1) == torch.arange(len(prompts))
    return float(hits.float().mean())


def one_per_subject(data: Pictures, seed: int) -> tuple[torch.Tensor, list[str]]:
    """One real picture per subject, with its full caption."""
    rng = torch.Generator().manual_seed(seed)
    rows = []
    for subject in range(len(data.subjects)):
        own = torch.nonzero(data.subject == subject).flatten()
        rows.append(int(own[torch.randint(len(own), (), generator=rng)]))
    batch = data.sample(len(rows), seed, torch.tensor(rows))
    styles, colours = list(STYLES), list(BACKGROUNDS)
    prompts = [
        caption(data.subjects[i].name, styles[j], colours[k])
        for i, j, k in zip(
            batch.subject.tolist(), batch.style.tolist(), batch.background.tolist(), strict=True
        )
    ]
    return batch.images, prompts


def sample(
    pipe, prompts: list[str], guidance: float, seed: int = 0, steps: int = 20
) -> torch.Tensor:
    images = []
    for start in range(0, len(prompts), 25):
        part = prompts[start : start + 25]
        rng = torch.Generator().manual_seed(seed * 1000 + start)
        images.append(
            pipe(
                part,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=rng,
                output_type="pt",
            ).images
        )
    return torch.cat(images).float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with the npm packages' node_modules"
    )
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    data, pipe = Pictures(arguments.data / "node_modules"), models.load_bundled()
    found: dict[str, object] = {"reconstruction": reconstruction(pipe, data, arguments.output)}
    images, prompts = one_per_subject(data, seed=99_000_002)
    found["real_r1_among_all_subjects"] = {
        copy: retrieval(images, prompts, copy) for copy in ("reward", "heldout")
    }
    colours = list(BACKGROUNDS)[1:7]
    styled = [
        caption(name, list(STYLES)[i % 3], colours[i % len(colours)])
        for i, name in enumerate(FIFTY)
    ]
    plain = [caption(name, None, colours[i % len(colours)]) for i, name in enumerate(FIFTY)]
    started = time.time()
    scores = {}
    for guidance in (4.0, 5.0, 7.5):
        for label, set_ in (("styled", styled), ("plain", plain)):
            sampled = sample(pipe, set_, guidance)
            scores[f"{label}, guidance {guidance}"] = {
                copy: retrieval(sampled, set_, copy) for copy in ("reward", "heldout")
            }
            if guidance == 5.0:
                file = arguments.output / f"samples_{label}.png"
                save(image_grid(sampled, set_, columns=10), file)
    found["sampled_r1_among_50"] = scores
    found["seconds_per_50_images"] = (time.time() - started) / len(scores)
    grid = [
        caption(name, None, colour) for name in ("fox", "rose", "car") for colour in BACKGROUNDS
    ]
    save(image_grid(sample(pipe, grid, 5.0), grid, columns=7), arguments.output / "backgrounds.png")
    looks = [
        caption(name, style, "pale blue")
        for name in ("dog", "bee", "rocket", "bell")
        for style in STYLES
    ]
    save(image_grid(sample(pipe, looks, 5.0), looks, columns=4), arguments.output / "styles.png")
    (arguments.output / "measurements.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
