"""`rewardprop sample`: pictures with a LoRA, without, and side by side."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rewardprop_fast.cli import main

CONFIG = """\
model: {{path: {model}}}
prompts: {{list: [a cat]}}
reward: [colour]
train:
  method: {{name: draft, k: 1}}
  sampling: {{steps: 2, guidance_scale: 3}}
  batch_size: 2
  dtype: float32
  output: {{images_every: 0, grid_size: 1, tensorboard: false}}
"""


@pytest.fixture(scope="module")
def visible(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose LoRA has an effect that can be seen."""
    folder = tmp_path_factory.mktemp("visible")
    file = folder / "my.yaml"
    file.write_text(CONFIG.format(model=tiny_model), encoding="utf-8")
    changes = ["train.steps=2", "train.optimizer.learning_rate=1"]
    directory = f"train.output.directory={folder / 'run'}"
    assert main(["train", str(file), directory, *changes]) == 0
    return folder / "run"


@pytest.fixture
def run(visible: Path, config: Path) -> Path:
    shutil.copytree(visible, config.parent / "out")
    return config.parent / "out"


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file).convert("RGB")).astype(int)


def test_without_a_lora(config: Path, tiny_model: Path, command) -> None:
    line = ["sample", "--model", tiny_model, "--steps", 2, "--prompts", "a cat", "a dog"]
    answer = command(*line, "--output", "new/base.png")
    assert (answer.code, answer.err) == (0, "")
    assert "new/base.png: 2 pictures" in answer.out
    assert pixels(Path("new/base.png")).shape[1] > 512, "two pictures beside each other"
    command(*line, "--output", "again.png")
    command(*line, "--output", "other.png", "--seed", 1)
    assert (pixels(Path("again.png")) == pixels(Path("new/base.png"))).all()
    assert (pixels(Path("other.png")) != pixels(Path("new/base.png"))).any()


def test_a_run_brings_its_model_and_sampling(run: Path, tiny_model: Path, command) -> None:
    answer = command("sample", "--lora", run, "--prompts", "a cat", "--output", "tuned.png")
    assert answer.code == 0
    assert "2 steps, guidance 3" in answer.out
    command("sample", "--lora", run / "lora", "--prompts", "a cat", "--output", "folder.png")
    assert (pixels(Path("folder.png")) == pixels(Path("tuned.png"))).all()
    kohya = run / "lora" / "lora_kohya.safetensors"
    command("sample", "--lora", kohya, "--prompts", "a cat", "--output", "kohya.png")
    assert (pixels(Path("kohya.png")) == pixels(Path("tuned.png"))).all()
    shutil.copytree(run / "lora", "elsewhere")
    line = ["sample", "--lora", "elsewhere", "--model", tiny_model, "--prompts", "a cat"]
    answer = command(*line, "--output", "moved.png")
    assert "2 steps, guidance 3" in answer.out
    assert (pixels(Path("moved.png")) == pixels(Path("tuned.png"))).all()
    assert "3 steps, guidance 3" in command(*line, "--output", "x.png", "--steps", 3).out
    off = ["--strength", 0, "--output", "off.png"]
    assert command("sample", "--lora", run, "--prompts", "a cat", *off).code == 0
    assert (pixels(Path("off.png")) != pixels(Path("tuned.png"))).any()


def test_compare_shows_base_beside_tuned(run: Path, command) -> None:
    line = ["sample", "--lora", run, "--compare", "--prompts", "a cat", "a dog"]
    assert command(*line, "--output", "both.png").code == 0
    both = pixels(Path("both.png"))
    left, right = both[28:284, 28:284], both[28:284, 306:562]
    assert np.abs(left - right).max() > 0
    off = command(*line, "--strength", 0, "--output", "off.png")
    assert off.code == 0
    same = pixels(Path("off.png"))
    assert (same[28:284, 28:284] == same[28:284, 306:562]).all()
    assert (same[28:284, 28:284] == left).all()


def test_prompts_from_a_file_and_several_of_each(config: Path, tiny_model: Path, command) -> None:
    Path("p.txt").write_text("# mine\na cat\n\na dog\n", encoding="utf-8")
    line = ["sample", "--model", tiny_model, "--steps", 2, "--prompts-file", "p.txt"]
    answer = command(*line, "--count", 2, "--output", "grid.png")
    assert answer.code == 0
    assert "4 pictures" in answer.out


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--steps", "0"], "steps"),
        (["--height", "17"], "multiples of"),
        (["--lora", "my.yaml"], "safetensors"),
        (["--lora", "."], ".safetensors"),
        (["--model", "stabilityai/none"], "'stabilityai/none' is not a local folder"),
        (["--device", "tpu"], "cuda"),
    ],
)
def test_wrong_options(
    options: list[str], named: str, config: Path, tiny_model: Path, command
) -> None:
    model = [] if "--model" in options else ["--model", tiny_model]
    answer = command("sample", *model, "--prompts", "a", "--output", "a.png", *options)
    assert answer.code == 2
    assert named in answer.err
    assert not Path("a.png").exists()
