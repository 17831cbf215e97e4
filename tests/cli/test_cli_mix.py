"""`rewardprop mix`, and what `rewardprop sample` does with two LoRAs or between base and LoRA."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rewardprop_fast import lora
from rewardprop_fast.models import load_bundled
from rewardprop_fast.training import lora_header
from rewardprop_fast.training.config import SamplingConfig


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two for the bundled model that can be seen."""
    made = []
    for name, seed in (("a", 1), ("b", 2)):
        pipe = load_bundled()
        parameters = lora.inject(pipe.unet, 2)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        folder = tmp_path_factory.mktemp("loras") / name
        lora.save_lora(pipe, folder)
        made.append(folder)
    return made[0], made[1]


def test_a_mix_from_the_command_line(loras, command, tmp_path):
    answer = command("mix", f"{loras[0]}:0.7", f"{loras[1]}:-0.3", "--out", tmp_path / "c")
    assert answer.code == 0, answer.err
    assert "0.7 x" in answer.out
    assert "exact, of rank 4" in answer.out
    pipe = load_bundled()
    a, b, c = (lora.read(pipe, folder) for folder in (*loras, tmp_path / "c"))
    for name, layer in c.items():
        wanted = 0.7 * a[name].up @ a[name].down - 0.3 * b[name].up @ b[name].down
        torch.testing.assert_close(layer.up @ layer.down, wanted, rtol=1e-4, atol=1e-5)
    again = command("mix", loras[0], "--out", tmp_path / "c")
    assert (again.code, "would be overwritten" in again.err) == (2, True)
    small = command("mix", loras[0], loras[1], "--rank", 2, "--out", tmp_path / "c", "--overwrite")
    assert small.code == 0, small.err
    assert "of it is lost" in small.out
    assert {layer.rank for layer in lora.read(pipe, tmp_path / "c").values()} == {2}


def test_sampling_settings_go_along_where_all_agree(loras, command, tmp_path):
    pipe, folders = load_bundled(), {}
    lora.load(pipe, loras[0])
    for name, steps in (("one", 3), ("two", 3), ("other", 4)):
        folders[name] = tmp_path / name
        header = lora_header.header(SamplingConfig(steps=steps, guidance_scale=2.0))
        lora.save_lora(pipe, folders[name], metadata=header)
    one, two, other = folders.values()
    # loras[1] says nothing
    answer = command("mix", one, two, loras[1], "--out", tmp_path / "agreed")
    assert answer.code == 0, answer.err
    assert "different" not in answer.out
    for format in ("pytorch_lora_weights", "lora_kohya"):
        file = tmp_path / "agreed" / f"{format}.safetensors"
        assert lora_header.sampling_of(file) == SamplingConfig(steps=3, guidance_scale=2.0)
    answer = command("mix", one, other, "--out", tmp_path / "torn")
    assert "different sampling settings" in answer.out
    assert lora_header.sampling_of(tmp_path / "torn") is None
    exported = command("export", tmp_path / "agreed", "--output", tmp_path / "again")
    assert exported.code == 0, exported.err
    line = ["sample", "--prompts", "a fox", "--output", tmp_path / "x.png"]
    answer = command(*line, "--lora", tmp_path / "again")
    assert "3 steps, guidance 2" in answer.out


def test_a_header_of_another_program_says_nothing(loras, tmp_path):
    pipe = load_bundled()
    lora.load(pipe, loras[0])
    for text in ("{", "[1]", '{"steps": 0}', '{"colour": 1}'):
        path = lora.save_kohya(
            pipe, tmp_path / "x.safetensors", metadata={"rewardprop.sampling": text}
        )
        assert lora_header.sampling_of(path) is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mix", "nowhere:0.5", "--out", "c"], "There is no nowhere"),
        (["mix", "nowhere:much", "--out", "c"], "weight follows a colon, such as nowhere:0.7"),
        (["sample", "--prompts", "x", "--output", "x.png", "--aig", "1"], "--aig need --lora"),
        (
            [
                "sample",
                "--prompts",
                "x",
                "--output",
                "x.png",
                "--interpolate",
                "a",
                "b",
                "--frames",
                "1",
            ],
            "--frames is 1",
        ),
        (
            ["sample", "--prompts", "x", "--output", "x.png", "--interpolate", "a", "b"],
            "There is no a",
        ),
    ],
)
def test_mistakes_are_one_error(arguments, words, command):
    answer = command(*arguments)
    assert answer.code == 2
    assert words in answer.err


def test_a_strip_from_one_lora_to_the_other(loras, command, tmp_path):
    common = ["--prompts", "a red apple", "--steps", "2", "--dtype", "float32"]
    strip, ends = tmp_path / "strip.png", []
    answer = command("sample", "--interpolate", *loras, "--frames", "3", "--output", strip, *common)
    assert answer.code == 0, answer.err
    assert "(A) to" in answer.out
    for index, folder in enumerate(loras):
        file = tmp_path / f"{index}.png"
        assert command("sample", "--lora", folder, "--output", file, *common).code == 0
        ends.append(np.asarray(Image.open(file)).astype(float))
    whole = np.asarray(Image.open(strip)).astype(float)
    margin = round(256 * 0.11)
    gap = round(256 * 0.085)

    def cell(picture, column):
        left = margin + column * (256 + gap)
        return picture[margin : margin + 256, left : left + 256]

    first, middle, last = (cell(whole, column) for column in range(3))
    assert np.abs(first - cell(ends[0], 0)).max() <= 2  # to rounding
    assert np.abs(last - cell(ends[1], 0)).max() <= 2
    assert np.abs(first - last).mean() > 5
    assert min(np.abs(middle - first).mean(), np.abs(middle - last).mean()) > 2


def test_annealing_is_nearer_to_the_base_model(loras, command, tmp_path):
    common = ["--prompts", "a red apple", "--steps", "4", "--dtype", "float32"]
    pictures = {}
    for name, options in {
        "base": [],
        "tuned": ["--lora", loras[0]],
        "none": ["--lora", loras[0], "--aig", "0"],
        "aig": ["--lora", loras[0], "--aig", "2"],
    }.items():
        file = tmp_path / f"{name}.png"
        assert command("sample", "--output", file, *options, *common).code == 0
        pictures[name] = np.asarray(Image.open(file)).astype(float)

    def apart(one, other):
        return np.abs(pictures[one] - pictures[other]).mean()

    assert apart("none", "tuned") == 0
    assert 0 < apart("aig", "base") < apart("tuned", "base")
