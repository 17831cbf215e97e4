"""Recomputation at the level of saved tensors: forget what autograd saves, make it again for it.

`recompute` calls a function whose saved tensors are replaced by placeholders, so that nothing but
its inputs is kept. The first placeholder that the backward pass asks for runs the function once
more, up to the last tensor that was saved and no further: what comes after it (the final projection
of a feed-forward with frozen weights, say) is not computed twice. The values are bitwise those of
the first run, random draws included.

Calls may lie within each other. The inputs of an inner one are then saved tensors of the outer one,
and are forgotten and made again with the rest. Inputs go through whatever
`torch.autograd.graph.saved_tensors_hooks` surround the call, so an offloader there moves them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from rewardprop_fast.memory.verify import RecomputeError, Trace, traced
from rewardprop_fast.ops import registry


def recompute(
    function: Callable[..., Any],
    *args: Any,
    name: str = "",
    random: bool = True,
    verify: bool = False,
    **kwargs: Any,
) -> Any:
    """``function(*args, **kwargs)``, keeping only its inputs for the backward pass.

    Args:
        function: computes the same again when it is called again with the same inputs. Parameters
            and buffers it uses must not change before the backward pass.
        name: what error messages call it.
        random: keep the states of the generators, 5 KB of the CPU's, so that the second run draws
            the same numbers; False only where none are ever drawn.
        verify: compare the second run with the first, operation by operation: slow, and for finding
            out why gradients differ.

    Raises:
        RecomputeError: in the backward pass, where the second run saved other tensors than the
            first, or a saved tensor was written to; under ``verify`` a DivergenceError, which is
            one, where an operation gave other values.
    """
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    leaves, tree = tree_flatten((args, kwargs))
    frame = _Frame(function, leaves, tree, name, random)
    with torch.autograd.graph.saved_tensors_hooks(frame.forget, _Placeholder.tensor):
        if not verify:
            return function(*args, **kwargs)
        with traced() as frame.trace:
            return function(*args, **kwargs)


def is_second_run() -> bool:
    """Whether a second run is under way in this thread.

    What is saved then is looked at and not kept: nothing is to be sent anywhere.
    """
    return _second_run.get()


_second_run: ContextVar[bool] = ContextVar("rewardprop_second_run", default=False)


class _Placeholder:
    """What autograd saves instead of a tensor."""

    __slots__ = ("__weakref__", "dtype", "frame", "shape", "value", "version")

    def __init__(self, frame: _Frame, tensor: Tensor) -> None:
        self.frame, self.shape, self.dtype = frame, tensor.shape, tensor.dtype
        self.value: Tensor | None = None
        self.version = 0

    def give(self, tensor: Tensor) -> None:
        """Take the second run's."""
        if (self.shape, self.dtype) != (tensor.shape, tensor.dtype):
            raise RecomputeError(
                f"{self.frame.title} saved {_words(tensor)} in its second run where the first "
                f"saved {_words(self)}. {_ADVICE}"
            )
        # a frozen weight as itself: packed copies of it are found by the tensor object
        self.value = tensor.detach() if tensor.requires_grad else tensor
        self.version = tensor._version

    def tensor(self) -> Tensor:
        """The saved tensor; given once, so that it lives no longer than the node that asks."""
        if self.value is None:
            self.frame.run_again()
        value, self.value = self.value, None
        if value is None:
            raise RecomputeError(
                f"{self.frame.title} saved fewer tensors in its second run than in its first, so "
                f"its gradient is not known. {_ADVICE}"
            )
        if value._version != self.version:  # autograd looks only where there are no hooks
            raise RecomputeError(
                f"{self.frame.title} has written into {_words(self)} that its own backward pass "
                "needs. Replace the in-place operation after it by one that makes a new tensor."
            )
        return value


_ADVICE = (
    "What it computes must depend on its inputs alone: look for state that changed in between."
)


class _Done(BaseException):
    """Ends a second run behind its last saved tensor.

    No Exception: what is run again may catch those and take them for its own.
    """


