"""Trains everything that ships: one command, to be stopped and started at will.

    npm install --prefix DATA @iconify-json/noto @iconify-json/noto-v1 \\
        @iconify-json/fluent-emoji-flat @iconify-json/fxemoji
    pip install resvg-py
    python tools/bundled_model/build.py --data DATA --work WORK

Stages run in order and each resumes where it was: vae, scorers (two), styles (two), unet, export.
`--stages` picks some of them; with cores to spare, the scorers can run beside the unet.
`--from-shipped` goes on from the package's own weights where WORK is gone: a warm restart.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import scorers
import torch
import unet as unet_stage
import vae as vae_stage
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import AttnProcessor2_0
from export import NOTICE, export_pipeline, pipeline
from loop import Loop
from pictures import Pictures
from pools import kept
from text import build_text_encoder, build_tokenizer

from rewardprop_fast.models import BUNDLED, load_bundled
from rewardprop_fast.rewards import scorer as shipped

STAGES = ("vae", "scorers", "styles", "unet", "export")


def trained_vae(folder: Path, data: Path, steps: int) -> AutoencoderKL:
    """The averaged VAE, its scaling factor set so that latents have unit spread."""
    vae = vae_stage.build()
    loop = Loop(folder, vae, steps=steps, learning_rate=0.0)
    if loop.step < steps:
        raise SystemExit(f"the vae has {loop.step} of {steps} steps; run the stage vae first")
    loop.use_ema()
    vae.requires_grad_(False).eval()
    images = Pictures(data / "node_modules").sample(256, seed=4_000_000).images * 2 - 1
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.mean for part in images.split(64)])
    vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 5))
    return vae


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the npm packages")
    parser.add_argument("--work", type=Path, required=True, help="folder of training states")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--copies", nargs="+", type=int, choices=(0, 1), default=(0, 1))
    parser.add_argument("--from-shipped", action="store_true", help="warm start of the unet stage")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--vae-steps", type=int, default=3_500)
    parser.add_argument("--scorer-steps", type=int, default=800)
    parser.add_argument("--style-steps", type=int, default=1_200)
    parser.add_argument("--unet-steps", type=int, default=12_000)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    data, work, stages = arguments.data, arguments.work, arguments.stages
    modules = data / "node_modules"
    rewards = shipped.BUNDLED
    if "vae" in stages:
        vae_stage.train(work / "vae", modules, arguments.vae_steps)
    start = None
    if arguments.from_shipped:
        pipe = load_bundled()
        vae = pipe.vae.to(memory_format=torch.channels_last)
        start = unet_stage.TextToLatents(pipe.text_encoder, pipe.unet).state_dict()
    else:
        vae = trained_vae(work / "vae", data, arguments.vae_steps)
    names = dict(enumerate(shipped.COPIES))
    if "scorers" in stages or "styles" in stages:
        pool = kept(work / "decoded.safetensors", lambda: scorers.decoded(vae, Pictures(modules)))
        for copy in arguments.copies if "scorers" in stages else ():
            folder = work / f"alignment_{names[copy]}"
            model = scorers.train_scorer(folder, modules, pool, copy, arguments.scorer_steps)
            shipped.save(model, rewards / folder.name)
            target = rewards / folder.name / "tokenizer"
            shutil.copytree(folder / "tokenizer", target, dirs_exist_ok=True)
        for copy in arguments.copies if "styles" in stages else ():
            folder = work / f"style_{names[copy]}"
            model = scorers.train_classifier(folder, modules, pool, copy, arguments.style_steps)
            shipped.save(model, rewards / folder.name)
        (rewards / "NOTICE").write_text(NOTICE)
    if "unet" in stages:
        unet_stage.train(work / "unet", modules, vae, steps=arguments.unet_steps, start=start)
    if "export" in stages:
        tokenizer = build_tokenizer(work / "unet" / "tokenizer")
        model = unet_stage.TextToLatents(build_text_encoder(tokenizer), unet_stage.build_unet())
        Loop(work / "unet", model, steps=1, learning_rate=0.0).use_ema()
        model.unet.set_attn_processor(AttnProcessor2_0())
        size = export_pipeline(
            pipeline(vae, model, tokenizer), work / "unet" / "tokenizer", BUNDLED
        )
        print(f"{BUNDLED.name}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
