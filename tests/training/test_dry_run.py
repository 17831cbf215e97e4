"""A training step on fake tensors has the memory of the step that it stands for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from rewardprop_fast import accelerate, lora
from rewardprop_fast.memory import MemoryTracker, policy
from rewardprop_fast.memory.plan import Plan, Policy
from rewardprop_fast.memory.profile import CHAIN_BEGINS
from rewardprop_fast.methods import SRPO, AlignProp, DRaFT, DRaFTLV, DRTune, ReFL
from rewardprop_fast.methods.base import Method
from rewardprop_fast.models import load_bundled
from rewardprop_fast.models.shapes import load_shapes
from rewardprop_fast.rewards.shapes import tower
from rewardprop_fast.training.config import (
    LoRAConfig,
    OptimizerConfig,
    SamplingConfig,
    TrainConfig,
)
from rewardprop_fast.training.dry_run import (
    DryDraws,
    DryRun,
    gradient_steps_of,
    shortened,
)
from rewardprop_fast.training.engine import Engine, negative_mean

R = Policy.RECOMPUTE
PHASES = {"prefix", "suffix", "decode", "reward", "decode_backward", "backward"}


class Judge(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.GELU(), nn.Conv2d(6, 1, 3))
        self.requires_grad_(False)

    def forward(self, images: Tensor, prompts: list[str], metadata: list[Any]) -> Tensor:
        return self.layers(images.float()).flatten(1).mean(1)


def config(method: Method, steps: int = 5, scale: float = 3.0, **options: Any) -> TrainConfig:
    sampling = SamplingConfig(steps=steps, guidance_scale=scale, **options.pop("sampling", {}))
    return TrainConfig(method=method, sampling=sampling, batch_size=2, **options)


def ready(pipe: Any, dtype: torch.dtype = torch.float32) -> Any:
    """As the trainer makes it."""
    for network in (pipe.unet, pipe.vae):
        nn.Module.to(network.requires_grad_(False), dtype, memory_format=torch.channels_last)
    lora.inject(pipe.unet, rank=2)
    accelerate(pipe)
    return pipe


def measured(tracker: MemoryTracker, engine: Engine, run: Any, plan: Any = None) -> dict[str, int]:
    def watch(phase: str) -> Any:
        if plan is not None and phase == CHAIN_BEGINS:
            plan.begin()
        return tracker.phase(phase)

    engine.watch = watch
    for network in (engine.pipe.unet, engine.pipe.vae, engine.reward):
        tracker.count(network)
    schedule = engine.schedule
    tracker.count([schedule.timesteps, schedule.coefficients, schedule.signal, schedule.noise])
    with tracker:
        run()
    return {phase: peak for phase, peak in tracker.peak_by_phase.items() if phase in PHASES}


def real_peaks(pipe: Any, reward: Any, config: TrainConfig, plan: Any) -> dict[str, int]:
    # of all steps: what is made of every timestep beforehand is part of the memory
    whole = replace(shortened(config), sampling=config.sampling)
    engine = Engine(pipe, reward, whole, negative_mean)
    prompts = ["a prompt"] * config.batch_size
    # Encoded before, since text encoders are not of the step; and held by the step alone.
    encoded = [engine.encoder(prompts)]
    engine.encoder = lambda _: encoded.pop()
    engine._score = lambda images, *rest: reward(images, *rest)  # nor is looking at the values
    engine._is_finite = lambda _: True
    draws = DryDraws(0, 0, tuple(range(config.batch_size)))
    latents = torch.zeros(config.batch_size, *engine.latent_shape)
    tracker = MemoryTracker()
    return measured(
        tracker, engine, lambda: engine.step(prompts, [{}] * len(prompts), latents, draws), plan
    )


@pytest.mark.parametrize(
    ("kind", "dtype", "made", "plan"),
    [
        ("sd", torch.bfloat16, config(DRaFT(2), scale=1.0), Plan(({"resnet": R},), {"resnet": R})),
        ("sd", torch.float32, config(DRaFTLV(2)), Plan(({"transformer block": R},))),
        (
            "sdxl",
            torch.bfloat16,
            config(DRaFT(2)),
            Plan(({"step": R}, {"feed-forward": R}), {"decoder block": R}),
        ),
        ("sd", torch.float32, config(ReFL()), Plan(({"resnet": R},))),
        ("sd", torch.float32, config(SRPO()), Plan(({"step": R},))),
        ("sd", torch.float32, config(DRTune(k=3)), Plan(({}, {"step": R}, {"resnet": R}))),
    ],
)
def test_peaks_are_those_of_the_real_step(
    pipeline: Any, kind: str, dtype: torch.dtype, made: TrainConfig, plan: Plan
) -> None:
    pipe, reward = ready(pipeline(kind), dtype), Judge()
    dry = DryRun.of_pipeline(pipe, reward, made)
    applied = policy.apply(plan, pipe.unet, pipe.vae)
    expected = real_peaks(pipe, reward, made, applied)
    applied.remove()
    applied = policy.apply(plan, dry.engine.pipe.unet, dry.engine.pipe.vae)
    tracker = MemoryTracker()
    found = measured(tracker, dry.engine, dry.step, applied)
    assert found.keys() == expected.keys() == PHASES
    assert found == expected


def test_of_shapes_is_as_of_a_pipeline_of_these_shapes() -> None:
    made = config(
        DRaFT(1),
        lora=LoRAConfig(rank=2),
        sampling={"height": 16, "width": 16},
    )
    reward = Judge()
    pipe = ready(load_bundled())
    other = DryRun.of_pipeline(pipe, reward, made)
    with torch.device("meta"):
        reward = Judge()
    dry = DryRun.of_shapes(load_shapes("bundled", torch.float32), reward, made)
    found = measured(MemoryTracker(), dry.engine, dry.step)
    assert found == measured(MemoryTracker(), other.engine, other.step)


def test_a_published_model_with_a_tower_can_be_asked_and_holds_nothing() -> None:
    made = TrainConfig(
        method=DRaFT(1),
        sampling=SamplingConfig(steps=50, height=64, width=64),
        lora=LoRAConfig(rank=4),
        optimizer=OptimizerConfig(ema_decay=0.9),
        batch_size=1,
        dtype="bfloat16",
    )
    reward = tower("clip-l", torch.bfloat16)
    dry = DryRun.of_shapes(load_shapes("sd15", torch.bfloat16), reward, made)
    tracker = MemoryTracker()
    resident = dry.resident()
    assert all(isinstance(tensor, FakeTensor) for tensor in resident)
    trained = sum(p.numel() * 4 for p in dry.trained)
    # UNet and decoder in bfloat16; the tower, its text and its table of positions; the LoRA with
    # two moments and an average
    held = 2 * (859_520_964 + 83_653_863 + 303_966_208 + 768) + 8 * 257 + 4 * trained
    assert tracker.count(resident) == held
    away = replace(
        dry, config=replace(made, optimizer=OptimizerConfig(ema_decay=0.9, offload=True))
    )
    assert MemoryTracker().count(away.resident()) == held - 3 * trained
    dry.config = replace(dry.config, device="cpu")  # where it changes nothing
    assert MemoryTracker().count(dry.resident()) == held
    assert {p.dtype for p in dry.trained} == {torch.float32}
    peaks = measured(tracker, dry.engine, dry.step)
    assert min(peaks.values()) > held
    assert tracker.live_bytes < held + 2**20
    assert all(p.grad is None for p in dry.trained)


def test_it_can_be_run_again_and_under_other_plans(pipeline: Any) -> None:
    dry = DryRun.of_pipeline(ready(pipeline()), Judge(), config(DRaFT(1)))
    before = torch.get_rng_state()

    def peak() -> int:
        tracker = MemoryTracker()
        measured(tracker, dry.engine, dry.step)
        return tracker.peak_bytes

    first = peak()
    applied = policy.apply(
        Plan(({"step": R, "transformer block": R},), {"decoder block": R}),
        dry.engine.pipe.unet,
        dry.engine.pipe.vae,
    )
    assert peak() < first
    applied.remove()
    assert peak() == first
    assert torch.equal(torch.get_rng_state(), before)


def test_the_pipeline_it_was_made_of_is_not_touched(pipeline: Any) -> None:
    pipe = ready(pipeline())
    values = {name: p.clone() for name, p in pipe.unet.named_parameters()}
    DryRun.of_pipeline(pipe, Judge(), config(DRaFT(1), accelerate=False)).step()
    assert all(torch.equal(p, values[name]) for name, p in pipe.unet.named_parameters())
    assert all(p.grad is None for p in pipe.unet.parameters())


@pytest.mark.parametrize(
    ("method", "steps", "k", "short"),
    [
        (DRaFT(1), 50, 1, 3),
        (DRaFT(3), 4, 3, 4),
        (DRaFT(), 7, 7, 7),
        (DRaFTLV(2), 50, 1, 3),
        (AlignProp(), 9, 9, 9),
        (AlignProp(k_max=4), 9, 4, 6),
        (AlignProp(k_max=4, trl_compat=True), 9, 9, 9),
        (DRaFT(1), 1, 1, 1),
        (ReFL(), 50, 1, 3),
        (DRTune(k=2), 9, 2, 4),
        (SRPO(), 50, 1, 3),
    ],
)
def test_steps_without_gradients_are_few(method: Method, steps: int, k: int, short: int) -> None:
    made = shortened(config(method, steps))
    assert gradient_steps_of(config(method, steps)) == k == gradient_steps_of(made)
    assert made.sampling.steps == short
    assert type(made.method) is (DRaFT if isinstance(method, AlignProp) else type(method))
    assert made.batch_size == 2


def test_fewer_steps_may_be_asked_for(pipeline: Any) -> None:
    dry = DryRun.of_pipeline(ready(pipeline()), Judge(), config(DRaFT(2)))
    settings, schedule = dry.engine.config, dry.engine.schedule
    kept = []
    for k in (1, 2):
        peaks = measured(
            MemoryTracker(), dry.engine, lambda k=k: dry.step(gradient_steps=k, prefix=0)
        )
        assert "prefix" not in peaks
        kept.append(peaks["suffix"])
    assert kept[0] < kept[1]
    assert dry.engine.config is settings
    assert dry.engine.schedule is schedule
