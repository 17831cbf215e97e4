"""Which attention kernels are launched, with which tiles: a fixed function of shape, dtype, device.

Tiles are chosen so that they fit into 99 KB of shared memory (compute capability 8.6 and 8.9) and
nothing spills; benchmarks/static_gpu compiles them all and checks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from rewardprop_fast.ops.attention import triton_kernels as kernels
from rewardprop_fast.ops.attention import triton_wide as wide
from rewardprop_fast.ops.attention.reference import Needed, gradients_like, token_major
from rewardprop_fast.ops.triton_runtime import launch

#: With so many keys or fewer, all of them are held at once.
_RESIDENT_KEYS = 128
#: Wider heads' dK and dV for all keys do not fit into registers, nor do those of float32.
_RESIDENT_WIDTH = 64
_RESIDENT_FORWARD_WIDTH = 160
#: So many queries share one partial dK and dV: its traffic stays a fifth of what must move anyway.
_CHUNK_ROWS = 768
#: Elements that rows are multiples of where loads take 16 bytes at a time.
_UNIT = 8
_SUM_BLOCK = 1024
_DELTA_ROWS = 32
#: Float32 heads above this width have kernels of their own, which take so many columns at a time.
_WIDE = 256
_WIDE_COLUMNS, _WIDE_KEYS_COLUMNS = 64, 32


@dataclass(frozen=True)
class Tiles:
    """M queries, N keys (0: all); warps and pipeline stages of one program."""

    m: int
    n: int
    warps: int
    stages: int


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out = token_major(q)
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    kernel, tiles, parts = _forward_form(q, k)
    across = triton.cdiv(q.shape[2], tiles.m)
    unit = _unit(q, k, v, out)
    launch(
        kernel,
        (across * q.shape[0] * q.shape[1],),
        {
            **_strided(unit, q=q, k=k, v=v, out=out),
            "lse": lse,
            "scale": scale,
            **_lengths(q, k),
            "tiles": across,
        },
        {
            **parts,
            "M": tiles.m,
            "UNIT": unit,
            "PRECISION": _precision(q),
        },
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return out, lse


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    needed: Needed,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = gradients_like(q, k, v, needed)
    if q.shape[2] == 0:
        return tuple(gradient.zero_() for gradient in grads)  # type: ignore[return-value]
    if _fits_resident_backward(q, k):
        _backward_resident(grad, q, k, v, out, lse, scale, needed, grads)
        return grads
    delta = torch.empty_like(lse)
    if needed[0] or needed[1]:
        _delta(grad, out, delta)
    if needed[1] or needed[2]:
        _grad_keys(grad, q, k, v, lse, delta, scale, needed, grads)
    if needed[0]:
        _grad_queries(grad, q, k, v, lse, delta, scale, grads[0])
    return grads


def _delta(grad: Tensor, out: Tensor, delta: Tensor) -> None:
    across = triton.cdiv(out.shape[2], _DELTA_ROWS)
    unit = _unit(grad, out)
    launch(
        kernels.delta_kernel,
        (across * out.shape[0] * out.shape[1],),
        {
            **_strided(unit, grad=grad, out=out),
            "delta": delta,
            "heads": out.shape[1],
            "queries": out.shape[2],
            "tiles": across,
        },
        {**_parts(out.shape[3]), "M": _DELTA_ROWS, "UNIT": unit},
        num_warps=4,
    )


def _grad_keys(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    scale: float,
    needed: Needed,
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    tiles = _grad_keys_tiles(q)
    across = triton.cdiv(k.shape[2], tiles.n)
    # What is not needed is not written; the kernel is given something of the same type.
    dk = grads[1] if needed[1] else k
    dv = grads[2] if needed[2] else v
    unit = _unit(q, k, v, grad, dk, dv)
    launch(
        wide.wide_grad_keys_kernel if _is_wide(q) else kernels.grad_keys_kernel,
        (across * q.shape[0] * q.shape[1],),
        {
            **_strided(unit, q=q, k=k, v=v, grad=grad, dk=dk, dv=dv),
            "lse": lse,
            "delta": delta,
            "scale": scale,
            **_lengths(q, k),
            "tiles": across,
        },
        {
            **_grad_keys_parts(q),
            "M": tiles.m,
            "N": tiles.n,
            "UNIT": unit,
            "PRECISION": _precision(q),
            "NEED_K": needed[1],
            "NEED_V": needed[2],
        },
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


def _grad_queries(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    scale: float,
    dq: Tensor,
) -> None:
    tiles = _grad_queries_tiles(q)
    across = triton.cdiv(q.shape[2], tiles.m)
    unit = _unit(q, k, v, grad, dq)
    launch(
        wide.wide_grad_queries_kernel if _is_wide(q) else kernels.grad_queries_kernel,
        (across * q.shape[0] * q.shape[1],),
        {
            **_strided(unit, q=q, k=k, v=v, grad=grad, dq=dq),
            "lse": lse,
            "delta": delta,
            "scale": scale,
            **_lengths(q, k),
            "tiles": across,
        },
        {
            **(
                {**_wide_parts(q.shape[3]), "N": tiles.n}
                if _is_wide(q)
                else {**_parts(q.shape[3]), **_tile_parts(k, tiles)}
            ),
            "M": tiles.m,
            "UNIT": unit,
            "PRECISION": _precision(q),
        },
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


def _backward_resident(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    needed: Needed,
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    tiles = _RESIDENT_BACKWARD_TILES
    batch, heads, queries, width = q.shape
    rows = _CHUNK_ROWS if needed[1] or needed[2] else tiles.m
    chunk_rows = triton.cdiv(triton.cdiv(queries, max(1, queries // rows)), tiles.m) * tiles.m
    chunks = triton.cdiv(queries, chunk_rows)
    # What is not needed is not written; the kernel is given something of the same type.
    dq = grads[0] if needed[0] else q
    dk, dv = (
        tensor[None] if not need else gradient[None] if chunks == 1 else _shares(gradient, chunks)
        for gradient, need, tensor in zip(grads[1:], needed[1:], (k, v), strict=True)
    )
    unit = _unit(q, k, v, grad, out, dq, dk, dv)
    launch(
        kernels.backward_resident_kernel,
        (chunks * batch * heads,),
        {
            **_strided(unit, q=q, k=k, v=v, grad=grad, out=out, dq=dq, dk=dk[0], dv=dv[0]),
            "dk_c": dk.stride(0) // unit,
            "dv_c": dv.stride(0) // unit,
            "lse": lse,
            "scale": scale,
            **_lengths(q, k),
            "chunks": chunks,
            "chunk_rows": chunk_rows,
        },
        {
            **_parts(width),
            "M": tiles.m,
            "N": max(16, triton.next_power_of_2(k.shape[2])),
            "UNIT": unit,
            "PRECISION": _precision(q),
            "NEED_Q": needed[0],
            "NEED_K": needed[1],
            "NEED_V": needed[2],
        },
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    if chunks == 1:
        return
    for gradient, need, share in zip(grads[1:], needed[1:], (dk, dv), strict=True):
        if need:
            launch(
                kernels.sum_chunks_kernel,
                (triton.cdiv(gradient.numel(), _SUM_BLOCK),),
                {"parts": share, "out": gradient, "count": gradient.numel(), "chunks": chunks},
                {"BLOCK": _SUM_BLOCK},
                num_warps=4,
            )


def _shares(gradient: Tensor, chunks: int) -> Tensor:
    """(chunks, B, H, Lk, D) in float32, each laid out as ``gradient`` is."""
    batch, heads, keys, width = gradient.shape
    share = gradient.new_empty((chunks, batch, keys, heads, width), dtype=torch.float32)
    return share.transpose(2, 3)


# --- arguments ---


def _strided(unit: int, **tensors: Tensor) -> dict[str, Any]:
    """Each tensor with its strides of batch, head and row, in units."""
    arguments: dict[str, Any] = {}
    for name, tensor in tensors.items():
        arguments[name] = tensor
        for letter, stride in zip("bhm", tensor.stride(), strict=False):
            arguments[f"{name}_{letter}"] = stride // unit
    return arguments


def _unit(*tensors: Tensor) -> int:
    """What all strides are multiples of, 8 or 1."""
    strides = (stride for tensor in tensors for stride in tensor.stride()[:-1])
    return _UNIT if all(stride % _UNIT == 0 for stride in strides) else 1


def _lengths(q: Tensor, k: Tensor) -> dict[str, int]:
    return {"heads": q.shape[1], "queries": q.shape[2], "keys": k.shape[2]}


def _parts(width: int) -> dict[str, int]:
    a, b = _split(width)
    return {"D": width, "A": a, "B": b}


def _wide_parts(width: int, columns: int = _WIDE_COLUMNS) -> dict[str, int]:
    return {"D": width, "W": triton.next_power_of_2(width), "C": columns}


def _grad_keys_parts(q: Tensor) -> dict[str, int]:
    """In float32 a width such as 80, split, spills with every tile; filled up it does not."""
    width = q.shape[3]
    if _is_wide(q):
        return _wide_parts(width, _WIDE_KEYS_COLUMNS)
    padded = q.dtype == torch.float32 and 64 < width <= 128
    return {"D": width, "A": 128, "B": 0} if padded else _parts(width)


def _resident_parts(k: Tensor) -> dict[str, int]:
    n, n2 = _split(k.shape[2])
    return {"N": n, "N2": n2}


def _tile_parts(k: Tensor, tiles: Tiles) -> dict[str, int]:
    return {"N": tiles.n, "EVEN": k.shape[2] % tiles.n == 0}


def _split(size: int) -> tuple[int, int]:
    """size <= a + b, powers of two of at least 16, or a alone where that is no more."""
    whole = max(16, triton.next_power_of_2(size))
    a = max(16, whole // 2)
    b = max(16, triton.next_power_of_2(max(1, size - a)))
    return (a, b) if size > a and a + b < whole else (whole, 0)


def _precision(q: Tensor) -> str:
    """float32 becomes three TF32 products, nearly exact; for the others this says nothing."""
    return "tf32x3" if q.dtype == torch.float32 else "ieee"


# --- tiles ---

#: Of the backward pass with all keys resident.
_RESIDENT_BACKWARD_TILES = Tiles(32, 0, 8, 1)


def _is_wide(q: Tensor) -> bool:
    return q.dtype == torch.float32 and q.shape[3] > _WIDE


def _forward_form(q: Tensor, k: Tensor) -> tuple[Any, Tiles, dict[str, Any]]:
    """The kernel, its tiles, and how it divides width and keys."""
    width = q.shape[3]
    if _fits_resident_forward(q, k):
        parts = {**_parts(width), **_resident_parts(k)}
        return kernels.forward_resident_kernel, _resident_forward_tiles(q), parts
    tiles = _forward_tiles(q)
    if _is_wide(q):
        return wide.wide_forward_kernel, tiles, {**_wide_parts(width), "N": tiles.n}
    return kernels.forward_kernel, tiles, {**_parts(width), **_tile_parts(k, tiles)}


def _fits_resident_forward(q: Tensor, k: Tensor) -> bool:
    widest = _RESIDENT_WIDTH if q.dtype == torch.float32 else _RESIDENT_FORWARD_WIDTH
    return k.shape[2] <= _RESIDENT_KEYS and q.shape[3] <= widest


def _fits_resident_backward(q: Tensor, k: Tensor) -> bool:
    fits = k.shape[2] <= _RESIDENT_KEYS and q.shape[3] <= _RESIDENT_WIDTH
    return fits and q.dtype != torch.float32


def _forward_tiles(q: Tensor) -> Tiles:
    width = q.shape[3]
    if q.dtype == torch.float32:
        if width <= 96:
            return Tiles(64, 32 if 48 < width <= 64 else 16, 4, 1)
        return Tiles(16, 16, 8, 1) if width <= _WIDE else Tiles(32, 16, 8, 1)
    if width <= 96:
        return Tiles(128, 64, 8, 2)
    if width <= 160:
        return Tiles(64, 32, 4, 2)
    if width <= 256:
        return Tiles(64, 64, 8, 1)
    return Tiles(32, 32, 8, 1)


def _grad_keys_tiles(q: Tensor) -> Tiles:
    width = q.shape[3]
    if q.dtype == torch.float32:
        if width <= 48:
            return Tiles(16, 32, 4, 1)
        return Tiles(32, 32, 4, 1) if width <= 64 else Tiles(16, 16, 8, 1)
    if width <= 48:
        return Tiles(64, 64, 4, 2)
    if width <= 64:
        return Tiles(16, 64, 4, 2)
    if width <= 96:
        return Tiles(32, 64, 4, 2)
    if width <= 160:
        return Tiles(16, 64, 8, 1)
    if width <= 256:
        return Tiles(32, 32, 4, 2)
    return Tiles(16, 16, 8, 1)


def _grad_queries_tiles(q: Tensor) -> Tiles:
    width = q.shape[3]
    if q.dtype == torch.float32:
        if 48 < width <= 96:
            return Tiles(32, 32 if width <= 64 else 16, 4, 1)
        return Tiles(16, 16, 4, 1) if width <= _WIDE else Tiles(32, 16, 8, 1)
    if width <= 64:
        return Tiles(64, 64, 4, 2)
    if width <= 160:
        return Tiles(64, 32, 4, 2)
    if width <= 256:
        return Tiles(64, 16, 4, 2)
    return Tiles(32, 16, 8, 2)


def _resident_forward_tiles(q: Tensor) -> Tiles:
    if q.dtype == torch.float32:
        return Tiles(32, 0, 4, 1)
    return Tiles(64, 0, 4, 1)
