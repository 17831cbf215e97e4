"""GroupNorm and SiLU on some rows of an image whose statistics are known.

Shape legend: B images, C channels, G groups, N numbers in a group.

    a = x_hat gamma + beta,  x_hat = (x - mean) rstd,  z = a sigmoid(a)

    da = dz sigmoid(a) (1 + a (1 - sigmoid(a)))
    dx = rstd (gamma da - (sum(gamma da) + x_hat sum(gamma da x_hat)) / N)

Both sums go over a group in the whole image. (Forward: Wu & He 2018, arXiv 1803.08494; backward is
its derivative.) For each channel a is affine in x, and dx in x and da; and gamma x_hat is a - beta,
so that sums of da and of da a are all that is needed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

#: Numbers that are worked on at once: what is computed is float32, twice as large as the images.
_ELEMENTS = 2**21


class BandedNorm:
    """One normalisation with its SiLU; all arithmetic in float32 (float64 for float64).

    Args:
        norm: its weights, frozen.
        mean, rstd: (B, G), of the whole image.
        size: pixels of the whole image, H W.
    """

    def __init__(self, norm: nn.GroupNorm, mean: Tensor, rstd: Tensor, size: int) -> None:
        channels = norm.num_channels // norm.num_groups
        self._groups, self._count = norm.num_groups, channels * size
        gamma = mean.new_ones(norm.num_channels)
        self._beta = mean.new_zeros(norm.num_channels)
        if norm.weight is not None:
            gamma.copy_(norm.weight.detach())
            self._beta.copy_(norm.bias.detach())
        self._mean, self._rstd = (s.repeat_interleave(channels, dim=1) for s in (mean, rstd))
        scale_BC = self._rstd * gamma
        self._scale = _per_channel(scale_BC)
        self._shift = _per_channel(self._beta - self._mean * scale_BC)
        #: Sums of da and of da a over the rows seen so far, (2, B, C).
        shape = (2, mean.shape[0], norm.num_channels)
        self._sums = torch.zeros(shape, dtype=torch.float64, device=mean.device)
        self._gamma = gamma

    def activate(self, x: Tensor) -> Tensor:
        """z of these rows, in the dtype of x."""
        z = torch.empty_like(x)
        for rows in _chunks(x):
            z[:, :, rows] = nn.functional.silu(self._affine(x[:, :, rows]), inplace=True)
        return z

    def add_sums(self, x: Tensor, dz: Tensor) -> None:
        """Count these rows in; every row of the image once before `input_gradient`."""
        for rows in _chunks(x):
            a = self._affine(x[:, :, rows])
            da = torch.ops.aten.silu_backward(dz[:, :, rows].to(a.dtype), a)
            self._sums[0] += da.sum((2, 3))
            self._sums[1] += da.mul_(a).sum((2, 3))

    def input_gradient(self, x: Tensor, dz: Tensor, plus: Tensor | None = None) -> Tensor:
        """dx of these rows, in the dtype of x; with ``plus`` added before it is rounded."""
        slope, offset = self._affine_in_x()
        dx = torch.empty_like(x)
        for rows in _chunks(x):
            a = self._affine(x[:, :, rows])
            da = torch.ops.aten.silu_backward(dz[:, :, rows].to(a.dtype), a)
            result = torch.addcmul(offset, x[:, :, rows], slope, out=a).addcmul_(da, self._scale)
            if plus is not None:
                result += plus[:, :, rows]
            dx[:, :, rows] = result
        return dx

    def _affine(self, x: Tensor) -> Tensor:
        """a."""
        return torch.addcmul(self._shift, x, self._scale)

    def _affine_in_x(self) -> tuple[Tensor, Tensor]:
        """Of dx = scale da + slope x + offset: slope and offset, (B, C, 1, 1)."""
        of_da, of_da_a = self._sums
        weighted = torch.stack((self._gamma * of_da, of_da_a - self._beta * of_da))
        grouped = weighted.unflatten(-1, (self._groups, -1))
        means = (grouped.sum(-1, keepdim=True) / self._count).expand_as(grouped).flatten(-2)
        constant, of_x_hat = means
        slope = -self._rstd.double().square() * of_x_hat
        offset = -self._rstd * constant - slope * self._mean
        return _per_channel(slope.to(self._mean.dtype)), _per_channel(offset.to(self._mean.dtype))


def _per_channel(values_BC: Tensor) -> Tensor:
    return values_BC[:, :, None, None]


def _chunks(x: Tensor) -> Iterator[slice]:
    rows = max(1, _ELEMENTS * x.shape[2] // max(1, x.numel()))
    for first in range(0, x.shape[2], rows):
        yield slice(first, first + rows)
