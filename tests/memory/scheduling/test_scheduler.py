"""The scheduler on random programs, and schedulers with one fault each, which must be found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings

from rewardprop_fast.memory.scheduling.backend import BACK, COMPUTE, OUT, Event
from rewardprop_fast.memory.scheduling.double import (
    BudgetOverrun,
    Double,
    MissingEvent,
    ScheduleError,
    UseAfterFree,
    UseBeforeArrival,
)
from rewardprop_fast.memory.scheduling.graph import GraphError
from rewardprop_fast.memory.scheduling.recorded import Recorded
from rewardprop_fast.memory.scheduling.scheduler import COMING, HERE, HOST, Block, Part, Scheduler
from rewardprop_fast.memory.scheduling.slab import Fence
from rewardprop_fast.memory.scheduling.virtual import VirtualDevice
from tests.memory.scheduling.programs import PROGRAMS, Program, run, some_programs


def scheduler_for(program: Program, device: Any, kind: type[Scheduler] = Scheduler) -> Scheduler:
    return kind(device, program.slab_bytes, program.window, program.stash)


def strict(program: Program, device_bytes: int = 2**30, **settings: Any) -> Double:
    return Double(2**20, device_bytes, program.to_host, program.to_device, **settings)


@settings(max_examples=150, deadline=None)
@given(PROGRAMS)
def test_nothing_is_violated_and_nothing_left(program: Program) -> None:
    for lockstep in (False, True):
        double = strict(program, lockstep=lockstep)
        device = Recorded(double)
        scheduler = scheduler_for(program, device)
        run(program, scheduler, device)
        assert double.violations == []
        device.graph.check()
        assert double.device_bytes_now == 0
        assert scheduler.slab.used == 0
        assert scheduler.is_idle
        assert scheduler.slab.peak <= program.slab_bytes
        sizes = [size for step in program.steps for size in step.sizes]
        counted = scheduler.counted
        assert counted.bytes_out + counted.stayed_bytes >= program.times * sum(sizes)
        assert counted.bytes_back <= counted.bytes_out


@settings(max_examples=60, deadline=None)
@given(PROGRAMS)
def test_virtual_time_is_that_of_the_strict_double(program: Program) -> None:
    """`simulate` runs without the checks, and must find the same times and bytes."""
    plain, double = VirtualDevice(program.to_host, program.to_device), strict(program)
    for device in (plain, double):
        run(program, scheduler_for(program, device), device)
    assert plain.ready == double.ready
    assert plain.stall_seconds == double.stall_seconds
    assert plain.peak_device_bytes == double.peak_device_bytes


@settings(max_examples=60, deadline=None)
@given(PROGRAMS)
def test_reset_at_any_time_leaves_nothing(program: Program) -> None:
    double = strict(program)
    scheduler = scheduler_for(program, double)
    for number, step in enumerate(program.steps):
        scheduler.open(f"{number}")
        for size in step.sizes:
            scheduler.send(size)
        if number % 2:
            scheduler.close()
    scheduler.reset()
    assert double.device_bytes_now == scheduler.slab.used == 0
    assert double.violations == []
    scheduler.open("next")
    run(program, scheduler, double)
    scheduler.close()


# --- schedulers with a fault ---


class DoesNotWaitForArrival(Scheduler):
    def _arrive(self, block: Block) -> None:
        block.where = HERE


class WaitsForArrivalOnTheWrongStream(Scheduler):
    def _arrive(self, block: Block) -> None:
        self.backend.wait(OUT, block.arrival[1])
        block.where = HERE


class FreesBeforeTheCopyOutHasEnded(Scheduler):
    def _let_buffer_go(self, block: Block) -> None:
        self.backend.drop(block.buffer)  # type: ignore[arg-type]
        block.buffer = None


class WaitsForTheCopyBefore(Scheduler):
    def _await(self, stream: int, fence: Fence) -> None:
        number, event = fence
        if number > self._waited[stream] + 1:
            self._waited[stream] = number - 1
            self.backend.wait(COMPUTE, event)


class FreesWhatComesBackBeforeItIsThere(Scheduler):
    def _forget(self, block: Block) -> None:
        if block.where == COMING:
            block.where = HERE
        super()._forget(block)


class IgnoresFences(Scheduler):
    def _send(self, *args: Any) -> Block | None:
        self.slab._fences = [None] * len(self.slab._fences)
        return super()._send(*args)


class CopiesBeforeItIsMade(Scheduler):
    def _send(self, *args: Any) -> Block | None:
        return without_waits(self, OUT, super()._send, *args)


class OverwritesMemoryInUse(Scheduler):
    def _fetch(self, part: Part) -> None:
        without_waits(self, BACK, super()._fetch, part)


class GivesAwayPlacesOfWhatIsAway(Scheduler):
    def _release(self, part: Part) -> None:
        super()._release(part)
        for block in part.blocks:
            if block.where == HOST:
                self.slab.give_back(block.offset, block.nbytes)


class BringsNothing(Scheduler):
    def _fetch(self, part: Part) -> None:
        for block in part.blocks:
            if block.where == HOST and block.holders:
                block.buffer = self.backend.allocate(block.nbytes)
                block.where = HERE
                self.slab.give_back(block.offset, block.nbytes)


class UsesWhatItLetGo(Scheduler):
    def need(self, block: Block, part: Part) -> Any:
        buffer = super().need(block, part)
        self.backend.drop(buffer)
        self.backend.use(buffer)
        return buffer


class PrefetchesOneMore(Scheduler):
    def _prefetch(self, part: Part) -> None:
        self.window += 1
        super()._prefetch(part)
        self.window -= 1


class KeepsOneMoreInTheStash(Scheduler):
    def __post_init__(self) -> None:
        self.stash += 1
        super().__post_init__()


def without_waits(
    scheduler: Scheduler, stream: int, function: Callable[..., Any], *args: Any
) -> Any:
    """Call a part of the scheduler, and let the stream wait for nothing meanwhile."""
    backend = scheduler.backend
    wait = backend.wait

    def deaf(which: int, event: Event) -> None:
        if which != stream:
            wait(which, event)

    backend.wait = deaf  # type: ignore[method-assign]
    try:
        return function(*args)
    finally:
        backend.wait = wait  # type: ignore[method-assign]


ORDER = (UseBeforeArrival, MissingEvent, UseAfterFree)
FAULTS: dict[type[Scheduler], tuple[type[Exception], ...]] = {
    DoesNotWaitForArrival: ORDER,
    WaitsForArrivalOnTheWrongStream: ORDER,
    FreesBeforeTheCopyOutHasEnded: (UseAfterFree,),
    WaitsForTheCopyBefore: ORDER,
    FreesWhatComesBackBeforeItIsThere: (UseAfterFree,),
    IgnoresFences: ORDER,
    CopiesBeforeItIsMade: ORDER,
    OverwritesMemoryInUse: ORDER,
    GivesAwayPlacesOfWhatIsAway: (*ORDER, AssertionError),  # the values are another block's
    BringsNothing: (UseBeforeArrival,),
    UsesWhatItLetGo: (UseAfterFree,),
}


def outcomes(kind: type[Scheduler], make: Callable[[Program], Any]) -> list[BaseException | None]:
    found: list[BaseException | None] = []
    for program in PROGRAMS_FOR_FAULTS:
        device = make(program)
        try:
            run(program, scheduler_for(program, device, kind), device)
            if isinstance(device, Recorded):
                device.graph.check()
            found.append(None)
        except (ScheduleError, GraphError, AssertionError) as error:
            found.append(error)
    return found


PROGRAMS_FOR_FAULTS = some_programs(40)


@pytest.mark.parametrize("kind", FAULTS, ids=lambda kind: kind.__name__)
def test_each_fault_is_found_while_it_runs(kind: type[Scheduler]) -> None:
    found = [type(error) for error in outcomes(kind, strict) if error is not None]
    assert found
    assert set(found) <= set(FAULTS[kind])


@pytest.mark.parametrize("kind", FAULTS, ids=lambda kind: kind.__name__)
def test_each_fault_is_found_in_the_graph(kind: type[Scheduler]) -> None:
    found = outcomes(kind, lambda p: Recorded(VirtualDevice(p.to_host, p.to_device)))
    assert any(isinstance(error, GraphError) for error in found)


def test_without_a_fault_nothing_is_found() -> None:
    assert set(outcomes(Scheduler, strict)) == {None}
    recorded = outcomes(Scheduler, lambda p: Recorded(VirtualDevice(p.to_host, p.to_device)))
    assert set(recorded) == {None}


@pytest.mark.parametrize("kind", [PrefetchesOneMore, KeepsOneMoreInTheStash])
def test_more_than_the_window_overruns_the_budget(kind: type[Scheduler]) -> None:
    """The budget being what the scheduler without the fault takes, to the byte."""

    def tight(program: Program) -> Double:
        plain = VirtualDevice(program.to_host, program.to_device)
        run(program, scheduler_for(program, plain), plain)
        return strict(program, plain.peak_device_bytes)

    assert set(outcomes(Scheduler, tight)) == {None}
    found = {type(error) for error in outcomes(kind, tight)}
    assert BudgetOverrun in found
    assert found <= {BudgetOverrun, type(None)}
