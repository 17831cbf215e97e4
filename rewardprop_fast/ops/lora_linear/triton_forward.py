"""Triton kernels of `lora_linear`, forward: y_i = x W_i^T + b_i + s_i (x A_i^T) B_i^T.

Up to three layers of one width N and one rank R go in one launch (q, k and v), so that they read x
together; their adapters lie joined, layer after layer.

Legend: M rows, K inputs, N outputs, R rank of one layer; a name in capitals with a size, such as
``BLOCK_N``, is a tile's. Ranks are padded to ``BLOCK_R``, a power of two of at least 16, with zeros
that are not stored anywhere.
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
def fused_kernel(
    x,
    w0,
    w1,
    w2,
    bias0,
    bias1,
    bias2,
    lora_a,
    lora_b,
    y0,
    y1,
    y2,
    s,
    scale0,
    scale1,
    scale2,
    M,
    K,
    N,
    R,
    LAYERS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All in one: every program multiplies its tile of x by its tiles of W and of A.

    The columns' programs of one row block follow each other, so x comes from memory once. Each
    computes S anew, which for a narrow layer costs less than reading x again.
    """
    across = tl.cdiv(N, BLOCK_N)
    column = tl.program_id(0) % (LAYERS * across)
    layer = column // across
    row = (tl.program_id(0) // (LAYERS * across)) * BLOCK_M
    m = tl.arange(0, BLOCK_M)
    n = (column % across) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    x = from_row(x, row, K)
    w = pick(layer, w0, w1, w2, LAYERS)
    a = lora_a + layer * R * K
    b = lora_b + layer * N * R

    y_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    s_MR = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x_MK = load_tile(x, m, k, K, 1, M - row, K)
        w_KN = load_tile(w, k, n, 1, K, K, N)
        a_KR = load_tile(a, k, r, 1, K, K, R)
        y_MN = tl.dot(x_MK, w_KN, y_MN, input_precision=PRECISION)
        s_MR = tl.dot(x_MK, a_KR, s_MR, input_precision=PRECISION)

    kept_MR = s_MR.to(x.dtype.element_ty)
    if column % across == 0:
        kept = from_row(s, row, LAYERS * R) + layer * R
        store_tile(kept, m, r, LAYERS * R, M - row, R, kept_MR)
    b_RN = load_tile(b, r, n, 1, R, R, N)
    low_MN = tl.dot(kept_MR, b_RN, input_precision=PRECISION)
    y_MN += pick(layer, scale0, scale1, scale2, LAYERS) * low_MN
    if HAS_BIAS:
        bias = tl.load(pick(layer, bias0, bias1, bias2, LAYERS) + n, mask=n < N, other=0.0)
        y_MN += bias.to(tl.float32)[None, :]
    y = from_row(pick(layer, y0, y1, y2, LAYERS), row, N)
    store_tile(y, m, n, N, M - row, N, y_MN)


@triton.jit
def project_kernel(
    x,
    lora_a,
    s,
    M,
    K,
    R,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """S = x A^T for all layers at once: here R is the sum of their ranks."""
    across = tl.cdiv(R, BLOCK_R)
    row = (tl.program_id(0) // across) * BLOCK_M
    m = tl.arange(0, BLOCK_M)
    r = (tl.program_id(0) % across) * BLOCK_R + tl.arange(0, BLOCK_R)
    x = from_row(x, row, K)
    s_MR = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x_MK = load_tile(x, m, k, K, 1, M - row, K)
        a_KR = load_tile(lora_a, k, r, 1, K, K, R)
        s_MR = tl.dot(x_MK, a_KR, s_MR, input_precision=PRECISION)
    store_tile(from_row(s, row, R), m, r, R, M - row, R, s_MR)


@triton.jit
def main_kernel(
    x,
    w0,
    w1,
    w2,
    bias0,
    bias1,
    bias2,
    lora_b,
    y0,
    y1,
    y2,
    s,
    scale0,
    scale1,
    scale2,
    M,
    K,
    N,
    R,
    S_WIDTH,
    LAYERS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The large product, started from s S B^T instead of from zero; S is there already.

    ``s`` begins at the first of these layers' columns, ``S_WIDTH`` is the width of the whole S.
    """
    across = tl.cdiv(N, BLOCK_N)
    block_m, column = grouped(tl.program_id(0), tl.cdiv(M, BLOCK_M), LAYERS * across, GROUP)
    layer = column // across
    row = block_m * BLOCK_M
    m = tl.arange(0, BLOCK_M)
    n = (column % across) * BLOCK_N + tl.arange(0, BLOCK_N)
    x = from_row(x, row, K)
    s = from_row(s, row, S_WIDTH) + layer * R
    w = pick(layer, w0, w1, w2, LAYERS)
    b = lora_b + layer * N * R

    y_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, R, BLOCK_R, num_stages=1):
        r = start + tl.arange(0, BLOCK_R)
        s_MR = load_tile(s, m, r, S_WIDTH, 1, M - row, R)
        b_RN = load_tile(b, r, n, 1, R, R, N)
        y_MN = tl.dot(s_MR, b_RN, y_MN, input_precision=PRECISION)
    y_MN *= pick(layer, scale0, scale1, scale2, LAYERS)
    if HAS_BIAS:
        bias = tl.load(pick(layer, bias0, bias1, bias2, LAYERS) + n, mask=n < N, other=0.0)
        y_MN += bias.to(tl.float32)[None, :]
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x_MK = load_tile(x, m, k, K, 1, M - row, K)
        w_KN = load_tile(w, k, n, 1, K, K, N)
        y_MN = tl.dot(x_MK, w_KN, y_MN, input_precision=PRECISION)
    y = from_row(pick(layer, y0, y1, y2, LAYERS), row, N)
    store_tile(y, m, n, N, M - row, N, y_MN)
