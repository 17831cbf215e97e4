"""One case timed: forward, backward and both; and what it keeps for backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases.protocol import Arguments, Case, Function, tensors, with_leaves
from benchmarks.timing import Timing, interleaved
from rewardprop_fast.memory import MemoryTracker

OURS = "rewardprop_fast"
COMPILED = "torch.compile"

#: The first is there already; the second runs on GPUs alone.
_LEFT_OUT = ("eager", "xformers")

#: What is timed; "both" is a forward and a backward pass.
PASSES = ("forward", "backward", "both")


def variants(case: Case, compiled: bool) -> dict[str, Function]:
    """The operator and its rivals by name, "eager" first; compiled ones compile when first run."""
    found: dict[str, Function] = {"eager": case.baselines["eager"]}
    if compiled:
        found[COMPILED] = torch.compile(case.baselines["eager"], dynamic=False, fullgraph=True)
    found |= {n: function for n, function in case.baselines.items() if n not in _LEFT_OUT}
    return {**found, OURS: case.call}


def time_case(
    case: Case, arguments: Arguments, functions: Mapping[str, Function], rounds: int
) -> dict[str, dict[str, Timing]]:
    """pass -> variant -> its times. A case without gradients has only its forward pass."""
    forward = {
        name: lambda function=function: function(**with_leaves(case, arguments))
        for name, function in functions.items()
    }
    found = {"forward": interleaved(forward, rounds=rounds)}
    if not case.leaves:
        return found
    passes = {name: _passes(case, function, arguments) for name, function in functions.items()}
    found["backward"] = interleaved({n: one[0] for n, one in passes.items()}, rounds=rounds)
    found["both"] = interleaved({n: one[1] for n, one in passes.items()}, rounds=rounds)
    return found


def _passes(
    case: Case, function: Function, arguments: Arguments
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The backward pass of one graph, run again and again; and a forward and backward pass."""
    with_graph = with_leaves(case, arguments)
    outputs = tensors(function(**with_graph))
    grads = tuple(torch.randn_like(output) for output in outputs)
    leaves = [with_graph[name] for name in case.leaves]

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, leaves, grads, retain_graph=True)

    def both() -> None:
        own = with_leaves(case, arguments)
        torch.autograd.grad(tensors(function(**own)), [own[name] for name in case.leaves], grads)

    return backward, both


def kept_bytes(case: Case, arguments: Arguments, function: Function) -> int:
    """Bytes that the forward pass makes and autograd keeps, the outputs left out."""
    with MemoryTracker() as tracker:
        tracker.count(value for value in arguments.values() if isinstance(value, Tensor))
        outputs = tensors(function(**with_leaves(case, arguments)))
        made = sum(holding.nbytes for holding in tracker.alive() if holding.operator != "given")
    own = {output.untyped_storage()._cdata: output.untyped_storage().nbytes() for output in outputs}
    return made - sum(own.values())
