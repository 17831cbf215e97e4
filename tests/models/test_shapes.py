"""Networks by their shapes alone, as a training step would find them loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rewardprop_fast.errors import ModelError
from rewardprop_fast.models import load_bundled
from rewardprop_fast.models.architectures import unet_inputs
from rewardprop_fast.models.random_init import tiny_stable_diffusion_xl
from rewardprop_fast.models.shapes import load_shapes


def facts(network: Any) -> list[tuple[Any, ...]]:
    return [
        (name, p.shape, p.requires_grad, p.dim() < 4 or p.is_contiguous(memory_format=LAST))
        for name, p in network.named_parameters()
    ]


def settings(scheduler: Any) -> dict[str, Any]:
    return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}


LAST = torch.channels_last


@pytest.mark.parametrize(("name", "count"), [("sd15", 859_520_964), ("sdxl", 2_567_463_684)])
def test_of_published_models(name: str, count: int) -> None:
    shapes = load_shapes(name, torch.bfloat16)
    assert sum(p.numel() for p in shapes.unet.parameters()) == count
    assert sum(p.numel() for p in shapes.vae.parameters()) == 83_653_863
    assert shapes.vae_scale_factor == 8
    for network in (shapes.unet, shapes.vae):
        assert not network.training
        assert {(p.device.type, p.dtype, p.requires_grad) for p in network.parameters()} == {
            ("meta", torch.bfloat16, False)
        }
    scheduler = shapes.scheduler.config
    assert (scheduler.beta_start, scheduler.steps_offset) == (0.00085, 1)


def as_loaded(pipe: Any) -> Any:
    """Frozen and channels last, as the trainer makes it."""
    for network in (pipe.unet, pipe.vae):
        network.requires_grad_(False).to(memory_format=torch.channels_last)
    return pipe


def test_of_the_bundled_model_and_of_a_folder(tmp_path: Path) -> None:
    sdxl = tiny_stable_diffusion_xl()
    sdxl.save_pretrained(tmp_path / "sdxl")
    for source, loaded in ((str(tmp_path / "sdxl"), sdxl), ("bundled", load_bundled())):
        loaded = as_loaded(loaded)
        found = load_shapes(source, torch.float32)
        assert facts(found.unet) == facts(loaded.unet)
        assert facts(found.vae) == facts(loaded.vae)
        assert found.vae_scale_factor == loaded.vae_scale_factor
        assert settings(found.scheduler) == settings(loaded.scheduler)
        with torch.device("meta"):
            output = found.unet(**unet_inputs(found.unet, 2, 8, torch.float32)).sample
        assert output.shape == (2, 4, 8, 8)


def test_in_the_dtype_asked_for() -> None:
    found = load_shapes("bundled", torch.bfloat16)
    for network in (found.unet, found.vae):
        assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
        assert {p.device.type for p in network.parameters()} == {"meta"}
        assert not network.training


def test_there_is_no_such_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere"):
        load_shapes(str(tmp_path / "nowhere"), torch.float32)
