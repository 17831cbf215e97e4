"""Which kernels of `lora_linear` are launched, and how."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewardprop_fast.ops.lora_linear import triton_backward as backwards
from rewardprop_fast.ops.lora_linear import triton_forward as forwards
from rewardprop_fast.ops.lora_linear import triton_tiles
from rewardprop_fast.ops.lora_linear.triton_tiles import Tiles, cdiv, padded_rank
from rewardprop_fast.ops.triton_runtime import capability, launch

#: Layers that share a launch.
_TOGETHER = 3

_SUM_BLOCK = 128


@dataclass(frozen=True)
class Group:
    """Neighbouring layers of one width and rank: their places among the layers, their columns of S
    and their elements of the joined B."""

    layers: slice
    columns: slice
    elements: slice
    width: int
    rank: int

    @property
    def count(self) -> int:
        return self.layers.stop - self.layers.start


def groups(
    weights: Sequence[Tensor], ranks: Sequence[int], kinds: Sequence[object]
) -> Iterator[Group]:
    """Splits the layers; only those of the same ``kind`` go together."""
    first = column = element = 0
    alike = [(w.shape[0], rank, kind) for w, rank, kind in zip(weights, ranks, kinds, strict=True)]
    while first < len(alike):
        last = first + 1
        while last < len(alike) and last - first < _TOGETHER and alike[last] == alike[first]:
            last += 1
        width, rank, _ = alike[first]
        columns = (last - first) * rank
        yield Group(
            slice(first, last),
            slice(column, column + columns),
            slice(element, element + columns * width),
            width,
            rank,
        )
        first, column, element = last, column + columns, element + columns * width


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_a: Tensor,
    lora_b: Tensor,
    ranks: Sequence[int],
    scales: Sequence[float],
) -> list[Tensor]:
    x_MK = x.reshape(-1, x.shape[-1]).contiguous()
    weights = [weight.contiguous() for weight in weights]
    a_RK, b = lora_a.to(x.dtype).contiguous(), lora_b.to(x.dtype)
    rows, inputs = x_MK.shape
    s_MR = x_MK.new_empty((rows, a_RK.shape[0]))
    outputs = [x_MK.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights]
    found = list(groups(weights, ranks, [bias is None for bias in biases]))
    tiles = [triton_tiles.product(rows, g.width, g.count, x.dtype) for g in found]
    # One S for all, or one in each launch: S must be dense, and x is read once.
    fused = len(found) == 1 and triton_tiles.fuses(found[0].width, found[0].rank, tiles[0])
    if not fused:
        _project(x_MK, a_RK, s_MR)
    for group, own in zip(found, tiles, strict=True):
        arguments = {
            "x": x_MK,
            **_numbered("w", weights[group.layers]),
            **_numbered("bias", [_dense(bias) for bias in biases[group.layers]]),
            "lora_b": b[group.elements],
            **_numbered("y", outputs[group.layers]),
            "s": s_MR[:, group.columns],
            **_numbers("scale", scales[group.layers]),
            "M": rows,
            "K": inputs,
            "N": group.width,
            "R": group.rank,
        }
        constants = {
            "LAYERS": group.count,
            "HAS_BIAS": biases[group.layers.start] is not None,
            "BLOCK_M": own.rows,
            "BLOCK_N": own.columns,
            "BLOCK_K": own.depth,
            "BLOCK_R": padded_rank(group.rank),
            "PRECISION": _precision(x.dtype),
        }
        if fused:
            arguments["lora_a"] = a_RK
        else:
            arguments["S_WIDTH"] = s_MR.shape[1]
            constants["GROUP"] = triton_tiles.GROUP
        _launch(
            forwards.fused_kernel if fused else forwards.main_kernel,
            cdiv(rows, own.rows) * cdiv(group.width, own.columns) * group.count,
            arguments,
            constants,
            own,
        )
    return [*outputs, s_MR]


def _project(x_MK: Tensor, a_RK: Tensor, s_MR: Tensor) -> None:
    rows, inputs = x_MK.shape
    rank = a_RK.shape[0]
    tiles = triton_tiles.narrow(rows, rank, x_MK.dtype)
    _launch(
        forwards.project_kernel,
        cdiv(rows, tiles.rows) * cdiv(rank, tiles.columns),
        {"x": x_MK, "lora_a": a_RK, "s": s_MR, "M": rows, "K": inputs, "R": rank},
        {
            "BLOCK_M": tiles.rows,
            "BLOCK_K": tiles.depth,
            "BLOCK_R": tiles.columns,
            "PRECISION": _precision(x_MK.dtype),
        },
        tiles,
    )


def backward(
    grads: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    x: Tensor | None,
    s_MR: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    ranks: Sequence[int],
    scales: Sequence[float],
    x_shape: Sequence[int],
    needed: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dx_needed, da_needed, db_needed = needed
    given = next(grad for grad in grads if grad is not None)
    rows = math.prod(x_shape[:-1])
    work = _Backward(
        rows,
        x_shape[-1],
        given.dtype,
        lora_a.to(given.dtype).contiguous(),
        lora_b.to(given.dtype),
        None if s_MR is None else s_MR.contiguous(),
        # Columns of layers without a gradient must be zero for dA.
        (torch.zeros if any(g is None for g in grads) else torch.empty)(
            (rows, lora_a.shape[0]), dtype=given.dtype, device=given.device
        ),
        given.new_empty((rows, x_shape[-1])) if dx_needed else None,
        lora_b.new_zeros(lora_b.shape) if db_needed else None,
    )
    started = False
    for group in groups(weights, ranks, [grad is None for grad in grads]):
        dys = [
            grad.reshape(rows, group.width).contiguous()
            for grad in grads[group.layers]
            if grad is not None
        ]
        if not dys:
            continue
        own_weights = [weight.contiguous() for weight in weights[group.layers]]
        work.through(group, dys, own_weights, scales[group.layers], da_needed, started)
        started = True
    da = None
    if da_needed:
        assert x is not None
        da = lora_a.new_empty(lora_a.shape)
        x_MK = x.reshape(rows, x_shape[-1]).contiguous()
        _outer(work.t_MR, x_MK, 1.0, da, padded_rank(lora_a.shape[0]), None)
    return None if work.dx_MK is None else work.dx_MK.view(*x_shape), da, work.db


@dataclass(frozen=True)
class _Backward:
    """What the groups of layers share in one backward pass."""

    rows: int
    inputs: int
    dtype: torch.dtype
    a_RK: Tensor
    b: Tensor
    s_MR: Tensor | None
    t_MR: Tensor
    dx_MK: Tensor | None
    db: Tensor | None

    def through(
        self,
        group: Group,
        dys: Sequence[Tensor],
        weights: Sequence[Tensor],
        scales: Sequence[float],
        da_needed: bool,
        add: bool,
    ) -> None:
        """Adds a group's part: dX and T, and dB if it is needed."""
        wide = triton_tiles.backward_product(self.rows, self.inputs, self.dtype)
        fused = self.dx_MK is not None and triton_tiles.fuses(self.inputs, group.rank, wide)
        low = triton_tiles.narrow(self.rows, group.rank, self.dtype)
        first = wide if fused else low
        with_t = self.dx_MK is not None or da_needed
        parts = None
        # For compute capability 8.0 the compiler spills the three layers' fused kernel with dB.
        spills = fused and group.count > 1 and capability(dys[0]) == (8, 0)
        pays = triton_tiles.partial_sums_pay(group.rank, first) and not spills
        if self.db is not None and with_t and pays:
            elements = group.count * group.width * group.rank
            parts = self.db.new_empty((cdiv(self.rows, first.rows), elements), dtype=torch.float32)
        shared: dict[str, Any] = {
            **_numbered("dy", dys),
            "lora_b": self.b[group.elements],
            "s": None if parts is None or self.s_MR is None else self.s_MR[:, group.columns],
            "t": self.t_MR[:, group.columns],
            "db_parts": parts,
            **_numbers("scale", scales),
            "M": self.rows,
            "N": group.width,
            "R": group.rank,
            "WIDTH": self.t_MR.shape[1],
        }
        constants = {
            "LAYERS": group.count,
            "WITH_DB": parts is not None,
            "BLOCK_M": first.rows,
            "BLOCK_N": first.depth,
            "BLOCK_R": padded_rank(group.rank),
            "PRECISION": _precision(self.dtype),
        }
        a_RK = self.a_RK[group.columns]
        if fused:
            _launch(
                backwards.fused_kernel,
                cdiv(self.rows, wide.rows) * cdiv(self.inputs, wide.columns),
                {
                    **shared,
                    **_numbered("w", weights),
                    "lora_a": a_RK,
                    "dx": self.dx_MK,
                    "K": self.inputs,
                },
                {**constants, "ADD": add, "BLOCK_K": wide.columns},
                wide,
            )
        elif with_t:
            blocks = cdiv(self.rows, low.rows) * cdiv(group.rank, low.columns)
            _launch(backwards.low_kernel, blocks * group.count, shared, constants, low)
            if self.dx_MK is not None:
                self._main(group, dys, weights, a_RK, add, wide)
        if self.db is None:
            return
        db = self.db[group.elements]
        if parts is not None:
            _sum(parts, db)
            return
        assert self.s_MR is not None
        for index, (dy_MN, scale) in enumerate(zip(dys, scales, strict=True)):
            start = group.columns.start + index * group.rank
            s_MR = self.s_MR[:, start : start + group.rank]
            size = group.width * group.rank
            own = db[index * size : (index + 1) * size].view(group.width, group.rank)
            _outer(dy_MN, s_MR, scale, own, None, padded_rank(group.rank))

    def _main(
        self,
        group: Group,
        dys: Sequence[Tensor],
        weights: Sequence[Tensor],
        a_RK: Tensor,
        add: bool,
        tiles: Tiles,
    ) -> None:
        _launch(
            backwards.main_kernel,
            cdiv(self.rows, tiles.rows) * cdiv(self.inputs, tiles.columns),
            {
                **_numbered("dy", dys),
                **_numbered("w", weights),
                "lora_a": a_RK,
                "t": self.t_MR[:, group.columns],
                "dx": self.dx_MK,
                "M": self.rows,
                "K": self.inputs,
                "N": group.width,
                "R": a_RK.shape[0],
                "WIDTH": self.t_MR.shape[1],
            },
            {
                "LAYERS": group.count,
                "ADD": add,
                "BLOCK_M": tiles.rows,
                "BLOCK_N": tiles.depth,
                "BLOCK_K": tiles.columns,
                "BLOCK_R": min(32, padded_rank(a_RK.shape[0])),
                "GROUP": triton_tiles.GROUP,
                "PRECISION": _precision(self.dtype),
            },
            tiles,
        )


