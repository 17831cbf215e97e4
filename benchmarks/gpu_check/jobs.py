"""What there is to do: a list of jobs, plain enough to go to another process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch

from benchmarks.cases import check_cases
from benchmarks.cases.protocol import Case
from benchmarks.static_gpu.collect import SCENARIOS
from rewardprop_fast import ops

#: Name of a group of cases -> the cases. The first group is checked, the others are timed.
Groups = Mapping[str, list[Case]]

CHECKS = "checks"

#: The group of whole models, which are no cases: benchmarks/gpu_check/network.py.
NETWORK = "network"

DTYPES = ("float32", "bfloat16", "float16")
PHASES = ("forward", "backward")

#: Forms whose arithmetic is this library's own: they must give the same bits every time.
OWN = ("triton", "cuda", "native")


@dataclass(frozen=True)
class Job:
    """One check of one form, or one timing of one form or baseline."""

    kind: str  # "check" or "time"
    group: str
    operator: str
    case: str
    dtype: str
    variant: str  # a backend of the operator ("triton"), or a baseline ("baseline eager")

    @property
    def ours(self) -> bool:
        """Whether a failure is this library's."""
        return not self.variant.startswith("baseline ")

    def __str__(self) -> str:
        return f"{self.kind} {self.operator} {self.case}, {self.dtype}, {self.variant}"


@dataclass
class Outcome:
    """How a job went. ``status`` is one of `STATUSES`; ``figures`` are its results."""

    job: Job
    status: str
    message: str = ""
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        if self.status == "out of memory":
            return self.job.ours and self.job.kind == "check"
        return self.job.ours and self.status in FAILURES


FAILURES = ("wrong", "error", "hung", "crashed")
STATUSES = ("passed", "not here", "out of memory", *FAILURES)


def groups() -> Groups:
    """The cases of all operators: odd shapes to check, the layers of the networks to time."""
    return {CHECKS: check_cases(), **{one.name: one.cases() for one in SCENARIOS}}


def load(source: str) -> Groups:
    """The groups that ``"module:function"`` gives; both processes call it."""
    module, _, name = source.partition(":")
    function: Callable[[], Groups] = getattr(import_module(module), name)
    return function()


def forms(case: Case, device: str) -> list[str]:
    """The backends of the case's operator that could run on this type of device."""
    names = [form.backend for form in ops.OPERATORS[case.operator].implementations]
    return [name for name in names if name != "native" or device == "cpu"]


def listed(found: Groups, device: str, dtypes: tuple[str, ...]) -> list[Job]:
    """All checks, then all timings: in bfloat16 alone; in the first dtype where that is out.

    Whole models are checked after the operators.
    """
    jobs = [
        Job("check", CHECKS, case.operator, case.name, dtype, form)
        for case in found[CHECKS]
        for dtype in dtypes
        for form in forms(case, device)
        if getattr(torch, dtype) in case.dtypes
    ]
    jobs += [Job("check", NETWORK, "accelerate", "bundled UNet + VAE", d, "auto") for d in dtypes]
    timed = "bfloat16" if "bfloat16" in dtypes else dtypes[0]
    for group, cases in found.items():
        if group == CHECKS:
            continue
        for case in cases:
            variants = [f"baseline {name}" for name in case.baselines]
            variants += [form for form in forms(case, device) if form != "reference"]
            jobs += [Job("time", group, case.operator, case.name, timed, v) for v in variants]
    return jobs


def find(found: Groups, job: Job) -> Case:
    """The case that a job is about."""
    return next(
        case for case in found[job.group] if (case.operator, case.name) == (job.operator, job.case)
    )
