"""Preprocessing against the models' own processors, on photographs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from rewardprop_fast.errors import ModelError
from rewardprop_fast.rewards.preprocess import CLIP_STD, Preprocess, of_processor, resize
from tests.rewards.images import (
    PHOTOGRAPHS,
    SHAPES,
    check_slope,
    crops,
    photograph,
    picture,
    to_tensor,
)

PROCESSORS = {
    "CLIP": (CLIPImageProcessorPil(), Preprocess((224, 224))),
    "CLIP 336": (
        CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=336),
        Preprocess((336, 336)),
    ),
    "BLIP": (BlipImageProcessorPil(), Preprocess((384, 384), "stretch")),
    "ViT": (
        ViTImageProcessorPil(),
        Preprocess((224, 224), "stretch", mode="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3),
    ),
    "256, then 224": (
        CLIPImageProcessorPil(size={"shortest_edge": 256}, crop_size=224),
        Preprocess((224, 224), shortest=256),
    ),
}


def grey_levels_off(name, photo, shape):
    processor, ours = PROCESSORS[name]
    image = picture(photo, shape)
    expected = processor(image, return_tensors="pt").pixel_values
    found = ours(to_tensor(image))
    assert found.shape == expected.shape
    return ((found - expected) * torch.tensor(ours.std).view(3, 1, 1) * 255).abs()


@pytest.fixture
def across_first(monkeypatch):
    """Pillow's resizing as it was before version 13, when the published models were trained."""
    resize_once = Image.Image.resize

    def resize_twice(image, size, resample=None, box=None, reducing_gap=None):
        assert box is None
        assert reducing_gap is None
        return resize_once(resize_once(image, (size[0], image.height), resample), size, resample)

    monkeypatch.setattr(Image.Image, "resize", resize_twice)


@pytest.mark.usefixtures("across_first")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("photo", PHOTOGRAPHS)
@pytest.mark.parametrize("name", PROCESSORS)
def test_it_is_the_models_own_processor_but_for_pillows_rounding(name, photo, shape):
    """Within 1.2 grey levels of 255 everywhere, 0.35 on average: Pillow rounds twice."""
    error = grey_levels_off(name, photo, shape)
    assert error.max() < 1.2
    assert error.mean() < 0.35


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("photo", PHOTOGRAPHS)
@pytest.mark.parametrize("name", PROCESSORS)
def test_pillow_13_goes_down_first_where_the_height_shrinks_much_more(name, photo, shape):
    """Which matters where a cubic overshoots and is clamped, in a tall picture that is stretched
    (python-pillow/Pillow, pull request 9549).
    """
    error = grey_levels_off(name, photo, shape)
    assert error.max() < (8 if (name, shape) == ("BLIP", "sideways") else 1.2)
    assert error.mean() < 0.35


@pytest.mark.parametrize("photo", PHOTOGRAPHS)
@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(224, 224), (37, 300), (700, 900)])
def test_resizing_is_pillows_but_for_the_rounding(photo, mode, size):
    """Pillow does not round pictures of floats: there the two are equal."""
    image = 0.2 + 0.6 * to_tensor(photograph(photo))  # so that nothing is clamped
    resample = getattr(Image.Resampling, mode.upper())
    found = resize(image, size, mode)[0]
    for channel, plane in enumerate(image[0].numpy()):
        exact = Image.fromarray(plane).resize(size[::-1], resample)
        expected = torch.from_numpy(np.array(exact))
        torch.testing.assert_close(found[channel], expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ("photo", "inner", "top", "left"),
    [
        ("grace_hopper", (191, 224), 0, 16),  # 512 x 600
        ("china", (224, 149), 37, 0),  # 640 x 427
        ("flower", (224, 149), 37, 0),
    ],
)
def test_the_whole_picture_on_black_as_hps_takes_it(photo, inner, top, left):
    """HPSv2's `image_transform(resize_longest_max=True)`, in Pillow and numpy."""
    image, (width, height) = photograph(photo), inner
    small = np.asarray(image.resize(inner, Image.Resampling.BICUBIC), dtype=np.float32)
    expected = np.zeros((224, 224, 3), dtype=np.float32)
    expected[top : top + height, left : left + width] = small / 255
    ours = Preprocess((224, 224), "fit", mean=(0.0,) * 3, std=(1.0,) * 3)(to_tensor(image))[0]
    error = (ours.permute(1, 2, 0) - torch.from_numpy(expected)).abs()
    assert error.max() < 1.2 / 255
    ours[:, top : top + height, left : left + width] = 0
    assert (ours == 0).all()


