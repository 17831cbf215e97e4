"""rewards/jpeg.py against real JPEG (Pillow); its gradients against finite differences."""

from __future__ import annotations

import io
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from rewardprop_fast import rewards
from rewardprop_fast.errors import ConfigError
from rewardprop_fast.rewards import jpeg
from rewardprop_fast.rewards.jpeg_size import jpeg_bytes
from tests.rewards.images import crops

SIZES = [(64, 64), (67, 45), (34, 18), (101, 130)]


def picture(height, width, noise, seed=3):
    """A colourful smooth picture plus noise, (1, 3, H, W), exactly representable in 8 bits."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 5, 5, generator=generator)
    smooth = F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)
    noisy = smooth + noise * torch.randn(1, 3, height, width, generator=generator)
    return (255 * noisy.clamp(0, 1)).round() / 255


def real_jpeg(image, quality):
    """Pillow with 4:2:0 chroma: image (1, 3, H, W) in [0, 255], file size, quantisation tables."""
    pixels = (255 * image[0]).round().to(torch.uint8).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling=2)
    decoded = Image.open(buffer)
    array = torch.from_numpy(np.array(decoded)).permute(2, 0, 1)[None].float()
    return array, buffer.tell(), decoded.quantization


def mean_error(image, quality):
    ours = (255 * rewards.DifferentiableJPEG(quality)(image)).round()
    return (ours - real_jpeg(image, quality)[0]).abs().mean().item()


@pytest.mark.parametrize("quality", [1, 5, 24, 25, 49, 50, 51, 80, 95, 100])
def test_quantisation_tables_are_those_in_a_real_file(quality):
    tables = jpeg.quantisation_tables(quality)
    real = real_jpeg(picture(16, 16, 0.1), quality)[2]
    assert [table.flatten().tolist() for table in tables] == [list(real[0]), list(real[1])]


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("quality", [20, 50, 80, 95])
def test_round_trip_is_within_a_few_grey_levels_of_real_jpeg(height, width, quality):
    assert mean_error(picture(height, width, 0.0), quality) < 2.5
    assert mean_error(picture(height, width, 0.3), quality) < 4.0


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_structure_is_that_of_libjpeg_when_rounding_is_hard(height, width):
    """At quality 20 on smooth pictures 8-bit rounding hardly matters: the structure is compared."""
    with mock.patch.object(jpeg, "soft_round", torch.round):
        assert mean_error(picture(height, width, 0.0), 20) < 1.2


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 50), (7, 9), (16, 16), (17, 33)])
def test_any_size_keeps_its_shape_and_stays_in_range(height, width):
    out = rewards.DifferentiableJPEG(10)(picture(height, width, 0.5))
    assert out.shape == (1, 3, height, width)
    assert out.min() >= 0
    assert out.max() <= 1


def test_the_images_of_a_batch_do_not_mix():
    coder = rewards.DifferentiableJPEG(30)
    a, b = picture(40, 24, 0.1, seed=1), picture(40, 24, 0.1, seed=2)
    torch.testing.assert_close(coder(torch.cat([a, b])), torch.cat([coder(a), coder(b)]))


def test_dct_is_orthonormal_and_puts_a_flat_block_into_its_first_coefficient():
    dct = jpeg.dct_matrix(torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(dct @ dct.T, torch.eye(8, dtype=torch.float64))
    coefficients = dct @ torch.full((8, 8), 5.0, dtype=torch.float64) @ dct.T
    assert coefficients[0, 0].item() == pytest.approx(40.0)
    assert coefficients.abs().sum().item() == pytest.approx(40.0)


def test_colour_conversion_inverts_and_knows_the_primaries():
    images = picture(8, 8, 0.2).double()
    torch.testing.assert_close(jpeg.ycbcr_to_rgb(jpeg.rgb_to_ycbcr(images)), images)
    red = torch.tensor([255.0, 0.0, 0.0]).view(1, 3, 1, 1)
    pillow = Image.new("RGB", (1, 1), (255, 0, 0)).convert("YCbCr").getpixel((0, 0))
    expected = torch.tensor(pillow) - torch.tensor([0, 128, 128])
    assert (jpeg.rgb_to_ycbcr(red).flatten() - expected).abs().max() < 1  # Pillow truncates


def test_soft_round():
    x = torch.tensor([-1.4, 0.0, 0.25, 2.0, 2.5, 7.75], dtype=torch.float64, requires_grad=True)
    y = jpeg.soft_round(x)
    assert (y - x.round()).abs().max() <= 0.125
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, 3 * (x - x.round()).detach() ** 2)


def test_gradient_of_the_linear_path_by_finite_differences():
    images = picture(18, 11, 0.2).double().requires_grad_(True)
    with mock.patch.object(jpeg, "soft_round", lambda x: 0.9 * x):
        assert torch.autograd.gradcheck(rewards.DifferentiableJPEG(50), images, fast_mode=True)


@pytest.mark.parametrize("quality", [5, 50, 90])
def test_gradient_of_the_soft_rounded_rewards_by_finite_differences(quality):
    images = (0.1 + 0.8 * picture(9, 6, 0.1)).double().requires_grad_(True)
    for reward in (rewards.JPEGCompressibility(quality), rewards.JPEGIncompressibility(quality)):
        assert torch.autograd.gradcheck(
            lambda x, reward=reward: reward(x, [""], [{}]), images, eps=1e-8, atol=1e-5
        )


def test_the_two_rewards_are_opposite_and_flat_images_are_best():
    image, flat = picture(32, 32, 0.1), torch.full((1, 3, 32, 32), 0.5)
    down, up = rewards.JPEGCompressibility(80), rewards.JPEGIncompressibility(80)
    assert torch.equal(down(image, [""], [{}]), -up(image, [""], [{}]))
    assert down(image, [""], [{}]) < down(flat, [""], [{}]) <= 0


def test_value_is_the_rms_change_in_grey_levels():
    image = picture(40, 48, 0.1)
    change = 255 * (image - rewards.DifferentiableJPEG(60)(image))
    expected = change.square().mean().sqrt()
    torch.testing.assert_close(
        rewards.JPEGIncompressibility(60)(image, [""], [{}])[0], expected, atol=0.011, rtol=0
    )


def test_value_does_not_depend_on_the_resolution():
    tile = picture(32, 32, 0.1)
    reward = rewards.JPEGCompressibility(50)
    one = reward(tile, [""], [{}])
    four = reward(tile.tile(1, 1, 2, 2), [""], [{}])
    torch.testing.assert_close(one, four, rtol=0.05, atol=0)


def test_rank_correlation_with_real_file_sizes_is_strong():
    """From flat gradients to noise: smaller reward, larger file. Spearman's rho, by hand."""
    reward = rewards.JPEGCompressibility(80)
    values, sizes = [], []
    for seed in range(40):
        image = picture(64, 64, 0.02 * (seed % 8), seed)
        values.append(reward(image, [""], [{}]).item())
        sizes.append(float(real_jpeg(image, 80)[1]))
    ranks = [torch.tensor(numbers).argsort().argsort().double() for numbers in (values, sizes)]
    assert torch.corrcoef(torch.stack(ranks))[0, 1] < -0.9


