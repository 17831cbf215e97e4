"""The trainer's `merge_lora`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rewardprop_fast.errors import CheckpointError
from rewardprop_fast.methods import DRaFT, DRaFTLV
from rewardprop_fast.training.config import RolloutConfig


def gradient(trainer: Any) -> torch.Tensor:
    trainer.training_step(["a dog", "a boat"], seed=3)
    return torch.cat([p.grad.flatten() for p in trainer.parameters.values()])


@pytest.mark.parametrize("method", [DRaFT(1), DRaFTLV(n=1)], ids=str)
def test_gradients_differ_by_the_rounding_of_the_merge(method, make_trainer):
    options = {"method": method, "trained": True, "dtype": "float64", "sampling": {"steps": 3}}
    plain = gradient(make_trainer(**options))
    merged = gradient(make_trainer(**options, rollout=RolloutConfig(merge_lora=True)))
    assert 0 < float((merged - plain).norm() / plain.norm()) < 1e-11


def test_samples_are_not_merged(make_trainer):
    """What is looked at is the adapter as it is."""
    plain, merged = (
        make_trainer(trained=True, rollout=RolloutConfig(merge_lora=m)) for m in (False, True)
    )
    assert torch.equal(plain.sample(["a dog"]), merged.sample(["a dog"]))


def test_a_run_does_not_go_on_with_it_switched(make_trainer):
    make_trainer().train(until=1)
    with pytest.raises(CheckpointError, match="merge_lora"):
        make_trainer(rollout=RolloutConfig(merge_lora=True)).resume()
    assert make_trainer(rollout=RolloutConfig(graphs="strict")).resume() == 1
