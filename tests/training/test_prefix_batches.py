"""Several batches take their steps without gradients as one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from rewardprop_fast.errors import ConfigError
from rewardprop_fast.memory import find_device
from rewardprop_fast.memory.plan import Plan
from rewardprop_fast.methods import DDPO, SRPO, AlignProp, DRaFT, DRaFTLV, DRaFTPlus, DRTune, ReFL
from rewardprop_fast.randomness import Draws
from rewardprop_fast.training.config import OptimizerConfig, RolloutConfig, TrainConfig
from rewardprop_fast.training.dry_run import DryRun
from rewardprop_fast.training.estimate import estimate

STEPS = 4
METHODS = [
    DRaFT(2),
    DRaFTLV(n=1),
    DRaFTPlus(k=1),
    AlignProp(k_max=3),
    AlignProp(trl_compat=True, k_max=3),
    ReFL(last=0.5),
    DRTune(k=2),
    SRPO(),
]


def run(make_trainer: Any, monkeypatch: Any, together: int, **config: Any) -> tuple[Any, ...]:
    """The first update: its gradients, the rows of the UNet's calls without any, its metrics."""
    trainer = make_trainer(
        **{"batch_size": 1, "accumulation_steps": 2, "dtype": "float64", "trained": True, **config},
        rollout=RolloutConfig(prefix_batches=together),
        sampling={"steps": STEPS, "eta": 0.5},
        optimizer=OptimizerConfig(max_grad_norm=None),
    )
    rows, forward = [], trainer.pipe.unet.forward
    found: dict[str, torch.Tensor] = {}

    def seen(x: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() and not found:
            rows.append(len(x) // 2)  # guidance doubles it
        return forward(x, *args, **kwargs)

    update = trainer.optimizer.update

    def noting(step: int) -> float:
        found.update({name: p.grad.clone() for name, p in trainer.parameters.items()})
        return update(step)

    monkeypatch.setattr(trainer.pipe.unet, "forward", seen)
    monkeypatch.setattr(trainer.optimizer, "update", noting)
    row = trainer.update()
    return torch.cat([g.flatten() for g in found.values()]), rows, row


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_gradients_are_those_of_each_batch_by_itself(method, make_trainer, monkeypatch):
    alone, calls, row = run(make_trainer, monkeypatch, 1, method=method, seed=1)
    assert float(alone.norm()) > 0
    found, joint, other = run(make_trainer, monkeypatch, 2, method=method, seed=1)
    assert float((found - alone).norm() / alone.norm()) < 1e-9
    assert sum(joint) == sum(calls)  # as much work, in fewer calls
    assert max(joint) == 2
    assert len(joint) < len(calls)
    for name in ("reward_mean", "loss", "k"):
        assert other[name] == pytest.approx(row[name], rel=1e-9), name
    assert other["seconds_prefix"] > 0


def test_sdxl(make_trainer, monkeypatch):
    options = {"method": DRaFT(1), "pipe": "sdxl"}
    alone, calls, _ = run(make_trainer, monkeypatch, 1, **options)
    found, joint, _ = run(make_trainer, monkeypatch, 2, **options)
    assert float((found - alone).norm() / alone.norm()) < 1e-9
    assert (calls, joint) == ([1] * 6, [2] * 3)


def test_a_draw_without_such_steps_runs_batch_by_batch(make_trainer, monkeypatch):
    """AlignProp's K may be T in one training step, and less in the next."""
    method = AlignProp(k_min=STEPS - 1)
    counts = {method.common_steps(STEPS, Draws(seed, 0, ())): seed for seed in range(20)}
    assert counts.keys() == {0, 1}
    for count, seed in counts.items():
        alone, calls, _ = run(make_trainer, monkeypatch, 1, method=method, seed=seed)
        found, joint, _ = run(make_trainer, monkeypatch, 2, method=method, seed=seed)
        assert float((found - alone).norm() / alone.norm()) < 1e-9
        assert (calls, joint) == ([1, 1] * count, [2] * count)


def test_bundled_model_runs_in_bfloat16(bundled_trainer):
    trainer = bundled_trainer(
        accumulation_steps=2, rollout=RolloutConfig(prefix_batches=2), dtype="bfloat16"
    )
    row = trainer.update()
    assert row["grad_norm"] > 0
    assert row["seconds_prefix"] > 0


@pytest.fixture
def bundled_trainer(make_trainer):
    from rewardprop_fast.models import load_bundled

    def make(**config: Any) -> Any:
        return make_trainer(load_bundled(), method=DRaFT(1), batch_size=1, **config)

    return make


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"accumulation_steps": 4, "rollout": RolloutConfig(prefix_batches=3)},
            "got 3 with accumulation_steps 4",
        ),
        (
            {"accumulation_steps": 2, "rollout": RolloutConfig(prefix_batches=4)},
            "got 4 with accumulation_steps 2",
        ),
        (
            {
                "accumulation_steps": 2,
                "rollout": RolloutConfig(prefix_batches=2),
                "method": DRaFT(),
            },
            "draft with these settings begins with no step",
        ),
        (
            {"accumulation_steps": 2, "rollout": RolloutConfig(prefix_batches=2), "method": DDPO()},
            "allowed: 1",
        ),
    ],
    ids=str,
)
def test_what_cannot_be(config, words):
    config = {"method": DRaFT(1), **config}
    if isinstance(config["method"], DDPO):
        config["sampling"] = {"eta": 1.0}
    with pytest.raises(ConfigError, match=words):
        TrainConfig(**config).validate()


def test_memory_is_estimated_with_the_larger_batch(make_trainer):
    trainer = make_trainer(method=DRaFT(1), sampling={"steps": 3})
    card = find_device("rtx3090")

    def peaks(**config: Any) -> dict[str, int]:
        asked = replace(trainer.config, **config)
        dry = DryRun.of_pipeline(trainer.pipe, trainer.reward, asked)
        return estimate(dry, Plan(), card).by_phase

    small, large = peaks(batch_size=1), peaks(batch_size=2)
    joint = peaks(batch_size=1, accumulation_steps=2, rollout=RolloutConfig(prefix_batches=2))
    assert small["prefix"] < large["prefix"]
    assert joint["prefix"] == large["prefix"]
    waiting = 4 * 8 * 8 * 4  # latents of the batch whose turn comes, float32
    assert joint["suffix"] == pytest.approx(small["suffix"] + waiting, abs=2 * waiting)
    assert joint["suffix"] < large["suffix"]
