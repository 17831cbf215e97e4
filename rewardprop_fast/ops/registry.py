"""Which implementation of an operator runs, and why.

An operator lists its implementations, the preferred one first. The first that is legal for the
arguments (device, dtypes, shapes) and pays for them runs; "reference" is plain PyTorch, legal for
everything, and always last.

A person can ask for another one, for all operators or for one of them: in code with
``with ops.backend("triton", attention="xformers"): ...``, or for the whole process with the
environment variable ``REWARDPROP_BACKEND=triton,attention=xformers``. It then runs wherever it is
legal, whether it pays or not; elsewhere "reference" runs, and `explain` says why. With
``strict=True`` that is an error.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from rewardprop_fast.errors import ConfigError

#: Names a person may ask for. "auto" takes the first legal implementation.
BACKENDS = ("auto", "native", "triton", "cuda", "sdpa", "xformers", "reference")

ENVIRONMENT_VARIABLE = "REWARDPROP_BACKEND"

_FIRST = "the first that is legal here"
_FIRST_THAT_PAYS = "the first that is legal here and pays"


def _none(*_: Any) -> None:
    return None


@dataclass(frozen=True)
class Implementation:
    """One form of an operator.

    ``why_not`` gets the operator's own arguments and returns None where this form is legal,
    otherwise the reason it is not. ``backward`` takes what the operator's autograd rule gives it.
    ``why_no_gain`` gets the same arguments where the form is legal, and returns None where it is
    faster than what comes after it, otherwise the reason to pass it over unless it is asked for.
    """

    backend: str
    why_not: Callable[..., str | None]
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    why_no_gain: Callable[..., str | None] = _none


@dataclass(frozen=True)
class Operator:
    """An operator's name and its implementations, the preferred one first, "reference" last.

    ``example(device, dtype)`` gives small typical arguments, for a network that computes in
    ``dtype``; the doctor asks with them which backend would run.
    """

    name: str
    implementations: tuple[Implementation, ...]
    example: Callable[[str, torch.dtype], tuple[Any, ...]]


@dataclass(frozen=True)
class Choice:
    """The implementation that runs, the reason in words, and what was passed over and why."""

    implementation: Implementation
    reason: str
    rejected: dict[str, str]

    def explain(self) -> str:
        """One line: the backend, why it, and why not the others."""
        passed_over = (f"; not {name}: {reason}" for name, reason in self.rejected.items())
        return f"{self.implementation.backend} ({self.reason}{''.join(passed_over)})"


@dataclass(frozen=True)
class Wish:
    """What a person asked for: one backend for all operators, others for some of them."""

    name: str = "auto"
    by_operator: Mapping[str, str] = field(default_factory=dict)
    strict: bool = False
    origin: str = ""

    def of(self, operator: str) -> str:
        """The backend asked for in this operator."""
        return self.by_operator.get(operator, self.name)


_requested: ContextVar[Wish | None] = ContextVar("rewardprop_backend", default=None)


@contextmanager
def backend(name: str = "auto", *, strict: bool = False, **by_operator: str) -> Iterator[None]:
    """Run the operators inside the ``with`` block on the backend ``name``, one of `BACKENDS`.

    ``by_operator`` names other backends for single operators: ``attention="xformers"``. Where the
    backend asked for cannot run an operator, the reference does; with ``strict`` that is a
    ConfigError instead. Holds for the current thread or task, and for the backward pass of what
    was computed inside, wherever that runs. Raises ConfigError for an unknown name at once.
    """
    wish = Wish(name, by_operator, strict, "ops.backend(...)")
    _check(wish)
    with under(wish):
        yield


def current() -> Wish:
    """What is asked for here and now: code goes before the environment."""
    requested = _requested.get()
    return _from_environment() if requested is None else requested


@contextmanager
def under(wish: Wish) -> Iterator[None]:
    """Run the operators inside the ``with`` block under ``wish``; autograd's threads need it."""
    token = _requested.set(wish)
    try:
        yield
    finally:
        _requested.reset(token)


@dataclass(frozen=True)
class Observation:
    """A call that `observing` saw: the operator, its arguments, what was chosen and why."""

    operator: str
    arguments: tuple[Any, ...]
    choice: Choice


class Observed(Exception):
    """Ends a kernel that `observing` runs on fake tensors for the sake of its choice alone."""


_observations: ContextVar[list[Observation] | None] = ContextVar(
    "rewardprop_observations", default=None
)


