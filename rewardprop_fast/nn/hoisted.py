"""What the UNet's calls of one rollout have in common, as its fast blocks take it.

Both stand where a tensor is expected: a `Context` for the text's embeddings, a `Moment` for the
time's. diffusers' UNet and its blocks only pass these on; the fast classes look into them. To
`torch.utils._pytree` they are containers of tensors, so that a block that is recomputed has these
among its inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node


@dataclass(frozen=True, eq=False)
class Context:
    """The text's embeddings, and what attention layers make of them.

    Attributes:
        embeddings: (B, L, D).
        pairs: attention -> its keys and values, (B, L, C) each.
    """

    embeddings: Tensor
    pairs: Mapping[nn.Module, tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Moment:
    """The time's embedding at one step, and what the resnets add of it.

    Attributes:
        embedding: (R, D); R is 1 where all rows of the batch are told the same, else B.
        rows: (R, sum of C), of all resnets side by side.
        places: resnet -> its first column, and how many.
    """

    embedding: Tensor
    rows: Tensor
    places: Mapping[nn.Module, tuple[int, int]]

    @property
    def dtype(self) -> torch.dtype:
        """As the UNet asks of a time embedding."""
        return self.embedding.dtype

    def __add__(self, other: Tensor) -> Moment:
        """The UNet adds SDXL's conditions, which are part of this already."""
        return self

    def row(self, resnet: nn.Module) -> Tensor | None:
        """(R, C, 1, 1), or None where the resnet has none here."""
        place = self.places.get(resnet)
        return None if place is None else self.rows.narrow(1, *place)[:, :, None, None]


def embeddings_of(context: Any) -> Any:
    """What takes no `Context` gets the embeddings."""
    return context.embeddings if type(context) is Context else context


def embedding_of(moment: Any) -> Any:
    """What takes no `Moment` gets the embedding."""
    return moment.embedding if type(moment) is Moment else moment


def _flat_context(context: Context) -> tuple[list[Any], Any]:
    # The pairs live as long as their graph; a block that is recomputed finds these very tensors.
    return [context.embeddings], context.pairs


def _context(parts: Any, pairs: Any) -> Context:
    (embeddings,) = parts
    return Context(embeddings, pairs)


def _flat_moment(moment: Moment) -> tuple[list[Any], Any]:
    return [moment.embedding, moment.rows], moment.places


def _moment(parts: Any, places: Any) -> Moment:
    embedding, rows = parts
    return Moment(embedding, rows, places)


register_pytree_node(
    Context, _flat_context, _context, serialized_type_name="rewardprop_fast.Context"
)
register_pytree_node(Moment, _flat_moment, _moment, serialized_type_name="rewardprop_fast.Moment")
