"""Triton kernels that the gates are tested with: a good one, and one for every way to be bad."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rewardprop_fast.ops import triton_runtime


@triton.jit
def matmul(
    x, w, y, M, N, K, stride_x, stride_w, stride_y,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = x w: a good kernel, a tile of y a program."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    depth = tl.arange(0, BK)
    accumulator = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        x_tile = tl.load(
            x + rows[:, None] * stride_x + (start + depth)[None, :],
            mask=(rows < M)[:, None] & (start + depth < K)[None, :],
            other=0.0,
        )
        w_tile = tl.load(
            w + (start + depth)[:, None] * stride_w + columns[None, :],
            mask=(start + depth < K)[:, None] & (columns < N)[None, :],
            other=0.0,
        )
        accumulator = tl.dot(x_tile, w_tile, accumulator, input_precision=PRECISION)
    tl.store(
        y + rows[:, None] * stride_y + columns[None, :],
        accumulator.to(y.dtype.element_ty),
        mask=(rows < M)[:, None] & (columns < N)[None, :],
    )


@triton.jit
def matmul_without_tensor_cores(x, w, y, K, stride, BM: tl.constexpr, BN: tl.constexpr):
    """The same product, a column of x times a row of w at a time."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    accumulator = tl.zeros((BM, BN), tl.float32)
    for k in range(K):
        x_column = tl.load(x + rows * stride + k).to(tl.float32)
        w_row = tl.load(w + k * stride + columns).to(tl.float32)
        accumulator += x_column[:, None] * w_row[None, :]
    tl.store(y + rows[:, None] * stride + columns[None, :], accumulator.to(y.dtype.element_ty))


@triton.jit
def twice(x, y, count, BLOCK: tl.constexpr):
    """y = x / sum(x) by blocks: reads its own block a second time."""
    block = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.sum(tl.load(x + block, mask=block < count, other=0.0).to(tl.float32))
    again = tl.load(x + block, mask=block < count, other=0.0).to(tl.float32)
    tl.store(y + block, (again / total).to(y.dtype.element_ty), mask=block < count)


@triton.jit
def one_of_five_writes(x, sums, BLOCK: tl.constexpr):
    """Five programs read a block of x each; the first of them writes something about it."""
    block = tl.program_id(0) // 5
    values = tl.load(x + block * BLOCK + tl.arange(0, BLOCK)).to(tl.float32)
    if tl.program_id(0) % 5 == 0:
        tl.store(sums + block, tl.sum(values))


def launch_matmul(
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype = torch.bfloat16,
    tile: tuple[int, int, int] = (64, 64, 32),
    num_warps: int = 4,
    num_stages: int = 3,
    precision: str = "tf32",
) -> None:
    x = torch.empty(m, k, dtype=dtype, device="meta")
    w = torch.empty(k, n, dtype=dtype, device="meta")
    y = torch.empty(m, n, dtype=dtype, device="meta")
    triton_runtime.launch(
        matmul,
        (-(-m // tile[0]), -(-n // tile[1])),
        {
            "x": x, "w": w, "y": y, "M": m, "N": n, "K": k,
            "stride_x": k, "stride_w": n, "stride_y": n,
        },
        {"BM": tile[0], "BN": tile[1], "BK": tile[2], "PRECISION": precision},
        num_warps=num_warps,
        num_stages=num_stages,
    )  # fmt: skip


def launch_without_tensor_cores(size: int) -> None:
    x, w, y = (torch.empty(size, size, dtype=torch.bfloat16, device="meta") for _ in range(3))
    triton_runtime.launch(
        matmul_without_tensor_cores,
        (size // 32, size // 32),
        {"x": x, "w": w, "y": y, "K": size, "stride": size},
        {"BM": 32, "BN": 32},
    )


def launch_twice(count: int, block: int) -> None:
    x, y = (torch.empty(count, dtype=torch.bfloat16, device="meta") for _ in range(2))
    triton_runtime.launch(
        twice, (-(-count // block),), {"x": x, "y": y, "count": count}, {"BLOCK": block}
    )


def launch_one_of_five(blocks: int, block: int) -> None:
    x = torch.empty(blocks * block, dtype=torch.bfloat16, device="meta")
    sums = torch.empty(blocks, dtype=torch.float32, device="meta")
    triton_runtime.launch(
        one_of_five_writes, (5 * blocks,), {"x": x, "sums": sums}, {"BLOCK": block}
    )