@pytest.mark.parametrize("quality", [20, 80])
def test_the_gradient_asks_for_less_noise_and_for_more(quality):
    smooth = 0.2 + 0.6 * picture(48, 48, 0.0)
    noise = torch.randn(smooth.shape, generator=torch.Generator().manual_seed(0))
    for start in (0.005, 0.02, 0.1):
        amount = torch.tensor(start, requires_grad=True)
        values = rewards.JPEGCompressibility(quality)(smooth + amount * noise, [""], [{}])
        (slope,) = torch.autograd.grad(values.sum(), amount)
        assert slope < 0


def ascend(reward, image, steps=40):
    image = image.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([image], lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        (-reward(image, [""], [{}]).sum()).backward()
        optimizer.step()
        with torch.no_grad():
            image.clamp_(0, 1)
    return image.detach()


def test_free_pixels_that_ascend_incompressibility_make_a_larger_real_file():
    start = picture(48, 48, 0.05)
    after = ascend(rewards.JPEGIncompressibility(80), start)
    assert real_jpeg(after, 80)[1] > 1.3 * real_jpeg(start, 80)[1]


def test_free_pixels_that_ascend_compressibility_settle_on_what_jpeg_keeps():
    """They end where JPEG changes nothing, not at a much smaller file: see docs/rewards.md."""
    start = picture(48, 48, 0.05)
    after = ascend(rewards.JPEGCompressibility(80), start)
    change_before = (255 * start - real_jpeg(start, 80)[0]).abs().mean()
    change_after = (255 * after - real_jpeg(after, 80)[0]).abs().mean()
    assert change_after < 0.3 * change_before
    assert real_jpeg(after, 80)[1] < real_jpeg(start, 80)[1]


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_flat_images_have_a_finite_gradient(value):
    images = torch.full((1, 3, 24, 24), value, requires_grad=True)
    rewards.JPEGCompressibility(80)(images, [""], [{}]).sum().backward()
    assert torch.isfinite(images.grad).all()


def test_computes_in_fp32_for_bf16_images_under_autocast_and_after_a_cast_of_the_module():
    image = picture(32, 32, 0.05).bfloat16()
    reward = rewards.JPEGCompressibility(80)
    expected = reward(image.float(), [""], [{}])
    assert expected.dtype == torch.float32
    assert torch.equal(reward(image, [""], [{}]), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(reward(image.float(), [""], [{}]), expected)
    assert torch.equal(reward.to(torch.bfloat16)(image, [""], [{}]), expected)


@pytest.mark.parametrize("quality", [1, 50, 80, 100])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (40, 72)])
def test_both_rewards_pass_the_probe(quality, height, width):
    for reward in (rewards.JPEGCompressibility(quality), rewards.JPEGIncompressibility(quality)):
        rewards.probe(reward, height, width)
        assert not list(reward.parameters())
        assert not reward.state_dict()


