"""A run whose prompts are encoded ahead is the run that encodes them when they come up."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from rewardprop_fast.models.encoders import Encoders, encoders
from rewardprop_fast.training.config import EncodingConfig, OptimizerConfig
from rewardprop_fast.training.report import read_metrics
from rewardprop_fast.training.trainer import RewardPropTrainer

TIMED = ("seconds", "peak_memory")


@pytest.fixture
def train(make_trainer, tmp_path, reward):
    def run(name: str, kind: str, **encoding: Any) -> tuple[RewardPropTrainer, list[Any]]:
        trainer = make_trainer(
            kind,
            reward=reward,
            directory=tmp_path / name,
            encoding=EncodingConfig(**encoding),
            optimizer=OptimizerConfig(learning_rate=0.05),
            steps=1,
            output={"grid_size": 1},
        )
        trainer.train()
        rows = [
            {key: value for key, value in row.items() if not key.startswith(TIMED)}
            for row in read_metrics(tmp_path / name)
        ]
        return trainer, rows

    return run


def test_the_same_run_to_the_last_bit(train, tmp_path: Path) -> None:
    _, expected = train("lazily", "sdxl", when="lazily")
    _, ahead = train("ahead", "sdxl", when="ahead", cache=str(tmp_path / "cache"))
    assert ahead == expected
    assert len(list((tmp_path / "cache").iterdir())) == 3  # prompts


def test_the_encoders_are_away_during_training(train, make_trainer, monkeypatch) -> None:
    # nothing that runs on "meta" gives a value, so a step that needs them would fail
    monkeypatch.setattr(Encoders, "come_back", lambda self: self._homes.clear())
    monkeypatch.setattr(Encoders, "REST", torch.device("meta"))
    trainer, rows = train("away", "sd", when="ahead")
    assert len(rows) == 1
    devices = {p.device.type for module in encoders(trainer.pipe) for p in module.parameters()}
    assert devices == {"meta"}
    # by itself where there is a device to leave
    trainer = make_trainer()
    for device, stay in (("cpu", True), ("cuda", False)):
        monkeypatch.setattr(trainer, "device", torch.device(device))
        assert isinstance(trainer._encoded(), nullcontext) == stay
