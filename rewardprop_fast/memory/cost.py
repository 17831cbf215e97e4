"""What an operation costs: the FLOPs it computes and the bytes it must read and write.

Both follow from shapes, strides and dtypes alone, so fake tensors are as good as real ones, and
nothing is decomposed: a fused operator is one operation, with the formula that lives beside it
(`ops.flops`); PyTorch's operations have those of `torch.utils.flop_counter`.

FLOPs are those of matrix products and convolutions, a multiply-add being two; masks save none.
Bytes are a floor: each argument and each result passes once. An operation that is short
of cache, or that needs two passes over its input as a large norm does, moves more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils import flop_counter

from rewardprop_fast.memory.signature import signature
from rewardprop_fast.ops.flops import FLOP_FORMULAS

aten = torch.ops.aten


@dataclass(frozen=True)
class Cost:
    """Of one operation.

    Attributes:
        flops: of products and convolutions.
        nbytes: read and written at least.
        dtype: what is computed with, that of the first floating-point tensor.
    """

    flops: int
    nbytes: int
    dtype: torch.dtype


def cost_of(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Cost:
    """The cost of one dispatched operation.

    Args:
        func: the ``torch._ops.OpOverload`` that ``__torch_dispatch__`` was given.
        args, kwargs: its arguments.
        output: what it returned.
    """
    return Cost(
        _flops(func, args, kwargs, output),
        _nbytes(func, args, kwargs, output),
        _dtype((args, kwargs), output),
    )


class CostCounter:
    """Adds up costs, to be told of every operation by whichever dispatch mode is running.

    Networks repeat themselves: the cost of a call is kept under its operation, shapes, strides and
    dtypes, and costs a few microseconds the next time.

    Attributes:
        costs: how often each cost was seen.
    """

    def __init__(self) -> None:
        self.costs: Counter[Cost] = Counter()
        self._known: dict[Any, Cost] = {}

    def see(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Cost:
        """Count one call, as `cost_of`, and return its cost."""
        key = signature(func, args, kwargs)
        cost = self._known.get(key)
        if cost is None:
            cost = cost_of(func, args, kwargs, output)
            if torch.Tag.dynamic_output_shape not in func.tags:
                self._known[key] = cost
        self.costs[cost] += 1
        return cost

    @property
    def flops(self) -> int:
        """All that was computed, in every dtype."""
        return sum(cost.flops * count for cost, count in self.costs.items())

    @property
    def nbytes(self) -> int:
        """All that was read and written."""
        return sum(cost.nbytes * count for cost, count in self.costs.items())


# --- FLOPs ---


def _vector_product(matrix: Any, vector: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * prod(matrix)


def _added_vector_product(_: Any, matrix: Any, *rest: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * prod(matrix)


def _attention(q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(flop_counter.sdpa_flop_count(q, k, v))


def _attention_backward(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return int(flop_counter.sdpa_backward_flop_count(grad, q, k, v))


def _convolution_backward_flops(
    grad: Any, x: Any, weight: Any, *rest: Any, out_shape: Any = None
) -> int:
    """Each gradient takes the forward pass's multiply-adds once more, also with groups.

    (`torch.utils.flop_counter` counts the gradient of a weight as if there were one group.)
    """
    transposed, needed = rest[4], rest[-1]
    return 2 * prod(x if transposed else grad) * prod(weight[1:]) * sum(map(bool, needed[:2]))


#: What `torch.utils.flop_counter` leaves out or counts otherwise.
_OWN = {
    aten.mv: _vector_product,
    aten.dot: _vector_product,
    aten.vdot: _vector_product,
    aten.addmv: _added_vector_product,
    aten.convolution_backward: _convolution_backward_flops,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten._scaled_dot_product_fused_attention_overrideable: _attention,
}

_FORMULAS: dict[Any, Any] = {
    **flop_counter.flop_registry,
    **{
        packet: flop_counter.shape_wrapper(formula)
        for packet, formula in (*FLOP_FORMULAS.items(), *_OWN.items())
    },
}


def _flops(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> int:
    formula = _FORMULAS.get(func._overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=output))


# --- bytes ---

#: Memory that is given and not written, and views whose schema does not say so.
_NOTHING_MOVES = {
    aten.empty,
    aten.empty_like,
    aten.empty_permuted,
    aten.empty_strided,
    aten.new_empty,
    aten.new_empty_strided,
    aten._unsafe_view,
    aten.resize_,
    aten.set_,
    aten.record_stream,
    aten.is_pinned,
    aten.is_same_size,
}

#: Written without being read: the first argument.
_OVERWRITES = {
    aten.copy_,
    aten.fill_,
    aten.zero_,
    aten.normal_,
    aten.uniform_,
    aten.random_,
    aten.bernoulli_,
    aten.exponential_,
}

#: Reads as much of the first tensor as it writes, however large that tensor is.
_PICKS = {aten.embedding, aten.gather, aten.index, aten.index_select, aten.take}


def _nbytes(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> int:
    packet = func._overloadpacket
    if (
        func.is_view
        or packet in _NOTHING_MOVES
        or func.namespace == "prim"
        or torch.Tag.inplace_view in func.tags
    ):
        return 0
    written = [*_new(func, output), *_mutated(func, args, kwargs)]
    read = [*_tensors(args), *_tensors([v for k, v in kwargs.items() if k not in _outs(func)])]
    if packet in _OVERWRITES:
        del read[0]
    elif packet in _PICKS:
        read[0] = next(iter(_tensors(output)))
    elif packet in _UNREAD:
        read = _UNREAD[packet](args, read)
    return sum(map(_held, (*read, *written)))


def _convolution_backward(args: tuple[Any, ...], read: list[Tensor]) -> list[Tensor]:
    """x is read for the gradient of the weight alone, the weight for that of x alone."""
    grad, x, weight = args[:3]
    for_x, for_weight, _ = args[-1]
    return [grad, *([x] if for_weight else []), *([weight] if for_x else [])]


def _lora_linear(args: tuple[Any, ...], read: list[Tensor]) -> list[Tensor]:
    """What the adapters were joined of is there to be kept; the joined ones are read."""
    return [*_tensors(args[:5])]


def _lora_linear_backward(args: tuple[Any, ...], read: list[Tensor]) -> list[Tensor]:
    """The weights are read for the gradient of x alone."""
    weights, needed = args[1], args[-1]
    return read if needed[0] else [t for t in read if not any(t is weight for weight in weights)]


#: Arguments that are there and not read, or only where certain gradients are needed.
_UNREAD = {
    aten.convolution_backward: _convolution_backward,
    torch.ops.rewardprop_fast.lora_linear: _lora_linear,
    torch.ops.rewardprop_fast.lora_linear_backward: _lora_linear_backward,
}


def _outs(func: Any) -> set[str]:
    """Names of the arguments the result is written to, of an out= form."""
    return {argument.name for argument in func._schema.arguments if argument.is_out}


def _new(func: Any, output: Any) -> Iterator[Tensor]:
    """The outputs that are not arguments themselves."""
    returns = func._schema.returns
    values = output if len(returns) > 1 else [output]
    for value, declared in zip(values, returns, strict=False):  # in-place lists return nothing
        if declared.alias_info is None:
            yield from _tensors(value)


def _mutated(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """The tensors an operation in place or with out= writes to."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            yield from _tensors(value)


def _tensors(values: Any) -> Iterator[Tensor]:
    """In order, from lists too."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)


def _held(tensor: Tensor) -> int:
    """Bytes of the elements; of those spread by a stride of 0, one."""
    if tensor.layout != torch.strided:
        return int(tensor.numel() * tensor.itemsize)
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    held = prod(size if stride else min(size, 1) for size, stride in sizes)
    return int(held * tensor.itemsize)


def _dtype(arguments: Any, output: Any) -> torch.dtype:
    args, kwargs = arguments
    for tensor in (*_tensors(args), *_tensors([*kwargs.values()]), *_tensors(output)):
        if tensor.is_floating_point() or tensor.is_complex():
            return tensor.dtype
    return torch.get_default_dtype()