@contextmanager
def observing() -> Iterator[list[Observation]]:
    """Gather the choices of all operators called inside the ``with`` block, on fake tensors.

    Run a model inside it under `torch._subclasses.FakeTensorMode`; nothing is computed, so that a
    large model, or a GPU that is not there, can be asked about.
    """
    found: list[Observation] = []
    token = _observations.set(found)
    try:
        yield found
    finally:
        _observations.reset(token)


def is_observing() -> bool:
    """Whether operators are asked for their choice alone; see `observing`."""
    return _observations.get() is not None


def observed(
    kernel: Callable[..., Any], fake: Callable[..., Any], otherwise: Callable[..., Any]
) -> Callable[..., Any]:
    """Under `observing`: ask ``kernel`` what it would choose, then ``fake``. Else ``otherwise``."""

    def run(*args: Any) -> Any:
        if _observations.get() is None:
            return otherwise(*args)
        with suppress(Observed):
            kernel(*args)
        return fake(*args)

    return run


def choose(operator: Operator, *args: Any) -> Choice:
    """Pick the implementation for these arguments.

    Raises ConfigError where a strict wish cannot be met.
    """
    observations = _observations.get()
    if observations is None and current() is _AUTO:
        first = operator.implementations[0]
        if first.why_not(*args) is None and first.why_no_gain(*args) is None:
            return _first_choice(first)
    choice = _choose(operator, args)
    if observations is not None:
        observations.append(Observation(operator.name, args, choice))
        raise Observed
    return choice


@cache
def _first_choice(implementation: Implementation) -> Choice:
    """Of an implementation that is the first, legal, pays, and not asked for: the usual case."""
    return Choice(implementation, _FIRST, {})


def _choose(operator: Operator, args: tuple[Any, ...]) -> Choice:
    wish = current()
    wanted = wish.of(operator.name)
    reason = _FIRST if wanted == "auto" else f"{wish.origin} asks for it"
    rejected: dict[str, str] = {}
    for implementation in operator.implementations:
        if wanted not in ("auto", implementation.backend):
            rejected[implementation.backend] = f"{wish.origin} asks for {wanted!r}"
            continue
        problem = implementation.why_not(*args)
        if problem is None and wanted == "auto":
            no_gain = implementation.why_no_gain(*args)
            if no_gain is not None:
                problem = f"legal, but {no_gain}"
                reason = _FIRST_THAT_PAYS
        if problem is None:
            return Choice(implementation, reason, rejected)
        rejected[implementation.backend] = problem
    return _instead(operator, wish, wanted, rejected)


def _instead(operator: Operator, wish: Wish, wanted: str, rejected: dict[str, str]) -> Choice:
    """The reference, where the backend asked for cannot run; or the error, where it must."""
    names = [implementation.backend for implementation in operator.implementations]
    if wanted in names:
        problem = f"cannot run {operator.name} here: {rejected[wanted]}"
    else:
        problem = f"{operator.name} does not have; it has {', '.join(names)}"
        rejected[wanted] = "this operator does not have it"
    if wish.strict or wanted == "reference":
        raise ConfigError(
            f"{wish.origin} asks for the backend {wanted!r}, which {problem}. "
            "Use 'auto' to take the fastest that can."
        )
    rejected.pop("reference", None)
    return Choice(operator.implementations[-1], f"{wanted!r} is asked for and cannot run", rejected)


def explain(operator: Operator, *args: Any) -> str:
    """One line on which backend runs ``operator`` for these arguments, and why not the others."""
    return _choose(operator, args).explain()


def _from_environment() -> Wish:
    """REWARDPROP_BACKEND: a backend, or operator=backend, or several of these with commas."""
    text = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if not text:
        return _AUTO
    name, by_operator = "auto", {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        left, equals, right = part.partition("=")
        if equals:
            by_operator[left.strip()] = right.strip()
        else:
            name = left
    wish = Wish(name, by_operator, origin=ENVIRONMENT_VARIABLE)
    _check(wish)
    return wish


_AUTO = Wish()


def _check(wish: Wish) -> None:
    from rewardprop_fast.ops import OPERATORS

    for name in (wish.name, *wish.by_operator.values()):
        if name not in BACKENDS:
            allowed = ", ".join(map(repr, BACKENDS))
            raise ConfigError(f"{wish.origin} got {name!r}; allowed are {allowed}.")
    for operator in wish.by_operator:
        if operator not in OPERATORS:
            raise ConfigError(
                f"{wish.origin} names the operator {operator!r}; there are {', '.join(OPERATORS)}."
            )
