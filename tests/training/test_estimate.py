"""A step's memory foreseen: equal to the tracker's on the real step; plans stay within it."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewardprop_fast.errors import ConfigError
from rewardprop_fast.memory import MemoryTracker, find_device, replay
from rewardprop_fast.memory.plan import Plan, Policy
from rewardprop_fast.memory.planner import BudgetError, Limits
from rewardprop_fast.memory.scheduling.double import Double
from rewardprop_fast.methods import SRPO, AlignProp, DRaFT, DRTune
from rewardprop_fast.models import load_bundled
from rewardprop_fast.ops import packing
from rewardprop_fast.training import budget
from rewardprop_fast.training.budget import Memory
from rewardprop_fast.training.config import (
    LoRAConfig,
    OptimizerConfig,
    OutputConfig,
    SamplingConfig,
    TrainConfig,
)
from rewardprop_fast.training.dry_run import DryRun, gradient_steps_of
from rewardprop_fast.training.estimate import estimate, make_profile, plan_for, planner_for
from rewardprop_fast.training.trainer import RewardPropTrainer

R, AWAY, RO = Policy.RECOMPUTE, Policy.OFFLOAD, Policy.RECOMPUTE_OFFLOAD
CARD = find_device("rtx3090")
PLANS = {
    "kept": Plan(),
    "feed-forward": Plan(({"feed-forward": R},), {"resnet": R}),
    "parts": Plan(({"feed-forward": R, "attention": R},), {"resnet": R, "attention": R}),
    "blocks": Plan(({"transformer block": R, "resnet": R},), {"decoder block": R}),
    "step": Plan(({"step": R},), {}, {"reward block": R}),
    "by step": Plan(({"step": R, "transformer block": R}, {"resnet": R}, {})),
}


class Judge(nn.Module):
    """A reward with layers."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.layers = nn.Sequential(
                nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.GELU()),
                nn.Sequential(nn.Conv2d(8, 8, 3), nn.GELU()),
                nn.Conv2d(8, 1, 1),
            )

    def forward(self, images: Tensor, prompts: list[str], metadata: list[Any]) -> Tensor:
        return self.layers(images.to(self.layers[2].weight.dtype)).flatten(1).mean(1)


def make(pipe: Any, method: Any, tmp_path: Any, **options: Any) -> RewardPropTrainer:
    sampling = {"steps": 4, "guidance_scale": 3, **options.pop("sampling", {})}
    config = TrainConfig(
        **{
            "method": method,
            "sampling": SamplingConfig(**sampling),
            "lora": LoRAConfig(rank=2),
            "output": OutputConfig(directory=str(tmp_path / "run"), tensorboard=False, grid_size=1),
            "batch_size": 2,
            "steps": 1,
            "dtype": "float32",
            "device": "cpu",
            **options,
        }
    )
    return RewardPropTrainer(pipe, Judge(), ["a boat", "a dog"], config, progress="silent")


