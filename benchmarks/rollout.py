"""The steps without gradients against diffusers' own denoising loop.

    python -m benchmarks.rollout --model bundled --steps 20 --batch 8
    python -m benchmarks.rollout --model sd15 --size 256 --steps 3 --dtype bfloat16

The same UNet, latents, conditions and schedule, in the same dtype and memory layout, with a LoRA of
rank 16 whose B is not zero; SD 1.5 is its architecture with random weights. Diffusers' loop is its
modules and its DDIMScheduler, LoRA by peft. Both run in turns, and what they compute is compared
first.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import interleaved, speedup
from rewardprop_fast import accelerate, lora
from rewardprop_fast.models import architectures, load_bundled
from rewardprop_fast.rollout import Conditioning, Sampler, Schedule

GUIDANCE = 5.0

#: How far the two may lie from each other, as a share of the latents' norm.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


def main() -> int:
    """Time one workload, print it, add it to a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=("bundled", "sd15"), default="bundled")
    parser.add_argument("--size", type=int, default=256, help="pixels of a side, of sd15")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON; the row is added to those it holds")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    row = vars(args) | measure(args)
    del row["output"]
    theirs, ours = row["diffusers"], row["ours"]
    print(
        f"{args.model}, {args.dtype}, batch {args.batch}, {args.steps} steps, ms a step: diffusers "
        f"{theirs['p50_ms']:.1f} (least {theirs['min_ms']:.1f}), this library "
        f"{ours['p50_ms']:.1f} ({ours['min_ms']:.1f}); {row['speedup']:.2f} times as fast; results "
        f"differ by {row['difference']:.1e}"
    )
    if args.output is not None:
        rows = json.loads(args.output.read_text())["rows"] if args.output.is_file() else []
        machine = {"torch": torch.__version__, "cpu": _cpu(), "python": platform.python_version()}
        text = json.dumps({"machine": machine, "rows": [*rows, row]}, indent=1)
        args.output.write_text(text + "\n")
    return 0


@torch.no_grad()
def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of both, in turns. Raises RuntimeError where they compute different things."""
    dtype = getattr(torch, args.dtype)
    unet, scheduler, size = _model(args, dtype)
    fast = copy.deepcopy(unet)
    generator = torch.Generator().manual_seed(1)
    width = unet.config.cross_attention_dim
    positive, negative = (
        torch.randn(args.batch, 77, width, generator=generator).to(dtype) for _ in range(2)
    )
    latents = torch.randn(args.batch, 4, size, size, generator=generator)
    schedule = Schedule.from_scheduler(scheduler, args.steps).to("cpu", torch.float32)
    sampler = Sampler(fast, schedule, Conditioning(positive, negative), GUIDANCE)

    def ours() -> Tensor:
        return sampler.run(latents, 0, args.steps, gradients=False)

    def theirs() -> Tensor:
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler

        ddim = DDIMScheduler.from_config(scheduler.config)
        ddim.set_timesteps(args.steps)
        embeddings, x = torch.cat([negative, positive]), latents.to(dtype)
        for t in ddim.timesteps:
            inputs = ddim.scale_model_input(torch.cat([x, x]), t)
            output = unet(inputs, t, encoder_hidden_states=embeddings, return_dict=False)[0]
            unconditional, text = output.chunk(2)
            output = unconditional + GUIDANCE * (text - unconditional)
            x = ddim.step(output, t, x, return_dict=False)[0]
        return x

    accelerate(fast)
    plain = theirs().float()
    difference = float((ours() - plain).norm() / plain.norm())
    if difference > _TOLERANCE[dtype]:
        raise RuntimeError(f"The two results differ by {difference:.2g} of their norm.")
    found = interleaved(
        {"diffusers": theirs, "ours": ours}, rounds=args.repeats, threads=args.threads
    )
    row: dict[str, Any] = {
        name: {key: value / args.steps for key, value in timing.summary().items()}
        for name, timing in found.items()
    }
    return row | {"speedup": speedup(found["diffusers"], found["ours"]), "difference": difference}


def _model(args: argparse.Namespace, dtype: torch.dtype) -> tuple[Any, Any, int]:
    if args.model == "bundled":
        pipe = load_bundled()
        unet, scheduler, size = pipe.unet, pipe.scheduler, pipe.unet.config.sample_size
    else:
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler

        torch.manual_seed(0)
        unet = architectures.unet("sd15", torch.bfloat16)
        scheduler, size = DDIMScheduler(**architectures.SCHEDULER), args.size // 8
    nn.Module.to(unet.requires_grad_(False).eval(), dtype, memory_format=torch.channels_last)
    lora.inject(unet, rank=16)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            parameter.copy_(0.01 * torch.randn(parameter.shape, generator=generator))
    return unet, scheduler, size


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if "model name" in line), "")


if __name__ == "__main__":
    sys.exit(main())
