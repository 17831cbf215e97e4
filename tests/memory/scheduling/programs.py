"""Random steps for schedulers, and what runs them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

from rewardprop_fast.memory.scheduling.backend import Buffer
from rewardprop_fast.memory.scheduling.scheduler import Block, Part, Scheduler


@dataclass(frozen=True)
class Step:
    """One segment of a random program.

    Attributes:
        seconds: of its forward pass; its backward pass takes twice as long.
        sizes: bytes of the blocks it saves.
        again: how many of the blocks of the segment before it saves once more.
    """

    seconds: float
    sizes: tuple[int, ...]
    again: int = 0


@dataclass(frozen=True)
class Program:
    """Segments forward and backward, some times.

    Attributes:
        forgotten: of those times, the backward pass is not run in these.
        retained: the backward pass is run twice in these.
        skipped: segments whose backward pass is not run, though those around it are.
        flushed: whether the scheduler is told to flush between the passes.
        interrupted: after so many segments of the backward pass another step runs; 0 for never.
        to_host, to_device: bytes/s.
    """

    steps: tuple[Step, ...]
    slab_bytes: int
    window: int = 1
    stash: int = 1
    times: int = 2
    forgotten: tuple[int, ...] = ()
    retained: tuple[int, ...] = ()
    skipped: tuple[int, ...] = ()
    interrupted: int = 0
    flushed: bool = False
    to_host: float = 1e5
    to_device: float = 1e5


STEPS = st.builds(
    Step,
    st.floats(0, 0.02),
    st.lists(st.integers(1, 2000), max_size=3).map(tuple),
    st.integers(0, 2),
)

PROGRAMS = st.builds(
    Program,
    st.lists(STEPS, min_size=1, max_size=7).map(tuple),
    st.integers(0, 20_000),
    st.integers(0, 3),
    st.integers(0, 3),
    st.integers(1, 3),
    st.sets(st.integers(0, 2), max_size=1).map(tuple),
    st.sets(st.integers(0, 2), max_size=1).map(tuple),
    st.sets(st.integers(0, 6), max_size=2).map(tuple),
    st.integers(0, 4),
    st.booleans(),
    st.sampled_from([1e4, 1e5, 1e6]),
    st.sampled_from([1e4, 1e5, 1e6]),
)


def some_programs(count: int) -> list[Program]:
    """Always the same ones."""
    source = random.Random(1)

    def step() -> Step:
        sizes = tuple(source.randint(1, 2000) for _ in range(source.randint(0, 3)))
        return Step(source.random() * 0.02, sizes, source.randint(0, 2))

    return [
        Program(
            tuple(step() for _ in range(source.randint(2, 7))),
            source.choice([3000, 8000, 30_000]),
            source.randint(0, 2),
            source.randint(0, 2),
            skipped=source.choice([(), (1,), (0, 2)]),
            interrupted=source.choice([0, 1, 2]),
            to_host=source.choice([1e4, 1e5, 1e6]),
            to_device=source.choice([1e4, 1e5, 1e6]),
        )
        for _ in range(count)
    ]


def run(program: Program, scheduler: Scheduler, device: Any) -> None:
    """Run a program, with values where the device has them.

    Everything that comes back is compared with what left.
    """
    for time in range(program.times):
        sent = _forward(program, scheduler, device, time)
        if program.flushed:
            scheduler.flush()
        if time not in program.forgotten:
            if time in program.retained:
                _backward(program, scheduler, device, sent, last=False)
            _backward(program, scheduler, device, sent, last=True)
        else:
            _let_go(scheduler, sent)
    scheduler.flush()


def _let_go(scheduler: Scheduler, sent: Sent) -> None:
    for blocks in reversed(sent):
        while blocks:
            scheduler.let_go(blocks.pop()[0])


Sent = list[list[tuple[Block, Part, int]]]


def _forward(program: Program, scheduler: Scheduler, device: Any, time: int) -> Sent:
    sent: Sent = []
    for number, step in enumerate(program.steps):
        scheduler.open(f"{number}")
        device.compute(step.seconds)
        blocks = []
        for block, _, seed in sent[-1][: step.again] if sent else []:
            scheduler.hold(block)
            blocks.append((block, scheduler.part, seed))
        for index, size in enumerate(step.sizes):
            seed = 100 * (10 * time + number) + index
            sized = scheduler.send(size, values(size, seed), f"{time}.{number}.{index}")
            if sized is not None:
                blocks.append((sized, scheduler.part, seed))
        scheduler.close()
        sent.append(blocks)
    return sent


def _backward(program: Program, scheduler: Scheduler, device: Any, sent: Sent, last: bool) -> None:
    for number in reversed(range(len(sent))):
        if len(sent) - number - 1 == program.interrupted > 0:
            other = _forward(program, scheduler, device, time=9)
            _let_go(scheduler, other)
        blocks = sent[number]
        if number not in program.skipped:
            for block, part, seed in reversed(blocks):
                buffer: Buffer = scheduler.need(block, part)
                if buffer.tensor is not None:
                    assert torch.equal(buffer.tensor, values(block.nbytes, seed))
            device.compute(2 * program.steps[number].seconds)
        if last:
            _let_go(scheduler, [blocks])


def values(size: int, seed: int) -> torch.Tensor:
    """uint8 (size,)"""
    return torch.arange(size, dtype=torch.int64).mul_(seed + 1).add_(seed).to(torch.uint8)
