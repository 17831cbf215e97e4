"""One form of an operator against float64: values, gradients, the same bits every time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases.protocol import (
    Case,
    converted,
    forward_and_backward,
    tensors,
)
from benchmarks.gpu_check.device import Device
from benchmarks.gpu_check.jobs import OWN, Job, Outcome
from rewardprop_fast import ops
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
    wrong, worst = [], 0.0
    for strided in (False, True):
        found = _together([draw.ours(strided) for draw in draws])
        eagers, exact = (
            _together([getattr(draw, name) for draw in draws]) for name in ("eager", "exact")
        )
        results = compare(labels, found, eagers, exact)
        worst = max(worst, *(multiple for _, multiple in results.values()))
        suffix = " with strided gradients" if strided else ""
        wrong += [f"{label}{suffix}: {text}" for label, (text, _) in results.items() if text]
    figures: dict[str, Any] = {"error_over_eager": worst}
    if job.variant in OWN:
        differing, figures["runs"] = _differing(first)
        figures["same_bits"] = not differing
        wrong += [f"{labels[index]} differs from run to run" for index in differing]
    return Outcome(job, "wrong" if wrong else "passed", "; ".join(wrong), figures)


@dataclass(frozen=True)
class _Draw:
    """One set of random arguments, and what is right and what eager makes of them."""

    ours: Callable[[bool], Results]  # with strided gradients or not
    eager: Results
    exact: Results


def _draw(case: Case, job: Job, device: Device) -> _Draw:
    arguments = case.make(device.type, getattr(torch, job.dtype))
    eager = case.baselines["eager"]
    grads = tuple(torch.randn_like(output) for output in tensors(eager(**arguments)))

    def ours(strided: bool) -> Results:
        given = tuple(_strided(grad) for grad in grads) if strided else grads
        with ops.backend(job.variant, strict=True), poisoned():
            return forward_and_backward(case, case.call, arguments, given)

    return _Draw(
        ours,
        forward_and_backward(case, eager, arguments, grads),
        forward_and_backward(case, eager, converted(arguments, torch.float64), grads),
    )


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


def _strided(grad: Tensor) -> Tensor:
    """The same values as every second element of a larger tensor."""
    if grad.dim() == 0:
        return grad
    wide = grad.new_zeros(*grad.shape[:-1], 2 * grad.shape[-1])
    wide[..., ::2] = grad
    return wide[..., ::2]


def _differing(draw: _Draw) -> tuple[list[int], int]:
    """Indices of results that are not the same bits when run again; and how often it was run."""
    differing: set[int] = set()
    first, runs = draw.ours(False), 1
    end = time.monotonic() + REPEAT_SECONDS
    while runs < LEAST_REPEATS or (runs < REPEATS and time.monotonic() < end):
        runs += 1
        for index, (own, other) in enumerate(zip(draw.ours(False), first, strict=True)):
            if own is not None and other is not None and not torch.equal(own, other):
                differing.add(index)
    return sorted(differing), runs