def _outer(
    p: Tensor, q: Tensor, scale: float, out: Tensor, block_p: int | None, block_q: int | None
) -> None:
    """out = scale p^T q; the side whose block is given is as narrow as the rank."""
    rows, wide = p.shape[0], triton_tiles.outer(p.shape[0], p.dtype)
    block_p, block_q = block_p or wide.columns, block_q or wide.columns
    blocks = cdiv(p.shape[1], block_p) * cdiv(q.shape[1], block_q)
    count, each = triton_tiles.parts(rows, blocks, wide.depth)
    parts = out if count == 1 else out.new_empty((count, out.numel()), dtype=torch.float32)
    if rows == 0:
        out.zero_()
        return
    _launch(
        backwards.outer_kernel,
        blocks * count,
        {
            "p": p,
            "q": q,
            "out_parts": parts,
            "scale": scale,
            "M": rows,
            "P": p.shape[1],
            "Q": q.shape[1],
            "P_WIDTH": p.stride(0),
            "Q_WIDTH": q.stride(0),
            "BLOCKS_PER_PART": each,
        },
        {
            "BLOCK_M": wide.depth,
            "BLOCK_P": block_p,
            "BLOCK_Q": block_q,
            "PRECISION": _precision(p.dtype),
        },
        wide,
    )
    if count > 1:
        _sum(parts, out)


