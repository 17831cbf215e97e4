"""The strongest plain loop: diffusers and peft, written by somebody who knows them.

Prompts encoded once and the encoders let go of, the steps in front of the gradient under no_grad,
convolutions channels last, latents float32 between steps. Variants: diffusers' own checkpointing
in UNet and VAE, torch.compile (also with CUDA graphs), xformers' attention.
"""

from __future__ import annotations

import gc
import itertools
import time
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from benchmarks.peers.competitors.shared import (
    DTYPES,
    fill,
    inputs,
    lora_parameters,
    take_gradients,
    tensors_of,
)
from benchmarks.peers.reward import Reward
from benchmarks.peers.workloads import LEARNING_RATE


def make(job: dict[str, Any], variant: str) -> Loop:
    return Loop(job, variant)


class Loop:
    def __init__(self, job: dict[str, Any], variant: str) -> None:
        from diffusers import DiffusionPipeline

        self.job, self.device, dtype = job, torch.device(job["device"]), DTYPES[job["dtype"]]
        pipe = DiffusionPipeline.from_pretrained(job["folder"], torch_dtype=dtype)
        pipe.set_progress_bar_config(disable=True)
        self.pipe = pipe.to(self.device)
        self.unet, self.vae, self.scheduler = pipe.unet, pipe.vae, pipe.scheduler
        for part in (self.unet, self.vae):
            part.requires_grad_(False).to(memory_format=torch.channels_last)
        self._encode()
        rank = job["rank"]
        targets = ["to_k", "to_q", "to_v", "to_out.0"]
        self.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
        self.parameters = lora_parameters(self.unet)
        if dtype != torch.float64:
            for parameter in self.parameters.values():
                parameter.data = parameter.data.float()
        latents, values = inputs(job)
        fill(self.parameters, values)
        self.state = torch.float64 if dtype == torch.float64 else torch.float32
        self.latents = latents.to(self.device, self.state)
        self.reward = Reward().to(self.device)
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=LEARNING_RATE)
        self.scheduler.set_timesteps(job["steps"])
        self.decode = self.vae.decode
        if variant == "checkpoint":
            for part in (self.unet, self.vae):
                part.enable_gradient_checkpointing()
                part.train()  # some versions checkpoint in this mode alone; there is no dropout
        elif variant in ("compile", "graphs"):
            mode = "reduce-overhead" if variant == "graphs" else None
            self.unet = torch.compile(self.unet, mode=mode)
            self.decode = torch.compile(self.vae.decode, mode=mode)
        elif variant == "xformers":
            self.pipe.enable_xformers_memory_efficient_attention()

    @torch.no_grad()
    def _encode(self) -> None:
        pipe, job = self.pipe, self.job
        sdxl = hasattr(pipe, "text_encoder_2")
        encoded = pipe.encode_prompt(
            prompt=job["prompts"],
            device=self.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
        )
        self.conditions: dict[str, Any] = {"encoder_hidden_states": torch.cat(encoded[1::-1])}
        if sdxl:
            size = (job["size"], job["size"])
            ids = torch.tensor([[*size, 0, 0, *size]], dtype=pipe.unet.dtype, device=self.device)
            self.conditions["added_cond_kwargs"] = {
                "text_embeds": torch.cat(encoded[3:1:-1]),
                "time_ids": ids.repeat(2 * job["batch"], 1),
            }
            pipe.text_encoder_2 = None
        pipe.text_encoder = None
        gc.collect()

    def _denoise(self, x: Tensor, index: int) -> Tensor:
        t = self.scheduler.timesteps[index]
        double = torch.cat([x, x]).to(self.pipe.unet.dtype)
        output = self.unet(double, t, return_dict=False, **self.conditions)[0].to(self.state)
        uncond, cond = output.chunk(2)
        output = uncond + self.job["guidance"] * (cond - uncond)
        return self.scheduler.step(output, t, x, return_dict=False)[0]

    def _backward(self) -> tuple[Tensor, dict[str, float]]:
        """Gradients onto the parameters; rewards, and seconds by phase."""
        job, marks = self.job, [self._now()]
        x = self.latents
        first = job["steps"] - job["k"]
        with torch.no_grad():
            for i in range(first):
                x = self._denoise(x, i)
        marks.append(self._now())
        for i in range(first, job["steps"]):
            x = self._denoise(x, i)
        marks.append(self._now())
        images = self.decode(
            (x / self.vae.config.scaling_factor).to(self.vae.dtype), return_dict=False
        )[0]
        images = (images.to(self.state) / 2 + 0.5).clamp(0, 1)
        marks.append(self._now())
        rewards = self.reward(images, job["prompts"])
        marks.append(self._now())
        (-rewards.mean()).backward()
        marks.append(self._now())
        names = ("prefix", "suffix", "decode", "reward", "backward")
        spans = [b - a for a, b in itertools.pairwise(marks)]
        return rewards.detach(), dict(zip(names, spans, strict=True))

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def gradients(self, random_seed: int | None) -> tuple[dict[str, Tensor], Tensor]:
        if random_seed is not None:
            raise NotImplementedError("random truncation is TRL's")
        rewards, _ = self._backward()
        return take_gradients(self.parameters), rewards

    def step(self) -> dict[str, float]:
        _, phases = self._backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return phases

    def held(self) -> Any:
        return tensors_of(self.pipe.unet, self.vae, self.reward)
