"""GEGLU in Triton: every element is read and written once, in tiles of rows and columns.

Shape legend: M rows, N the width of hidden and of gate; x and its gradient (M, 2N), out (M, N).
"""

# mypy: disable-error-code="no-untyped-def"
# Parameters of kernels are Triton's own: pointers, numbers, compile-time constants.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rewardprop_fast.ops.geglu.compiled import rows
from rewardprop_fast.ops.triton_runtime import launch

#: Elements of a tile: eight for each thread of four warps.
_TILE = 1024


@triton.jit
def _tile(rows_M, width_N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Offsets into out and into hidden, and which of them exist."""
    columns = tl.cdiv(width_N, BLOCK_N)
    tile = tl.program_id(0)
    row = (tile // columns).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    column = (tile % columns) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    return row * width_N + column, row * 2 * width_N + column, (row < rows_M) & (column < width_N)


@triton.jit
def _cdf(x):
    return 0.5 + 0.5 * tl.math.erf(x * 0.7071067811865476)


@triton.jit
def forward_kernel(x, out, rows_M, width_N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    at, packed, inside = _tile(rows_M, width_N, BLOCK_M, BLOCK_N)
    hidden = tl.load(x + packed, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x + packed + width_N, mask=inside, other=0.0).to(tl.float32)
    result = hidden * (gate * _cdf(gate))
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(grad, x, grad_x, rows_M, width_N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    at, packed, inside = _tile(rows_M, width_N, BLOCK_M, BLOCK_N)
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    hidden = tl.load(x + packed, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x + packed + width_N, mask=inside, other=0.0).to(tl.float32)
    cdf = _cdf(gate)
    density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    grad_hidden = g * (gate * cdf)
    grad_gate = g * hidden * (cdf + gate * density)
    tl.store(grad_x + packed, grad_hidden.to(grad_x.dtype.element_ty), mask=inside)
    tl.store(grad_x + packed + width_N, grad_gate.to(grad_x.dtype.element_ty), mask=inside)


def forward(x: Tensor) -> Tensor:
    """out (..., N) from a contiguous ``x`` (..., 2N)."""
    out = x.new_empty((*x.shape[:-1], x.shape[-1] // 2))
    _launch(forward_kernel, {"x": x, "out": out}, out)
    return out


def backward(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of ``x``, packed as it is; ``grad`` and ``x`` contiguous."""
    grad_x = torch.empty_like(x)
    _launch(backward_kernel, {"grad": grad, "x": x, "grad_x": grad_x}, grad)
    return grad_x


def _launch(kernel, tensors: dict[str, Tensor], out: Tensor) -> None:
    rows_M, width_N = rows(out), out.shape[-1]
    block_m, block_n = tile_shape(width_N)
    grid = (triton.cdiv(rows_M, block_m) * triton.cdiv(width_N, block_n),)
    launch(
        kernel,
        grid,
        {**tensors, "rows_M": rows_M, "width_N": width_N},
        {"BLOCK_M": block_m, "BLOCK_N": block_n},
        num_warps=4,
    )


def tile_shape(width_N: int) -> tuple[int, int]:
    """(rows, columns) of a tile: the widest columns of those that leave least of a row idle."""
    if width_N <= 128:
        columns = triton.next_power_of_2(max(width_N, 1))
    else:
        columns = min((128, 256, 512, 1024), key=lambda n: (triton.cdiv(width_N, n) * n, -n))
    return _TILE // columns, columns