def real(trainer: RewardPropTrainer, update: bool = False) -> dict[str, int]:
    """Peaks by phase of a step under whatever plan is at work."""
    tracker = MemoryTracker()
    tracker.count(trainer.optimizer.held())
    for network in (trainer.pipe.unet, trainer.pipe.vae, trainer.reward):
        tracker.count(network)
    engine = trainer.engine
    schedule = engine.schedule
    tracker.count([schedule.timesteps, schedule.coefficients, schedule.signal, schedule.noise])
    # Encoded before, since text encoders are not of the step, and held by the step alone; nor is
    # looking at values of it.
    encoded, encoder = [engine.encoder(["a boat", "a dog"])], engine.encoder
    engine.encoder = lambda _: encoded.pop()
    engine._score = lambda images, *rest: trainer.reward(images, *rest)
    engine._is_finite = lambda _: True
    watch = engine.watch

    def both(phase: str) -> ExitStack:
        stack = ExitStack()
        stack.enter_context(watch(phase))
        stack.enter_context(tracker.phase(phase))
        return stack

    engine.watch = both
    with tracker:
        trainer.training_step(["a boat", "a dog"], seed=3)
        if update:
            with tracker.phase("update"):
                trainer.optimizer.gradient_norm()
                trainer.optimizer.update(0)
    engine.watch, engine.encoder = watch, encoder
    del engine._score, engine._is_finite
    for parameter in trainer.parameters.values():
        parameter.grad = None
    return tracker.peak_by_phase


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    ("kind", "method", "options"),
    [
        ("sd", DRaFT(3), {"dtype": "bfloat16"}),
        ("sdxl", DRaFT(1), {}),
        ("bundled", DRaFT(None), {}),
    ],
)
def test_the_estimate_is_the_real_steps_peak(
    pipeline: Any, tmp_path: Any, kind: str, method: Any, options: Any, plan: str
) -> None:
    pipe = load_bundled() if kind == "bundled" else pipeline(kind)
    file = tmp_path / "plan.json"
    file.write_text(PLANS[plan].to_json())
    trainer = make(pipe, method, tmp_path, memory_budget=str(file), **options)
    found = real(trainer)
    trainer.memory.close()
    dry = DryRun.of_pipeline(pipe, trainer.reward, trainer.config)
    foreseen = estimate(dry, PLANS[plan], CARD, optimizer=False)
    for phase, peak in foreseen.by_phase.items():
        assert found[phase] == pytest.approx(peak, rel=1e-3), phase
    assert max(found.values()) == pytest.approx(foreseen.peak, rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "method"),
    [("sd", DRaFT(1)), ("sdxl", DRaFT(2)), ("sd", DRaFT(5)), ("sd", DRTune(2)), ("sd", SRPO())],
    ids=str,
)
def test_a_plan_composed_of_parts_is_never_over_its_budget_when_it_is_run(
    pipeline: Any, tmp_path: Any, kind: str, method: Any
) -> None:
    trainer = make(
        pipeline(kind), method, tmp_path, sampling={"steps": 7, "height": 64, "width": 64}
    )
    dry = DryRun.of_pipeline(trainer.pipe, trainer.reward, trainer.config)
    profile = make_profile(dry, CARD)
    kept = plan_for(dry, profile, Limits(None))
    # of the steps in between a latent more is counted than there is, and SRPO's dry run has no row
    # of coefficients for the way back where only one step is in front of it
    latents = 4 * dry.config.batch_size * math.prod(dry.engine.latent_shape)
    found = estimate(dry, kept.plan, CARD).peak
    k = method.gradient_steps(7)
    row = 12 if isinstance(method, SRPO) else 0
    assert -row <= kept.peak - found <= max(0, k - 2) * latents
    with pytest.raises(BudgetError) as caught:
        plan_for(dry, profile, Limits(1, apart=False))
    # device and host are one memory there
    assert "offloading" not in str(caught.value)
    assert "residency" not in str(caught.value)
    least = caught.value.least
    for share in (0.0, 0.5):
        most = int(least + share * (kept.peak - least))
        planned = plan_for(dry, profile, Limits(most))
        assert planned.peak <= most
        assert estimate(dry, planned.plan, CARD).peak <= most
        assert planned.plan.budget_bytes == most
        assert planned.seconds > kept.seconds


@pytest.mark.parametrize(
    ("kind", "method", "sampling"),
    [
        ("sd", DRaFT(1), {}),
        ("sd", DRaFT(3), {"eta": 1.0}),
        ("sdxl", DRaFT(2), {}),
    ],
    ids=str,
)
def test_steps_run_again_as_a_whole_are_composed_to_a_few_latents(
    pipeline: Any, tmp_path: Any, kind: str, method: Any, sampling: Any
) -> None:
    trainer = make(pipeline(kind), method, tmp_path, sampling={"steps": 6, **sampling})
    dry = DryRun.of_pipeline(trainer.pipe, trainer.reward, trainer.config)
    profile = make_profile(dry, CARD)
    latents = 4 * dry.config.batch_size * math.prod(dry.engine.latent_shape)
    k = gradient_steps_of(dry.config)
    most = 5 * profile.step_output + max(1, k - 2) * latents
    for problem in planner_for(dry, profile, Limits(None))._every_problem():
        for mode in ("keep", "block") if problem.whole else ():
            chosen = {
                modes[mode if group >= 0 and mode in modes else "keep"]
                for (group, _), modes in problem.choice.items()
            }
            composed = problem._planned(chosen, 0.0, None)
            found = estimate(dry, composed.plan, CARD)
            assert 0 <= composed.peak - found.peak <= most, (problem.whole, mode)
            for phase in ("decode", "decode_backward", "backward"):
                more = composed.by_phase[phase] - found.by_phase[phase]
                # of a phase that is not the highest: a small gradient that is added to another
                assert -256 <= more <= most, (problem.whole, mode, phase)


