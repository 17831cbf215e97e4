"""Tiles, warps and stages of `lora_linear`'s kernels: a fixed function of sizes and dtype.

All of them fit into 99 KB of shared memory (compute capability 8.6 and 8.9) without spills;
benchmarks/static_gpu compiles and checks them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Tiles:
    """Of the output's rows and columns and of the depth that a step of the loop goes."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


#: Row blocks that run in turn over all columns, so that their part of W stays in the cache.
GROUP = 8

#: Programs that keep the smallest of the GPUs in mind busy: an RTX 3090 has 82 multiprocessors, and
#: three quarters of them with a large tile do more than all of them with small ones.
_BUSY = 64

#: FLOPs that an RTX 3090 does while it reads one byte: 71 TFLOP/s in bfloat16, 936 GB/s.
_FLOPS_PER_BYTE = 76


def padded_rank(rank: int) -> int:
    """A power of two that tensor cores take, and no more than 64: larger ranks go in steps."""
    return min(64, max(16, 1 << (rank - 1).bit_length()))


def fuses(columns: int, rank: int, tiles: Tiles) -> bool:
    """Whether computing S (or T) in every column block beats a kernel of its own.

    A column block but the first costs 2 rank FLOPs for an element of x; a kernel of its own reads
    that element, two bytes, once more.
    """
    if rank > 64:
        return False
    return padded_rank(rank) * (cdiv(columns, tiles.columns) - 1) <= _FLOPS_PER_BYTE


def product(rows: int, columns: int, layers: int, dtype: torch.dtype) -> Tiles:
    """Of the large products. Fewer rows and columns where large tiles would leave the GPU idle."""
    if dtype == torch.float32:
        return Tiles(64, 64, 32, 4 if layers == 1 else 8, 3)
    if columns % 128 == 0 and cdiv(rows, 128) * (columns // 128) * layers >= _BUSY:
        return Tiles(128, 128, 32, 8, 4)
    if cdiv(rows, 128) * cdiv(columns, 64) * layers >= _BUSY:
        return Tiles(128, 64, 64, 4, 3)
    return Tiles(64, 64, 64, 4, 3)


def backward_product(rows: int, columns: int, dtype: torch.dtype) -> Tiles:
    """Of dX. Its fused kernel holds more at a time: 128 rows are too many for four warps."""
    tiles = product(rows, columns, 1, dtype)
    return replace(tiles, warps=8) if tiles.rows == 128 else tiles


def narrow(rows: int, rank: int, dtype: torch.dtype) -> Tiles:
    """Of the products whose width is the rank."""
    height = 128 if cdiv(rows, 128) >= _BUSY // 2 else 32
    if dtype == torch.float32:
        return Tiles(min(height, 64), padded_rank(rank), 32 if height > 32 else 16, 4, 3)
    return Tiles(height, padded_rank(rank), 64, 4 if padded_rank(rank) < 64 else 8, 4)


def outer(rows: int, dtype: torch.dtype) -> Tiles:
    """Of dA and dB: ``columns`` of the wide side, ``depth`` rows a step."""
    return Tiles(rows, 64, 32 if dtype == torch.float32 else 64, 4, 3)


def parts(rows: int, tiles: int, depth: int) -> tuple[int, int]:
    """In how many parts a sum over the rows is split, and the steps of each."""
    steps = cdiv(rows, depth)
    each = cdiv(steps, max(1, cdiv(2 * _BUSY, tiles)))
    return cdiv(steps, each), each


def partial_sums_pay(rank: int, tiles: Tiles) -> bool:
    """Whether dB comes from the same reading of dY as T, in parts written by each row block.

    These are written and read in float32: 8 rank bytes for a column of dY's block of rows, against
    2 bytes for each row if dY is read again.
    """
    return 4 * padded_rank(rank) < tiles.rows and rank <= 64


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)
