"""Triton kernels of group normalisation, for channels first and last by the strides of a tile.

Shape legend: B images, P positions, C channels, G groups of D = C / G channels, S slices of the
positions. A tile is (positions, channels).

Two forms. *Whole*: one program holds a whole group in registers, so x (and the gradient) is read
once. *Sliced*: programs share out the positions and all channels, so that one image fills a GPU;
statistics by slice, joined by a second kernel in a fixed order, and a third kernel reads x again,
beginning with what was read last. No atomics: the result is the same every time.
"""

# mypy: disable-error-code="no-untyped-def"
# Parameters of kernels are Triton's own: pointers, numbers, compile-time constants.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _offsets(image, p, c, positions_P, channels_C, CHANNELS_LAST: tl.constexpr):
    """Where (image, p, c) lies; ``image`` and ``p`` are int64, so the products are."""
    base = image * positions_P * channels_C
    if CHANNELS_LAST:
        return base + p * channels_C + c
    return base + c.to(tl.int64) * positions_P + p


@triton.jit
def _parameter(pointer, c, inside, default: tl.constexpr):
    """Weight or bias of the channels ``c``, or what stands for none."""
    if pointer is None:
        return tl.full(c.shape, default, tl.float32)
    return tl.load(pointer + c, mask=inside, other=default).to(tl.float32)


@triton.jit
def _slope(z, SILU: tl.constexpr):
    """dy / dz."""
    if SILU:
        s = 1.0 / (1.0 + tl.exp(-z))
        return s * (1.0 + z * (1.0 - s))
    return tl.full(z.shape, 1.0, tl.float32)


@triton.jit
def _activation(z, SILU: tl.constexpr):
    if SILU:
        return z / (1.0 + tl.exp(-z))
    return z


# --- whole: a group in one program ---


