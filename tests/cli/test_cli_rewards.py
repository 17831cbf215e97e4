"""Published reward models in a config: a run from end to end, and what is refused before one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rewardprop_fast.cli.common import build_trainer
from rewardprop_fast.memory.plan import Plan, Policy
from rewardprop_fast.training.config import RewardConfig, RunConfig
from tests.rewards.folders import clip_folder, head_file


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward_models")
    clip_folder(folder / "clip")
    head_file(folder / "head.safetensors")
    return folder


def with_rewards(config: Path, reward: list, heldout: list | None = None) -> None:
    text = yaml.safe_load(config.read_text())
    text["reward"], text["heldout_reward"] = reward, heldout or []
    text["train"]["steps"] = 2
    config.write_text(yaml.safe_dump(text))


def both(models: Path) -> list:
    clip = str(models / "clip")
    head = {"model": clip, "head": str(models / "head.safetensors")}
    return [
        {"name": "clip_score", "args": {"model": clip}},
        {"name": "aesthetic", "weight": 0.1, "args": head, "normalise": [1.5, 2.0]},
    ]


def lora_of(run: Path) -> dict[str, bytes]:
    tensors = load_file(run / "lora" / "pytorch_lora_weights.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def test_a_run_with_published_rewards_under_a_plan_that_recomputes_them(
    config: Path, models: Path, command
) -> None:
    with_rewards(config, both(models), [{"name": "jpeg_size"}])  # watched, so no gradient needed
    assert command("train", "my.yaml").code == 0
    rows = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["grad_norm"] > 0 and row["heldout_mean"] < 0 for row in rows)
    assert RunConfig.from_yaml(Path("out/config.yaml")).reward[1].normalise == (1.5, 2.0)
    plan = Plan(steps=({},), reward={"reward block": Policy.RECOMPUTE})
    Path("plan.json").write_text(plan.to_json())
    planned = command(
        "train", "my.yaml", "train.memory_budget=plan.json", "train.output.directory=planned"
    )
    assert planned.code == 0, planned.err
    assert lora_of(Path("planned")) == lora_of(Path("out"))


def test_a_run_within_a_budget_foresees_the_rewards_memory(
    config: Path, models: Path, command
) -> None:
    with_rewards(config, both(models))
    answer = command("train", "my.yaml", "train.memory_budget=1GiB", "--dry-run")
    assert answer.code == 0, answer.err


def test_a_reward_without_gradient_is_for_ddpo(config: Path, command) -> None:
    with_rewards(config, ["jpeg_size"])
    answer = command("train", "my.yaml")
    assert answer.code == 2
    assert "no gradient by nature" in " ".join(answer.err.split())
    assert "{name: ddpo}" in answer.err
    assert not Path("out").exists()
    ddpo = command("train", "my.yaml", "train.method={name: ddpo}", "train.sampling.eta=1")
    assert ddpo.code == 0, ddpo.err


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        ({"name": "clipscore"}, "Did you mean clip_score"),
        ({"name": "clip_score"}, "missing a required argument: 'model'"),
        ({"name": "clip_score", "args": {"model": "./nowhere"}}, "no folder './nowhere'"),
        ({"name": "clip_score", "args": {"model": "MODELS/head.safetensors"}}, "is a file"),
        ({"name": "pickscore", "args": {"model": 3}}, "model is 3"),
        ({"name": "detection", "args": {"model": "MODELS/clip", "query": "x"}}, "'owlvit'"),
        ({"name": "image_reward", "args": {"model": "MODELS/clip"}}, "convert-reward"),
        ({"name": "aesthetic", "args": {"model": "MODELS/clip", "head": "h.pth"}}, "is a pickle"),
        ({"name": "colour", "normalise": [1.0]}, "allowed: two numbers, [mean, std]"),
        ({"name": "colour", "normalise": [1.0, 0.0]}, "the second above 0"),
    ],
)
def test_what_is_wrong_is_said_once_and_before_anything_is_written(
    config: Path, models: Path, command, reward: dict, words: str
) -> None:
    whole = yaml.safe_load(yaml.safe_dump(reward).replace("MODELS", str(models)))
    with_rewards(config, [whole])
    answer = command("train", "my.yaml")
    said = " ".join(answer.err.split())
    assert answer.code == 2
    assert words in said
    assert said.count(words) == 1
    assert not Path("out").exists()


def test_the_networks_compute_in_the_runs_dtype(config: Path, models: Path) -> None:
    with_rewards(config, both(models), both(models)[:1])
    trainer = build_trainer(RunConfig.from_yaml(config, ["train.dtype=bfloat16"]))
    for reward in (trainer.reward, trainer.evaluator.heldout_reward):
        assert isinstance(reward, torch.nn.Module)
        assert {parameter.dtype for parameter in reward.parameters()} == {torch.bfloat16}


def test_normalise_comes_back_from_a_config() -> None:
    reward = RewardConfig(name="colour", normalise=(0, 2))
    assert RewardConfig.from_dict(reward.to_dict()) == reward
    assert RewardConfig(name="colour").normalise is None