def test_where_the_middle_is_half_a_pixel_off():
    """transformers cuts 3 rows too many into 1 and 2, torchvision into 2 and 1."""
    image = torch.arange(7.0).view(1, 1, 7, 1).expand(1, 3, 7, 4) / 7
    plain = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    down = Preprocess((4, 4), **plain)(image)
    even = Preprocess((4, 4), offset="even", **plain)(image)
    assert torch.equal(down, image[..., 1:5, :])
    assert torch.equal(even, image[..., 2:6, :])


@pytest.mark.parametrize("how", ["crop", "stretch", "fit"])
def test_the_slope_is_that_of_finite_differences(how):
    ours = Preprocess((16, 16), how)
    weight = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(1)).double()
    check_slope(
        lambda images, prompts, metadata: (ours(images) * weight).sum((1, 2, 3)),
        0.1 + 0.8 * crops(1, 40)[..., :30],
        step=1e-6,
    )


def test_bf16_images_are_scaled_in_fp32():
    images = crops(1, 40).bfloat16()
    ours = Preprocess((16, 16))
    assert ours(images).dtype == torch.float32
    assert torch.equal(ours(images), ours(images.float()))
    assert ours(images.double()).dtype == torch.float64


DEFAULT = Preprocess((30, 30), offset="even")
CLIP = {
    "do_center_crop": True,
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "resample": 3,
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.4, 0.5, 0.6],
}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, DEFAULT),
        (
            CLIP,
            Preprocess((224, 224), "crop", 224, "even", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)),
        ),
        ({"size": 224, "crop_size": 224}, Preprocess((224, 224), "crop", 224, "even")),
        (
            {"size": {"shortest_edge": 256}, "crop_size": 224, "resample": 2},
            Preprocess((224, 224), "crop", 256, "even", "bilinear"),
        ),
        (
            {"size": {"shortest_edge": 224}, "crop_pct": 0.875},
            Preprocess((224, 224), "crop", 256, "even"),
        ),
        (
            {"size": {"shortest_edge": 384}, "crop_pct": 0.875},
            Preprocess((384, 384), "stretch", offset="even"),
        ),
        ({"size": {"height": 20, "width": 30}}, Preprocess((20, 30), "stretch", offset="even")),
        ({"size": 20, "do_center_crop": False}, Preprocess((20, 20), "stretch", offset="even")),
        (
            {"size": {"height": 9, "width": 9}, "do_normalize": False},
            Preprocess((9, 9), "stretch", offset="even", mean=(0.0,) * 3, std=(1.0,) * 3),
        ),
    ],
)
def test_what_a_preprocessor_config_says(config, expected):
    assert of_processor(config, DEFAULT, "r") == expected


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"do_pad": True}, "do_pad"),
        ({"resample": 0}, "resample: 0"),
        ({"do_rescale": False}, "do_rescale"),
        ({"size": {"longest_edge": 4}}, "longest_edge"),
        ({"image_mean": [0.5]}, "three channels"),
        ({"size": {"shortest_edge": 200}, "crop_size": 224}, "more than there is"),
        ({"size": {"height": 9, "width": 9}, "crop_size": 8, "do_center_crop": True}, "cuts out"),
    ],
)
def test_what_is_not_known_is_refused(config, words):
    with pytest.raises(ModelError, match=rf"'r': .*{words}"):
        of_processor(config, DEFAULT, "r")


def test_the_constants_are_clips():
    assert CLIPImageProcessorPil().image_std == CLIP_STD
