"""Launches of group normalisation's Triton kernels: which form, which tiles, how many slices.

All of it a fixed function of shape and dtype. Bytes moved: the whole form is at the floors, 2u
forward and 3u backward. The sliced form reads x (and the gradient) a second time, 3u and 5u where
that comes from memory and 2u and 3u where the second-level cache holds an image's slice; a group
that no program can hold leaves no other way without waiting between programs.

Shape legend: B images, P positions, C channels, G groups of D = C / G channels, S slices.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import triton
from torch import Tensor

from rewardprop_fast.ops.group_norm_silu import layout, triton_kernels
from rewardprop_fast.ops.triton_runtime import launch

#: Elements of a group that one program can hold: 32 for each thread of 16 warps, no spills.
_WHOLE = 16384
#: Elements of a tile of the sliced form: 16 for each thread of four warps.
_TILE = 2048
#: Programs that fill a GPU of about 128 multiprocessors, four on each.
_PROGRAMS = 512


@dataclass(frozen=True)
class _Plan:
    """The sizes every kernel is told, and the tiles."""

    batch_B: int
    positions_P: int
    channels_C: int
    groups_G: int
    channels_last: bool

    @property
    def sizes(self) -> dict[str, Any]:
        return {
            "positions_P": self.positions_P,
            "channels_C": self.channels_C,
            "groups_G": self.groups_G,
        }

    @property
    def width_D(self) -> int:
        return self.channels_C // self.groups_G

    # --- whole ---

    @property
    def whole_tile(self) -> tuple[int, int]:
        """(positions, channels) of a group, filled up to powers of two."""
        return _power(self.positions_P), _power(self.width_D)

    @property
    def is_whole(self) -> bool:
        offsets_fit = self.positions_P * self.channels_C < 2**31
        return prod(self.whole_tile) <= _WHOLE and offsets_fit

    @property
    def whole_warps(self) -> int:
        return min(max(prod(self.whole_tile) // 512, 1), 16)

    @property
    def whole_backward_warps(self) -> int:
        """Twice as many for wide groups of full size, which on 9.0 spill otherwise; narrow ones
        would spill with twice as many."""
        positions, channels = self.whole_tile
        return 32 if positions * channels == _WHOLE and channels >= 64 else self.whole_warps

    # --- sliced ---

    @property
    def tile(self) -> tuple[int, int]:
        """(positions, channels): long in the direction in which memory runs."""
        if not self.channels_last:
            positions = min(_power(self.positions_P), 1024, _TILE)
            return positions, min(_TILE // positions, _power(self.channels_C))
        if self.channels_C <= 32:
            channels = _power(self.channels_C)
        else:  # the widest of those that leave fewest channels idle
            channels = min(
                (32, 64, 128, 256), key=lambda n: (triton.cdiv(self.channels_C, n) * n, -n)
            )
        return _TILE // channels, channels

    @property
    def slices(self) -> tuple[int, int]:
        """(positions of a slice, slices): enough programs for the GPU, whole tiles in each."""
        positions, channels = self.tile
        others = self.batch_B * triton.cdiv(self.channels_C, channels)
        wanted = max(triton.cdiv(_PROGRAMS, max(others, 1)), 1)
        length = triton.cdiv(triton.cdiv(self.positions_P, wanted), positions) * positions
        return length, triton.cdiv(self.positions_P, length)

    @property
    def sliced_grid(self) -> tuple[int]:
        blocks = triton.cdiv(self.channels_C, self.tile[1])
        return (self.batch_B * self.slices[1] * blocks,)

    @property
    def join_tile(self) -> tuple[int, int]:
        """(slices, channels) that a joining program takes at a time."""
        channels = _power(self.width_D)
        return max(min(_power(self.slices[1]), _TILE // channels), 1), channels


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y in the layout of ``x``; mean and rstd (B, G), float32."""
    plan = _plan(x, num_groups)
    y = layout.empty_like(x)
    mean, rstd = (x.new_empty((x.shape[0], num_groups), dtype=torch.float32) for _ in range(2))
    if plan.positions_P == 0:
        return y, mean.fill_(torch.nan), rstd.fill_(torch.nan)
    groups = (plan.batch_B * num_groups,)
    tensors = {"x": x, "weight": weight, "bias": bias, "mean": mean, "rstd": rstd, "y": y}
    if plan.is_whole:
        launch(
            triton_kernels.whole_forward_kernel,
            groups,
            {**tensors, **plan.sizes, "eps": eps},
            _tiled(plan, plan.whole_tile, SILU=silu, WIDTH_D=plan.width_D),
            num_warps=plan.whole_warps,
        )
        return y, mean, rstd

    partial, slices = _partial(plan, x)
    launch(
        triton_kernels.moments_kernel,
        plan.sliced_grid,
        {
            "x": x,
            "partial": partial,
            "positions_P": plan.positions_P,
            "channels_C": plan.channels_C,
            **slices,
        },
        _tiled(plan, plan.tile),
    )
    launch(
        triton_kernels.join_moments_kernel,
        groups,
        {"partial": partial, "mean": mean, "rstd": rstd, **plan.sizes, **slices, "eps": eps},
        dict(zip(("BLOCK_S", "BLOCK_C"), plan.join_tile, strict=True)),
    )
    launch(
        triton_kernels.normalise_kernel,
        plan.sliced_grid,
        {**tensors, **plan.sizes, **slices},
        _tiled(plan, plan.tile, SILU=silu),
    )
    return y, mean, rstd


def backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    silu: bool,
    needs: tuple[bool, bool, bool],
) -> list[Tensor]:
    """The gradients that are needed, of x, weight and bias; ``grad`` in the layout of ``x``."""
    plan = _plan(x, mean.shape[1])
    grad_x = layout.empty_like(x) if needs[0] else None
    sums = None
    if needs[1] or needs[2]:
        sums = x.new_empty((2, plan.batch_B, plan.channels_C), dtype=torch.float32)
    if plan.positions_P == 0:
        sums = None if sums is None else sums.zero_()
    else:
        _input_gradient(plan, grad, x, mean, rstd, weight, bias, silu, grad_x, sums)
    gradients = [] if grad_x is None else [grad_x]
    for parameter, needed, half in ((weight, needs[1], 1), (bias, needs[2], 0)):
        if needed:
            assert sums is not None
            assert parameter is not None
            gradients.append(_parameter_gradient(plan, sums[half], parameter))
    return gradients


def _input_gradient(
    plan: _Plan,
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    silu: bool,
    grad_x: Tensor | None,
    sums: Tensor | None,
) -> None:
    """Fills grad_x and sums (2, B, C), of grad_z and of grad_z xhat; either may be None."""
    tensors = {"grad": grad, "x": x, "mean": mean, "rstd": rstd, "weight": weight, "bias": bias}
    groups = (plan.batch_B * plan.groups_G,)
    batch = {"batch_B": plan.batch_B}
    if plan.is_whole:
        launch(
            triton_kernels.whole_backward_kernel,
            groups,
            {**tensors, "grad_x": grad_x, "sums": sums, **plan.sizes, **batch},
            _tiled(plan, plan.whole_tile, SILU=silu, WIDTH_D=plan.width_D),
            num_warps=plan.whole_backward_warps,
        )
        return

    partial, slices = _partial(plan, x)
    group_means = x.new_empty((plan.batch_B, plan.groups_G, 2), dtype=torch.float32)
    launch(
        triton_kernels.sums_kernel,
        plan.sliced_grid,
        {**tensors, "partial": partial, **plan.sizes, **slices},
        _tiled(plan, plan.tile, SILU=silu),
        num_warps=8 if x.dtype == torch.float32 else 4,
    )
    launch(
        triton_kernels.join_sums_kernel,
        groups,
        {
            "partial": partial,
            "weight": weight,
            "group_means": group_means,
            "sums": sums,
            **plan.sizes,
            "slices_S": slices["slices_S"],
            **batch,
        },
        dict(zip(("BLOCK_S", "BLOCK_C"), plan.join_tile, strict=True)),
    )
    if grad_x is not None:
        launch(
            triton_kernels.input_gradient_kernel,
            plan.sliced_grid,
            {**tensors, "group_means": group_means, "grad_x": grad_x, **plan.sizes, **slices},
            _tiled(plan, plan.tile, SILU=silu),
            # The compiler aims at more programs at once than fit, and spills, with four warps, and
            # in float32 without the SiLU with eight.
            num_warps=4 if x.dtype == torch.float32 and not silu else 8,
        )


def _parameter_gradient(plan: _Plan, sums: Tensor, parameter: Tensor) -> Tensor:
    """(C,) in the parameter's dtype, of sums (B, C)."""
    gradient = torch.empty_like(parameter)
    if plan.batch_B == 0:
        return gradient.zero_()
    channels = min(_power(plan.channels_C), 128)
    launch(
        triton_kernels.parameter_gradient_kernel,
        (triton.cdiv(plan.channels_C, channels),),
        {
            "sums": sums,
            "gradient": gradient,
            "batch_B": plan.batch_B,
            "channels_C": plan.channels_C,
        },
        {"BLOCK_B": min(_power(plan.batch_B), 8), "BLOCK_C": channels},
    )
    return gradient


def _plan(x: Tensor, num_groups: int) -> _Plan:
    batch, channels, *spatial = x.shape
    return _Plan(batch, prod(spatial), channels, num_groups, layout.is_channels_last(x))


def _partial(plan: _Plan, x: Tensor) -> tuple[Tensor, dict[str, int]]:
    """Room for two numbers of each image, slice and channel; the slices as kernels are told."""
    length, count = plan.slices
    partial = x.new_empty((plan.batch_B, count, 2, plan.channels_C), dtype=torch.float32)
    return partial, {"slice_P": length, "slices_S": count}


def _tiled(plan: _Plan, tile: tuple[int, int], **others: int) -> dict[str, Any]:
    """The compile-time constants of a kernel that walks tiles."""
    constexprs = {"CHANNELS_LAST": plan.channels_last, **others}
    return {**constexprs, "BLOCK_P": tile[0], "BLOCK_C": tile[1]}


def _power(size: int) -> int:
    return int(triton.next_power_of_2(max(size, 1)))
