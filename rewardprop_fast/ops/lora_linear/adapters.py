"""Several adapters as one: their A stacked, their B one after the other in one flat array.

A custom operator passes gradients to tensors that are arguments themselves, not to those in lists.
``torch.cat`` has a gradient of its own, which splits; adapters are small, so the copy costs nothing
beside the layers. A single adapter is not copied at all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def join(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """A as (R, K) with R the sum of the ranks, and B flat; ``parts`` are all A and then all B."""
    lora_as, lora_bs = parts[: len(parts) // 2], parts[len(parts) // 2 :]
    if len(lora_as) == 1:
        return lora_as[0], lora_bs[0].reshape(-1)
    return torch.cat(tuple(lora_as)), torch.cat([b_NR.reshape(-1) for b_NR in lora_bs])


def split(lora_b: Tensor, weights: Sequence[Tensor], ranks: Sequence[int]) -> list[Tensor]:
    """Each layer's B (N, r) as a view of the flat array."""
    if len(ranks) == 1:
        return [lora_b.view(weights[0].shape[0], ranks[0])]
    shapes = [(w_NK.shape[0], rank) for w_NK, rank in zip(weights, ranks, strict=True)]
    parts = lora_b.split([rows * rank for rows, rank in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def columns(ranks: Sequence[int]) -> list[slice]:
    """Where each layer's adapter lies among the R columns of S = x A^T."""
    ends = [sum(ranks[: i + 1]) for i in range(len(ranks))]
    return [slice(end - rank, end) for end, rank in zip(ends, ranks, strict=True)]
