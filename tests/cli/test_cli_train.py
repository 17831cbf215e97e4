"""`rewardprop train` as a user meets it: what it writes, refuses, and leaves when stopped."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from rewardprop_fast.training.config import RunConfig

_numbers = itertools.count()


def reward_module(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> str:
    """A user's own reward `own(images, prompts, metadata)` in a file; returns its name."""
    name = f"own_reward_{next(_numbers)}"
    (folder / f"{name}.py").write_text(
        f"import os, signal, torch\ncalls = 0\ndef own(images, prompts, metadata):\n{body}\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(str(folder))
    return f"reward=['python:{name}:own']"


def lora_of(run: Path) -> dict[str, bytes]:
    tensors = load_file(run / "lora" / "pytorch_lora_weights.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def steps_of(run: Path) -> list[int]:
    return [row["step"] for row in rows_of(run)]


def rows_of(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture
def straight(finished: Path, config: Path) -> Path:
    """A run that was never stopped, in this test's working directory."""
    target = config.parent / "straight"
    shutil.copytree(finished, target)
    file = target / "config.yaml"
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace(str(finished), "straight"), encoding="utf-8")
    return target


def test_a_run_writes_everything_and_says_what_was_reached(config: Path, command) -> None:
    answer = command("train", "my.yaml", "train.optimizer.learning_rate=0.05")
    assert (answer.code, answer.err) == (0, "")
    run = config.parent / "out"
    expected = "config.yaml metrics.jsonl summary.json report.html before_after.png curves.png"
    for name in [*expected.split(), "lora", "checkpoints/step_000004", "images/step_000000.png"]:
        assert (run / name).exists(), name
    resolved = RunConfig.from_yaml(run / "config.yaml")
    assert resolved.train.optimizer.learning_rate == 0.05
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert summary["steps"] == 4
    for text in (
        "held-out reward",
        "4 steps in",
        "peak memory",
        "out/report.html",
        "out/before_after.png",
        "pipe.load_lora_weights('out/lora')",
        "float32",
        "draft (k 1)",
    ):
        assert text in answer.out, text


def test_stopped_and_resumed_twice_is_the_same_run(straight: Path, config: Path, command) -> None:
    first = command("train", config, "--until", 1)
    assert first.code == 0
    assert "rewardprop train out/config.yaml --resume" in first.out
    second = command("train", "out", "--until", 3, "--resume")
    assert second.code == 0
    third = command("train", "out", "--resume", "out/checkpoints/step_000003")
    assert third.code == 0
    assert "Going on from step 3" in third.out
    run = config.parent / "out"
    assert lora_of(run) == lora_of(straight)
    assert steps_of(run) == [1, 2, 3, 4]


def test_ctrl_c_saves_and_leaves_with_130(
    straight: Path, config: Path, command, monkeypatch
) -> None:
    # The colour reward itself, with a user at the keyboard: in the second step, after the probe
    # (1 call) and the pictures of step 0 (1 call), Ctrl-C is pressed.
    body = """\
    global calls
    calls += 1
    if calls == 4 and os.environ.get("PRESS"):
        os.kill(os.getpid(), signal.SIGINT)
    return -(images - torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1)).square().mean(dim=(1, 2, 3))"""
    own = reward_module(config.parent, monkeypatch, body)
    monkeypatch.setenv("PRESS", "1")
    stopped = command("train", config, own)
    assert stopped.code == 130
    assert "--resume" in stopped.out
    run = config.parent / "out"
    done = steps_of(run)
    assert 1 <= len(done) < 4
    assert (run / "checkpoints" / f"step_{done[-1]:06d}" / "manifest.json").exists()
    assert not (run / "summary.json").exists()

    monkeypatch.delenv("PRESS")
    assert command("train", config, own, "--resume").code == 0
    assert lora_of(run) == lora_of(straight)


def test_a_second_ctrl_c_aborts_at_once(config: Path, command, monkeypatch) -> None:
    body = """\
    global calls
    calls += 1
    if calls == 4:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    return -images.square().mean(dim=(1, 2, 3))"""
    own = reward_module(config.parent, monkeypatch, body)
    answer = command("train", config, own)
    assert answer.code == 130
    assert not list((config.parent / "out" / "checkpoints").glob("*"))


def test_sigterm_saves_and_leaves_with_143(straight: Path, config: Path, command, process) -> None:
    child = process("train", "my.yaml", "train.steps=100000", cwd=config.parent)
    run = config.parent / "out"
    deadline = time.monotonic() + 300
    while not ((run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size):
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=300)
    assert child.returncode == 143
    # a fresh process, in which every library has been imported: none of them says a word
    assert [line.split()[0] for line in err.splitlines()] == ["SIGTERM"], err
    done = steps_of(run)
    # resumed by another process, from the step-2 checkpoint if there is one, it is still that run
    resumed = command("train", config, "--resume", f"train.steps={done[-1] + 1}")
    assert resumed.code == 0
    assert steps_of(run) == list(range(1, done[-1] + 2))
    rows = {folder: rows_of(folder) for folder in (run, straight)}
    for ours, theirs in zip(rows[run], rows[straight], strict=False):
        assert ours["reward_mean"] == theirs["reward_mean"]
        assert ours["grad_norm"] == theirs["grad_norm"]


def test_all_mistakes_of_a_config_come_at_once(config: Path, command) -> None:
    answer = command(
        "train", config, "train.stepz=5", "train.lora.rank=0", "reward=[colur]", "model.path="
    )
    assert answer.code == 2
    for text in ("train.steps", "train.lora.rank", "Did you mean colour?", "model.path"):
        assert text in answer.err, text
    assert not (config.parent / "out").exists()


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["prompts={source: animls}"], "animls"),
        (["reward=[{name: colour, args: {colour: blue}}]"], "three numbers"),
        (["reward=[{name: colour, args: {color: [1, 0, 0]}}]"], "color"),
        (["reward=['python:nowhere:own']"], "nowhere"),
        (["model.path=./missing"], "There is no folder './missing'"),
        (["model.path=."], "model_index.json"),
        (["model.path=stabilityai/none"], "'stabilityai/none' is not a local folder"),
        (["train.device=cuda:7"], "train.device"),
        (["train.dtype=float16", "train.device=cpu"], "train.dtype"),
        (["train.sampling.height=17"], "multiples of"),
        (["train.method.k=9"], "train.method"),
        (["train.steps"], "key=value"),
        (["train.lora.target_modules=[nothing_like_it]"], "nothing_like_it"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(
    overrides: list[str], named: str, config: Path, command
) -> None:
    started = time.monotonic()
    answer = command("train", config, *overrides)
    assert answer.code == 2
    assert answer.err.startswith("error: ")
    assert named in answer.err
    assert "HTTP" not in answer.err
    assert not (config.parent / "out").exists()
    assert time.monotonic() - started < 60


def test_prompts_and_rewards_are_reported_together(config: Path, command) -> None:
    answer = command("train", config, "prompts={source: animls}", "reward=['python:nowhere:own']")
    assert answer.code == 2
    assert "animls" in answer.err
    assert "nowhere" in answer.err


def test_a_reward_that_cannot_train_is_refused(config: Path, command, monkeypatch) -> None:
    body = "    return torch.ones(len(prompts))"
    answer = command("train", config, reward_module(config.parent, monkeypatch, body))
    assert answer.code == 2
    assert "no gradient" in answer.err
    assert not (config.parent / "out").exists()


@pytest.mark.parametrize(
    "late",
    [
        "images.mean(dim=(1, 2, 3)) * float('nan')",  # a value
        "(images - images.detach()).square().sum(dim=(1, 2, 3)).sqrt()",  # only the gradient
    ],
)
def test_numbers_that_become_non_finite_stop_the_run_with_1(
    late: str, config: Path, command, monkeypatch
) -> None:
    body = f"""\
    global calls
    calls += 1
    return images.mean(dim=(1, 2, 3)) if calls < 5 else {late}"""
    own = reward_module(config.parent, monkeypatch, body)
    answer = command("train", config, own, "train.output.checkpoint_every=1")
    assert answer.code == 1
    assert "finite" in answer.err or "nan" in answer.err
    assert list((config.parent / "out" / "checkpoints").glob("step_*")), "the last one stands"


def test_a_folder_with_a_run_is_not_trained_over(straight: Path, config: Path, command) -> None:
    before = {path: path.stat().st_mtime_ns for path in straight.rglob("*")}
    answer = command("train", config, "train.output.directory=straight")
    assert answer.code == 2
    assert "--resume" in answer.err
    # nor may another run's checkpoint be continued into it
    assert command("train", config, "--until", 2).code == 0
    other = command("train", config, "--resume", "out", "train.output.directory=straight")
    assert other.code == 2
    assert "another run" in other.err
    assert {path: path.stat().st_mtime_ns for path in straight.rglob("*")} == before


def test_resume_refuses_what_it_cannot_continue(straight: Path, config: Path, command) -> None:
    nothing = command("train", config, "--resume")
    assert nothing.code == 1
    assert "out" in nothing.err
    changed = command("train", "straight", "--resume", "train.seed=5")
    assert changed.code == 1
    assert "seed was 0 and is 5" in changed.err
    colour = command("train", "straight", "--resume", "reward.0.args={colour: [0, 0, 1]}")
    assert colour.code == 1
    assert "reward was" in colour.err
    assert "[0, 0, 1]" in colour.err
    weights = next((straight / "checkpoints" / "step_000004").glob("lora.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    tampered = command("train", "straight", "--resume")
    assert tampered.code == 1
    assert "lora.safetensors" in tampered.err


def test_an_override_after_resume_is_not_taken_for_its_path(
    straight: Path, config: Path, command
) -> None:
    answer = command("train", "straight", "--resume", "train.steps=5")
    assert answer.code == 0
    assert steps_of(straight) == [1, 2, 3, 4, 5]


def test_a_dry_run_checks_and_prints_but_writes_nothing(config: Path, command) -> None:
    answer = command("train", config, "--dry-run", "train.steps=7")
    assert answer.code == 0
    resolved = yaml.safe_load(answer.out)
    assert resolved["train"]["steps"] == 7
    assert resolved["train"]["optimizer"]["weight_decay"] == 0.1
    assert "96 thousand" in " ".join(answer.err.split())
    assert sorted(os.listdir(config.parent)) == ["my.yaml"]
    assert command("train", config, "--dry-run", "model.path=./missing").code == 2