@triton.jit
def _whole(
    positions_P, channels_C, groups_G,
    WIDTH_D: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The group's number, its image's first element, its channels, offsets of its elements from
    there, and which of both exist.

    An image is so small here that its offsets are int32, and the width is known to the compiler,
    which then knows how far memory may be read in vectors: both save registers.
    """
    index = tl.program_id(0)
    base = (index // groups_G).to(tl.int64) * positions_P * channels_C
    p = tl.arange(0, BLOCK_P)[:, None]
    k = tl.arange(0, BLOCK_C)[None, :]
    c = (index % groups_G) * WIDTH_D + k
    if CHANNELS_LAST:
        at = p * channels_C + c
    else:
        at = c * positions_P + p
    return index, base, c, at, k < WIDTH_D, (p < positions_P) & (k < WIDTH_D)


@triton.jit
def whole_forward_kernel(
    x, weight, bias, mean, rstd, y, positions_P, channels_C, groups_G, eps,
    WIDTH_D: tl.constexpr, CHANNELS_LAST: tl.constexpr, SILU: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    index, base, c, at, real, inside = _whole(
        positions_P, channels_C, groups_G, WIDTH_D, CHANNELS_LAST, BLOCK_P, BLOCK_C
    )
    size = positions_P * WIDTH_D
    v = tl.load(x + base + at, mask=inside, other=0.0).to(tl.float32)
    m = tl.sum(v) / size
    distance = tl.where(inside, v - m, 0.0)
    r = 1.0 / tl.sqrt_rn(tl.sum(distance * distance) / size + eps)
    tl.store(mean + index, m)
    tl.store(rstd + index, r)
    z = distance * r * _parameter(weight, c, real, 1.0) + _parameter(bias, c, real, 0.0)
    tl.store(y + base + at, _activation(z, SILU).to(y.dtype.element_ty), mask=inside)


@triton.jit
def whole_backward_kernel(
    grad, x, mean, rstd, weight, bias, grad_x, sums, positions_P, channels_C, groups_G, batch_B,
    WIDTH_D: tl.constexpr, CHANNELS_LAST: tl.constexpr, SILU: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grad_x, and sums (2, B, C): of grad_z and of grad_z xhat; either may be None."""
    index, base, c, at, real, inside = _whole(
        positions_P, channels_C, groups_G, WIDTH_D, CHANNELS_LAST, BLOCK_P, BLOCK_C
    )
    size = positions_P * WIDTH_D
    m, r = tl.load(mean + index), tl.load(rstd + index)
    w, b = _parameter(weight, c, real, 1.0), _parameter(bias, c, real, 0.0)
    v = tl.load(x + base + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + base + at, mask=inside, other=0.0).to(tl.float32)
    xhat = (v - m) * r
    grad_z = g * _slope(xhat * w + b, SILU)
    if sums is not None:
        own = sums + (index // groups_G).to(tl.int64) * channels_C + c
        tl.store(own, tl.sum(grad_z, 0, keep_dims=True), mask=real)
        of_product = tl.sum(grad_z * xhat, 0, keep_dims=True)
        tl.store(own + batch_B.to(tl.int64) * channels_C, of_product, mask=real)
    if grad_x is not None:
        grad_xhat = grad_z * w
        mean_grad = tl.sum(grad_xhat) / size
        mean_product = tl.sum(grad_xhat * xhat) / size
        result = r * (grad_xhat - mean_grad - xhat * mean_product)
        tl.store(grad_x + base + at, result.to(grad_x.dtype.element_ty), mask=inside)


# --- sliced: the positions shared out ---


@triton.jit
def _slice(channels_C, slices_S, BLOCK_C: tl.constexpr):
    """The program's image, slice and channels. Neighbours take neighbouring channels."""
    blocks = tl.cdiv(channels_C, BLOCK_C)
    program = tl.program_id(0)
    c = (program % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    rest = program // blocks
    return (rest // slices_S).to(tl.int64), rest % slices_S, c


@triton.jit
def moments_kernel(
    x, partial, positions_P, channels_C, slice_P, slices_S,
    CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partial (B, S, 2, C): each channel's mean over the slice, and sum of squared distances.

    Every lane of the tile keeps a Welford mean of its own; they are joined at the end. Values are
    taken as distances from the slice's first, so that a large mean does not blur them.
    """
    image, number, c = _slice(channels_C, slices_S, BLOCK_C)
    begin = number * slice_P
    end = tl.minimum(begin + slice_P, positions_P)
    real = c < channels_C
    origin = _offsets(image, begin.to(tl.int64), c, positions_P, channels_C, CHANNELS_LAST)
    first = tl.load(x + origin, mask=real, other=0.0).to(tl.float32)
    count = tl.zeros((BLOCK_P, 1), tl.float32)
    mean = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(begin, end, BLOCK_P):
        p = (start + tl.arange(0, BLOCK_P)[:, None]).to(tl.int64)
        row = p < end
        at = _offsets(image, p, c, positions_P, channels_C, CHANNELS_LAST)
        v = tl.load(x + at, mask=row & real, other=0.0).to(tl.float32) - first
        count += row.to(tl.float32)
        delta = v - mean
        mean += tl.where(row, delta / tl.maximum(count, 1.0), 0.0)
        squares += tl.where(row, delta * (v - mean), 0.0)
    total = (end - begin).to(tl.float32)
    joined = tl.sum(mean * count, 0, keep_dims=True) / total
    distance = mean - joined
    joined_squares = tl.sum(squares + count * distance * distance, 0, keep_dims=True)
    own = partial + (image * slices_S + number) * 2 * channels_C + c
    tl.store(own, first + joined, mask=real)
    tl.store(own + channels_C, joined_squares, mask=real)


@triton.jit
def join_moments_kernel(
    partial, mean, rstd, positions_P, channels_C, groups_G, slice_P, slices_S, eps,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """mean and rstd (B, G) of what `moments_kernel` left: the mean first, then the distances."""
    index = tl.program_id(0)
    image = (index // groups_G).to(tl.int64)
    width = channels_C // groups_G
    k = tl.arange(0, BLOCK_C)[None, :]
    own = partial + image * slices_S * 2 * channels_C + (index % groups_G) * width + k
    size = positions_P.to(tl.float32) * width

    # Means are summed as distances from the first, which a large mean does not blur.
    first = tl.load(partial + image * slices_S * 2 * channels_C + (index % groups_G) * width)
    shift = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for start in range(0, slices_S, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)[:, None]
        inside = (s < slices_S) & (k < width)
        count = tl.minimum(slice_P, positions_P - s * slice_P).to(tl.float32)
        m = tl.load(own + s * 2 * channels_C, mask=inside, other=0.0)
        shift += tl.where(inside, count * (m - first), 0.0)
    of_group = first + tl.sum(shift) / size

    squares = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for start in range(0, slices_S, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)[:, None]
        inside = (s < slices_S) & (k < width)
        count = tl.minimum(slice_P, positions_P - s * slice_P).to(tl.float32)
        m = tl.load(own + s * 2 * channels_C, mask=inside, other=0.0)
        q = tl.load(own + (s * 2 + 1) * channels_C, mask=inside, other=0.0)
        squares += tl.where(inside, q + count * (m - of_group) * (m - of_group), 0.0)
    tl.store(mean + index, of_group)
    tl.store(rstd + index, 1.0 / tl.sqrt_rn(tl.sum(squares) / size + eps))


@triton.jit
def normalise_kernel(
    x, weight, bias, mean, rstd, y, positions_P, channels_C, groups_G, slice_P, slices_S,
    CHANNELS_LAST: tl.constexpr, SILU: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    image, number, c = _slice(channels_C, slices_S, BLOCK_C)
    real = c < channels_C
    group = image * groups_G + c // (channels_C // groups_G)
    m = tl.load(mean + group, mask=real, other=0.0)
    scale = tl.load(rstd + group, mask=real, other=0.0) * _parameter(weight, c, real, 1.0)
    b = _parameter(bias, c, real, 0.0)
    begin = number * slice_P
    end = tl.minimum(begin + slice_P, positions_P)
    steps = tl.cdiv(end - begin, BLOCK_P)
    for step in range(steps):
        # Backwards: the cache holds what was read last.
        p = (begin + (steps - 1 - step) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]).to(tl.int64)
        inside = (p < end) & real
        at = _offsets(image, p, c, positions_P, channels_C, CHANNELS_LAST)
        v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        z = (v - m) * scale + b
        tl.store(y + at, _activation(z, SILU).to(y.dtype.element_ty), mask=inside)


@triton.jit
def sums_kernel(
    grad, x, mean, rstd, weight, bias, partial, positions_P, channels_C, groups_G, slice_P,
    slices_S,
    CHANNELS_LAST: tl.constexpr, SILU: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partial (B, S, 2, C): each channel's sums of grad_z and of grad_z xhat over the slice."""
    image, number, c = _slice(channels_C, slices_S, BLOCK_C)
    real = c < channels_C
    group = image * groups_G + c // (channels_C // groups_G)
    m = tl.load(mean + group, mask=real, other=0.0)
    r = tl.load(rstd + group, mask=real, other=0.0)
    w, b = _parameter(weight, c, real, 1.0), _parameter(bias, c, real, 0.0)
    begin = number * slice_P
    end = tl.minimum(begin + slice_P, positions_P)
    of_grad_z = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    of_product = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(begin, end, BLOCK_P):
        p = (start + tl.arange(0, BLOCK_P)[:, None]).to(tl.int64)
        inside = (p < end) & real
        at = _offsets(image, p, c, positions_P, channels_C, CHANNELS_LAST)
        v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        xhat = (v - m) * r
        grad_z = g * _slope(xhat * w + b, SILU)
        of_grad_z += grad_z
        of_product += grad_z * xhat
    own = partial + (image * slices_S + number) * 2 * channels_C + c
    tl.store(own, tl.sum(of_grad_z, 0, keep_dims=True), mask=real)
    tl.store(own + channels_C, tl.sum(of_product, 0, keep_dims=True), mask=real)


@triton.jit
def join_sums_kernel(
    partial, weight, group_means, sums, positions_P, channels_C, groups_G, slices_S, batch_B,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Of what `sums_kernel` left: group_means (B, G, 2), of weight grad_z and weight grad_z xhat,
    and, where it is not None, sums (2, B, C) over all slices."""
    index = tl.program_id(0)
    image = (index // groups_G).to(tl.int64)
    width = channels_C // groups_G
    k = tl.arange(0, BLOCK_C)[None, :]
    c = (index % groups_G) * width + k
    real = k < width
    own = partial + image * slices_S * 2 * channels_C + c
    of_grad_z = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    of_product = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for start in range(0, slices_S, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)[:, None]
        inside = (s < slices_S) & real
        of_grad_z += tl.load(own + s * 2 * channels_C, mask=inside, other=0.0)
        of_product += tl.load(own + (s * 2 + 1) * channels_C, mask=inside, other=0.0)
    grad_z = tl.sum(of_grad_z, 0, keep_dims=True)
    product = tl.sum(of_product, 0, keep_dims=True)
    w = _parameter(weight, c, real, 1.0)
    size = positions_P.to(tl.float32) * width
    tl.store(group_means + index * 2, tl.sum(grad_z * w) / size)
    tl.store(group_means + index * 2 + 1, tl.sum(product * w) / size)
    if sums is not None:
        tl.store(sums + image * channels_C + c, grad_z, mask=real)
        tl.store(sums + (batch_B + image) * channels_C + c, product, mask=real)


@triton.jit
def input_gradient_kernel(
    grad, x, mean, rstd, weight, bias, group_means, grad_x, positions_P, channels_C, groups_G,
    slice_P, slices_S,
    CHANNELS_LAST: tl.constexpr, SILU: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    image, number, c = _slice(channels_C, slices_S, BLOCK_C)
    real = c < channels_C
    group = image * groups_G + c // (channels_C // groups_G)
    m = tl.load(mean + group, mask=real, other=0.0)
    r = tl.load(rstd + group, mask=real, other=0.0)
    mean_grad = tl.load(group_means + group * 2, mask=real, other=0.0)
    mean_product = tl.load(group_means + group * 2 + 1, mask=real, other=0.0)
    w, b = _parameter(weight, c, real, 1.0), _parameter(bias, c, real, 0.0)
    begin = number * slice_P
    end = tl.minimum(begin + slice_P, positions_P)
    steps = tl.cdiv(end - begin, BLOCK_P)
    for step in range(steps):
        p = (begin + (steps - 1 - step) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]).to(tl.int64)
        inside = (p < end) & real
        at = _offsets(image, p, c, positions_P, channels_C, CHANNELS_LAST)
        v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        xhat = (v - m) * r
        grad_xhat = g * _slope(xhat * w + b, SILU) * w
        result = r * (grad_xhat - mean_grad - xhat * mean_product)
        tl.store(grad_x + at, result.to(grad_x.dtype.element_ty), mask=inside)


# --- both ---


@triton.jit
def parameter_gradient_kernel(
    sums, gradient, batch_B, channels_C, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """gradient (C,): one half of sums (2, B, C) over the batch."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    real = c < channels_C
    total = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    for start in range(0, batch_B, BLOCK_B):
        image = (start + tl.arange(0, BLOCK_B)[:, None]).to(tl.int64)
        total += tl.load(sums + image * channels_C + c, mask=(image < batch_B) & real, other=0.0)
    result = tl.sum(total, 0, keep_dims=True)
    tl.store(gradient + c, result.to(gradient.dtype.element_ty), mask=real)
