"""A double of torch.cuda on CPU tensors, as far as capture and replay go.

Its graphs are tapes of operations. A replay runs these on the very tensors, and with the very
numbers, that were there when they were recorded, without a line of the step's Python, as a GPU
would: memory that has moved since is read where it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.played: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.played.append((func, args, kwargs or {}, output))
        return output


class _Graph:
    def __init__(self) -> None:
        self.tape = _Tape()

    def replay(self) -> None:
        for func, args, kwargs, then in self.tape.played:
            given = _storages((args, kwargs))
            for old, new in zip(_tensors(then), _tensors(func(*args, **kwargs)), strict=True):
                if old.untyped_storage()._cdata not in given:  # a view is where it was
                    old.copy_(new)


class FakeCuda:
    """The namespace. `log` is what was asked of it, in order; `failing` fails the next captures."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.pools: list[object] = []
        self.available, self.failing, self.reserved = True, False, 1000
        self.stack: list[Any] = ["the caller's"]
        self.CUDAGraph = _Graph

    def is_available(self) -> bool:
        return self.available

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        yield

    def graph_pool_handle(self) -> object:
        self.pools.append(object())
        return self.pools[-1]

    def Stream(self) -> Any:
        return SimpleNamespace(wait_stream=lambda other: self.log.append("side waits"))

    def current_stream(self, device: Any = None) -> Any:
        return SimpleNamespace(wait_stream=lambda other: self.log.append("caller waits"))

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        depth = len(self.stack)
        self.stack.append(stream)
        self.log.append("stream")
        try:
            yield
        finally:
            del self.stack[depth:]

    def memory_reserved(self) -> int:
        return self.reserved

    def synchronize(self, device: Any = None) -> None:
        self.log.append("synchronize")

    def empty_cache(self) -> None:
        self.log.append("empty_cache")

    @contextmanager
    def graph(
        self, graph: _Graph, pool: object, stream: Any, capture_error_mode: str
    ) -> Iterator[None]:
        assert pool is self.pools[-1]
        assert capture_error_mode == "thread_local"
        self.log.append("capture")
        self.stack.append(stream)  # as torch's, it stays there where capturing fails
        if self.failing:
            raise RuntimeError("operation not permitted when stream is capturing\nmore of it")
        with graph.tape:
            yield
        self.stack.pop()
        self.reserved += 64


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _storages(value: Any) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in _tensors(value)}
