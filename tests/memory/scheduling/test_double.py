"""Everything the double forbids, one at a time; and that it waits with the values."""

from __future__ import annotations

import pytest
import torch

from rewardprop_fast.memory.scheduling.backend import BACK, COMPUTE, OUT, Buffer, Host
from rewardprop_fast.memory.scheduling.double import (
    BudgetOverrun,
    Double,
    MissingEvent,
    ScheduleError,
    UseAfterFree,
    UseBeforeArrival,
)


def double(**settings: object) -> Double:
    given = {"host_bytes": 4096, "device_bytes": 4096}
    given |= {"to_host_bandwidth": 1000, "to_device_bandwidth": 500}
    return Double(**(given | settings))  # type: ignore[arg-type]


def adopted(device: Double, value: float = 3.0) -> Buffer:
    """100 bytes."""
    return device.adopt(100, torch.full((25,), value), "x")


def sent(device: Double) -> tuple[Buffer, Host]:
    """Copied to the host, as it should be."""
    host, buffer = device.host(1000), adopted(device)
    device.wait(OUT, device.record(COMPUTE))
    device.copy_out(buffer, host, 0)
    return buffer, host


def test_a_copy_takes_its_time_and_its_values_come_at_its_end() -> None:
    device = double()
    device.compute(2.0)
    buffer, host = sent(device)
    assert device.ready == [2.0, 2.1, 0.0]
    assert host.tensor is not None
    floats = host.tensor[:100].view(torch.float32)
    assert floats.isnan().all()
    device.wait(COMPUTE, device.record(OUT))
    assert (floats == 3).all()
    device.drop(buffer)
    back = device.allocate(100, "x")
    device.wait(BACK, device.record(COMPUTE))
    device.copy_in(host, 0, back)
    assert device.ready == [2.1, 2.1, pytest.approx(2.3)]
    assert back.tensor is not None
    assert back.tensor.view(torch.float32).isnan().all()
    device.compute(0.05)
    device.wait(COMPUTE, device.record(BACK))
    device.use(back)
    assert (back.tensor.view(torch.float32) == 3).all()
    assert device.stall_seconds == pytest.approx(0.1 + 0.15)
    assert device.busy_seconds() == {
        "compute": pytest.approx(2.05),
        "out": pytest.approx(0.1),
        "back": pytest.approx(0.2),
    }
    device.drop(back)
    assert device.device_bytes_now == 0
    assert device.peak_device_bytes == 100
    assert device.violations == []


def test_freed_while_it_is_copied() -> None:
    device = double()
    buffer, _ = sent(device)
    with pytest.raises(UseAfterFree, match="'out' may still touch it"):
        device.drop(buffer)
    assert len(device.violations) == 1


def test_copied_before_it_is_made() -> None:
    device = double()
    device.compute(1.0)
    host, buffer = device.host(1000), adopted(device)
    with pytest.raises(UseBeforeArrival, match=r"at 0.0.* only at 1.0"):
        device.copy_out(buffer, host, 0)


def test_in_time_by_luck() -> None:
    device = double()
    host, buffer = device.host(1000), adopted(device)
    with pytest.raises(MissingEvent, match="does not wait until it is written"):
        device.copy_out(buffer, host, 0)


def round_trip(device: Double) -> Buffer:
    """Copied back, which nobody has waited for."""
    buffer, host = sent(device)
    device.wait(COMPUTE, device.record(OUT))
    device.drop(buffer)
    back = device.allocate(100, "x")
    device.wait(BACK, device.record(COMPUTE))
    device.copy_in(host, 0, back)
    return back


def test_used_before_it_is_back() -> None:
    device = double()
    back = round_trip(device)
    with pytest.raises(UseBeforeArrival, match="copied back"):
        device.use(back)


def test_used_after_enough_time_without_an_event() -> None:
    device = double()
    back = round_trip(device)
    device.compute(10.0)
    with pytest.raises(MissingEvent, match="in time by luck"):
        device.use(back)
    with pytest.raises(UseAfterFree):
        device.drop(back)


