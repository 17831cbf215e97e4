"""Differentiable JPEG, and the compressibility rewards made of it.

A baseline JPEG encoder and decoder without the (lossless) entropy coding, as libjpeg does it: YCbCr
(JFIF), 4:2:0 chroma, 8x8 DCT, the standard quantisation tables (ITU-T T.81 Annex K) scaled by
quality, and back. The one step without a useful gradient, rounding, is replaced by the cubic
approximation of Shin & Song, "JPEG-resistant Adversarial Images" (2017). That the tables are
rounded and clamped to [1, 255], and the decoded picture clamped, follows the findings of Reich et
al. (arXiv 2309.06978).

Tensor names carry shapes: B images, C channels, H rows, W columns; N, M blocks down and across.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewardprop_fast.errors import ConfigError

_BLOCK = 8
_MCU = 16  # with 4:2:0 chroma, 16 x 16 pixels hold four luma blocks and one block of each chroma

# ITU-T T.81, Annex K, tables K.1 (luminance) and K.2 (chrominance).
_LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
)


def quantisation_tables(quality: int) -> Tensor:
    """(2, 8, 8) int64: luma and chroma tables for a quality of 1 to 100, as libjpeg has them."""
    if isinstance(quality, bool) or not isinstance(quality, int) or not 1 <= quality <= 100:
        raise ConfigError(f"JPEG quality must be a whole number from 1 to 100, got {quality!r}.")
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    base = torch.tensor([_LUMINANCE, _CHROMINANCE])
    return ((base * scale + 50) // 100).clamp(1, 255)


def soft_round(x: Tensor) -> Tensor:
    """round(x) + (x - round(x))^3: within 1/8 of rounding, with the slope 3 (x - round(x))^2."""
    nearest = x.detach().round()
    return nearest + (x - nearest) ** 3


def rgb_to_ycbcr(rgb_BCHW: Tensor) -> Tensor:
    """JFIF's full-range YCbCr; any scale of the input, chroma centred at 0 instead of 128."""
    red, green, blue = rgb_BCHW.unbind(dim=1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    return torch.stack([luma, (blue - luma) / 1.772, (red - luma) / 1.402], dim=1)


def ycbcr_to_rgb(ycbcr_BCHW: Tensor) -> Tensor:
    """The exact inverse of `rgb_to_ycbcr`."""
    luma, cb, cr = ycbcr_BCHW.unbind(dim=1)
    red = luma + 1.402 * cr
    blue = luma + 1.772 * cb
    green = (luma - 0.299 * red - 0.114 * blue) / 0.587
    return torch.stack([red, green, blue], dim=1)


def dct_matrix(like: Tensor) -> Tensor:
    """The orthonormal 8-point DCT-II as a matrix (8, 8), in the dtype and device of ``like``."""
    position = torch.arange(_BLOCK, device=like.device, dtype=like.dtype)
    matrix = torch.cos(math.pi / _BLOCK * torch.outer(position, position + 0.5)) * 0.5
    return torch.cat([matrix[:1] * math.sqrt(0.5), matrix[1:]])


def _dct_blocks(plane_BCHW: Tensor) -> Tensor:
    """DCT coefficients (B, C, H/8, W/8, 8, 8) of planes whose sides are multiples of 8."""
    B, C, H, W = plane_BCHW.shape
    dct = dct_matrix(plane_BCHW)
    rows_of_blocks = plane_BCHW.reshape(B, C, H // _BLOCK, _BLOCK, W // _BLOCK, _BLOCK)
    return dct @ rows_of_blocks.transpose(3, 4) @ dct.T


def quantise_blocks(plane_BCHW: Tensor, table: Tensor) -> Tensor:
    """DCT, soft quantisation and inverse DCT of planes whose sides are multiples of 8."""
    B, C, H, W = plane_BCHW.shape
    dct = dct_matrix(plane_BCHW)
    step = table.to(plane_BCHW)
    coefficients = _dct_blocks(plane_BCHW)
    decoded_BCNM88 = dct.T @ (soft_round(coefficients / step) * step) @ dct
    return decoded_BCNM88.transpose(3, 4).reshape(B, C, H, W)


def _fill_rows(plane_BCHW: Tensor) -> Tensor:
    return F.pad(plane_BCHW, (0, 0, 0, -plane_BCHW.shape[-2] % _BLOCK), mode="replicate")


class DifferentiableJPEG(nn.Module):
    """JPEG encoding and decoding as a differentiable function: (B, 3, H, W) in [0, 1] -> the same.

    Any height and width. Computes in fp32 (fp64 for fp64 input) whatever the images come in, and
    returns that: bf16 has 8 significant bits, so its values near white are a whole grey level
    apart, as much as JPEG at a good quality changes, and DCT coefficients of several hundred would
    be rounded before they are quantised. Differs from libjpeg by the soft rounding (up to 1/8
    quantisation step per coefficient) and by leaving out the 8-bit rounding of the YCbCr planes,
    which has no gradient and tips a coefficient to its neighbouring step now and then.
    """

    tables: Tensor

    def __init__(self, quality: int = 80) -> None:
        super().__init__()
        self.quality = quality
        # Integers, so that module.to(bfloat16) leaves them alone.
        self.register_buffer("tables", quantisation_tables(quality), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        # Autocast would take the DCT's matrix products back to half precision.
        with torch.autocast(images.device.type, enabled=False):
            return self._round_trip(images if images.dtype == torch.float64 else images.float())

    def _round_trip(self, images_BCHW: Tensor) -> Tensor:
        H, W = images_BCHW.shape[-2:]
        luma_table, chroma_table = self.tables.to(images_BCHW.device)
        # libjpeg repeats the last row and column up to whole blocks, which adds no edge to be
        # coded: columns before the chroma is halved, rows after it.
        padded = F.pad(images_BCHW, (0, -W % _MCU, 0, H % 2), mode="replicate")
        ycbcr = rgb_to_ycbcr(255 * padded)
        luma = quantise_blocks(_fill_rows(ycbcr[:, :1]) - 128, luma_table) + 128
        chroma = quantise_blocks(
            _fill_rows(F.avg_pool2d(ycbcr[:, 1:], kernel_size=2)), chroma_table
        )
        # libjpeg's "fancy upsampling" has the weights 3/4 and 1/4 in each direction: bilinear. It
        # does not look at the padding, hence the crop before it.
        chroma = chroma[..., : (H + 1) // 2, : (W + 1) // 2]
        chroma = F.interpolate(chroma, scale_factor=2, mode="bilinear", align_corners=False)
        decoded = ycbcr_to_rgb(torch.cat([luma[..., :H, :W], chroma[..., :H, :W]], dim=1))
        return (decoded / 255).clamp(0, 1)


#: What the two rewards can look at.
MEASURES = ("change", "size")


class JPEGCompressibility(nn.Module):
    """Higher for images that JPEG at ``quality`` compresses better.

    With measure "change", the reward of DRaFT (arXiv 2309.17400): minus the Euclidean distance
    between an image and its JPEG reconstruction, here divided by sqrt(3 H W), so that values do not
    depend on the resolution: an RMS change in grey levels. 0 is the maximum (flat images); at
    quality 80, smooth pictures lie near -2, heavy noise below -20.

    With measure "size", minus `estimated_kilobytes`: that ranks pictures as their files do, where
    the change ranks them by what is lost.

    Raises ConfigError unless ``quality`` is a whole number from 1 to 100, and for another measure.
    """

    name = "jpeg_compressibility"
    sign = -1

    def __init__(self, quality: int = 80, measure: str = "change") -> None:
        super().__init__()
        if measure not in MEASURES:
            raise ConfigError(f"measure is {measure!r}; allowed are {' and '.join(MEASURES)}.")
        self.measure = measure
        self.jpeg = DifferentiableJPEG(quality)

    def forward(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        if self.measure == "size":
            return self.sign * estimated_kilobytes(images, self.jpeg.quality)
        return self.sign * rms_change(images, self.jpeg(images))


class JPEGIncompressibility(JPEGCompressibility):
    """Minus `JPEGCompressibility`: higher for images that JPEG compresses worse.

    Detail and noise raise it. At least 0; grey levels, or kB with measure "size". Raises
    ConfigError as that one does.
    """

    name = "jpeg_incompressibility"
    sign = 1


def estimated_kilobytes(images_BCHW: Tensor, quality: int) -> Tensor:
    """(B,) about the size of the images' JPEG files (4:2:0), in kB of 1000 bytes; fp32 at least.

    A coefficient c that is q quantisation steps large takes Huffman coding about log2(1 + |q|) bits
    and a symbol that says so; the first of each block is coded as the difference to the block on
    its left. Summed over all coefficients, before rounding, that is proportional to the file but
    for its header. The factors were fitted to Pillow's files of photographs at qualities 20 to 95.
    """
    header_bytes, bytes_per_bit = 620.0, 2.5 / 8
    with torch.autocast(images_BCHW.device.type, enabled=False):
        images = images_BCHW if images_BCHW.dtype == torch.float64 else images_BCHW.float()
        H, W = images.shape[-2:]
        padded = F.pad(images, (0, -W % _MCU, 0, -H % _MCU), mode="replicate")
        ycbcr = rgb_to_ycbcr(255 * padded)
        planes = (ycbcr[:, :1] - 128, F.avg_pool2d(ycbcr[:, 1:], kernel_size=2))
        tables = quantisation_tables(quality).to(images.device)
        bits = sum(
            (_code_lengths(plane, table) for plane, table in zip(planes, tables, strict=True)),
            start=images.new_zeros(()),
        )
    return (header_bytes + bytes_per_bit * bits) / 1000


def _code_lengths(plane_BCHW: Tensor, table: Tensor) -> Tensor:
    """(B,) bits of all coefficients of planes whose sides are multiples of 8."""
    coefficients_BCNM88 = _dct_blocks(plane_BCHW) / table.to(plane_BCHW)
    average_BCNM = coefficients_BCNM88[..., 0, 0]
    difference = torch.cat([average_BCNM[..., :1], average_BCNM.diff(dim=-1)], dim=-1)
    # all coefficients but the first of each block, and the differences of those
    lengths = torch.log2(1 + coefficients_BCNM88.abs()).sum(dim=(1, 2, 3, 4, 5))
    first = torch.log2(1 + average_BCNM.abs()).sum(dim=(1, 2, 3))
    return lengths - first + torch.log2(1 + difference.abs()).sum(dim=(1, 2, 3))


def rms_change(before_BCHW: Tensor, after_BCHW: Tensor) -> Tensor:
    """(B,) root mean square difference of images in [0, 1], in grey levels (0 to 255).

    Shifted by a hundredth of a grey level under the root and back, because the root alone has an
    infinite slope at zero and a flat image would give a NaN gradient.
    """
    floor = 0.01
    change = 255 * (before_BCHW.to(after_BCHW.dtype) - after_BCHW)
    return (change.square().mean(dim=(1, 2, 3)) + floor**2).sqrt() - floor
