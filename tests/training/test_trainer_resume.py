"""N steps are k steps, stop, another trainer, resume, N - k steps: the same bits everywhere."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rewardprop_fast.errors import CheckpointError, ConfigError
from rewardprop_fast.methods import AlignProp, DRaFT, DRaFTLV
from rewardprop_fast.rewards import ColourReward
from rewardprop_fast.training import checkpoint
from rewardprop_fast.training.config import LoRAConfig, OptimizerConfig
from rewardprop_fast.training.report import read_metrics
from rewardprop_fast.training.report.summary import read_summary

STEPS = 5
SETTINGS: dict[str, Any] = {
    "method": DRaFTLV(n=1),
    "optimizer": OptimizerConfig(
        learning_rate=0.02, schedule="cosine", warmup_steps=2, ema_decay=0.9
    ),
    "lora": LoRAConfig(rank=2),
    "sampling": {"eta": 0.5},
    "output": {"checkpoint_every": 2, "keep_checkpoints": 9, "images_every": 0},
    "accumulation_steps": 2,
    "batch_size": 1,
    "steps": STEPS,
    "seed": 5,
}


def numbers(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock or the process decides."""
    varying = ("seconds", "peak_memory")
    return [
        {k: v for k, v in row.items() if not k.startswith(varying)} for row in read_metrics(folder)
    ]


def assert_same_run(folder: Path, wanted: Path) -> None:
    assert numbers(folder) == numbers(wanted)
    mine, theirs = checkpoint.load(folder), checkpoint.load(wanted)
    assert mine.step == theirs.step
    assert mine.tensors.keys() == theirs.tensors.keys() == {"lora", "optimizer", "average"}
    for group, tensors in theirs.tensors.items():
        assert mine.tensors[group].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(mine.tensors[group][name], tensor), (group, name)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("uninterrupted") / "run"


@pytest.fixture
def whole(uninterrupted, make_trainer) -> Path:
    """The folder of the run that was never stopped; made once."""
    if not uninterrupted.exists():
        result = make_trainer(directory=uninterrupted, **SETTINGS).train()
        assert (result.step, result.exit_code) == (STEPS, 0)
    return uninterrupted


def test_through_two_resumes(whole, make_trainer, tmp_path):
    folder = tmp_path / "run"
    stopped = make_trainer(**SETTINGS).train(until=2)
    assert (stopped.step, stopped.exit_code, stopped.summary) == (2, 0, {})
    second = make_trainer(**SETTINGS)
    assert second.resume() == 2
    assert second.train(until=3).step == 3
    third = make_trainer(**SETTINGS)
    assert third.resume(folder) == 3
    result = third.train()
    assert result.step == STEPS
    assert_same_run(folder, whole)
    for name in ("pytorch_lora_weights.safetensors", "lora_kohya.safetensors"):
        a, b = (load_file(place / "lora" / name) for place in (folder, whole))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    first, last = "images/step_000000.png", f"images/step_{STEPS:06d}.png"
    for picture in (first, last, "before_after.png"):
        assert (folder / picture).read_bytes() == (whole / picture).read_bytes()
    summary = read_summary(whole)
    for key in ("reward_before", "reward_after", "diversity_after", "steps"):
        assert result.summary[key] == summary[key]


def test_from_an_older_checkpoint_the_later_lines_go(whole, make_trainer, tmp_path):
    """As after a kill: metrics run ahead of the last checkpoint."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for step in (4, 5):
        shutil.rmtree(folder / "checkpoints" / f"step_{step:06d}")
    trainer = make_trainer(**SETTINGS)
    assert trainer.resume() == 2
    trainer.train(until=4)
    assert [row["step"] for row in read_metrics(folder)] == [1, 2, 3, 4]
    assert numbers(folder) == numbers(whole)[:4]


def test_the_same_trainer_can_go_on(whole, make_trainer, tmp_path):
    trainer = make_trainer(**SETTINGS)
    trainer.train(until=1)
    # what somebody tries in between is no part of the run
    trainer.training_step(["a dog"], seed=99)
    trainer.sample(["a dog"], seed=99)
    trainer.train(until=4)
    assert numbers(tmp_path / "run") == numbers(whole)[:4]


def test_drawn_suffixes_resume_too(make_trainer, tmp_path):
    settings = {
        "method": AlignProp(),
        "sampling": {"steps": 3},
        "batch_size": 1,
        "lora": LoRAConfig(rank=2),
        "steps": 9,
    }
    make_trainer(directory=tmp_path / "whole", **settings).train(until=5)
    make_trainer(**settings).train(until=2)
    trainer = make_trainer(**settings)
    trainer.resume()
    trainer.train(until=5)
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")
    assert len({row["k"] for row in numbers(tmp_path / "run")}) > 1


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"method": DRaFT(k=1)}, "method was .*draft_lv.* and is .*draft"),
        ({"sampling": {"eta": 0.25}}, "sampling was"),
        ({"seed": 6}, "seed was 5 and is 6"),
        ({"batch_size": 2}, "batch_size was 1 and is 2"),
        ({"prompts": ["something else"]}, "the prompts differ"),
        ({"reward": ColourReward()}, "the reward was wavy_reward and is colour"),
        (
            {
                "prompts": [
                    ("a red apple", {"wave": 5.0}),
                    ("a dog on the beach", {"wave": 2.0}),
                    ("a boat", {}),
                ]
            },
            "the prompts' metadata differ",
        ),
    ],
)
def test_other_settings_are_another_run(changed, words, whole, make_trainer):
    trainer = make_trainer(**{**SETTINGS, **changed})
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    with pytest.raises(CheckpointError, match=words):
        trainer.resume(whole)
    assert trainer.step == 0
    assert all(torch.equal(p, before[name]) for name, p in trainer.parameters.items())


def test_output_and_length_may_change(whole, make_trainer):
    longer = {**SETTINGS, "steps": STEPS + 1, "output": {"checkpoint_every": 1}}
    assert make_trainer(**longer).resume(whole) == STEPS


def test_a_checkpoint_of_another_folder_starts_a_new_one(whole, make_trainer, tmp_path):
    before = numbers(whole)
    trainer = make_trainer(directory=tmp_path / "branch", **SETTINGS)
    trainer.resume(whole / "checkpoints" / "step_000002")
    trainer.train(until=3)
    assert numbers(tmp_path / "branch") == before[2:3]
    assert numbers(whole) == before
    # a folder with a run of its own is not written over
    third = make_trainer(directory=tmp_path / "branch", **SETTINGS)
    third.resume(whole / "checkpoints" / "step_000002")
    with pytest.raises(ConfigError, match="already holds a run"):
        third.train(until=3)
    assert numbers(tmp_path / "branch") == before[2:3]


def test_nothing_to_resume(make_trainer, tmp_path):
    with pytest.raises(CheckpointError, match="There is no folder"):
        make_trainer().resume()
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        make_trainer().resume(tmp_path)
