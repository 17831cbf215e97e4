"""torch.nn's own layers on the operators.

Each subclasses the original and overrides forward only, so that parameters, state dict, hooks,
`isinstance` and pickling are the original's. Where its operator would not compute the same (a
weight that is trained, autocast, mixed dtypes), it runs as the original.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from rewardprop_fast import ops
from rewardprop_fast.nn.legality import is_frozen, is_plain


class FastLinear(nn.Linear):
    """A linear layer that computes no gradient of its weight."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if is_frozen(weight, bias) and is_plain(input, weight, bias):
            return ops.frozen_linear(input, weight, bias)
        return super().forward(input)


class FastConv2d(nn.Conv2d):
    """A convolution that keeps no input, with its weight packed once on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if (
            input.dim() == 4
            and self.padding_mode == "zeros"
            and not isinstance(self.padding, str)
            and is_frozen(weight, bias)
            and is_plain(input, weight, bias)
        ):
            return ops.frozen_conv2d(
                input, weight, bias, self.stride, self.padding, self.dilation, self.groups
            )
        return super().forward(input)


class FastGroupNorm(nn.GroupNorm):
    """Group normalisation that keeps its input and nothing else of its size."""

    def forward(self, input: Tensor) -> Tensor:
        if is_plain(input, self.weight, self.bias):
            return group_norm(self, input, silu=False)
        return super().forward(input)


class FastGroupNormSiLU(nn.GroupNorm):
    """Group normalisation and the SiLU after it, whose own module is an `AbsorbedSiLU` then."""

    def forward(self, input: Tensor) -> Tensor:
        if is_plain(input, self.weight, self.bias):
            return group_norm(self, input, silu=True)
        return nn.functional.silu(super().forward(input))


class AbsorbedSiLU(nn.SiLU):
    """A SiLU that the module before it has applied already."""

    def forward(self, input: Tensor) -> Tensor:
        return input


class FastDropout(nn.Dropout):
    """Dropout that does nothing at all at p = 0, where PyTorch's draws a mask in training."""

    def forward(self, input: Tensor) -> Tensor:
        return input if self.p == 0 else super().forward(input)


def group_norm(norm: nn.GroupNorm, x: Tensor, *, silu: bool) -> Tensor:
    """The module's normalisation, and a SiLU."""
    # Typed Any by torch's stubs: weight and bias are None without affine parameters.
    weight: Any = norm.weight
    bias: Any = norm.bias
    return ops.group_norm(x, norm.num_groups, weight, bias, norm.eps, silu)
