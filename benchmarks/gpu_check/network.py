"""The bundled UNet and VAE decoder, accelerated, against themselves as diffusers made them."""

from __future__ import annotations

from typing import Any

import torch

import rewardprop_fast as rpf
from benchmarks.gpu_check.checking import compare
from benchmarks.gpu_check.device import Device
from benchmarks.gpu_check.jobs import Job, Outcome
from rewardprop_fast import lora
from rewardprop_fast.models import load_bundled
from tests.nn.passes import cast, fill, with_gradients
from tests.ops.oracle import poisoned

_RANK = 3

#: Of the loss: float16 has no room for the gradients of a mean.
_SCALE = 2.0**12


def check(job: Job, device: Device) -> Outcome:
    """Images and LoRA gradients: error against float64 at most twice the plain model's."""
    exact = with_gradients(cast(_pipeline(device), torch.float64), _SCALE)
    pipe = cast(_pipeline(device), getattr(torch, job.dtype))
    plain = with_gradients(pipe, _SCALE)
    swapped = rpf.accelerate(pipe).swapped
    with poisoned():
        found = with_gradients(pipe, _SCALE)
    results = compare(["images", "gradients of the LoRA"], found, plain, exact)
    wrong = [f"{label}: {text}" for label, (text, _) in results.items() if text]
    if not swapped:
        wrong.append("no module was swapped")
    figures = {"error_over_eager": max(multiple for _, multiple in results.values())}
    return Outcome(job, "wrong" if wrong else "passed", "; ".join(wrong), figures)


def _pipeline(device: Device) -> Any:
    pipe = load_bundled()
    for network in (pipe.unet, pipe.vae):
        network.requires_grad_(False).to(memory_format=torch.channels_last)
    lora.inject(pipe.unet, rank=_RANK, target_modules="all-linear")
    fill(pipe.unet)
    for network in (pipe.unet, pipe.vae):
        network.to(device.type)
    return pipe
