"""Flash attention in Triton. Who launches which kernel with which tiles is in triton_launch.py.

Shape legend: M a tile of queries, N a tile of keys, A + B the head's width in two parts.

The width is split into powers of two, each at least 16, as tensor cores want them: 40 = 32 + 8 (as
16), 80 = 64 + 16, 160 = 128 + 32. Padding to the next power of two would read and multiply up to
twice as much, and at 160 not fit into the shared memory of consumer cards. B is 0 where the width
is a power of two already.

Weights are powers of two, exp2(S scale log2 e - ...), which is one instruction on a GPU.

Strides and offsets come divided by UNIT, so that the compiler sees that rows start at multiples of
it and loads 16 bytes at a time; with heads of width 40 it could not know that otherwise.

Every sum has a fixed order and no kernel uses atomics, so results are the same every time.
"""

# Parameters of a Triton kernel are what Triton makes of them, not Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
_LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def _base(pointer, batch, head, row, stride_b, stride_h, stride_m, UNIT: tl.constexpr):
    """Where a tile starts, in 64 bits; inside a tile 32 are enough."""
    offset = batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    return pointer + (offset + row.to(tl.int64) * stride_m) * UNIT


@triton.jit
def _load(
    base,
    rows,
    row_ok,
    stride_m,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """(rows, WIDTH): the columns from START on; zero past the width and where no row is."""
    columns = START + tl.arange(0, WIDTH)
    mask = row_ok[:, None]
    if START + WIDTH > D:
        mask = mask & (columns < D)[None, :]
    return tl.load(
        base + rows[:, None] * (stride_m * UNIT) + columns[None, :], mask=mask, other=0.0
    )


@triton.jit
def _store(
    base,
    values,
    rows,
    row_ok,
    stride_m,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
):
    columns = START + tl.arange(0, WIDTH)
    mask = row_ok[:, None]
    if START + WIDTH > D:
        mask = mask & (columns < D)[None, :]
    pointers = base + rows[:, None] * (stride_m * UNIT) + columns[None, :]
    tl.store(pointers, values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _above(maximum):
    """What to subtract: 0 where all scores are -inf, so that their weights are 0 and not NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def forward_kernel(
    q, q_b, q_h, q_m,
    k, k_b, k_h, k_m,
    v, v_b, v_h, v_m,
    out, out_b, out_h, out_m,
    lse,
    scale,
    heads, queries, keys, tiles,
    D: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
    UNIT: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
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
    q_a = _load(q_base, rows, row_ok, q_m, UNIT, D, 0, A)
    if B > 0:
        q_b_part = _load(q_base, rows, row_ok, q_m, UNIT, D, A, B)
    maximum = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    out_a = tl.zeros([M, A], tl.float32)
    if B > 0:
        out_b_part = tl.zeros([M, B], tl.float32)
    for first in range(0, keys, N):
        key_ok = first + columns < keys
        k_a = _load(k_base, columns, key_ok, k_m, UNIT, D, 0, A)
        scores = tl.dot(q_a, tl.trans(k_a), input_precision=PRECISION)
        if B > 0:
            k_b_part = _load(k_base, columns, key_ok, k_m, UNIT, D, A, B)
            scores = tl.dot(q_b_part, tl.trans(k_b_part), scores, input_precision=PRECISION)
        scores *= scale * _LOG2_E
        if not EVEN:
            scores = tl.where(key_ok[None, :], scores, float("-inf"))
        higher = tl.maximum(maximum, tl.max(scores, 1))
        weights = tl.math.exp2(scores - _above(higher)[:, None])
        shrink = tl.math.exp2(maximum - _above(higher))
        total = total * shrink + tl.sum(weights, 1)
        maximum = higher
        weights = weights.to(v.dtype.element_ty)
        v_a = _load(v_base, columns, key_ok, v_m, UNIT, D, 0, A)
        out_a = tl.dot(weights, v_a, out_a * shrink[:, None], input_precision=PRECISION)
        if B > 0:
            v_b_part = _load(v_base, columns, key_ok, v_m, UNIT, D, A, B)
            out_b_part = tl.dot(
                weights, v_b_part, out_b_part * shrink[:, None], input_precision=PRECISION
            )
        k_base += N * (k_m * UNIT)
        v_base += N * (v_m * UNIT)
    out_base = _base(out, batch, head, start, out_b, out_h, out_m, UNIT)
    _store(out_base, out_a / total[:, None], rows, row_ok, out_m, UNIT, D, 0, A)
    if B > 0:
        _store(out_base, out_b_part / total[:, None], rows, row_ok, out_m, UNIT, D, A, B)
    lse_base = lse + image_head.to(tl.int64) * queries + start
    tl.store(lse_base + rows, (_above(maximum) + tl.math.log2(total)) * _LN_2, mask=row_ok)


@triton.jit
def _scores(
    q_a,
    q_b,
    k_base,
    keys,
    key_ok,
    k_m,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    PRECISION: tl.constexpr,
):
    k_a = _load(k_base, keys, key_ok, k_m, UNIT, D, 0, A)
    scores = tl.dot(q_a, tl.trans(k_a), input_precision=PRECISION)
    if B > 0:
        k_b = _load(k_base, keys, key_ok, k_m, UNIT, D, A, B)
        scores = tl.dot(q_b, tl.trans(k_b), scores, input_precision=PRECISION)
    return scores


@triton.jit
def _weighted(
    weights,
    v_base,
    keys,
    key_ok,
    v_m,
    total,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    values = _load(v_base, keys, key_ok, v_m, UNIT, D, START, WIDTH)
    return tl.dot(weights.to(values.dtype), values, total, input_precision=PRECISION)


@triton.jit
def forward_resident_kernel(
    q, q_b, q_h, q_m,
    k, k_b, k_h, k_m,
    v, v_b, v_h, v_m,
    out, out_b, out_h, out_m,
    lse,
    scale,
    heads, queries, keys, tiles,
    D: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, N2: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries against all keys at once, in two parts N + N2: the 77 of a prompt are
    64 + 16. No running maximum."""
    program = tl.program_id(0)
    tile, image_head = program % tiles, program // tiles
    batch, head = image_head // heads, image_head % heads
    start = tile * M
    rows = tl.arange(0, M)
    row_ok = start + rows < queries
    first = tl.arange(0, N)
    first_ok = first < keys
    q_base = _base(q, batch, head, start, q_b, q_h, q_m, UNIT)
    k_base = _base(k, batch, head, 0 * start, k_b, k_h, k_m, UNIT)
    v_base = _base(v, batch, head, 0 * start, v_b, v_h, v_m, UNIT)
    q_a = _load(q_base, rows, row_ok, q_m, UNIT, D, 0, A)
    q_b_part = q_a
    if B > 0:
        q_b_part = _load(q_base, rows, row_ok, q_m, UNIT, D, A, B)
    scores = _scores(q_a, q_b_part, k_base, first, first_ok, k_m, UNIT, D, A, B, PRECISION)
    scores = tl.where(first_ok[None, :], scores * (scale * _LOG2_E), float("-inf"))
    maximum = tl.max(scores, 1)
    if N2 > 0:
        second = N + tl.arange(0, N2)
        second_ok = second < keys
        more = _scores(q_a, q_b_part, k_base, second, second_ok, k_m, UNIT, D, A, B, PRECISION)
        more = tl.where(second_ok[None, :], more * (scale * _LOG2_E), float("-inf"))
        maximum = tl.maximum(maximum, tl.max(more, 1))
    maximum = _above(maximum)
    weights = tl.math.exp2(scores - maximum[:, None])
    total = tl.sum(weights, 1)
    if N2 > 0:
        more = tl.math.exp2(more - maximum[:, None])
        total += tl.sum(more, 1)
    out_base = _base(out, batch, head, start, out_b, out_h, out_m, UNIT)
    zero_a = tl.zeros([M, A], tl.float32)
    out_a = _weighted(weights, v_base, first, first_ok, v_m, zero_a, UNIT, D, 0, A, PRECISION)
    if N2 > 0:
        out_a = _weighted(more, v_base, second, second_ok, v_m, out_a, UNIT, D, 0, A, PRECISION)
    _store(out_base, out_a / total[:, None], rows, row_ok, out_m, UNIT, D, 0, A)
    if B > 0:
        zero_b = tl.zeros([M, B], tl.float32)
        o_b = _weighted(weights, v_base, first, first_ok, v_m, zero_b, UNIT, D, A, B, PRECISION)
        if N2 > 0:
            o_b = _weighted(more, v_base, second, second_ok, v_m, o_b, UNIT, D, A, B, PRECISION)
        _store(out_base, o_b / total[:, None], rows, row_ok, out_m, UNIT, D, A, B)
    lse_base = lse + image_head.to(tl.int64) * queries + start
    tl.store(lse_base + rows, (maximum + tl.math.log2(total)) * _LN_2, mask=row_ok)


@triton.jit
def delta_kernel(
    grad, grad_b, grad_h, grad_m,
    out, out_b, out_h, out_m,
    delta,
    heads, queries, tiles,
    D: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    M: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """δ = Σ_d dO O for a tile of queries."""
    program = tl.program_id(0)
    tile, image_head = program % tiles, program // tiles
    batch, head = image_head // heads, image_head % heads
    start = tile * M
    rows = tl.arange(0, M)
    row_ok = start + rows < queries
    grad_base = _base(grad, batch, head, start, grad_b, grad_h, grad_m, UNIT)
    out_base = _base(out, batch, head, start, out_b, out_h, out_m, UNIT)
    found = _delta(grad_base, grad_m, out_base, out_m, rows, row_ok, UNIT, D, 0, A)
    if B > 0:
        found += _delta(grad_base, grad_m, out_base, out_m, rows, row_ok, UNIT, D, A, B)
    tl.store(delta + image_head.to(tl.int64) * queries + start + rows, found, mask=row_ok)


@triton.jit
def _delta(
    grad_base,
    grad_m,
    out_base,
    out_m,
    rows,
    row_ok,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
):
    grad = _load(grad_base, rows, row_ok, grad_m, UNIT, D, START, WIDTH).to(tl.float32)
    out = _load(out_base, rows, row_ok, out_m, UNIT, D, START, WIDTH).to(tl.float32)
    return tl.sum(grad * out, 1)


@triton.jit
def grad_keys_kernel(
    q, q_b, q_h, q_m,
    k, k_b, k_h, k_m,
    v, v_b, v_h, v_m,
    grad, grad_b, grad_h, grad_m,
    lse, delta,
    dk, dk_b, dk_h, dk_m,
    dv, dv_b, dv_h, dv_m,
    scale,
    heads, queries, keys, tiles,
    D: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr,
    NEED_K: tl.constexpr, NEED_V: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys, over all queries. Scores lie transposed: (keys, queries)."""
    program = tl.program_id(0)
    tile, image_head = program % tiles, program // tiles
    batch, head = image_head // heads, image_head % heads
    start = tile * N
    rows = tl.arange(0, N)
    row_ok = start + rows < keys
    columns = tl.arange(0, M)
    q_base = _base(q, batch, head, 0 * start, q_b, q_h, q_m, UNIT)
    grad_base = _base(grad, batch, head, 0 * start, grad_b, grad_h, grad_m, UNIT)
    k_base = _base(k, batch, head, start, k_b, k_h, k_m, UNIT)
    v_base = _base(v, batch, head, start, v_b, v_h, v_m, UNIT)
    lse += image_head.to(tl.int64) * queries
    delta += image_head.to(tl.int64) * queries
    k_a = _load(k_base, rows, row_ok, k_m, UNIT, D, 0, A)
    v_a = _load(v_base, rows, row_ok, v_m, UNIT, D, 0, A)
    dk_a = tl.zeros([N, A], tl.float32)
    dv_a = tl.zeros([N, A], tl.float32)
    if B > 0:
        k_b_part = _load(k_base, rows, row_ok, k_m, UNIT, D, A, B)
        v_b_part = _load(v_base, rows, row_ok, v_m, UNIT, D, A, B)
        dk_b_part = tl.zeros([N, B], tl.float32)
        dv_b_part = tl.zeros([N, B], tl.float32)
    for first in range(0, queries, M):
        query_ok = first + columns < queries
        q_a = _load(q_base, columns, query_ok, q_m, UNIT, D, 0, A)
        scores = tl.dot(k_a, tl.trans(q_a), input_precision=PRECISION)
        if B > 0:
            q_b_part = _load(q_base, columns, query_ok, q_m, UNIT, D, A, B)
            scores = tl.dot(k_b_part, tl.trans(q_b_part), scores, input_precision=PRECISION)
        # A query that is not there has LSE = inf and weighs nothing.
        lse_tile = tl.load(lse + first + columns, mask=query_ok, other=float("inf"))
        weights = tl.math.exp2(scores * (scale * _LOG2_E) - (lse_tile * _LOG2_E)[None, :])
        grad_a = _load(grad_base, columns, query_ok, grad_m, UNIT, D, 0, A)
        if B > 0:
            grad_b_part = _load(grad_base, columns, query_ok, grad_m, UNIT, D, A, B)
        if NEED_V:
            rounded = weights.to(q.dtype.element_ty)
            dv_a = tl.dot(rounded, grad_a, dv_a, input_precision=PRECISION)
            if B > 0:
                dv_b_part = tl.dot(rounded, grad_b_part, dv_b_part, input_precision=PRECISION)
        if NEED_K:
            dweights = tl.dot(v_a, tl.trans(grad_a), input_precision=PRECISION)
            if B > 0:
                dweights = tl.dot(
                    v_b_part, tl.trans(grad_b_part), dweights, input_precision=PRECISION
                )
            delta_tile = tl.load(delta + first + columns, mask=query_ok, other=0.0)
            dscores = (weights * (dweights - delta_tile[None, :])).to(q.dtype.element_ty)
            dk_a = tl.dot(dscores, q_a, dk_a, input_precision=PRECISION)
            if B > 0:
                dk_b_part = tl.dot(dscores, q_b_part, dk_b_part, input_precision=PRECISION)
        q_base += M * (q_m * UNIT)
        grad_base += M * (grad_m * UNIT)
    if NEED_K:
        dk_base = _base(dk, batch, head, start, dk_b, dk_h, dk_m, UNIT)
        _store(dk_base, dk_a * scale, rows, row_ok, dk_m, UNIT, D, 0, A)
        if B > 0:
            _store(dk_base, dk_b_part * scale, rows, row_ok, dk_m, UNIT, D, A, B)
    if NEED_V:
        dv_base = _base(dv, batch, head, start, dv_b, dv_h, dv_m, UNIT)
        _store(dv_base, dv_a, rows, row_ok, dv_m, UNIT, D, 0, A)
        if B > 0:
            _store(dv_base, dv_b_part, rows, row_ok, dv_m, UNIT, D, A, B)


@triton.jit
def grad_queries_kernel(
    q, q_b, q_h, q_m,
    k, k_b, k_h, k_m,
    v, v_b, v_h, v_m,
    grad, grad_b, grad_h, grad_m,
    lse, delta,
    dq, dq_b, dq_h, dq_m,
    scale,
    heads, queries, keys, tiles,
    D: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
    UNIT: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
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
    q_a = _load(q_base, rows, row_ok, q_m, UNIT, D, 0, A)
    grad_a = _load(grad_base, rows, row_ok, grad_m, UNIT, D, 0, A)
    dq_a = tl.zeros([M, A], tl.float32)
    if B > 0:
        q_b_part = _load(q_base, rows, row_ok, q_m, UNIT, D, A, B)
        grad_b_part = _load(grad_base, rows, row_ok, grad_m, UNIT, D, A, B)
        dq_b_part = tl.zeros([M, B], tl.float32)
    row = image_head.to(tl.int64) * queries + start
    lse_tile = tl.load(lse + row + rows, mask=row_ok, other=float("inf")) * _LOG2_E
    delta_tile = tl.load(delta + row + rows, mask=row_ok, other=0.0)
    for first in range(0, keys, N):
        key_ok = first + columns < keys
        k_a = _load(k_base, columns, key_ok, k_m, UNIT, D, 0, A)
        v_a = _load(v_base, columns, key_ok, v_m, UNIT, D, 0, A)
        scores = tl.dot(q_a, tl.trans(k_a), input_precision=PRECISION)
        dweights = tl.dot(grad_a, tl.trans(v_a), input_precision=PRECISION)
        if B > 0:
            k_b_part = _load(k_base, columns, key_ok, k_m, UNIT, D, A, B)
            v_b_part = _load(v_base, columns, key_ok, v_m, UNIT, D, A, B)
            scores = tl.dot(q_b_part, tl.trans(k_b_part), scores, input_precision=PRECISION)
            dweights = tl.dot(grad_b_part, tl.trans(v_b_part), dweights, input_precision=PRECISION)
        weights = tl.math.exp2(scores * (scale * _LOG2_E) - lse_tile[:, None])
        if (
            not EVEN
        ):  # a key that is not there is read as 0; e^-LSE may overflow, and inf * 0 is NaN
            weights = tl.where(key_ok[None, :], weights, 0.0)
        dscores = (weights * (dweights - delta_tile[:, None])).to(q.dtype.element_ty)
        dq_a = tl.dot(dscores, k_a, dq_a, input_precision=PRECISION)
        if B > 0:
            dq_b_part = tl.dot(dscores, k_b_part, dq_b_part, input_precision=PRECISION)
        k_base += N * (k_m * UNIT)
        v_base += N * (v_m * UNIT)
    dq_base = _base(dq, batch, head, start, dq_b, dq_h, dq_m, UNIT)
    _store(dq_base, dq_a * scale, rows, row_ok, dq_m, UNIT, D, 0, A)
    if B > 0:
        _store(dq_base, dq_b_part * scale, rows, row_ok, dq_m, UNIT, D, A, B)


@triton.jit
def backward_resident_kernel(
    q, q_b, q_h, q_m,
    k, k_b, k_h, k_m,
    v, v_b, v_h, v_m,
    grad, grad_b, grad_h, grad_m,
    out, out_b, out_h, out_m,
    lse,
    dq, dq_b, dq_h, dq_m,
    dk, dk_c, dk_b, dk_h, dk_m,
    dv, dv_c, dv_b, dv_h, dv_m,
    scale,
    heads, queries, keys, chunks, chunk_rows,
    D: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr,
    NEED_Q: tl.constexpr, NEED_K: tl.constexpr, NEED_V: tl.constexpr,
):  # fmt: skip
    """All three gradients of a chunk of queries against all keys at once: the 77 of a prompt.

    dQ is whole; dK and dV are this chunk's share, which `sum_chunks_kernel` adds up. Scores lie
    transposed, (keys, queries): they are then in the registers where dK and dV want them.
    """
    program = tl.program_id(0)
    chunk, image_head = program % chunks, program // chunks
    batch, head = image_head // heads, image_head % heads
    start = chunk * chunk_rows
    end = tl.minimum(start + chunk_rows, queries)
    rows = tl.arange(0, M)
    columns = tl.arange(0, N)
    key_ok = columns < keys
    k_base = _base(k, batch, head, 0 * start, k_b, k_h, k_m, UNIT)
    v_base = _base(v, batch, head, 0 * start, v_b, v_h, v_m, UNIT)
    k_a = _load(k_base, columns, key_ok, k_m, UNIT, D, 0, A)
    v_a = _load(v_base, columns, key_ok, v_m, UNIT, D, 0, A)
    dk_a = tl.zeros([N, A], tl.float32)
    dv_a = tl.zeros([N, A], tl.float32)
    if B > 0:
        k_b_part = _load(k_base, columns, key_ok, k_m, UNIT, D, A, B)
        v_b_part = _load(v_base, columns, key_ok, v_m, UNIT, D, A, B)
        dk_b_part = tl.zeros([N, B], tl.float32)
        dv_b_part = tl.zeros([N, B], tl.float32)
    lse += image_head.to(tl.int64) * queries
    q_base = _base(q, batch, head, start, q_b, q_h, q_m, UNIT)
    grad_base = _base(grad, batch, head, start, grad_b, grad_h, grad_m, UNIT)
    out_base = _base(out, batch, head, start, out_b, out_h, out_m, UNIT)
    dq_base = _base(dq, batch, head, start, dq_b, dq_h, dq_m, UNIT)
    for first in range(start, end, M):
        row_ok = first + rows < end
        q_a = _load(q_base, rows, row_ok, q_m, UNIT, D, 0, A)
        grad_a = _load(grad_base, rows, row_ok, grad_m, UNIT, D, 0, A)
        scores = tl.dot(k_a, tl.trans(q_a), input_precision=PRECISION)
        if B > 0:
            q_b_part = _load(q_base, rows, row_ok, q_m, UNIT, D, A, B)
            grad_b_part = _load(grad_base, rows, row_ok, grad_m, UNIT, D, A, B)
            scores = tl.dot(k_b_part, tl.trans(q_b_part), scores, input_precision=PRECISION)
        # A query that is not there has LSE = inf and weighs nothing.
        lse2 = tl.load(lse + first + rows, mask=row_ok, other=float("inf")) * _LOG2_E
        weights = tl.math.exp2(scores * (scale * _LOG2_E) - lse2[None, :])
        # A key that is not there is read as 0; e^-LSE may overflow, and inf * 0 is NaN.
        weights = tl.where(key_ok[:, None], weights, 0.0)
        if NEED_V:
            rounded = weights.to(q.dtype.element_ty)
            dv_a = tl.dot(rounded, grad_a, dv_a, input_precision=PRECISION)
            if B > 0:
                dv_b_part = tl.dot(rounded, grad_b_part, dv_b_part, input_precision=PRECISION)
        if NEED_Q or NEED_K:
            delta = _delta(grad_base, grad_m, out_base, out_m, rows, row_ok, UNIT, D, 0, A)
            dweights = tl.dot(v_a, tl.trans(grad_a), input_precision=PRECISION)
            if B > 0:
                delta += _delta(grad_base, grad_m, out_base, out_m, rows, row_ok, UNIT, D, A, B)
                dweights = tl.dot(
                    v_b_part, tl.trans(grad_b_part), dweights, input_precision=PRECISION
                )
            dscores = (weights * (dweights - delta[None, :])).to(q.dtype.element_ty)
            if NEED_K:
                dk_a = tl.dot(dscores, q_a, dk_a, input_precision=PRECISION)
                if B > 0:
                    dk_b_part = tl.dot(dscores, q_b_part, dk_b_part, input_precision=PRECISION)
            if NEED_Q:
                turned = tl.trans(dscores)
                # Read again for every tile, from the first cache: as right-hand sides of a product
                # all keys would take more registers than there are.
                keys_a = _load(k_base, columns, key_ok, k_m, UNIT, D, 0, A)
                dq_a = tl.dot(turned, keys_a, input_precision=PRECISION)
                _store(dq_base, dq_a * scale, rows, row_ok, dq_m, UNIT, D, 0, A)
                if B > 0:
                    keys_b = _load(k_base, columns, key_ok, k_m, UNIT, D, A, B)
                    dq_b_part = tl.dot(turned, keys_b, input_precision=PRECISION)
                    _store(dq_base, dq_b_part * scale, rows, row_ok, dq_m, UNIT, D, A, B)
        q_base += M * (q_m * UNIT)
        grad_base += M * (grad_m * UNIT)
        out_base += M * (out_m * UNIT)
        dq_base += M * (dq_m * UNIT)
    if NEED_K:
        dk += chunk.to(tl.int64) * (dk_c * UNIT)
        dk_base = _base(dk, batch, head, 0 * start, dk_b, dk_h, dk_m, UNIT)
        _store(dk_base, dk_a * scale, columns, key_ok, dk_m, UNIT, D, 0, A)
        if B > 0:
            _store(dk_base, dk_b_part * scale, columns, key_ok, dk_m, UNIT, D, A, B)
    if NEED_V:
        dv += chunk.to(tl.int64) * (dv_c * UNIT)
        dv_base = _base(dv, batch, head, 0 * start, dv_b, dv_h, dv_m, UNIT)
        _store(dv_base, dv_a, columns, key_ok, dv_m, UNIT, D, 0, A)
        if B > 0:
            _store(dv_base, dv_b_part, columns, key_ok, dv_m, UNIT, D, A, B)


@triton.jit
def sum_chunks_kernel(parts, out, count, chunks, BLOCK: tl.constexpr):
    """out = Σ_c parts[c], in the order of c, for flat arrays of ``count`` numbers."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = index < count
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(chunks):
        total += tl.load(parts + index, mask=ok, other=0.0)
        parts += count
    tl.store(out + index, total.to(out.dtype.element_ty), mask=ok)
