"""This library: its trainer, as a user would set it up.

The variant "lean" recomputes blocks of UNet and decoder.
"""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.peers.competitors.shared import fill, inputs, take_gradients, tensors_of
from benchmarks.peers.reward import Reward
from benchmarks.peers.workloads import LEARNING_RATE


def make(job: dict[str, Any], variant: str) -> Ours:
    return Ours(job, variant)


class Ours:
    def __init__(self, job: dict[str, Any], variant: str) -> None:
        import rewardprop_fast as rpf
        from benchmarks.peers.competitors.shared import DTYPES

        self.prompts = job["prompts"]
        self.latents, values = inputs(job)
        pipe = rpf.models.load_pipeline(job["folder"], dtype=DTYPES[job["dtype"]])
        self.folder = tempfile.TemporaryDirectory()
        changes: dict[str, Any] = {}
        if variant == "lean":
            changes["memory_budget"] = self._plan()
        config = rpf.TrainConfig(
            method=rpf.DRaFT(job["k"]),
            sampling=rpf.SamplingConfig(steps=job["steps"], guidance_scale=job["guidance"]),
            lora=rpf.LoRAConfig(rank=job["rank"]),
            optimizer=rpf.OptimizerConfig(learning_rate=LEARNING_RATE),
            output=rpf.OutputConfig(directory=str(Path(self.folder.name, "run"))),
            steps=10**6,
            batch_size=job["batch"],
            dtype=job["dtype"],
            device=job["device"],
            **changes,
        )
        self.trainer = rpf.RewardPropTrainer(
            pipe, Reward(), self.prompts, config, progress="silent"
        )
        fill(self.trainer.parameters, values)
        # Known from here on; the encoders are not needed any more.
        self.trainer.engine.encoder(self.prompts)
        for name in ("text_encoder", "text_encoder_2"):
            if getattr(pipe, name, None) is not None:
                setattr(pipe, name, None)
        gc.collect()

    def _plan(self) -> str:
        from rewardprop_fast.memory.plan import Plan, Policy

        again = Policy.RECOMPUTE
        plan = Plan(
            steps=({"transformer block": again, "resnet": again},), decode={"resnet": again}
        )
        path = Path(self.folder.name, "plan.json")
        path.write_text(plan.to_json())
        return str(path)

    def gradients(self, random_seed: int | None) -> tuple[dict[str, Tensor], Tensor]:
        if random_seed is not None:
            raise NotImplementedError("random truncation is TRL's")
        result = self.trainer.training_step(self.prompts, self.latents)
        return take_gradients(self.trainer.parameters), result.rewards

    def step(self) -> dict[str, float]:
        row = self.trainer.update()
        return {
            name.removeprefix("seconds_"): value
            for name, value in row.items()
            if name.startswith("seconds_")
        }

    def held(self) -> Any:
        pipe = self.trainer.pipe
        return tensors_of(pipe.unet, pipe.vae, self.trainer.reward)