@pytest.mark.parametrize("foreach", [False, True])
def test_the_update_is_a_phase_of_the_step(pipeline: Any, tmp_path: Any, foreach: bool) -> None:
    """With ``foreach``, PyTorch's default on a card, the roots of all second moments at once."""
    optimizer = OptimizerConfig(ema_decay=0.9)
    trainer = make(
        pipeline("sd"), DRaFT(1), tmp_path, optimizer=optimizer, lora=LoRAConfig(rank=64)
    )
    for parameter in trainer.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    for group in trainer.optimizer.adamw.param_groups:
        group["foreach"] = foreach
    trainer.optimizer.update(0)
    device = "cuda" if foreach else "cpu"
    dry = DryRun.of_pipeline(trainer.pipe, trainer.reward, replace(trainer.config, device=device))
    foreseen = estimate(dry, Plan(), CARD)
    assert real(trainer, update=True)["update"] == pytest.approx(
        foreseen.by_phase["update"], rel=1e-3
    )
    # parameters, gradients, two moments, the average, and the roots
    trained = sum(p.nbytes for p in trainer.parameters.values())
    others = foreseen.resident - 4 * trained
    most = max(p.nbytes for p in trainer.parameters.values())
    roots = foreseen.by_phase["update"] - others - 5 * trained
    least, limit = (trained, 1.01 * trained) if foreach else (most, trained / 2)
    assert least <= roots < limit
    profile = make_profile(dry, CARD)
    assert profile.seconds["update"] >= 9 * trained / CARD.bandwidth  # each is read and written
    planned = plan_for(dry, profile, Limits(None))
    assert planned.by_phase["update"] == foreseen.by_phase["update"]
    assert [phase for phase, _, _ in planned.timeline()][-1] == "update"


def test_an_optimizer_on_the_host_updates_nothing_on_the_card(pipeline: Any, tmp_path: Any) -> None:
    trainer = make(pipeline("sd"), DRaFT(1), tmp_path)
    away = replace(trainer.config, device="cuda", optimizer=OptimizerConfig(offload=True))
    dry = DryRun.of_pipeline(trainer.pipe, trainer.reward, away)
    found, bare = (estimate(dry, Plan(), CARD, optimizer=there) for there in (True, False))
    trained = sum(p.nbytes for p in trainer.parameters.values())
    assert found.resident == bare.resident
    assert 0 <= found.by_phase["update"] - found.resident - trained < 2**16


def test_noise_of_every_step_is_counted_though_few_are_run(pipeline: Any, tmp_path: Any) -> None:
    peaks = []
    for steps in (9, 20):
        sampling = {"steps": steps, "eta": 1.0, "height": 64, "width": 64}
        trainer = make(pipeline("sd"), DRaFT(1), tmp_path, sampling=sampling)
        dry = DryRun.of_pipeline(trainer.pipe, trainer.reward, trainer.config)
        peaks.append(estimate(dry, Plan(), CARD, optimizer=False).peak)
    assert max(real(trainer).values()) == pytest.approx(peaks[1], rel=1e-3)
    assert peaks[1] - peaks[0] >= 11 * 4 * 2 * math.prod(dry.engine.latent_shape)


def test_a_random_number_of_steps_is_planned_at_its_most(pipeline: Any, tmp_path: Any) -> None:
    trainer = make(pipeline("sd"), AlignProp(k_max=3), tmp_path)
    most = make(pipeline("sd"), DRaFT(3), tmp_path)
    dry, other = (DryRun.of_pipeline(one.pipe, one.reward, one.config) for one in (trainer, most))
    assert estimate(dry, Plan(), CARD).peak == estimate(other, Plan(), CARD).peak


def test_weights_by_phase_are_taken_off_where_they_are_away(pipeline: Any, tmp_path: Any) -> None:
    trainer = make(pipeline("sd"), DRaFT(1), tmp_path)
    dry = DryRun.of_pipeline(trainer.pipe, trainer.reward, trainer.config)
    there = estimate(dry, Plan(), CARD)
    away = estimate(dry, Plan(residency="phases"), CARD)
    frozen = sum(4 * p.numel() for p in trainer.pipe.unet.parameters() if not p.requires_grad)
    assert there.by_phase["decode"] - away.by_phase["decode"] == frozen
    assert away.by_phase["backward"] < there.by_phase["backward"]
    for found in (there, away):
        assert sum(holding.nbytes for holding in found.holdings) == found.peak
        # what an allocator is asked for is that too; weights that move are padded to 512 bytes
        live = list(accumulate(nbytes for _, nbytes in found.events))
        assert 0 <= max(live) - found.peak <= (0 if found is there else 512 * 400)
        assert replay(found.events).peak_reserved >= found.peak
    assert replay(away.events).peak_rounded < replay(there.events).peak_rounded


