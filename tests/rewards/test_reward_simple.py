"""brightness, symmetry, colour and the real JPEG size: closed forms, slopes, refusals."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from rewardprop_fast import rewards
from rewardprop_fast.errors import ConfigError, RewardError
from tests.rewards.images import check_slope, crops, photograph, to_tensor


def value(name, images, **arguments):
    reward = rewards.build(name, **arguments)
    return reward(images, [""] * len(images), [{}] * len(images))


def test_brightness_is_pillows_luma():
    image = photograph()
    expected = np.asarray(image.convert("L")).mean() / 255
    assert value("brightness", to_tensor(image)).item() == pytest.approx(expected, abs=0.5 / 255)
    flat = torch.full((2, 3, 4, 4), 0.3)
    torch.testing.assert_close(value("brightness", flat, target=0.5), torch.full((2,), -0.04))


def test_symmetry_is_zero_for_a_mirrored_picture_alone():
    left = crops(2, 32)[..., :16]
    mirrored = torch.cat([left, left.flip(-1)], dim=-1)
    assert torch.equal(value("symmetry", mirrored), torch.zeros(2))
    assert (value("symmetry", mirrored, axis="top-bottom") < -1e-4).all()
    turned = mirrored.transpose(2, 3)
    assert torch.equal(value("symmetry", turned, axis="top-bottom"), torch.zeros(2))
    black_and_white = torch.cat([torch.zeros(1, 3, 4, 2), torch.ones(1, 3, 4, 2)], dim=-1)
    assert value("symmetry", black_and_white).item() == -1


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("brightness", {}),
        ("brightness", {"target": 0.9}),
        ("symmetry", {}),
        ("symmetry", {"axis": "top-bottom"}),
        ("colour", {"colour": [0.1, 0.9, 0.4]}),
        ("jpeg_compressibility", {"measure": "size"}),
        ("jpeg_incompressibility", {"measure": "size", "quality": 30}),
    ],
)
def test_the_slope_is_that_of_finite_differences(name, arguments):
    check_slope(rewards.build(name, **arguments), crops(2, 40), step=1e-6)


@pytest.mark.parametrize("name", ["brightness", "symmetry"])
def test_bf16_images_are_summed_in_fp32(name):
    images = crops(2, 64).bfloat16()
    assert value(name, images).dtype == torch.float32
    assert torch.equal(value(name, images), value(name, images.float()))


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("brightness", {"target": 1.5}, "from 0 to 1"),
        ("brightness", {"target": "high"}, "from 0 to 1"),
        ("brightness", {"target": True}, "from 0 to 1"),
        ("symmetry", {"axis": "x"}, "left-right and top-bottom"),
        ("jpeg_size", {"quality": 0}, "1 to 100"),
        ("jpeg_size", {"larger": 1}, "true or false"),
        ("jpeg_compressibility", {"measure": "bytes"}, "change and size"),
    ],
)
def test_impossible_arguments_are_refused(name, arguments, words):
    with pytest.raises(ConfigError, match=words):
        rewards.build(name, **arguments)


def test_jpeg_size_is_that_of_the_file():
    images = torch.cat([crops(1, 64), torch.full((1, 3, 64, 64), 0.5)])
    sizes = []
    for image in images:
        pixels = np.round(255 * image.permute(1, 2, 0).numpy()).astype("uint8")
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
        sizes.append(len(buffer.getvalue()) / 1000)
    assert value("jpeg_size", images).tolist() == pytest.approx([-size for size in sizes])
    assert value("jpeg_size", images, larger=True).tolist() == pytest.approx(sizes)
    assert value("jpeg_size", images.bfloat16()).dtype == torch.float32


def test_jpeg_size_is_for_ddpo():
    with pytest.raises(RewardError, match=r"'jpeg_size' has no gradient by nature.*DDPO"):
        rewards.probe(rewards.build("jpeg_size"), 32, 32)
    values = rewards.probe(rewards.build("jpeg_size"), 32, 32, needs_gradient=False)
    assert (values < 0).all()