@pytest.mark.parametrize("quality", [0, 101, -5, 80.0, "80", True, None])
def test_impossible_qualities_are_refused(quality):
    with pytest.raises(ConfigError, match="1 to 100"):
        rewards.JPEGCompressibility(quality)


@pytest.mark.parametrize("width", [20, 26, 50])
def test_chroma_at_the_edge_does_not_look_at_the_padding(width):
    """Halved chroma is enlarged with weights 3/4 and 1/4, the last column with its own value.

    So of the last three columns the third follows from two: c[n-1] = 1.5 x[-2] - 0.5 x[-3].
    """
    generator = torch.Generator().manual_seed(1)
    image = 0.5 + 0.1 * torch.randn(1, 3, 16, width, generator=generator, dtype=torch.float64)
    decoded = jpeg.DifferentiableJPEG(90)(image)
    assert decoded.min() > 0
    assert decoded.max() < 1  # nothing was clamped
    chroma = jpeg.rgb_to_ycbcr(decoded)[:, 1:]
    edge = 1.5 * chroma[..., -2] - 0.5 * chroma[..., -3]
    torch.testing.assert_close(chroma[..., -1], edge, rtol=0, atol=1e-12)
    assert (chroma[..., -1] - chroma[..., -2]).abs().max() > 1e-3


def rank_correlation(one, other):
    ranks = [torch.as_tensor(numbers).argsort().argsort().double() for numbers in (one, other)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


def two_hundred(size=64):
    """Squares of a photograph: as they are, blurred, with noise, and with other contrast."""
    images = crops(200, size, seed=1)
    draw = np.random.default_rng(2)
    for index, amount in enumerate(draw.random(len(images))):
        image = images[index : index + 1]
        if index % 4 == 1:
            small = F.interpolate(image, scale_factor=1 - 0.9 * amount, mode="area")
            image = F.interpolate(small, (size, size), mode="bicubic")
        elif index % 4 == 2:
            image = image + 0.1 * amount * torch.from_numpy(draw.normal(size=image.shape)).float()
        elif index % 4 == 3:
            image = 0.5 + (image - 0.5) * (0.2 + amount)
        images[index : index + 1] = image.clamp(0, 1)
    return images


def test_both_measures_rank_two_hundred_pictures_as_their_real_files_do():
    """The size at each quality and over all of them; the change, what JPEG loses, from 50 up."""
    images = two_hundred()
    empty = [""] * 200, [{}] * 200
    pooled_sizes, pooled = [], []
    for quality in (20, 50, 80, 95):
        sizes = [float(jpeg_bytes(image, quality)) for image in images]
        size = rewards.JPEGIncompressibility(quality, "size")(images, *empty)
        assert rank_correlation(size, sizes) > 0.97
        assert (size / (torch.tensor(sizes) / 1000)).log().abs().mean() < 0.1
        if quality >= 50:
            change = rewards.JPEGIncompressibility(quality)(images, *empty)
            assert rank_correlation(change, sizes) > 0.9
        pooled_sizes += sizes
        pooled += size.tolist()
    assert rank_correlation(pooled, pooled_sizes) > 0.9


def test_free_pixels_that_ascend_the_size_make_a_much_smaller_real_file():
    start = picture(48, 48, 0.05)
    after = ascend(rewards.JPEGCompressibility(80, "size"), start)
    assert jpeg_bytes(after[0], 80) < 0.75 * jpeg_bytes(start[0], 80)


def test_a_flat_picture_costs_its_average_once_a_row_of_blocks():
    """Four blocks of luma in two rows; the second of each row differs from its neighbour by 0."""
    level = 0.75
    images = torch.full((1, 3, 16, 16), level, dtype=torch.float64)
    steps = 8 * (255 * level - 128) / 16  # at quality 50 the first of the luma table is 16
    expected = (620 + 2.5 / 8 * 2 * np.log2(1 + steps)) / 1000
    size = rewards.JPEGIncompressibility(50, "size")(images, [""], [{}])
    assert size.item() == pytest.approx(expected, rel=1e-9)
