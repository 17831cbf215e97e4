"""A training loop of diffusers and peft alone, on this library's operators: a line more, and back.

Nothing else is used of this library but its bundled model: the UNet learns the caption of a handful
of pictures with a LoRA, as in diffusers' own text-to-image examples.

python examples/accelerate_in_own_loop.py
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

import rewardprop_fast as rpf


def main(steps: int = 20, output: Path | None = None) -> list[float]:
    torch.manual_seed(0)
    pipe = rpf.models.load_bundled()
    unet, vae, scheduler = pipe.unet, pipe.vae, pipe.scheduler
    for network in (unet, vae, pipe.text_encoder):
        network.requires_grad_(False)
    unet.to(memory_format=torch.channels_last)
    vae.to(memory_format=torch.channels_last)
    unet.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=["to_q", "to_k", "to_v"]))

    print(rpf.accelerate(pipe))

    # Four plain colours under one caption, where a photo collection would be.
    colours = torch.rand(4, 3, 1, 1).expand(4, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        latents = vae.encode(colours).latent_dist.mean * vae.config.scaling_factor
        embeds, _ = pipe.encode_prompt(
            ["a plain colour"] * 4,
            "cpu",
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for step in range(steps):
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(
            scheduler.config.num_train_timesteps, (len(latents),), generator=generator
        )
        noisy = scheduler.add_noise(latents, noise, timesteps)
        predicted = unet(noisy, timesteps, encoder_hidden_states=embeds).sample
        target = (
            scheduler.get_velocity(latents, noise, timesteps)
            if scheduler.config.prediction_type == "v_prediction"
            else noise
        )
        loss = F.mse_loss(predicted, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step}: loss {losses[-1]:.4f}")

    if output is not None:
        StableDiffusionPipeline.save_lora_weights(output, get_peft_model_state_dict(unet))

    with torch.no_grad():
        fast = unet(noisy, timesteps, encoder_hidden_states=embeds).sample
        print(f"restored {rpf.restore(pipe)} modules")  # all is diffusers' and peft's own again
        plain = unet(noisy, timesteps, encoder_hidden_states=embeds).sample
    print(f"the same prediction, but for {(fast - plain).abs().max():.1e}")
    return losses


if __name__ == "__main__":
    main(output=Path("runs/own_loop"))
