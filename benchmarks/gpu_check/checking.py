"""One form of an operator against float64: values, gradients, the same bits every time.

Also from strided inputs and gradients, and what becomes of NaN and infinity.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases.protocol import (
    Arguments,
    Case,
    converted,
    forward_and_backward,
    tensors,
)
from benchmarks.gpu_check.device import Device
from benchmarks.gpu_check.jobs import OWN, Job, Outcome
from rewardprop_fast import ops
from rewardprop_fast.errors import ConfigError
from tests.ops.oracle import poisoned, relative_error

#: How often an own form must give the same bits; where that takes so many seconds, the least times.
REPEATS, LEAST_REPEATS, REPEAT_SECONDS = 100, 5, 0.5

#: Fewer numbers than these are drawn several times, but not more often than this.
_NUMBERS, _DRAWS = 256, 32

Results = tuple[Tensor | None, ...]


def check(case: Case, job: Job, device: Device) -> Outcome:
    """Error against float64 at most twice that of eager PyTorch in the same dtype."""
    torch.manual_seed(0)
    first = _draw(case, job, device)
    few = min(result.numel() for result in first.exact if result is not None)
    # Of few numbers eager may be exact by luck: then several draws are judged together.
    more = min(_DRAWS, -(-_NUMBERS // max(1, few))) - 1
    draws = [first, *(_draw(case, job, device) for _ in range(more))]
    labels = names(case, first.exact)
    eagers, exact = (
        _together([getattr(draw, name) for draw in draws]) for name in ("eager", "exact")
    )
    multiples: list[float] = []

    def errors(strided: str) -> list[str]:
        found = _together([draw.ours(strided) for draw in draws])
        results = compare(labels, found, eagers, exact)
        multiples.extend(multiple for _, multiple in results.values())
        suffix = f" with strided {strided}" if strided else ""
        return [f"{label}{suffix}: {text}" for label, (text, _) in results.items() if text]

    wrong = errors("")
    for strided in ("gradients", "inputs"):
        wrong += _attempt(f"strided {strided}", partial(errors, strided), device)
    figures: dict[str, Any] = {"error_over_eager": max(multiples)}
    if job.variant in OWN:
        for special in (float("nan"), float("inf")):
            wrong += _attempt(f"{special}", partial(_spread, case, job, device, special), device)
        differing, figures["runs"] = _differing(first)
        figures["same_bits"] = not differing
        wrong += [f"{labels[index]} differs from run to run" for index in differing]
    return Outcome(job, "wrong" if wrong else "passed", "; ".join(wrong), figures)


@dataclass(frozen=True)
class _Draw:
    """One set of random arguments, and what is right and what eager makes of them."""

    ours: Callable[[str], Results]  # "gradients" or "inputs" that are strided, or ""
    eager: Results
    exact: Results


def _draw(case: Case, job: Job, device: Device) -> _Draw:
    arguments = case.make(device.type, getattr(torch, job.dtype))
    eager = case.baselines["eager"]
    grads = tuple(torch.randn_like(output) for output in tensors(eager(**arguments)))

    def ours(strided: str) -> Results:
        given, own = grads, arguments
        if strided == "gradients":
            given = tuple(_strided(grad) for grad in grads)
        if strided == "inputs":
            own = arguments | {name: _strided(arguments[name]) for name in case.leaves}
        with ops.backend(job.variant, strict=True), poisoned():
            return forward_and_backward(case, case.call, own, given)

    return _Draw(
        ours,
        forward_and_backward(case, eager, arguments, grads),
        forward_and_backward(case, eager, converted(arguments, torch.float64), grads),
    )


def _attempt(what: str, run: Callable[[], list[str]], device: Device) -> list[str]:
    """What is wrong, an error included: the other parts of the check go on.

    A form may refuse such arguments; then another one takes them.
    """
    try:
        return run()
    except ConfigError:
        return []
    except Exception as error:
        if device.broken_by(error) or device.out_of_memory(error):
            raise
        return [f"{what}: {type(error).__name__}: {error}"]


def _spread(case: Case, job: Job, device: Device, special: float) -> list[str]:
    """Results that are finite elsewhere than the reference's, where one number of an input is not.

    Gradients are compared for NaN alone: what infinities cancel to depends on the order of sums.
    """
    arguments = case.make(device.type, getattr(torch, job.dtype))
    outputs = tensors(case.baselines["eager"](**arguments))
    grads = tuple(torch.ones_like(output) for output in outputs)
    spoiled = _with(arguments, case.leaves[0], special)

    def run(backend: str) -> Results:
        with ops.backend(backend, strict=True):
            return forward_and_backward(case, case.call, spoiled, grads)

    found, plain = run(job.variant), run("reference")
    compared = len(outputs) if math.isinf(special) else len(found)
    pairs = list(zip(names(case, found), found, plain, strict=True))[:compared]
    return [
        f"{label}: {special} in {case.leaves[0]} spreads otherwise than in the reference"
        for label, own, theirs in pairs
        if own is not None
        and theirs is not None
        and not torch.equal(own.isfinite(), theirs.isfinite())
    ]


def _with(arguments: Arguments, name: str, special: float) -> Arguments:
    """The arguments with ``special`` in the middle of the one of this name."""
    tensor = arguments[name].clone()
    tensor[tuple(size // 2 for size in tensor.shape)] = special
    return arguments | {name: tensor}


def _together(draws: list[Results]) -> Results:
    """The same result of several draws as one tensor; None where any is missing."""
    return tuple(
        None
        if any(one is None for one in same)
        else torch.stack([one for one in same if one is not None])
        for same in zip(*draws, strict=True)
    )


def names(case: Case, results: Results) -> list[str]:
    outputs = len(results) - len(case.leaves)
    return [f"output {i}" for i in range(outputs)] + [f"gradient of {n}" for n in case.leaves]


def compare(
    labels: list[str], found: Results, eagers: Results, exact: Results
) -> dict[str, tuple[str, float]]:
    """Per result: what is wrong in words, "" if nothing; and our error as a multiple of eager's.

    Errors below half a unit in the last place count as none: eager may be exact by luck.
    """
    results = {}
    for label, own, eager, truth in zip(labels, found, eagers, exact, strict=True):
        if own is None or eager is None or truth is None:
            text = "" if own is None and eager is None else "is missing"
            results[label] = (text, 0.0)
            continue
        if own.shape != eager.shape or own.dtype != eager.dtype:
            kinds = [f"{tuple(one.shape)} {one.dtype}" for one in (own, eager)]
            results[label] = (f"is {kinds[0]}, not {kinds[1]}", 0.0)
            continue
        error, allowed = relative_error(own, truth), 2 * relative_error(eager, truth)
        slack = torch.finfo(own.dtype).eps / 2
        text = ""
        if not torch.isfinite(own).all():
            text = "is not finite (new memory held NaN: not all of it was written)"
        elif not error <= max(allowed, slack):
            text = f"error {error:.2e}, allowed {max(allowed, slack):.2e}"
        results[label] = (text, error / max(allowed / 2, slack))
    return results


def _strided(tensor: Tensor) -> Tensor:
    """The same values as every second element of a larger tensor."""
    if tensor.dim() == 0:
        return tensor
    wide = tensor.new_zeros(*tensor.shape[:-1], 2 * tensor.shape[-1])
    wide[..., ::2] = tensor
    return wide[..., ::2]


def _differing(draw: _Draw) -> tuple[list[int], int]:
    """Indices of results that are not the same bits when run again; and how often it was run."""
    differing: set[int] = set()
    first, runs = draw.ours(""), 1
    end = time.monotonic() + REPEAT_SECONDS
    while runs < LEAST_REPEATS or (runs < REPEATS and time.monotonic() < end):
        runs += 1
        for index, (own, other) in enumerate(zip(draw.ours(""), first, strict=True)):
            if own is not None and other is not None and not torch.equal(own, other):
                differing.add(index)
    return sorted(differing), runs
