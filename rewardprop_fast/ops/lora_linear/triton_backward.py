"""Triton kernels of `lora_linear`, backward, from the layers' dY:

    T_i = s_i dY_i B_i,  dX = sum_i dY_i W_i + T_i A_i,  dA = T^T x,  dB_i = s_i dY_i^T S_i

dA and dB are sums over all rows. Row blocks write partial sums in float32, which `sum_kernel` adds
in a fixed order: no atomics, the same bits every time. Legend as in `triton_forward`.
"""

# Triton gives a kernel's arguments their types when it compiles it.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from rewardprop_fast.ops.lora_linear.triton_common import (
    from_row,
    grouped,
    load_tile,
    pick,
    store_tile,
)


@triton.jit
def _through_layer(
    dx_MK,
    dy,
    w,
    a,
    b,
    s,
    t,
    db,
    scale,
    m,
    k,
    first,
    rows_left,
    K,
    N,
    R,
    WIDTH,
    WITH_DB: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One layer's part of a dX tile, from one reading of dY; the ``first`` of a row block's
    programs also writes T and this row block's part of dB.

    dB is computed transposed: so dY enters both products as it lies, and its tiles are still copied
    to shared memory ahead of time.
    """
    r = tl.arange(0, BLOCK_R)
    low_MR = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    if WITH_DB:
        s_RM = tl.trans(load_tile(s, m, r, WIDTH, 1, rows_left, R))
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        dy_MN = load_tile(dy, m, n, N, 1, rows_left, N)
        w_NK = load_tile(w, n, k, K, 1, N, K)
        b_NR = load_tile(b, n, r, R, 1, N, R)
        dx_MK = tl.dot(dy_MN, w_NK, dx_MK, input_precision=PRECISION)
        low_MR = tl.dot(dy_MN, b_NR, low_MR, input_precision=PRECISION)
        if WITH_DB:  # noqa: SIM102  # decided when this is compiled, `first` when it runs
            if first:
                db_NR = tl.trans(tl.dot(s_RM, dy_MN, input_precision=PRECISION))
                store_tile(db, n, r, R, N, R, scale * db_NR)
    t_MR = (scale * low_MR).to(t.dtype.element_ty)
    if first:
        store_tile(t, m, r, WIDTH, rows_left, R, t_MR)
    a_RK = load_tile(a, r, k, K, 1, R, K)
    return tl.dot(t_MR, a_RK, dx_MK, input_precision=PRECISION)


@triton.jit
def fused_kernel(
    dy0,
    dy1,
    dy2,
    w0,
    w1,
    w2,
    lora_a,
    lora_b,
    s,
    t,
    dx,
    db_parts,
    scale0,
    scale1,
    scale2,
    M,
    K,
    N,
    R,
    WIDTH,
    LAYERS: tl.constexpr,
    WITH_DB: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dX, T and parts of dB from one reading of every dY.

    ``s`` and ``t`` begin at the first of these layers' columns of ``WIDTH`` in all. With ``ADD``,
    dX already holds the part of other layers.
    """
    across = tl.cdiv(K, BLOCK_K)
    block_m = tl.program_id(0) // across
    first = tl.program_id(0) % across == 0
    row = block_m * BLOCK_M
    m = tl.arange(0, BLOCK_M)
    k = (tl.program_id(0) % across) * BLOCK_K + tl.arange(0, BLOCK_K)
    dx = from_row(dx, row, K)
    t = from_row(t, row, WIDTH)
    if WITH_DB:
        s = from_row(s, row, WIDTH)
        db_parts = from_row(db_parts, block_m, LAYERS * N * R)

    dx_MK = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    if ADD:
        dx_MK += load_tile(dx, m, k, K, 1, M - row, K).to(tl.float32)
    for layer in range(LAYERS):
        dx_MK = _through_layer(
            dx_MK,
            from_row(pick(layer, dy0, dy1, dy2, LAYERS), row, N),
            pick(layer, w0, w1, w2, LAYERS),
            lora_a + layer * R * K,
            lora_b + layer * N * R,
            s + layer * R if WITH_DB else s,
            t + layer * R,
            db_parts + layer * N * R if WITH_DB else db_parts,
            pick(layer, scale0, scale1, scale2, LAYERS),
            m,
            k,
            first,
            M - row,
            K,
            N,
            R,
            WIDTH,
            WITH_DB,
            BLOCK_M,
            BLOCK_N,
            BLOCK_R,
            PRECISION,
        )
    store_tile(dx, m, k, K, M - row, K, dx_MK)


@triton.jit
def low_kernel(
    dy0,
    dy1,
    dy2,
    lora_b,
    s,
    t,
    db_parts,
    scale0,
    scale1,
    scale2,
    M,
    N,
    R,
    WIDTH,
    LAYERS: tl.constexpr,
    WITH_DB: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """T and parts of dB from one reading of every dY."""
    across = tl.cdiv(R, BLOCK_R)
    column = tl.program_id(0) % (LAYERS * across)
    layer = column // across
    block_m = tl.program_id(0) // (LAYERS * across)
    row = block_m * BLOCK_M
    m = tl.arange(0, BLOCK_M)
    r = (column % across) * BLOCK_R + tl.arange(0, BLOCK_R)
    dy = from_row(pick(layer, dy0, dy1, dy2, LAYERS), row, N)
    scale = pick(layer, scale0, scale1, scale2, LAYERS)
    b = lora_b + layer * N * R

    low_MR = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    if WITH_DB:
        s = from_row(s, row, WIDTH) + layer * R
        s_RM = tl.trans(load_tile(s, m, r, WIDTH, 1, M - row, R))
        db = from_row(db_parts, block_m, LAYERS * N * R) + layer * N * R
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        dy_MN = load_tile(dy, m, n, N, 1, M - row, N)
        b_NR = load_tile(b, n, r, R, 1, N, R)
        low_MR = tl.dot(dy_MN, b_NR, low_MR, input_precision=PRECISION)
        if WITH_DB:
            db_NR = tl.trans(tl.dot(s_RM, dy_MN, input_precision=PRECISION))
            store_tile(db, n, r, R, N, R, scale * db_NR)
    t = from_row(t, row, WIDTH) + layer * R
    store_tile(t, m, r, WIDTH, M - row, R, scale * low_MR)


@triton.jit
def main_kernel(
    dy0,
    dy1,
    dy2,
    w0,
    w1,
    w2,
    lora_a,
    t,
    dx,
    M,
    K,
    N,
    R,
    WIDTH,
    LAYERS: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dX = T A + sum_i dY_i W_i; T is there already. Here R is the sum of these layers' ranks."""
    block_m, block_k = grouped(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K), GROUP)
    row = block_m * BLOCK_M
    m = tl.arange(0, BLOCK_M)
    k = block_k * BLOCK_K + tl.arange(0, BLOCK_K)
    t = from_row(t, row, WIDTH)
    dx = from_row(dx, row, K)
    dx_MK = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    if ADD:
        dx_MK += load_tile(dx, m, k, K, 1, M - row, K).to(tl.float32)
    for start in tl.range(0, R, BLOCK_R, num_stages=1):
        r = start + tl.arange(0, BLOCK_R)
        t_MR = load_tile(t, m, r, WIDTH, 1, M - row, R)
        a_RK = load_tile(lora_a, r, k, K, 1, R, K)
        dx_MK = tl.dot(t_MR, a_RK, dx_MK, input_precision=PRECISION)
    for layer in range(LAYERS):
        dy = from_row(pick(layer, dy0, dy1, dy2, LAYERS), row, N)
        w = pick(layer, w0, w1, w2, LAYERS)
        for start in range(0, N, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            dy_MN = load_tile(dy, m, n, N, 1, M - row, N)
            w_NK = load_tile(w, n, k, K, 1, N, K)
            dx_MK = tl.dot(dy_MN, w_NK, dx_MK, input_precision=PRECISION)
    store_tile(dx, m, k, K, M - row, K, dx_MK)


@triton.jit
def outer_kernel(
    p,
    q,
    out_parts,
    scale,
    M,
    P,
    Q,
    P_WIDTH,
    Q_WIDTH,
    BLOCKS_PER_PART,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One part of scale p^T q, summed over ``BLOCKS_PER_PART`` blocks of rows: dA from T and x, dB
    from dY and S."""
    across = tl.cdiv(Q, BLOCK_Q)
    tiles = tl.cdiv(P, BLOCK_P) * across
    part = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    i = (tile // across) * BLOCK_P + tl.arange(0, BLOCK_P)
    j = (tile % across) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    m = tl.arange(0, BLOCK_M)
    out_PQ = tl.zeros((BLOCK_P, BLOCK_Q), tl.float32)
    for block in range(BLOCKS_PER_PART):
        row = (part * BLOCKS_PER_PART + block) * BLOCK_M
        p_MP = load_tile(from_row(p, row, P_WIDTH), m, i, P_WIDTH, 1, M - row, P)
        q_MQ = load_tile(from_row(q, row, Q_WIDTH), m, j, Q_WIDTH, 1, M - row, Q)
        out_PQ = tl.dot(tl.trans(p_MP), q_MQ, out_PQ, input_precision=PRECISION)
    out = from_row(out_parts, part, P * Q)
    store_tile(out, i, j, Q, P, Q, scale * out_PQ)


@triton.jit
def sum_kernel(parts, out, PARTS, COUNT, BLOCK: tl.constexpr):
    """Adds the parts in order: out[e] = sum_p parts[p, e]."""
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    pointers = parts + e
    for _ in range(PARTS):
        total += tl.load(pointers, mask=e < COUNT, other=0.0)
        pointers += COUNT
    tl.store(out + e, total.to(out.dtype.element_ty), mask=e < COUNT)