@pytest.mark.parametrize(
    "plan",
    [
        Plan(({"transformer block": RO, "resnet": AWAY},)),
        Plan(({"step": RO}, {"resnet": AWAY}, {"transformer block": RO}), {"decoder block": AWAY}),
        Plan(({"transformer block": RO, "resnet": RO},), {"decoder block": R}),
    ],
    ids=["both", "by step", "inputs"],
)
def test_what_is_offloaded_is_foreseen_to_the_byte(tmp_path: Any, plan: Plan) -> None:
    size = {"height": 128, "width": 128}
    trainer = make(load_bundled(), DRaFT(3), tmp_path, sampling=size)
    dry = DryRun.of_pipeline(trainer.pipe, trainer.reward, trainer.config)
    kept, foreseen = (estimate(dry, one, CARD, optimizer=False) for one in (Plan(), plan))
    # copies nothing: of the bytes on the device that changes none
    device = Double(2**40, 2**40, CARD.download, CARD.upload, values=False)
    memory = Memory(plan, trainer.pipe, trainer.reward, device, slab_bytes=2**40)
    trainer.engine.watch = memory.phase
    found = real(trainer)
    memory.close()
    assert memory.offloader.statistics().bytes_out > 20 * 2**20
    assert {phase: found[phase] for phase in foreseen.by_phase} == foreseen.by_phase
    assert foreseen.peak < 0.65 * kept.peak
    assert foreseen.seconds > kept.seconds


@pytest.mark.parametrize("k", [2, 4])
def test_a_plan_that_offloads_is_never_over_its_budget_when_it_is_run(
    tmp_path: Any, k: int
) -> None:
    trainer = make(
        load_bundled(),
        DRaFT(k),
        tmp_path,
        sampling={"steps": 5, "height": 256, "width": 256},
        batch_size=4,
    )
    dry = DryRun.of_pipeline(trainer.pipe, trainer.reward, trainer.config)
    planner = planner_for(dry, make_profile(dry, CARD), Limits(None, offload=True))
    least, most = planner.least(), planner.plan(None).peak
    latents = 4 * dry.config.batch_size * math.prod(dry.engine.latent_shape)
    most_more = planner._variables.on_the_way + 6 * latents
    offloading = 0
    for share in (0.0, 0.1, 0.3):
        budget = int(least + share * (most - least))
        planned = planner.plan(budget)
        found = estimate(dry, planned.plan, CARD)
        offloading += planned.plan.offloads
        assert found.peak <= planned.peak <= budget
        assert planned.peak - found.peak <= most_more
        assert min(planned.at_peak.values()) >= 0
        assert sum(planned.at_peak.values()) == planned.peak
        for phase, peak in found.by_phase.items():
            assert peak <= planned.by_phase[phase], (share, phase)
    assert offloading


# --- the trainer's setting ---


def test_a_budget_changes_memory_and_no_gradient(pipeline: Any, tmp_path: Any) -> None:
    free = make(pipeline("sd"), DRaFT(3), tmp_path, sampling={"height": 64, "width": 64})
    peak = max(real(free).values())
    free.training_step(["a boat", "a dog"], seed=3)
    tight = make(
        pipeline("sd"),
        DRaFT(3),
        tmp_path,
        sampling={"height": 64, "width": 64},
        memory_budget=f"{int(0.9 * peak)}B",
    )
    assert tight.memory is not None
    assert max(real(tight).values()) <= int(0.9 * peak)
    tight.training_step(["a boat", "a dog"], seed=3)
    for name, parameter in free.parameters.items():
        assert torch.equal(parameter.grad, tight.parameters[name].grad), name


