"""Cases for tests of `benchmarks.gpu_check`: small good ones, and one for every way to fail."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import check_cases
from benchmarks.cases.geglu import GegluLayer, case
from benchmarks.cases.protocol import Case
from benchmarks.gpu_check.jobs import CHECKS, Groups
from rewardprop_fast import ops

_ELEMENTS = 3000  # what the interpreter does in no time


def small() -> Groups:
    """Of every operator, the smallest cases; one of each is timed."""
    found: dict[str, list[Case]] = {}
    for one in check_cases():
        arguments = one.make("meta", torch.float32)
        sizes = [value.numel() for value in arguments.values() if isinstance(value, Tensor)]
        if max(sizes) <= _ELEMENTS:
            found.setdefault(one.operator, []).append(one)
    return {
        CHECKS: [one for cases in found.values() for one in cases[:2]],
        "a small network": [cases[0] for cases in found.values()],
    }


def bad() -> Groups:
    """The first and the last are good, and must be found so whatever happens between them."""
    good = case(GegluLayer((2, 3, 256)))
    calls = {
        "raises": _raises,
        "dies": _dies,
        "hangs": _hangs,
        "has no memory": _has_no_memory,
        "leaves NaN": _leaves_nan,
        "is wrong": _is_wrong,
        "is wrong from strides": _is_wrong_from_strides,
        "fails from strides": _fails_from_strides,
        "is wrong the second time": _Changing(),
    }
    checks = [replace(good, name=name, call=call) for name, call in calls.items()]
    first, last = replace(good, name="first"), replace(good, name="last")
    rivals = {**good.baselines, "absent": _absent, "broken": _raises}
    timed = replace(good, name="timed", baselines=rivals)
    return {CHECKS: [first, *checks, last], "a network": [timed]}


def silent() -> Groups:
    """A form that makes numbers of what is none."""
    return {CHECKS: [replace(case(GegluLayer((2, 3, 256))), name="hides NaN", call=_hides_nan)]}


def unable() -> Groups:
    """Cases that cannot even be listed in the worker."""
    if os.environ.get("GPU_CHECK_TEST_PARENT") == str(os.getpid()):
        return bad()
    raise RuntimeError("no cases in this process")


def _raises(x: Tensor) -> Tensor:
    raise RuntimeError("a fault | of its own\nwith a second line")


def _dies(x: Tensor) -> Tensor:
    os._exit(3)


def _hangs(x: Tensor) -> Tensor:
    time.sleep(600)
    return x


def _has_no_memory(x: Tensor) -> Tensor:
    raise MemoryError("not enough for this tensor")


def _product(x: Tensor) -> Tensor:
    hidden, gate = x.chunk(2, dim=-1)
    return hidden * torch.nn.functional.gelu(gate)


def _leaves_nan(x: Tensor) -> Tensor:
    return _product(x) + torch.empty(x.shape[-1] // 2)  # poisoned: NaN


def _is_wrong(x: Tensor) -> Tensor:
    return _product(x) * 1.001


def _is_wrong_from_strides(x: Tensor) -> Tensor:
    return _product(x) * (1.0 if x.is_contiguous() else 1.001)


def _fails_from_strides(x: Tensor) -> Tensor:
    if not x.is_contiguous():
        raise RuntimeError("a fault of strides")
    return _product(x)


def _hides_nan(x: Tensor) -> Tensor:
    """But for the reference, which it is compared with."""
    out = ops.geglu(x)
    chosen = ops.explain(ops.OPERATORS["geglu"], x)
    return out if chosen.startswith("reference") else out.nan_to_num()


class _Changing:
    """Right within tolerance, but not the same twice."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        scale = torch.ones(x.shape[-1] // 2)
        scale[0] += 2**-23 * (self.calls % 2)
        return _product(x) * scale


def _absent(x: Any) -> Tensor:
    raise ImportError("no module named 'absent'")
