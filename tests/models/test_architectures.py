"""The published shapes: parameter counts as published, calls that fit."""

from __future__ import annotations

import pytest
import torch

from rewardprop_fast.models import architectures


@pytest.mark.parametrize(("name", "count"), [("sd15", 859_520_964), ("sdxl", 2_567_463_684)])
def test_unets_have_the_published_number_of_parameters(name: str, count: int) -> None:
    with torch.device("meta"):
        model = architectures.unet(name)
        inputs = architectures.unet_inputs(model, 2, 64, torch.float32)
        output = model(**inputs).sample
    assert sum(p.numel() for p in model.parameters()) == count
    assert output.shape == (2, 4, 64, 64)
    assert not any(p.requires_grad for p in model.parameters())


def test_the_autoencoder_too() -> None:
    with torch.device("meta"):
        model = architectures.autoencoder()
        image = model.decode(torch.zeros(1, 4, 32, 32)).sample
    assert sum(p.numel() for p in model.parameters()) == 83_653_863
    assert image.shape == (1, 3, 256, 256)