def test_copied_to_memory_that_is_in_use() -> None:
    device = double()
    _, host = sent(device)
    device.wait(BACK, device.record(OUT))
    back = device.allocate(100, "y")
    with pytest.raises(MissingEvent, match="is overwritten"):
        device.copy_in(host, 0, back)


def test_back_from_the_host_before_it_is_there() -> None:
    device = double()
    _, host = sent(device)
    back = device.allocate(100, "y")
    device.wait(BACK, device.record(COMPUTE))
    with pytest.raises(UseBeforeArrival, match=r"comes back at 0.0.*only at 0.1"):
        device.copy_in(host, 0, back)


def test_back_from_a_place_that_holds_something_else() -> None:
    device = double()
    buffer, host = sent(device)
    device.copy_out(buffer, host, 50)
    back = device.allocate(100, "y")
    device.wait(BACK, device.record(COMPUTE))
    device.wait(BACK, device.record(OUT))
    with pytest.raises(UseAfterFree, match="does not hold it"):
        device.copy_in(host, 0, back)


def test_a_place_overwritten_while_it_is_read() -> None:
    device = double()
    buffer, host = sent(device)
    back = device.allocate(100, "y")
    device.wait(BACK, device.record(OUT))
    device.wait(BACK, device.record(COMPUTE))
    device.copy_in(host, 0, back)
    with pytest.raises(UseBeforeArrival, match="takes a place"):
        device.copy_out(buffer, host, 99)
    device.copy_out(buffer, host, 100)  # beside it
    device.wait(OUT, device.record(BACK))
    device.copy_out(buffer, host, 0)


def test_memory_that_holds_nothing() -> None:
    device = double()
    host, buffer = device.host(100), device.allocate(100)
    device.wait(OUT, device.record(COMPUTE))
    with pytest.raises(UseBeforeArrival, match="nothing was copied"):
        device.use(buffer)
    with pytest.raises(UseBeforeArrival, match="holds nothing"):
        device.copy_out(buffer, host, 0)


def test_what_was_let_go_of() -> None:
    device = double()
    buffer = adopted(device)
    device.drop(buffer)
    for touch in (device.drop, device.use, lambda b: device.copy_out(b, device.host(1), 0)):
        with pytest.raises(UseAfterFree, match="after it was let go of"):
            touch(buffer)


def test_written_to_while_it_is_copied() -> None:
    device = double()
    buffer, _ = sent(device)
    assert buffer.tensor is not None
    buffer.tensor[3] = 0
    assert buffer.changed
    with pytest.raises(ScheduleError, match="written to while it was copied"):
        device.wait(COMPUTE, device.record(OUT))


def test_arenas_have_an_end() -> None:
    device = double(device_bytes=250)
    adopted(device)
    last = device.allocate(150)
    with pytest.raises(BudgetOverrun, match=r"device arena holds 250 B; 251 B"):
        device.allocate(1)
    assert last.nbytes == 150
    device = double()
    device.host(4000)
    with pytest.raises(BudgetOverrun, match="host arena"):
        device.host(97)
    host, buffer = double().host(99), adopted(device)
    device._places[host] = []
    device.wait(OUT, device.record(COMPUTE))
    with pytest.raises(BudgetOverrun, match="within the host memory"):
        device.copy_out(buffer, host, 0)


def test_a_host_in_step_with_the_device_sees_copies_end() -> None:
    for lockstep in (False, True):
        device = double(lockstep=lockstep)
        buffer, _ = sent(device)
        event = device.record(OUT)
        assert not device.done(event)
        device.compute(0.2)
        assert device.done(event) == lockstep
        if lockstep:
            device.drop(buffer)  # the host knows that the copy has ended
        else:
            device.synchronize(event)
            device.drop(buffer)


def test_bandwidths_are_positive() -> None:
    with pytest.raises(ValueError, match="positive bytes/s"):
        double(to_host_bandwidth=-1)
