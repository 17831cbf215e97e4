"""Real steps under memory budgets: resident set, tracked bytes, time, and whether gradients agree.

    python -m benchmarks.memory_real --model sd15 --size 256 --k 1 5 --budgets 0.95 0.9 0.85

The architectures with random weights on this machine's CPU, each run in a process of its own: this
library with everything kept, under budgets (as shares of that peak), and diffusers with and without
its own checkpointing. A first step warms up and is tracked; a second one is timed, with the
kernel's record of the resident set's peak (VmHWM) reset before it. malloc gives blocks of 128 KiB
and more back to the system at once (MALLOC_MMAP_THRESHOLD_), so that the resident set follows what
is alive.

From two steps with gradients on, oneDNN's copies of large weights for them come and go within a
step (`ops.packing`). They are no tensors; their bytes are added at every moment to those tracked,
and the most of both together is what the resident set should grow to.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

GIB = 2**30

#: Diffusers' own modules, and with its gradient checkpointing.
_DIFFUSERS = ("diffusers", "diffusers, checkpointing")


def main() -> int:
    """Run all cases of the command line, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=("sd15", "sdxl"), default="sd15")
    parser.add_argument("--size", type=int, default=256, help="pixels of a side")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 5], help="steps with gradients")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--prefix", type=int, default=1, help="steps without")
    parser.add_argument(
        "--budgets", nargs="*", default=["0.95", "0.9", "0.85"], help="shares of the kept peak"
    )
    parser.add_argument(
        "--diffusers",
        nargs="*",
        choices=_DIFFUSERS,
        default=_DIFFUSERS,
        help="which of its forms to run too",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, help="JSON; rows are added to those it holds")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        print(json.dumps(_child(json.loads(args.child))))
        return 0
    output: Path | None = args.output
    rows = json.loads(output.read_text())["rows"] if output is not None and output.is_file() else []
    for k in args.k:
        for row in _cases(args, k):
            rows.append(row)
            if output is not None:  # after each, since the next may take hours
                output.write_text(
                    json.dumps({"machine": _machine(), "rows": rows}, indent=1) + "\n"
                )
    return 0


def _cases(args: argparse.Namespace, k: int) -> Iterator[dict[str, Any]]:
    case = {"model": args.model, "size": args.size, "k": k, "steps": k + args.prefix}
    case["dtype"] = args.dtype
    kept = _run({**case, "form": "all kept"}, args.threads, None)
    yield kept
    for share in args.budgets:
        budget = int(float(share) * kept["tracked_peak"])
        form = f"budget {budget / GIB:.2f} GiB"
        yield _run({**case, "form": form, "budget": budget}, args.threads, kept)
    for form in args.diffusers:
        yield _run({**case, "form": form}, args.threads, kept)


