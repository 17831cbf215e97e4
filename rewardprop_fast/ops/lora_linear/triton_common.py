"""What the forward and the backward kernels of `lora_linear` share."""

# Triton gives a kernel's arguments their types when it compiles it.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pick(layer, first, second, third, LAYERS: tl.constexpr):
    """The layer's own tensor or number among up to three."""
    picked = first
    # Nested, so that what is not there is not looked at when this is compiled.
    if LAYERS > 1:  # noqa: SIM102
        if layer == 1:
            picked = second
    if LAYERS > 2:  # noqa: SIM102
        if layer == 2:
            picked = third
    return picked


@triton.jit
def load_tile(base, rows, columns, row_stride, column_stride, row_end, column_end):
    """A tile of a matrix, zero outside of it. One of the strides is 1 wherever this is called."""
    inside = (rows < row_end)[:, None] & (columns < column_end)[None, :]
    pointers = base + rows[:, None] * row_stride + columns[None, :] * column_stride
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def store_tile(base, rows, columns, row_stride, row_end, column_end, values):
    """The counterpart for a matrix whose columns are adjacent; rounds to its dtype."""
    inside = (rows < row_end)[:, None] & (columns < column_end)[None, :]
    pointers = base + rows[:, None] * row_stride + columns[None, :]
    tl.store(pointers, values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def from_row(base, row, stride):
    """Where a row of an activation begins. Row times width can exceed 2^31; within a tile offsets
    do not, and stay in 32 bits: that halves the registers they need."""
    return base + row.to(tl.int64) * stride


@triton.jit
def grouped(program, row_blocks, column_blocks, GROUP: tl.constexpr):
    """Order of a product's tiles in which programs that run together share rows and columns."""
    in_group = GROUP * column_blocks
    first = (program // in_group) * GROUP
    height = tl.minimum(row_blocks - first, GROUP)
    within = program % in_group
    return first + within % height, within // height
