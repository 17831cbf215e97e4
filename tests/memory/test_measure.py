"""The tracker against sums done by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from rewardprop_fast.memory import MemoryTracker
from rewardprop_fast.ops import guided_ddim_step

KIB = 1024


def floats(kib: int) -> torch.Tensor:
    return torch.empty(kib * KIB // 4)


def test_counts_a_storage_once_and_until_it_is_freed() -> None:
    with MemoryTracker() as tracker:
        a = floats(4)
        view = a[3:].view(-1)
        assert tracker.live_bytes == 4 * KIB
        del a
        assert tracker.live_bytes == 4 * KIB  # the view holds it
        b = floats(8)
        del view, b
        assert tracker.live_bytes == 0
        c = floats(1)
    assert tracker.live_bytes == KIB
    assert tracker.peak_bytes == 12 * KIB
    assert [holding.nbytes for holding in tracker.alive_at_peak()] == [8 * KIB, 4 * KIB]
    assert [holding.operator for holding in tracker.alive()] == ["aten.empty.memory_format"]
    del c
    assert tracker.live_bytes == 0  # also after the block


def test_counts_what_was_there_before_when_it_is_used_or_named() -> None:
    used, named, neither = floats(1), floats(2), floats(4)
    view = named[5:]
    with MemoryTracker() as tracker:
        assert tracker.count([named, view]) == 2 * KIB
        assert tracker.count([named]) == 0
        used.add_(1)
        assert tracker.live_bytes == 3 * KIB
    assert {holding.operator for holding in tracker.alive()} == {"given"}
    assert neither.numel() == KIB


def test_sees_what_autograd_keeps_and_lets_go() -> None:
    x = floats(4).requires_grad_()
    with MemoryTracker() as tracker:
        y = x.exp()  # kept for backward by autograd alone
        z = y.sin()  # keeps y; z itself is kept by nobody but us
        del y
        assert tracker.live_bytes == 12 * KIB
        loss = z.sum()
        del z
        assert tracker.live_bytes == 8 * KIB + 4
        loss.backward()
        assert tracker.live_bytes == 8 * KIB + 4  # x, its gradient, the loss
        assert {holding.operator for holding in tracker.alive()} >= {"given", "aten.mul.Tensor"}


def test_phases_have_peaks_of_their_own() -> None:
    with MemoryTracker() as tracker:
        with tracker.phase("first"):
            a = floats(4)
            b = floats(2)
            del b
        with tracker.phase("second"):
            c = floats(1)
    assert tracker.peak_by_phase["first"] == 6 * KIB
    assert tracker.peak_by_phase["second"] == 5 * KIB
    assert tracker.at_peak_by("phase") == {"first": 6 * KIB}
    assert [holding.phase for holding in tracker.alive()] == ["first", "second"]
    del a, c


def test_names_the_module_that_made_it() -> None:
    model = nn.Sequential(nn.Linear(8, 64), nn.Sequential(nn.Linear(64, 8), nn.GELU()))
    with MemoryTracker(model) as tracker:
        tracker.count(model)
        model(torch.zeros(16, 8))
    made = tracker.at_peak_by("module")
    assert made["0"] == 16 * 64 * 4
    assert "1.0" in made
    with pytest.raises(ZeroDivisionError), MemoryTracker(model):
        raise ZeroDivisionError
    assert len(torch.nn.modules.module._global_forward_hooks) == 0


def step(device_mode: object = None) -> MemoryTracker:
    """A small network with every trap: views, in-place, our own operator, two calls, a no-grad."""
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 4, 1)
    )
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    coefficients = torch.tensor([1.0, 0.5, 0.0])
    with MemoryTracker(model) as tracker:
        tracker.count(model)
        x = torch.randn(2, 4, 16, 16)
        for gradients in (False, True, True):
            with (
                tracker.phase("suffix" if gradients else "prefix"),
                torch.set_grad_enabled(gradients),
            ):
                output = model(torch.cat([x, x]))
                x = guided_ddim_step(output, x, coefficients, 2.0)
                del output
        with tracker.phase("backward"):
            x.square().mean().backward()
    return tracker


def test_fake_tensors_give_the_same_bytes_as_a_run() -> None:
    real = step()
    with FakeTensorMode():
        fake = step()
    assert fake.peak_bytes == real.peak_bytes > 0
    assert fake.peak_by_phase == real.peak_by_phase
    assert [h.nbytes for h in fake.alive_at_peak()] == [h.nbytes for h in real.alive_at_peak()]
    assert fake.peak_by_phase["prefix"] < fake.peak_by_phase["suffix"]


def test_counts_one_kind_of_device_if_asked() -> None:
    with MemoryTracker(device_type="meta") as tracker:
        here, there = floats(1), torch.empty(256, device="meta")
    assert tracker.live_bytes == KIB
    del here, there


def test_cuda_s_own_figures_by_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    """A caching allocator played by hand: it keeps what was freed, and counts peaks until reset."""
    now = {"allocated": 0, "reserved": 0}
    peak = dict(now)

    def hold(nbytes: int) -> None:
        now["allocated"] += nbytes
        now["reserved"] = max(now["reserved"], now["allocated"])
        peak.update({name: max(peak[name], now[name]) for name in now})

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak["allocated"])
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: peak["reserved"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: peak.update(now))
    hold(900)
    hold(-900)  # before the tracker: not counted, though it stays reserved
    tracker = MemoryTracker(device_type="cuda")
    assert tracker.cuda is not None
    with tracker:
        hold(100)
        with tracker.phase("suffix"):
            hold(500)
            hold(-400)  # a workspace: no tensor of it is ever seen
            with tracker.phase("decode"):
                hold(50)
            hold(200)
        with tracker.phase("decode"):
            hold(-300)
    hold(5000)
    found = {name: (one.allocated, one.reserved) for name, one in tracker.cuda.by_phase.items()}
    assert found == {"": (450, 900), "suffix": (600, 900), "decode": (450, 900)}
    assert MemoryTracker().cuda is None