def _run(case: dict[str, Any], threads: int, kept: dict[str, Any] | None) -> dict[str, Any]:
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": str(2**17),
        "OMP_NUM_THREADS": str(threads),
    }
    command = [sys.executable, "-m", "benchmarks.memory_real", "--child", json.dumps(case)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        print(f"{case['model']} {case['size']} K={case['k']} {case['form']}: failed", flush=True)
        print(done.stderr.splitlines()[-1] if done.stderr else "", flush=True)
        return {**case, "failed": done.stderr.splitlines()[-1:] or "killed"}
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    row["threads"] = threads
    if kept is not None and "gradients" in kept:
        row["gradients_equal"] = row["gradients"] == kept["gradients"]
    words = {True: "equal", False: "differ", None: "-"}
    print(
        f"{row['model']} {row['size']} K={row['k']} {row['form']:<26} "
        f"tracked {_gib(row['tracked_peak'])}, estimated {_gib(row.get('estimated_peak'))}; "
        f"resident set {_gib(row['resident_peak'])}, grew by {_gib(row['resident_growth'])}, "
        f"expected {_gib(row.get('expected_growth'))}; {row['seconds']:.1f} s; "
        f"gradients {words[row.get('gradients_equal')]}",
        flush=True,
    )
    return row


def _gib(nbytes: int | None) -> str:
    return "-" if nbytes is None else f"{nbytes / GIB:.3f} GiB"


# --- one case, in its own process ---


def _child(case: dict[str, Any]) -> dict[str, Any]:
    import torch

    import rewardprop_fast as rpf
    from rewardprop_fast.memory import MemoryTracker, find_device
    from rewardprop_fast.memory.plan import Plan
    from rewardprop_fast.ops import drop_packs, packed_bytes
    from rewardprop_fast.rewards.style import StyleReward
    from rewardprop_fast.training.dry_run import DryRun
    from rewardprop_fast.training.estimate import estimate

    accelerated = not case["form"].startswith("diffusers")
    pipe = random_pipeline(case["model"], getattr(torch, case["dtype"]))
    config = rpf.TrainConfig(
        method=rpf.DRaFT(case["k"]),
        sampling=rpf.SamplingConfig(
            steps=case["steps"], height=case["size"], width=case["size"], guidance_scale=7.5
        ),
        lora=rpf.LoRAConfig(rank=16),
        batch_size=1,
        dtype=case["dtype"],
        device="cpu",
        accelerate=accelerated,
        memory_budget=str(case["budget"]) + "B" if "budget" in case else None,
    )
    started = time.perf_counter()
    trainer = rpf.RewardPropTrainer(pipe, StyleReward("fluent"), ["a fox"], config)
    setup = time.perf_counter() - started
    for number, parameter in enumerate(trainer.parameters.values()):
        generator = torch.Generator().manual_seed(number)
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.01)
    if case["form"] == "diffusers, checkpointing":
        pipe.unet.enable_gradient_checkpointing()
        pipe.vae.enable_gradient_checkpointing()
    for name in ("text_encoder", "text_encoder_2"):
        trainer.engine.encoder(["a fox"])  # remembered; the encoders are not needed any more
        if getattr(pipe, name, None) is not None:
            setattr(pipe, name, None)

    networks = (pipe.unet, pipe.vae)
    most = copies_then = 0

    def see(*call: Any) -> None:
        nonlocal most, copies_then
        copies = sum(packed_bytes(network, passing=True) for network in networks)
        if tracker.live_bytes + copies > most:
            most, copies_then = tracker.live_bytes + copies, copies

    tracker = MemoryTracker(pipe.unet, watch=see)
    resident = tracker.count(_held(trainer))
    watch = trainer.engine.watch

    def both(phase: str) -> Any:
        from contextlib import ExitStack

        stack = ExitStack()
        stack.enter_context(watch(phase))
        stack.enter_context(tracker.phase(phase))
        return stack

    trainer.engine.watch = both
    with tracker:
        trainer.training_step(["a fox"], seed=1)
    trainer.engine.watch = watch
    gradients = _take_gradients(trainer)
    copies = [sum(packed_bytes(n, passing=yes) for n in networks) for yes in (False, True)]
    for network in networks:
        drop_packs(network, passing=True)

    baseline = _reset_peak()
    started = time.perf_counter()
    trainer.training_step(["a fox"], seed=1)
    seconds = time.perf_counter() - started
    peak = _status("VmHWM")
    again = _take_gradients(trainer)
    row = {
        **case,
        "tracked_peak": tracker.peak_bytes,
        "tracked_by_phase": tracker.peak_by_phase,
        "tracked_resident": resident,
        "resident_peak": peak,
        "resident_growth": peak - baseline,
        "expected_growth": most - resident,
        "packed": copies[0] - copies[1],
        "packed_for_gradients": copies_then,
        "seconds": seconds,
        "setup_seconds": setup,
        "gradients": gradients,
        "repeatable": gradients == again,
        "plan": json.loads(trainer.memory.plan.to_json()) if trainer.memory else None,
    }
    if accelerated:
        plan = trainer.memory.plan if trainer.memory else Plan()
        if trainer.memory:
            trainer.memory.close()
        dry = DryRun.of_pipeline(pipe, trainer.reward, config)
        foreseen = estimate(dry, plan, find_device("rtx3090"), optimizer=False)
        row["estimated_peak"] = foreseen.peak
    return row


def _held(trainer: Any) -> list[Any]:
    networks = (trainer.pipe.unet, trainer.pipe.vae, trainer.reward)
    return [t for network in networks for t in (*network.parameters(), *network.buffers())]


def _take_gradients(trainer: Any) -> str:
    """A hash of all of them; they are gone afterwards."""
    digest = hashlib.blake2b(digest_size=16)
    for parameter in trainer.parameters.values():
        digest.update(parameter.grad.numpy().tobytes())
        parameter.grad = None
    return digest.hexdigest()


def random_pipeline(model: str, dtype: Any) -> Any:
    """The architecture with random weights; of the text encoders the shape of the output counts."""
    import torch
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from rewardprop_fast.models import architectures, random_init

    torch.manual_seed(0)
    parts: dict[str, Any] = {
        "unet": architectures.unet(model, dtype),
        "vae": architectures.autoencoder(dtype),
        "scheduler": DDIMScheduler(**architectures.SCHEDULER),
    }

    def text(width: int, heads: int) -> CLIPTextConfig:
        tokenizer = parts["tokenizer"]
        return CLIPTextConfig(
            hidden_size=width,
            num_attention_heads=heads,
            intermediate_size=width,
            num_hidden_layers=2,
            projection_dim=width,
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )

    if model == "sd15":
        from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
            StableDiffusionPipeline,
        )

        parts["tokenizer"] = random_init.tiny_stable_diffusion().tokenizer
        parts["text_encoder"] = CLIPTextModel(text(768, 12))
        pipe: Any = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    else:
        from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import (
            StableDiffusionXLPipeline,
        )

        tiny = random_init.tiny_stable_diffusion_xl()
        parts |= {"tokenizer": tiny.tokenizer, "tokenizer_2": tiny.tokenizer_2}
        parts["text_encoder"] = CLIPTextModel(text(768, 12))
        parts["text_encoder_2"] = CLIPTextModelWithProjection(text(1280, 20))
        pipe = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def _reset_peak() -> int:
    """Forget the highest resident set so far; returns the present one, bytes.

    What malloc keeps of small blocks that are free goes back to the system first, or the step
    would use that again and grow by less than it needs.
    """
    import ctypes
    import gc

    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _machine() -> dict[str, Any]:
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if "model name" in line), "")
    return {"cpu": name, "torch": torch.__version__, "python": platform.python_version()}


if __name__ == "__main__":
    sys.exit(main())
