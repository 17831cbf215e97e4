"""A run from the outside: what it writes, when it stops, what it refuses."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import rewardprop_fast as rpf
from rewardprop_fast.errors import ConfigError, ModelError, NonFiniteError, RewardError
from rewardprop_fast.methods import AlignProp, DRaFT, DRaFTLV
from rewardprop_fast.training import checkpoint
from rewardprop_fast.training.config import LoRAConfig, OptimizerConfig, RunConfig
from rewardprop_fast.training.report import read_metrics

METRICS = {
    "step", "reward_mean", "reward_std", "heldout_mean", "loss", "grad_norm", "learning_rate",
    "diversity", "drift", "seconds", "seconds_prefix", "seconds_suffix", "seconds_decode",
    "seconds_reward", "seconds_decode_backward", "seconds_backward", "seconds_update",
    "peak_memory_bytes", "k",
}  # fmt: skip
SUMMARY = {
    "reward_before", "reward_after", "heldout_before", "heldout_after", "steps", "seconds",
    "seconds_per_step", "peak_memory_bytes", "device", "dtype", "versions", "method", "reward",
    "seed", "prompts",
}  # fmt: skip


def brightness(images, prompts, metadata):
    return images.flatten(1).mean(1)


def redness(images, prompts, metadata):
    return images[:, 0].flatten(1).mean(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("finished") / "run"


@pytest.fixture
def finished(folder, make_trainer) -> tuple[Path, dict[str, Any]]:
    """A run towards brighter images with everything switched on; made once."""
    if not folder.exists():
        trainer = make_trainer(
            reward=brightness,
            prompts=["a dog", "a boat", "a tree"],
            directory=folder,
            trainer={"heldout_reward": redness},
            output={"checkpoint_every": 2, "keep_checkpoints": 1, "images_every": 2},
            optimizer=OptimizerConfig(learning_rate=0.02),
            method=DRaFT(k=1),
            steps=5,
        )
        result = trainer.train()
        assert (result.step, result.exit_code, result.directory) == (5, 0, folder)
        assert json.loads((folder / "summary.json").read_text()).keys() >= SUMMARY
        assert result.summary.keys() >= SUMMARY
    return folder, json.loads((folder / "summary.json").read_text())


def test_a_run_writes_what_the_contract_lists(finished):
    folder, _ = finished
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert files == {
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
        "report.html",
        "curves.png",
        "before_after.png",
        "images/step_000000.png",
        "images/step_000002.png",
        "images/step_000004.png",
        "images/step_000005.png",
        "lora/pytorch_lora_weights.safetensors",
        "lora/lora_kohya.safetensors",
        *(
            f"checkpoints/step_000005/{name}"
            for name in ("lora.safetensors", "optimizer.safetensors", "state.json", "manifest.json")
        ),
    }
    for picture in folder.rglob("*.png"):
        assert Image.open(picture).convert("L").getextrema() != (0, 0)
    assert "data:image/" in (folder / "report.html").read_text()


def test_metrics_have_every_key_and_numbers_that_fit_together(finished):
    rows = read_metrics(finished[0])
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    for row in rows:
        assert row.keys() >= METRICS
        assert row["loss"] == pytest.approx(-row["reward_mean"], rel=1e-5)
        assert row["learning_rate"] == 0.02
        assert row["k"] == 1
        assert row["grad_norm"] > 0
        assert 0 <= row["diversity"] <= 1
        assert 0 <= row["heldout_mean"] <= 1
        assert row["peak_memory_bytes"] > 1e6
        parts = [v for k, v in row.items() if k.startswith("seconds_")]
        assert all(v >= 0 for v in parts)
        assert 0.5 * row["seconds"] < sum(parts) <= 1.01 * row["seconds"]
    drift = [row["drift"] for row in rows]
    assert 0 < drift[0] < drift[-1]
    assert drift[1:-1] == [None, None, None]  # every tenth step, the first and the last


@pytest.mark.parametrize(
    ("every", "measured"), [(0, [1, 5]), (1, [1, 2, 3, 4, 5]), (2, [1, 2, 4, 5])]
)
def test_drift_is_measured_at_the_steps_asked_for(every, measured, make_trainer):
    trainer = make_trainer(steps=5, output={"drift_every": every})
    rows = [trainer.update() for _ in range(5)]
    assert [row["step"] for row in rows if row["drift"] is not None] == measured


def test_the_summary_says_what_happened(finished):
    summary = finished[1]
    assert summary["reward_after"] > summary["reward_before"] + 1e-3
    assert summary["heldout_after"] != summary["heldout_before"]
    assert summary["steps"] == 5
    assert summary["seconds"] > 0
    steps = [row["seconds"] for row in read_metrics(finished[0])]
    assert summary["seconds_per_step"] == pytest.approx(sum(steps) / 5)
    assert sum(steps) < summary["seconds"]  # which counts grids and checkpoints too
    assert (summary["method"], summary["reward"], summary["dtype"]) == (
        "draft", "brightness", "float32",
    )  # fmt: skip
    assert summary["prompts"] == ["a dog", "a boat"]  # those of the grid
    assert {"torch", "diffusers"} <= summary["versions"].keys()


def test_config_yaml_reads_back(finished, make_trainer, tmp_path):
    text = (finished[0] / "config.yaml").read_text()
    assert "learning_rate: 0.02" in text
    run = RunConfig.from_yaml("reward: [style]\ntrain:\n  steps: 3\n  dtype: float32\n")
    trainer = make_trainer(steps=9, trainer={"run_config": run})
    trainer.train(until=1)
    assert RunConfig.from_yaml(tmp_path / "run" / "config.yaml") == run


def test_the_saved_lora_is_the_trained_one(finished, make_trainer):
    folder = finished[0]
    trainer = make_trainer(
        reward=brightness,
        prompts=["a dog", "a boat", "a tree"],
        optimizer=OptimizerConfig(learning_rate=0.02),
        method=DRaFT(k=1),
        steps=5,
    )
    trainer.resume(folder)
    weights = load_file(folder / "lora" / "pytorch_lora_weights.safetensors")
    for name, parameter in trainer.parameters.items():
        assert torch.equal(weights[f"unet.{name}"], parameter.detach()), name


def test_an_average_is_what_is_shown_and_saved(make_trainer, tmp_path):
    settings = {
        "optimizer": OptimizerConfig(learning_rate=0.05, ema_decay=0.9),
        "method": DRaFT(k=1),
        "steps": 4,
    }
    trainer = make_trainer(**settings)
    trainer.train(until=3)
    own = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    average = {name: t.clone() for name, t in trainer.optimizer.average.items()}
    trainer.save_lora(tmp_path / "lora")
    saved = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    for name in own:
        assert torch.equal(saved[f"unet.{name}"], average[name]), name
        assert torch.equal(trainer.parameters[name], own[name]), name
    assert any(not torch.equal(own[name], average[name]) for name in own)
    kept = checkpoint.load(tmp_path / "run").tensors
    assert all(torch.equal(kept["lora"][name], own[name]) for name in own)
    assert all(torch.equal(kept["average"][name], average[name]) for name in own)
    shown = trainer.sample(["a dog"])
    for name, parameter in trainer.parameters.items():
        parameter.data.copy_(average[name])
    trainer.optimizer.average = None
    assert torch.equal(trainer.sample(["a dog"]), shown)


def test_a_target_reward_ends_the_run(make_trainer):
    trainer = make_trainer(reward=brightness, method=DRaFT(k=1), steps=50, target_reward=0.1)
    result = trainer.train()
    assert (result.step, result.exit_code) == (1, 0)
    assert result.summary["steps"] == 1
    assert (result.directory / "report.html").exists()
    assert (result.directory / "lora" / "lora_kohya.safetensors").exists()
    assert checkpoint.load(result.directory).step == 1


# --- stopping ---


class Interrupting:
    """Brightness, and at its n-th gradient call somebody presses Ctrl-C or says kill."""

    def __init__(self, number: signal.Signals, at: int) -> None:
        self.number, self.left = number, at

    def __call__(self, images, prompts, metadata):
        self.left -= images.requires_grad
        if self.left == 0:
            self.left = -1
            signal.raise_signal(self.number)
        return brightness(images, prompts, metadata)


@pytest.mark.parametrize(
    ("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"]
)
def test_a_signal_saves_at_the_end_of_its_step(number, exit_code, make_trainer, capfd):
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        # the first call is the probe before training
        trainer = make_trainer(reward=Interrupting(number, 3), method=DRaFT(k=1), steps=9)
        result = trainer.train()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, previous)
    assert (result.step, result.exit_code, result.summary) == (2, exit_code, {})
    assert checkpoint.load(result.directory).step == 2
    assert [row["step"] for row in read_metrics(result.directory)] == [1, 2]
    assert not (result.directory / "summary.json").exists()
    assert f"{number.name} received: saving" in capfd.readouterr().err


# --- what is not finite ---


class FailsAt:
    """Brightness until gradient call `at`; then its value, or only its gradient, is not finite."""

    def __init__(self, at: int, kind: str) -> None:
        self.left, self.kind = at, kind

    def __call__(self, images, prompts, metadata):
        self.left -= images.requires_grad
        value = brightness(images, prompts, metadata)
        if self.left >= 0 and not (self.left == 0 and images.requires_grad):
            return value
        if self.kind == "nan":
            return value * float("nan")
        if self.kind == "infinite":
            return value / 0
        # the derivative of sqrt at 0: finite on the way there, infinite on the way back
        return value + (images.flatten(1).mean(1) * 0).sqrt()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("nan", "The reward 'FailsAt' returned nan"),
        ("infinite", "The reward 'FailsAt' returned inf"),
        ("gradient", "The gradient's norm is nan"),
    ],
)
@pytest.mark.parametrize("method", [DRaFT(k=1), DRaFTLV(n=1)], ids=str)
def test_what_is_not_finite_stops_before_the_update(kind, words, method, make_trainer, tmp_path):
    trainer = make_trainer(
        reward=FailsAt(4, kind),
        prompts=["a dog"],
        method=method,
        steps=9,
        seed=77,
        output={"checkpoint_every": 1},
    )
    with pytest.raises(NonFiniteError, match=words) as caught:
        trainer.train()
    message = str(caught.value)
    assert "in step 3, seed 77, for the prompts ['a dog', 'a dog']" in message
    assert "weights have not been changed" in message
    assert trainer.step == 2
    kept = checkpoint.load(tmp_path / "run")
    assert kept.step == 2
    for name, parameter in trainer.parameters.items():
        assert torch.equal(kept.tensors["lora"][name], parameter.detach()), name
        assert parameter.grad is None  # so that training_step looks at a clean gradient
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2]


def test_a_loss_that_is_not_finite(make_trainer):
    trainer = make_trainer(trainer={"loss": lambda rewards: rewards.mean() / 0}, seed=3)
    with pytest.raises(NonFiniteError, match=r"The loss is -?inf in step 1, seed 9.*'a dog'"):
        trainer.training_step(["a dog"], seed=9)
    assert all(p.grad is None for p in trainer.parameters.values())


# --- refusals ---


def test_a_folder_with_another_run_is_refused(finished, make_trainer):
    folder = finished[0]
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match=r"already holds a run.*nothing there has been touched"):
        make_trainer(directory=folder).train()
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_that_cannot_be_made(make_trainer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run folder .*file/run cannot be made"):
        make_trainer(directory=tmp_path / "file" / "run").train()


def test_arguments_of_training_step(make_trainer):
    trainer = make_trainer()
    with pytest.raises(
        ConfigError, match=r"latents have shape \(1, 4, 8, 8\); expected \(2, 4, 8, 8"
    ):
        trainer.training_step(["a", "b"], torch.zeros(1, 4, 8, 8))
    with pytest.raises(ConfigError, match="got 2 prompts and 1 metadata"):
        trainer.training_step(["a", "b"], metadata=[{}])
    with pytest.raises(ConfigError, match="at least one prompt"):
        trainer.training_step([])
    for draw in (trainer.training_step, trainer.sample):
        for wrong in ("a fox", 3, ["a", 3]):  # a text alone would be drawn letter by letter
            with pytest.raises(ConfigError, match="give a list of texts"):
                draw(wrong)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sampling": {"height": 20}}, r"sampling.height is 20.*multiples of 8"),
        ({"sampling": {"steps": 3}, "method": DRaFT(k=4)}, "k is 4; allowed: 1 to"),
        ({"sampling": {"steps": 3}, "method": AlignProp(k_max=4)}, "k_max 4"),
        ({"method": DRaFTLV(n=0)}, "n is 0"),
        ({"lora": LoRAConfig(target_modules=("no_such",))}, "no_such"),
    ],
)
def test_settings_are_refused_before_training(settings, words, make_trainer):
    with pytest.raises(ConfigError, match=words):
        make_trainer(**settings)


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        (lambda images, prompts, metadata: images.detach().mean((1, 2, 3)), "no gradient"),
        (lambda images, prompts, metadata: images.mean(), r"shape \(\) for 2 images"),
        (lambda images: images.mean((1, 2, 3)), "has the arguments"),
        (lambda images, prompts, metadata: images.mean((1, 2, 3)) / 0, "returned inf"),
        (lambda images, prompts, metadata: images.mean((1, 2, 3)).tolist(), "list"),
    ],
    ids=["no gradient", "wrong shape", "wrong arguments", "not finite", "no tensor"],
)
def test_rewards_are_refused_before_training(reward, words, make_trainer, pipeline):
    pipe = pipeline()
    with pytest.raises(RewardError, match=words):
        make_trainer(pipe, reward=reward)
    make_trainer(pipe)  # and the pipeline is still good for another try


def test_a_held_out_reward_is_tried_before_training_and_needs_no_gradient(make_trainer, tmp_path):
    wrong = {"heldout_reward": lambda images, prompts, metadata: images.mean()}
    with pytest.raises(RewardError, match=r"shape \(\) for 2 images"):
        make_trainer(trainer=wrong)
    assert not (tmp_path / "run").exists()
    make_trainer(trainer={"heldout_reward": lambda x, *_: (x > 0.5).float().mean((1, 2, 3))})


def test_pipelines_are_refused_before_training(make_trainer, pipeline):
    pipe = pipeline()
    pipe.scheduler = type(pipe.scheduler)(clip_sample=True)
    with pytest.raises(ModelError, match="clip_sample"):
        make_trainer(pipe)
    pipe.scheduler = type(pipe.scheduler)(clip_sample=False, set_alpha_to_one=False, steps_offset=0)
    with pytest.raises(ModelError, match="no gradient would come from it"):
        make_trainer(pipe)
    with pytest.raises(ModelError, match="object has no unet"):
        make_trainer(object())
    trained = pipeline()
    make_trainer(trained)
    with pytest.raises(ConfigError, match="already has the adapter"):
        make_trainer(trained)


def test_runs_on_the_operators_unless_told_otherwise(make_trainer, pipeline):
    pipe = pipeline()
    before = [type(module) for module in pipe.vae.modules()]
    make_trainer(pipe)
    assert [type(module) for module in pipe.vae.modules()] != before
    plain = pipeline()
    rpf.accelerate(plain)
    make_trainer(plain, accelerate=False)
    assert [type(module) for module in plain.vae.modules()] == before