def test_a_run_with_a_budget_writes_its_plan_and_can_go_on_with_another(
    pipeline: Any, tmp_path: Any
) -> None:
    trainer = make(pipeline("sd"), DRaFT(1), tmp_path, memory_budget="1GiB", steps=2)
    trainer.train(until=1)
    plan = Plan.load(tmp_path / "run" / "plan.json")
    assert plan == trainer.memory.plan
    assert plan.made_for["k"] == 1
    again = make(pipeline("sd"), DRaFT(1), tmp_path, memory_budget=None, steps=2)
    assert again.resume() == 1


@pytest.mark.parametrize("k", [1, 2])
def test_auto_is_what_is_free_beside_the_copies_that_convolutions_make(
    k: int, pipeline: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One for each direction; a large weight has the second only where gradients repeat."""
    monkeypatch.setattr(budget, "free_host_memory", lambda: 3 * 2**30)
    monkeypatch.setattr(packing, "_LARGE", 2**14)
    trainer = make(pipeline("sd"), DRaFT(k), tmp_path, memory_budget="auto")
    networks = (trainer.pipe.unet, trainer.pipe.vae, trainer.reward)
    there = sum(t.nbytes for n in networks for t in (*n.parameters(), *n.buffers()))
    sizes = [m.weight.nbytes for n in networks[:2] for m in n.modules() if isinstance(m, nn.Conv2d)]
    large = sum(size for size in sizes if size >= 2**14)
    assert 0 < large < sum(sizes)
    packed = 2 * sum(sizes) - (large if k == 1 else 0)
    assert trainer.memory.plan.budget_bytes == 2 * 2**30 + there - packed


def test_auto_on_a_card_counts_what_the_allocator_holds_and_does_not_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (5 * 2**30, 24 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 2**30)
    network = nn.Linear(1024, 1024, bias=False)
    assert budget.available(torch.device("cuda"), 1, network) == (5 + 2 - 1) * 2**30 + 4 * 2**20


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("24 gigs", "'24 gigs' is no size; write a number and a unit, such as '24GiB'"),
        ("missing.json", "there is no file 'missing.json'; `rewardprop plan --output"),
        ("-3GiB", "'-3GiB' is no size"),
    ],
)
def test_a_wrong_budget_is_refused_before_anything_else(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match="memory_budget") as caught:
        TrainConfig(memory_budget=setting).validate()
    assert message in str(caught.value)


def test_a_budget_that_cannot_be_met_names_the_least_that_works(
    pipeline: Any, tmp_path: Any
) -> None:
    with pytest.raises(BudgetError, match=r"No plan fits into 1\.00 KiB: the least that works is"):
        make(pipeline("sd"), DRaFT(1), tmp_path, memory_budget="1KiB")


def test_a_reward_that_looks_at_values_cannot_be_foreseen(pipeline: Any, tmp_path: Any) -> None:
    class Looks(Judge):
        def forward(self, images: Tensor, *rest: Any) -> Tensor:
            return super().forward(images * (1 if float(images.mean()) > 2 else 3), *rest)

    pipe = pipeline("sd")
    config = TrainConfig(method=DRaFT(1), device="cpu", dtype="float32", memory_budget="1GiB")
    with pytest.raises(ConfigError, match="cannot be foreseen, because the reward 'Looks'"):
        RewardPropTrainer(pipe, Looks(), ["a boat"], config, progress="silent")


def test_a_plan_that_moves_memory_is_refused_on_a_cpu(pipeline: Any, tmp_path: Any) -> None:
    file = tmp_path / "plan.json"
    file.write_text(Plan(({"transformer block": RO},)).to_json())
    with pytest.raises(ConfigError, match="on a CPU would copy memory to the same memory"):
        make(pipeline("sd"), DRaFT(1), tmp_path, memory_budget=str(file))


def test_an_interrupted_step_leaves_a_plan_ready_for_the_next(pipeline: Any, tmp_path: Any) -> None:
    class Stops(Judge):
        stop = False

        def forward(self, images: Tensor, *rest: Any) -> Tensor:
            if self.stop:
                raise KeyboardInterrupt
            return super().forward(images, *rest)

    trainer = make(pipeline("sd"), DRaFT(2), tmp_path, memory_budget="1GiB")
    before = trainer.training_step(["a boat", "a dog"], seed=3).loss
    trainer.engine.reward = Stops()
    trainer.engine.reward.stop = True
    with pytest.raises(KeyboardInterrupt):
        trainer.training_step(["a boat", "a dog"], seed=3)
    trainer.engine.reward = trainer.reward
    assert torch.equal(trainer.training_step(["a boat", "a dog"], seed=3).loss, before)
