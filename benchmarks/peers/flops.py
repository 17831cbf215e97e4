"""Floating point operations of a step, counted on the plain diffusers networks without memory."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.peers.workloads import RANK, Workload


def count(workload: Workload, folder: str) -> dict[str, float]:
    """FLOP by part of one step, and "total"; the LoRA's and attention's are among them.

    Nothing is computed twice: T forward passes of the UNet on 2B images, K backward passes to what
    the LoRA needs, one decoding forward and backward. The reward and the update do not count.
    """
    from peft import LoraConfig

    from rewardprop_fast.models import architectures
    from rewardprop_fast.models.skeleton import load_skeleton

    pipe = load_skeleton(folder, with_vae=True)
    unet, vae, side = pipe.unet.eval(), pipe.vae.eval(), pipe.unet.config.sample_size
    unet.requires_grad_(False)
    vae.requires_grad_(False)
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    with torch.device("meta"):
        unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
        inputs: dict[str, Any] = architectures.unet_inputs(
            unet, 2 * workload.batch, side, torch.float32
        )
        inputs["sample"].requires_grad_()
        forward, backward = _both(lambda: unet(**inputs).sample)
        latents = torch.randn(workload.batch, 4, side, side, requires_grad=True)
        decode, decode_backward = _both(lambda: vae.decode(latents).sample)
    parts = {
        "prefix": forward * (workload.steps - workload.k),
        "suffix": forward * workload.k,
        "decode": decode,
        "backward": backward * workload.k + decode_backward,
    }
    return {**parts, "total": sum(parts.values())}


def _both(run: Any) -> tuple[float, float]:
    with FlopCounterMode(display=False) as forward:
        output = run()
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    return float(forward.get_total_flops()), float(backward.get_total_flops())