class _Frame:
    """One call: its function, its inputs, and the placeholders it left in the graph."""

    def __init__(
        self, function: Callable[..., Any], leaves: list[Any], tree: Any, name: str, random: bool
    ) -> None:
        self.function, self.tree = function, tree
        self.title = f"The segment {name!r}" if name else "A recomputed function"
        self.trace: Trace | None = None
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self.leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
        self.requires_grad = [tensor.requires_grad for tensor in tensors]
        self.inputs = _saved(tensors)
        self.surroundings = _Surroundings.now(tensors, random)
        #: The nodes hold their placeholders; here they are known without being kept.
        self.placeholders: list[weakref.ref[_Placeholder]] = []

    def forget(self, tensor: Tensor) -> _Placeholder:
        placeholder = _Placeholder(self, tensor)
        self.placeholders.append(weakref.ref(placeholder))
        return placeholder

    def run_again(self) -> None:
        """Give every placeholder that is still there its tensor."""
        tensors = [
            tensor.detach().requires_grad_(differentiable)
            for tensor, differentiable in zip(
                self.inputs.saved_tensors, self.requires_grad, strict=True
            )
        ]
        remaining = iter(tensors)
        leaves = [
            next(remaining) if is_tensor else leaf
            for leaf, is_tensor in zip(self.leaves, self.is_tensor, strict=True)
        ]
        args, kwargs = tree_unflatten(leaves, self.tree)
        count, needed = 0, self._needed()

        def remember(tensor: Tensor) -> None:
            nonlocal count
            placeholder = self.placeholders[count]()
            if placeholder is not None:
                placeholder.give(tensor)
            count += 1
            if count == needed:
                raise _Done

        with ExitStack() as stack:
            stack.callback(_second_run.reset, _second_run.set(True))
            stack.enter_context(self.surroundings.again())
            if self.trace is not None:
                stack.enter_context(self.trace.compared(self.title))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(remember, _never))
            with suppress(_Done):
                self.function(*args, **kwargs)

    def _needed(self) -> int:
        """The number of placeholders up to the last that some node still holds."""
        count = len(self.placeholders)
        while count and self.placeholders[count - 1]() is None:
            count -= 1
        return count


def _never(_: Any) -> Tensor:
    raise RecomputeError("A backward pass inside a recomputed function is not supported.")


def _words(tensor: Tensor | _Placeholder) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"


class _Inputs(torch.autograd.Function):
    """A node that saves tensors, so that hooks around it see them."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.view_as(anchor)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise AssertionError("nothing is computed from it")


def _saved(tensors: Sequence[Tensor]) -> Any:
    """The node; detached, since the graph behind the inputs is not its to keep."""
    anchor = torch.empty(0, requires_grad=True)
    return _Inputs.apply(anchor, *[tensor.detach() for tensor in tensors]).grad_fn


@dataclass(frozen=True)
class _Surroundings:
    """What a function's result depends on beside its inputs, for calling it again elsewhere.

    The backward pass may run in a thread of its own, which has none of this.
    """

    wish: registry.Wish
    autocast: tuple[tuple[str, bool, torch.dtype], ...]
    autocast_cache: bool
    generators: tuple[tuple[torch.Generator, Tensor], ...]

    @classmethod
    def now(cls, tensors: Sequence[Tensor], random: bool) -> _Surroundings:
        kinds = {"cpu", *(tensor.device.type for tensor in tensors)} - {"meta"}
        autocast = tuple(
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in sorted(kinds)
        )
        return cls(
            registry.current(),
            autocast,
            torch.is_autocast_cache_enabled(),
            _states(tensors) if random else (),
        )

    @contextmanager
    def again(self) -> Iterator[None]:
        present = [(generator, generator.get_state()) for generator, _ in self.generators]
        with ExitStack() as stack:
            stack.enter_context(registry.under(self.wish))
            for kind, enabled, dtype in self.autocast:
                if enabled or torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, dtype, enabled, self.autocast_cache))
            for generator, state in self.generators:
                generator.set_state(state)
            try:
                yield
            finally:
                for generator, state in present:
                    generator.set_state(state)


def _states(tensors: Sequence[Tensor]) -> tuple[tuple[torch.Generator, Tensor], ...]:
    generators = [torch.default_generator]
    for index in sorted({t.device.index or 0 for t in tensors if t.device.type == "cuda"}):
        generators.append(torch.cuda.default_generators[index])
    return tuple((generator, generator.get_state()) for generator in generators)