def _sum(parts: Tensor, out: Tensor) -> None:
    count = out.numel()
    launch(
        backwards.sum_kernel,
        (cdiv(count, _SUM_BLOCK),),
        {"parts": parts, "out": out, "PARTS": parts.shape[0], "COUNT": count},
        {"BLOCK": _SUM_BLOCK},
    )


def _launch(
    kernel: Any,
    programs: int,
    arguments: dict[str, Any],
    constants: dict[str, Any],
    tiles: Tiles,
) -> None:
    launch(
        kernel, (programs,), arguments, constants, num_warps=tiles.warps, num_stages=tiles.stages
    )


def _numbered(name: str, tensors: Sequence[Tensor | None]) -> dict[str, Tensor | None]:
    """name0, name1, name2; those that are not there are None."""
    return {f"{name}{i}": tensors[i] if i < len(tensors) else None for i in range(_TOGETHER)}


def _numbers(name: str, numbers: Sequence[float]) -> dict[str, float]:
    return {f"{name}{i}": numbers[i] if i < len(numbers) else 0.0 for i in range(_TOGETHER)}


def _dense(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


def _precision(dtype: torch.dtype) -> str:
    """float32 products as three of TF32 each: on tensor cores, and nearly as exact as float32."""
    return "tf32x3" if dtype == torch.float32 else "ieee"
