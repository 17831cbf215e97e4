"""Flash attention in Triton for wide heads in float32: the VAE's 512.

Shape legend: M a tile of queries, N a tile of keys, W the head's width up to a power of two.

A float32 product on tensor cores is three products of TF32, so that its operands take twice the
registers. Tiles as wide as the head, of queries and keys both, would spill. Here scores are summed
over C columns at a time, read again for each tile, and only the result is held whole.

Every sum has a fixed order and no kernel uses atomics, so results are the same every time.
"""

# Parameters of a Triton kernel are what Triton makes of them, not Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from rewardprop_fast.ops.attention.triton_kernels import (
    _LN_2,
    _LOG2_E,
    _above,
    _base,
    _load,
    _store,
)


@triton.jit
def _scores(
    x, x_rows, x_ok, x_m,
    y, y_rows, y_ok, y_m,
    X: tl.constexpr, Y: tl.constexpr,
    UNIT: tl.constexpr, D: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x yᵀ, (X, Y), over all columns, C at a time."""
    total = tl.zeros([X, Y], tl.float32)
    for start in range(0, D, C):
        columns = start + tl.arange(0, C)
        there = (columns < D)[None, :]
        x_tile = tl.load(
            x + x_rows[:, None] * (x_m * UNIT) + columns[None, :],
            mask=x_ok[:, None] & there,
            other=0.0,
        )
        y_tile = tl.load(
            y + y_rows[:, None] * (y_m * UNIT) + columns[None, :],
            mask=y_ok[:, None] & there,
            other=0.0,
        )
        total = tl.dot(x_tile, tl.trans(y_tile), total, input_precision=PRECISION)
    return total


@triton.jit
def wide_forward_kernel(
    q, q_b, q_h, q_m,
    k, k_b, k_h, k_m,
    v, v_b, v_h, v_m,
    out, out_b, out_h, out_m,
    lse,
    scale,
    heads, queries, keys, tiles,
    D: tl.constexpr, W: tl.constexpr, C: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries against all keys, tile by tile (arXiv 2307.08691, algorithm 1)."""
    program = tl.program_id(0)
    tile, image_head = program % tiles, program // tiles
    batch, head = image_head // heads, image_head % heads
    start = tile * M
    rows = tl.arange(0, M)
    row_ok = start + rows < queries
    columns = tl.arange(0, N)
    q_base = _base(q, batch, head, start, q_b, q_h, q_m, UNIT)
    k_base = _base(k, batch, head, 0 * start, k_b, k_h, k_m, UNIT)
    v_base = _base(v, batch, head, 0 * start, v_b, v_h, v_m, UNIT)
    maximum = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    result = tl.zeros([M, W], tl.float32)
    for first in range(0, keys, N):
        key_ok = first + columns < keys
        scores = _scores(
            q_base, rows, row_ok, q_m, k_base, columns, key_ok, k_m, M, N, UNIT, D, C, PRECISION
        )
        scores = tl.where(key_ok[None, :], scores * (scale * _LOG2_E), float("-inf"))
        higher = tl.maximum(maximum, tl.max(scores, 1))
        weights = tl.math.exp2(scores - _above(higher)[:, None])
        shrink = tl.math.exp2(maximum - _above(higher))
        total = total * shrink + tl.sum(weights, 1)
        maximum = higher
        v_tile = _load(v_base, columns, key_ok, v_m, UNIT, D, 0, W)
        result = tl.dot(weights, v_tile, result * shrink[:, None], input_precision=PRECISION)
        k_base += N * (k_m * UNIT)
        v_base += N * (v_m * UNIT)
    out_base = _base(out, batch, head, start, out_b, out_h, out_m, UNIT)
    _store(out_base, result / total[:, None], rows, row_ok, out_m, UNIT, D, 0, W)
    lse_base = lse + image_head.to(tl.int64) * queries + start
    tl.store(lse_base + rows, (_above(maximum) + tl.math.log2(total)) * _LN_2, mask=row_ok)


@triton.jit
def wide_grad_keys_kernel(
    q, q_b, q_h, q_m,
    k, k_b, k_h, k_m,
    v, v_b, v_h, v_m,
    grad, grad_b, grad_h, grad_m,
    lse, delta,
    dk, dk_b, dk_h, dk_m,
    dv, dv_b, dv_h, dv_m,
    scale,
    heads, queries, keys, tiles,
    D: tl.constexpr, W: tl.constexpr, C: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr,
    NEED_K: tl.constexpr, NEED_V: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys, over all queries; scores lie transposed, (keys, queries)."""
    program = tl.program_id(0)
    tile, image_head = program % tiles, program // tiles
    batch, head = image_head // heads, image_head % heads
    start = tile * N
    rows = tl.arange(0, N)
    row_ok = start + rows < keys
    columns = tl.arange(0, M)
    k_base = _base(k, batch, head, start, k_b, k_h, k_m, UNIT)
    v_base = _base(v, batch, head, start, v_b, v_h, v_m, UNIT)
    q_base = _base(q, batch, head, 0 * start, q_b, q_h, q_m, UNIT)
    grad_base = _base(grad, batch, head, 0 * start, grad_b, grad_h, grad_m, UNIT)
    lse += image_head.to(tl.int64) * queries
    delta += image_head.to(tl.int64) * queries
    if NEED_K:
        dk_tile = tl.zeros([N, W], tl.float32)
    if NEED_V:
        dv_tile = tl.zeros([N, W], tl.float32)
    for first in range(0, queries, M):
        query_ok = first + columns < queries
        scores = _scores(
            k_base, rows, row_ok, k_m, q_base, columns, query_ok, q_m, N, M, UNIT, D, C, PRECISION
        )
        # A query that is not there has LSE = inf and weighs nothing.
        lse_tile = tl.load(lse + first + columns, mask=query_ok, other=float("inf"))
        weights = tl.math.exp2(scores * (scale * _LOG2_E) - (lse_tile * _LOG2_E)[None, :])
        if NEED_V:
            grad_tile = _load(grad_base, columns, query_ok, grad_m, UNIT, D, 0, W)
            dv_tile = tl.dot(weights, grad_tile, dv_tile, input_precision=PRECISION)
        if NEED_K:
            dweights = _scores(
                v_base, rows, row_ok, v_m, grad_base, columns, query_ok, grad_m,
                N, M, UNIT, D, C, PRECISION,
            )  # fmt: skip
            delta_tile = tl.load(delta + first + columns, mask=query_ok, other=0.0)
            dscores = weights * (dweights - delta_tile[None, :])
            q_tile = _load(q_base, columns, query_ok, q_m, UNIT, D, 0, W)
            dk_tile = tl.dot(dscores, q_tile, dk_tile, input_precision=PRECISION)
        q_base += M * (q_m * UNIT)
        grad_base += M * (grad_m * UNIT)
    if NEED_K:
        dk_base = _base(dk, batch, head, start, dk_b, dk_h, dk_m, UNIT)
        _store(dk_base, dk_tile * scale, rows, row_ok, dk_m, UNIT, D, 0, W)
    if NEED_V:
        dv_base = _base(dv, batch, head, start, dv_b, dv_h, dv_m, UNIT)
        _store(dv_base, dv_tile, rows, row_ok, dv_m, UNIT, D, 0, W)


@triton.jit
def wide_grad_queries_kernel(
    q, q_b, q_h, q_m,
    k, k_b, k_h, k_m,
    v, v_b, v_h, v_m,
    grad, grad_b, grad_h, grad_m,
    lse, delta,
    dq, dq_b, dq_h, dq_m,
    scale,
    heads, queries, keys, tiles,
    D: tl.constexpr, W: tl.constexpr, C: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries, over all keys."""
    program = tl.program_id(0)
    tile, image_head = program % tiles, program // tiles
    batch, head = image_head // heads, image_head % heads
    start = tile * M
    rows = tl.arange(0, M)
    row_ok = start + rows < queries
    columns = tl.arange(0, N)
    q_base = _base(q, batch, head, start, q_b, q_h, q_m, UNIT)
    grad_base = _base(grad, batch, head, start, grad_b, grad_h, grad_m, UNIT)
    k_base = _base(k, batch, head, 0 * start, k_b, k_h, k_m, UNIT)
    v_base = _base(v, batch, head, 0 * start, v_b, v_h, v_m, UNIT)
    dq_tile = tl.zeros([M, W], tl.float32)
    row = image_head.to(tl.int64) * queries + start
    lse_tile = tl.load(lse + row + rows, mask=row_ok, other=float("inf")) * _LOG2_E
    delta_tile = tl.load(delta + row + rows, mask=row_ok, other=0.0)
    for first in range(0, keys, N):
        key_ok = first + columns < keys
        scores = _scores(
            q_base, rows, row_ok, q_m, k_base, columns, key_ok, k_m, M, N, UNIT, D, C, PRECISION
        )
        dweights = _scores(
            grad_base, rows, row_ok, grad_m, v_base, columns, key_ok, v_m,
            M, N, UNIT, D, C, PRECISION,
        )  # fmt: skip
        weights = tl.math.exp2(scores * (scale * _LOG2_E) - lse_tile[:, None])
        # A key that is not there is read as 0; e^-LSE may overflow, and inf * 0 is NaN.
        weights = tl.where(key_ok[None, :], weights, 0.0)
        dscores = weights * (dweights - delta_tile[:, None])
        k_tile = _load(k_base, columns, key_ok, k_m, UNIT, D, 0, W)
        dq_tile = tl.dot(dscores, k_tile, dq_tile, input_precision=PRECISION)
        k_base += N * (k_m * UNIT)
        v_base += N * (v_m * UNIT)
    dq_base = _base(dq, batch, head, start, dq_b, dq_h, dq_m, UNIT)
    _store(dq_base, dq_tile * scale, rows, row_ok, dq_m, UNIT, D, 0, W)
