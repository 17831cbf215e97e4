"""Work in other processes: some with Triton's compiler, some with its interpreter.

Which of the two a kernel gets is decided when triton is imported, so one process cannot do both.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")


@contextmanager
def pool(*, interpreted: bool, workers: int) -> Iterator[ProcessPoolExecutor]:
    """Fresh processes with or without TRITON_INTERPRET, one thread each."""
    executor = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        # A process starts with a task that finds none idle, and takes the environment along.
        with environment(TRITON_INTERPRET="1" if interpreted else "0", OMP_NUM_THREADS="1"):
            for started in [executor.submit(os.getpid) for _ in range(workers)]:
                started.result()
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)


def in_order(
    executor: ProcessPoolExecutor,
    function: Callable[..., R],
    tasks: Iterable[tuple[Any, ...]],
    done: Callable[[], None] = lambda: None,
) -> list[R]:
    """function(*task) of each task, in the tasks' order; ``done`` is called after each."""
    futures = [executor.submit(function, *task) for task in tasks]
    for future in futures:
        future.add_done_callback(lambda _: done())
    return [future.result() for future in futures]


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Set variables while processes are started inside the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
