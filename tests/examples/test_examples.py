"""The examples and the quick benchmark run as they are given, on the model that ships."""

from __future__ import annotations

import json
import math
import re
import runpy
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline

import rewardprop_fast as rpf
from benchmarks import quick
from rewardprop_fast.rewards.base import probe

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def example(name: str) -> dict:
    return runpy.run_path(str(EXAMPLES / name))


def test_accelerate_in_own_loop_learns_saves_and_goes_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = example("accelerate_in_own_loop.py")["main"](steps=8, output=tmp_path)
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    printed = capsys.readouterr().out
    swapped = sum(map(int, re.findall(r"^(\d+) x ", printed, re.MULTILINE)))
    assert f"restored {swapped} modules" in printed
    assert float(printed.split("but for ")[1]) < 1e-4
    pipe = rpf.models.load_bundled()
    assert isinstance(pipe, StableDiffusionPipeline)
    pipe.load_lora_weights(tmp_path)  # an ordinary LoRA, on a plain pipeline
    assert any("lora_B" in name for name in pipe.unet.state_dict())


def test_compiled_operators_are_one_graph_that_learns() -> None:
    main = example("compiled_operators.py")["main"]
    losses, difference = main(steps=10, backend="aot_eager")
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert difference < 1e-5


def test_own_loop_prints_what_it_returns(capsys: pytest.CaptureFixture[str]) -> None:
    before, after = example("own_loop.py")["main"](steps=1)
    assert math.isfinite(before)
    assert after != before
    assert f"{before:.3f} before, {after:.3f} after" in capsys.readouterr().out


def test_own_reward_is_a_reward_that_can_be_trained_on() -> None:
    probe(example("own_reward.py")["warmth"], 64, 64)


def test_quick_benchmark_measures_every_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "quick.json"
    options = "--repeats 1 --batch-size 1 --sampling-steps 5 --dtypes float32 --output"
    monkeypatch.setattr("sys.argv", ["quick", *options.split(), str(output)])
    quick.main()
    rows = json.loads(output.read_text(encoding="utf-8"))["rows"]
    assert [row["method"] for row in rows] == list(quick.METHODS)
    assert all(row["seconds_min"] > 0 for row in rows)
    printed = capsys.readouterr().out
    assert all(method in printed for method in quick.METHODS), "names are not cut in a log"
