"""The examples run as they are given, in a few seconds."""

from __future__ import annotations

import runpy
from pathlib import Path

from diffusers import StableDiffusionPipeline

import rewardprop_fast as rpf

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_accelerate_in_own_loop_learns_and_saves(tmp_path: Path) -> None:
    main = runpy.run_path(str(EXAMPLES / "accelerate_in_own_loop.py"))["main"]
    losses = main(steps=8, output=tmp_path)
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    pipe = rpf.models.load_bundled()
    assert isinstance(pipe, StableDiffusionPipeline)
    pipe.load_lora_weights(tmp_path)  # an ordinary LoRA, on a plain pipeline
    assert any("lora_B" in name for name in pipe.unet.state_dict())
