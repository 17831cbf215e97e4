"""TRL 0.23.1's trainer on the bundled model, in its own environment; a job as JSON on stdin.

Writes the adapter at each evaluation into the job's folder, STEP.safetensors, and the times into
times.json. Of this library only the reward is imported.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def main(job: dict[str, Any]) -> None:
    import torch
    from accelerate import PartialState
    from safetensors.torch import save_file

    from rewardprop_fast.rewards.style import StyleReward

    torch.set_num_threads(1)
    PartialState(cpu=True)
    from trl import AlignPropConfig, AlignPropTrainer, DefaultDDPOStableDiffusionPipeline

    reward = StyleReward(job["style"]).eval().requires_grad_(False)
    prompts = iter(job["prompts"])
    random_truncation = job["variant"] == "trl-random"
    pipe = DefaultDDPOStableDiffusionPipeline(job["folder"])
    trainer = AlignPropTrainer(
        AlignPropConfig(
            seed=job["seed"],
            mixed_precision={"bfloat16": "bf16", "float32": "no"}[job["dtype"]],
            sample_num_steps=job["steps"],
            sample_eta=0.0,  # as here; TRL's default is 1
            sample_guidance_scale=job["guidance"],
            train_batch_size=job["batch"],
            train_learning_rate=job["learning_rate"],
            truncated_backprop_rand=random_truncation,
            truncated_backprop_timestep=job["steps"] - 1,
            truncated_rand_backprop_minmax=(0, job["steps"]),
            num_epochs=10**9,
            save_freq=10**9,
        ),
        lambda images, texts, facts: (reward(images, list(texts), list(facts)), {}),
        lambda: (next(prompts), {}),
        pipe,
    )
    pipe.set_progress_bar_config(disable=True)
    folder = Path(job["output"])
    folder.mkdir(parents=True, exist_ok=True)
    times = []
    seconds = cpu = 0.0
    for step in range(1, job["updates"] + 1):
        wall_then, cpu_then = time.perf_counter(), time.process_time()
        _step(trainer, step)
        seconds += time.perf_counter() - wall_then
        cpu += time.process_time() - cpu_then
        if step % job["every"] and step != job["updates"]:
            continue
        state = {
            name.replace(".default.", "."): parameter.detach().float().contiguous()
            for name, parameter in pipe.unet.named_parameters()
            if "lora_" in name
        }
        save_file(state, folder / f"{step}.safetensors")
        times.append({"step": step, "seconds": seconds, "cpu_seconds": cpu})
    (folder / "times.json").write_text(json.dumps(times))


def _step(trainer: Any, step: int) -> None:
    """An update; one whose random cuts leave no step a gradient passes by and teaches nothing.

    Each step of the chain has a cut of its own: of T = 3 one update in eleven has no gradient, of
    T = 10 one in 7000. TRL stops there.
    """
    try:
        trainer.step(0, step)
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise


if __name__ == "__main__":
    main(json.load(sys.stdin))
