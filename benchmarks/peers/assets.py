"""What all competitors are given: weights, prompts, noise and LoRA, made once and kept.

    FOLDER/weights/sd15/           a diffusers folder, bfloat16 values in safetensors
    FOLDER/sd15-256/               the same files, linked; the UNet's own size is the workload's
    FOLDER/sd15-256/inputs.safetensors   latents, LoRA

All values of latents and random weights are bfloat16 numbers, so that a float32 and a bfloat16
run start from the same.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from benchmarks.peers.workloads import GUIDANCE, RANK, Workload

PROMPTS = (
    "a red apple on a teal background",
    "a fox on a peach background",
    "a rocket on a pale yellow background",
    "two boats at sea",
    "a bicycle on a pale blue background",
    "a heart on a pale pink background",
    "a donut on a lavender background",
    "a dog on the beach",
)


def make(workload: Workload, cache: Path) -> dict[str, Any]:
    """The job of a workload: what `prepare` of a competitor is given, beside dtype and device."""
    folder = cache / f"{workload.model}-{workload.size}"
    source = _weights(workload.model, cache / "weights" / workload.model)
    if not (folder / "inputs.safetensors").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        _link(source, folder, workload.size)
        _inputs(folder)
    return {
        **workload.to_dict(),
        "folder": str(folder),
        "prompts": [PROMPTS[i % len(PROMPTS)] for i in range(workload.batch)],
        "guidance": GUIDANCE,
        "rank": RANK,
    }


def _weights(model: str, folder: Path) -> Path:
    from rewardprop_fast.models.load import BUNDLED

    if model == "bundled":
        return BUNDLED
    if not (folder / "complete").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        print(f"making random weights of {model} in {folder}", flush=True)
        _make_weights(model, folder)
        (folder / "complete").touch()
    return folder


def _make_weights(model: str, folder: Path) -> None:
    import torch
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from rewardprop_fast.models import architectures, random_init
    from rewardprop_fast.models.load import BUNDLED

    torch.manual_seed(0)
    index = json.loads((BUNDLED / "model_index.json").read_text())
    # The bundled tokenizer's files are read by every version of transformers.
    tokenizers = ["tokenizer", "tokenizer_2"] if model == "sdxl" else ["tokenizer"]
    for name in tokenizers:
        shutil.copytree(BUNDLED / "tokenizer", folder / name)
    tokens = json.loads((BUNDLED / "text_encoder" / "config.json").read_text())

    def text(kind: Any, width: int, layers: int, heads: int, vocabulary: int = 49408) -> Any:
        config = CLIPTextConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            projection_dim=width,
            vocab_size=vocabulary,
            max_position_embeddings=77,
            **{key: tokens[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
        )
        return kind(config).to(torch.bfloat16)

    parts: dict[str, Any]
    if model == "tiny":
        tiny = random_init.tiny_stable_diffusion()
        tiny.unet.to(torch.bfloat16)
        tiny.vae.to(torch.bfloat16)
        parts = {"unet": tiny.unet, "vae": tiny.vae, "scheduler": tiny.scheduler}
        parts["text_encoder"] = text(
            CLIPTextModel, tiny.unet.config.cross_attention_dim, 2, 2, 1163
        )
    else:
        parts = {
            "unet": architectures.unet(model, torch.bfloat16),
            "vae": architectures.autoencoder(
                torch.bfloat16, scaling_factor=0.13025 if model == "sdxl" else 0.18215
            ),
            "scheduler": DDIMScheduler(**architectures.SCHEDULER),
            # SDXL's are shortened: nobody runs them within a step, and they are let go of
            "text_encoder": text(CLIPTextModel, 768, 2 if model == "sdxl" else 12, 12),
        }
    if model == "sdxl":
        parts["text_encoder_2"] = text(CLIPTextModelWithProjection, 1280, 2, 20)
        index = {
            "_class_name": "StableDiffusionXLPipeline",
            "_diffusers_version": index["_diffusers_version"],
            "force_zeros_for_empty_prompt": True,
            **{k: index[k] for k in ("scheduler", "text_encoder", "tokenizer", "unet", "vae")},
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": index["tokenizer"],
        }
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    (folder / "model_index.json").write_text(json.dumps(index, indent=1))


def _link(source: Path, folder: Path, size: int) -> None:
    """The same pipeline, its UNet's own size being ``size`` pixels: TRL knows no other."""
    vae = json.loads((source / "vae" / "config.json").read_text())
    scale = 2 ** (len(vae["block_out_channels"]) - 1)
    for path in sorted(source.rglob("*")):
        target = folder / path.relative_to(source)
        if path.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        elif path.suffix == ".safetensors" and path.parent.name.startswith("text_encoder"):
            _old_names(path, target)
        elif path.suffix == ".safetensors":
            os.symlink(path.resolve(), target)
        elif path.name != "complete":
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    config = folder / "unet" / "config.json"
    settings = {**json.loads(config.read_text()), "sample_size": size // scale}
    config.write_text(json.dumps(settings, indent=1))


def _old_names(source: Path, target: Path) -> None:
    """A text encoder by the names that every version of transformers reads.

    Version 5 writes others, which version 4 takes for none at all and makes up random weights.
    """
    from safetensors.torch import load_file, save_file

    prefix = "text_model."
    tensors = {
        key if key.startswith((prefix, "text_projection.")) else prefix + key: value
        for key, value in load_file(source).items()
    }
    save_file(tensors, target, metadata={"format": "pt"})


def _inputs(folder: Path) -> None:
    """Noise for as many images as there are prompts, and a LoRA whose B is not zero."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    from rewardprop_fast.models.skeleton import load_skeleton

    unet = load_skeleton(folder).unet
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
    generator = torch.Generator().manual_seed(1)
    side = unet.config.sample_size
    latents = torch.randn(len(PROMPTS), 4, side, side, generator=generator)
    tensors = {"latents": latents.bfloat16().float()}
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator)
            spread = 1 / RANK if "lora_A" in name else 0.02
            tensors[name.replace(".default.", ".")] = noise * spread
    save_file(tensors, folder / "inputs.safetensors")
