"""Stage 4: the text encoder and the UNet, trained together on latents that were encoded ahead."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from loop import Loop
from pictures import Pictures
from pools import Pool, kept
from text import WIDTH, build_text_encoder, build_tokenizer
from transformers import CLIPTextModel

SNR_GAMMA = 5.0  # min-SNR weighting (2303.09556)
JITTER = 0.5  # less than the other stages see: fewer things to learn by heart
UNCONDITIONAL = 0.1  # share of empty prompts, for classifier-free guidance


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


def build_unet() -> UNet2DConditionModel:
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 128, 144),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # diffusers' name for the number of heads
        norm_num_groups=16,
        use_linear_projection=True,
    )
    return unet.to(memory_format=torch.channels_last)


@torch.no_grad()
def encode(vae: AutoencoderKL, data: Pictures, count: int, batch: int = 64) -> Pool:
    """`count` augmented pictures as latents (count, 4, 16, 16), with their captions."""
    latents, captions = [], []
    for start in range(0, count, batch):
        drawn = data.sample(min(batch, count - start), seed=2_000_000 + start, jitter=JITTER)
        x = (drawn.images * 2 - 1).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            latents.append(vae.encode(x).latent_dist.mean.float())
        captions += drawn.captions
        if start % (batch * 50) == 0:
            print(f"encoded {start} of {count}", flush=True)
    return {"latents": torch.cat(latents).half()}, captions


class TextToLatents(torch.nn.Module):
    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.text_encoder, self.unet = text_encoder, unet


def train(
    folder: Path,
    node_modules: Path,
    vae: AutoencoderKL,
    *,
    steps: int,
    batch: int = 64,
    learning_rate: float = 1.5e-3,
    pool_size: int = 24_000,
    start: dict[str, torch.Tensor] | None = None,
) -> tuple[Loop, TextToLatents]:
    torch.manual_seed(3)
    data = Pictures(node_modules)
    pool, captions = kept(folder / "pool.safetensors", lambda: encode(vae, data, pool_size))
    latents = pool["latents"].float() * vae.config.scaling_factor
    tokenizer = build_tokenizer(folder / "tokenizer")
    ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    empty = tokenizer("", padding="max_length", return_tensors="pt").input_ids
    model = TextToLatents(build_text_encoder(tokenizer), build_unet())
    model.unet.set_attn_processor(
        AttnProcessor()
    )  # eager attention: SDPA's CPU backward is several times slower
    model.text_encoder.set_attn_implementation("eager")
    if start is not None:
        model.load_state_dict(start)
    alphas = build_scheduler().alphas_cumprod
    loop = Loop(folder, model, steps=steps, learning_rate=learning_rate, warmup=300, ema=0.9995)

    def loss_at(step: int) -> dict[str, torch.Tensor]:
        rng = torch.Generator().manual_seed(step)
        index = torch.randint(len(latents), (batch,), generator=rng)
        x0 = latents[index].contiguous(memory_format=torch.channels_last)
        drop = torch.rand(batch, generator=rng) < UNCONDITIONAL
        tokens = torch.where(drop[:, None], empty, ids[index])
        # one timestep per equal slice of [0, 1000): uniform draws, with less variance
        slices = torch.randperm(batch, generator=rng) + torch.rand(batch, generator=rng)
        t = (slices / batch * 1000).long().clamp(max=999)
        noise = torch.randn(x0.shape, generator=rng)
        a = alphas[t][:, None, None, None]
        xt, v = a.sqrt() * x0 + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * x0
        with torch.autocast("cpu", dtype=torch.bfloat16):
            context = model.text_encoder(tokens)[0]
            predicted = model.unet(
                xt.contiguous(memory_format=torch.channels_last), t, context
            ).sample
        snr = alphas[t] / (1 - alphas[t])
        weight = snr.clamp(max=SNR_GAMMA) / (snr + 1)  # min(SNR, gamma) on x0, written for v
        errors = (predicted.float() - v).square().mean((1, 2, 3))
        return {"loss": (weight * errors).mean(), "v_mse": errors.mean().detach()}

    loop.run(loss_at, log_every=100)
    loop.use_ema()
    return loop, model
