"""One form or baseline timed on the device: forward and backward apart, caches cold."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from benchmarks.cases.protocol import Case, tensors, with_leaves
from benchmarks.gpu_check.device import Device
from benchmarks.gpu_check.jobs import Job, Outcome
from benchmarks.timing import percentile
from rewardprop_fast import ops

#: Repeats of a pass: as many as fit into the seconds, within these bounds.
_SECONDS, _LEAST, _MOST = 0.25, 10, 100


def measure(case: Case, job: Job, device: Device) -> Outcome:
    """Median, p20 and p80 in milliseconds of both passes, and the memory of a whole one."""
    torch.manual_seed(0)
    arguments = case.make(device.type, getattr(torch, job.dtype))
    baseline = case.baselines.get(job.variant.removeprefix("baseline "))
    function = case.call if job.ours else baseline
    assert function is not None, job
    wish: AbstractContextManager[Any] = (
        ops.backend(job.variant, strict=True) if job.ours else nullcontext()
    )
    with wish:
        with_graph = with_leaves(case, arguments)
        outputs = tensors(function(**with_graph))
        figures = {"forward": _timed(lambda: function(**with_graph), device)}
        if case.leaves:
            leaves = [with_graph[name] for name in case.leaves]
            grads = tuple(torch.randn_like(output) for output in outputs)

            def backward() -> None:
                torch.autograd.grad(outputs, leaves, grads, retain_graph=True)

            def both() -> Any:
                fresh = with_leaves(case, arguments)
                made = tensors(function(**fresh))
                return torch.autograd.grad(made, [fresh[name] for name in case.leaves], grads)

            figures["backward"] = _timed(backward, device)
            figures["peak_bytes"] = device.peak_bytes(both)
    return Outcome(job, "passed", "", figures)


def _timed(run: Callable[[], Any], device: Device) -> dict[str, float]:
    for _ in range(2):  # compiles, allocates, raises the clocks
        run()
    once = max(1e-3, *device.milliseconds(run, 2))
    repeats = int(min(_MOST, max(_LEAST, 1e3 * _SECONDS / once)))
    found = device.milliseconds(run, repeats)
    return {
        "median_ms": percentile(found, 0.5),
        "p20_ms": percentile(found, 0.2),
        "p80_ms": percentile(found, 0.8),
        "repeats": repeats,
    }
