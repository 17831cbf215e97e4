"""A plan that moves things, put to work on whole steps: the double stands for a GPU."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from rewardprop_fast import RewardPropTrainer
from rewardprop_fast.errors import ConfigError
from rewardprop_fast.memory.plan import Plan, Policy
from rewardprop_fast.memory.planner import Limits
from rewardprop_fast.memory.scheduling.backend import COMPUTE
from rewardprop_fast.memory.scheduling.double import Double
from rewardprop_fast.methods import DRaFT
from rewardprop_fast.models import load_bundled
from rewardprop_fast.rewards import build
from rewardprop_fast.training import budget
from rewardprop_fast.training.config import LoRAConfig, OutputConfig, SamplingConfig, TrainConfig

MIB = 2**20
PROMPTS = ["a boat", "a dog"]
OFFLOADED = Plan(({"transformer block": Policy.RECOMPUTE_OFFLOAD, "resnet": Policy.OFFLOAD},))


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: Any) -> RewardPropTrainer:
    config = TrainConfig(
        method=DRaFT(2),
        sampling=SamplingConfig(steps=3, guidance_scale=3, height=64, width=64),
        lora=LoRAConfig(rank=2),
        output=OutputConfig(directory=str(tmp_path_factory.mktemp("run")), tensorboard=False),
        batch_size=2,
        steps=1,
        dtype="float32",
        device="cpu",
    )
    made = RewardPropTrainer(load_bundled(), build("alignment"), PROMPTS, config, progress="silent")
    with torch.no_grad():
        for parameter in made.parameters.values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return made


def gradients(trainer: RewardPropTrainer) -> dict[str, torch.Tensor]:
    trainer.training_step(PROMPTS, seed=4)
    found = {}
    for name, parameter in trainer.parameters.items():
        found[name], parameter.grad = parameter.grad, None
    return found


def at_work(plan: Plan, trainer: RewardPropTrainer, device: Double) -> budget.Memory:
    memory = budget.Memory(plan, trainer.pipe, trainer.reward, device, slab_bytes=64 * MIB)
    if memory.offloader is not None:
        memory.offloader.least_bytes = 4096  # the bundled model's tensors are small
    return memory


@pytest.mark.parametrize(
    "plan",
    [
        OFFLOADED,
        Plan(residency="phases"),
        Plan(OFFLOADED.steps, {"decoder block": Policy.RECOMPUTE}, residency="phases"),
    ],
    ids=["offload", "phases", "both"],
)
def test_gradients_are_the_same_to_the_last_bit(trainer: RewardPropTrainer, plan: Plan) -> None:
    expected = gradients(trainer)
    device = Double(256 * MIB, 256 * MIB, 1e9, 1e9)
    memory = at_work(plan, trainer, device)
    weights_at: dict[str, int] = {}
    sent_at_decode = -1

    def watch(name: str) -> Any:
        nonlocal sent_at_decode
        surrounding = memory.phase(name)
        if name == "decode":
            sent_at_decode = device.device_bytes_now
        if memory.residency is not None:
            weights_at[name] = memory.residency.bytes_of(name)
        return surrounding

    trainer.engine.watch = watch
    try:
        for _ in range(2):  # the second step finds what the first one left
            got = gradients(trainer)
            assert got.keys() == expected.keys()
            for name, gradient in expected.items():
                assert torch.equal(got[name], gradient), name
        assert device.violations == []
        if memory.offloader is not None:
            moved = memory.offloader.statistics()
            assert moved.bytes_out > MIB
            assert moved.bytes_back > MIB
            # all of it has left when the decoder begins: only weights are there
            there = 0 if memory.residency is None else memory.residency.bytes_of("suffix")
            assert sent_at_decode == there
            assert memory.offloader.weights is memory.residency
        if memory.residency is not None:
            assert memory.residency.bytes_up > 0
            everything = memory.residency.bytes_of("suffix") + memory.residency.bytes_of("decode")
            assert 0 < weights_at["decode"] < weights_at["suffix"] < everything
    finally:
        memory.close()
        del trainer.engine.watch
    after = gradients(trainer)
    assert all(torch.equal(after[name], gradient) for name, gradient in expected.items())


class Ahead:
    """A phase that takes some time; notes the weights that are beside its own meanwhile."""

    def __init__(self, name: str, memory: budget.Memory, device: Double, found: dict[str, int]):
        self.name, self.memory, self.device, self.found = name, memory, device, found
        self.phase = memory.phase(name)

    def __enter__(self) -> None:
        self.phase.__enter__()
        residency = self.memory.residency
        self.found[self.name] = residency.resident_bytes - residency.bytes_of(self.name)
        self.device.compute(0.02)

    def __exit__(self, *error: Any) -> None:
        self.phase.__exit__(*error)


def test_weights_come_up_ahead_as_far_as_the_plan_leaves_room(trainer: RewardPropTrainer) -> None:
    expected = gradients(trainer)
    ends, ahead = [], []
    for room in (0, 2, 64):  # MiB beside the peak of each phase
        device = Double(256 * MIB, 256 * MIB, 2e8, 2e8)
        peaks = dict.fromkeys(("suffix", "decode", "reward", "decode_backward"), 100 * MIB)
        plan = Plan(
            residency="phases",
            budget_bytes=(100 + room) * MIB,
            prediction={"peak_bytes_by_phase": peaks},
        )
        memory = at_work(plan, trainer, device)
        found: dict[str, int] = {}
        trainer.engine.watch = partial(Ahead, memory=memory, device=device, found=found)
        try:
            got = gradients(trainer)
            assert all(torch.equal(got[name], gradient) for name, gradient in expected.items())
            assert device.violations == []
            assert all(nbytes <= room * MIB for nbytes in found.values())
            assert found["prefix"] == found["backward"] == 0
            ahead.append(found["suffix"] + found["decode_backward"])
            ends.append(device.ready[COMPUTE])
        finally:
            memory.close()
            del trainer.engine.watch
    assert ahead[0] == 0 < ahead[2]
    assert ahead == sorted(ahead)
    assert ends[2] < ends[0]  # copies lie beside the computation, which waited for them before


def test_a_cpu_refuses_a_plan_that_moves_anything(trainer: RewardPropTrainer) -> None:
    for plan in (OFFLOADED, Plan(residency="phases")):
        with pytest.raises(ConfigError, match="--no-offload and --residency all"):
            budget.Memory(plan, trainer.pipe, trainer.reward)


def test_on_a_cpu_nothing_may_move(
    trainer: RewardPropTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(budget, "make_profile", lambda *_: None)
    monkeypatch.setattr(budget.DryRun, "of_pipeline", lambda *_: None)
    monkeypatch.setattr(
        budget, "plan_for", lambda _dry, _profile, limits: asked.append(limits) or Planned
    )
    budget.make("3GiB", trainer.pipe, trainer.reward, trainer.config, torch.device("cpu"))
    assert asked == [Limits(3 * 2**30, offload=False, residencies=("all",), apart=False)]


class Planned:
    plan = Plan()
