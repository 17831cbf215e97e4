"""Fake calls that are not worked out again give what they gave before, and what torch gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from rewardprop_fast import lora
from rewardprop_fast.memory import MemoryTracker, make_fake
from rewardprop_fast.memory.repeating import UNKNOWN, RepeatingFakeMode
from rewardprop_fast.models import architectures
from rewardprop_fast.nn import accelerate
from tests.memory.test_fake import SMALL


def walk(mode: FakeTensorMode, fast: bool, asked: RepeatingFakeMode | None = None) -> Any:
    """Everything that a small UNet makes and frees, twice forward and backward."""
    with torch.device("meta"):
        model = architectures.unet("sd15", torch.bfloat16, **SMALL)
    lora.inject(model, rank=4)
    make_fake(model, mode)
    if fast:
        accelerate(model)
    with mode, MemoryTracker(fake=asked) as tracker:
        tracker.count(model)
        for _ in range(2):
            inputs = architectures.unet_inputs(model, 2, 16, torch.bfloat16)
            model(**inputs).sample.float().square().mean().backward()
    return tracker.events(), tracker.peak_bytes


@pytest.mark.parametrize("fast", [False, True], ids=["diffusers", "accelerated"])
def test_a_network_s_memory_is_that_of_the_usual_mode_event_by_event(fast: bool) -> None:
    repeating = RepeatingFakeMode()
    assert walk(repeating, fast) == walk(FakeTensorMode(), fast)
    assert len(repeating._ways) > 50


@pytest.mark.parametrize("fast", [False, True], ids=["diffusers", "accelerated"])
def test_a_tracker_that_asks_the_mode_itself_sees_the_same(
    fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, mode = walk(FakeTensorMode(), fast), RepeatingFakeMode()
    known, again = [0], RepeatingFakeMode.again

    def counted(self: Any, *call: Any) -> Any:
        output = again(self, *call)
        known[0] += output is not UNKNOWN
        return output

    monkeypatch.setattr(RepeatingFakeMode, "again", counted)
    assert walk(mode, fast, asked=mode) == expected
    assert known[0] > 500


CALLS = {
    "product": lambda x: x @ x.transpose(1, 2),
    "view": lambda x: x[1:, ::2],
    "several views": lambda x: x.chunk(2, 1),
    "unsafe view": lambda x: torch.ops.aten._unsafe_view(x, [24, 4]),
    "no dimension": lambda x: x.sum(),
    "two results": lambda x: x.max(1),
    "a number's kind": lambda x: (x * 2, x.int() * 2, x.int() * 2.0, x.int() + True),
    "a number with a point": lambda x: (
        F.interpolate(x, scale_factor=2.0, recompute_scale_factor=False),
        F.interpolate(x, scale_factor=1.5, recompute_scale_factor=False),
    ),
    "a layout": lambda x: x.permute(2, 0, 1).contiguous(),
    "written to": lambda x: x.clone().add_(1),
    "a value": lambda x: x * torch.tensor(2.0, dtype=torch.float64),
    "another dtype": lambda x: x.view(torch.int32),
    "nothing to be freed": lambda x: torch.empty(0).expand(3, 0),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_call_gives_the_same_again(call: str) -> None:
    results = []
    for mode in (FakeTensorMode(), RepeatingFakeMode()):
        with mode:
            x = torch.empty(4, 6, 4)
            for _ in range(3):
                found = CALLS[call](x)
                parts = found if isinstance(found, tuple) else (found,)
                results.append(
                    [
                        (
                            part.shape,
                            part.stride(),
                            part.dtype,
                            part.device,
                            part.storage_offset(),
                            part.untyped_storage().nbytes(),
                            part.untyped_storage()._cdata == x.untyped_storage()._cdata,
                        )
                        for part in parts
                    ]
                )
    assert all(result == results[0] for result in results)


def test_a_view_is_of_the_tensor_it_is_asked_of_and_from_where_that_begins() -> None:
    with RepeatingFakeMode():
        both = torch.empty(2, 5, 4)
        for row in (both[0], both[1], both[0]):
            view = row[2:]
            assert view.untyped_storage()._cdata == both.untyped_storage()._cdata
            assert view.storage_offset() == row.storage_offset() + 8
            assert row.mul_(2) is row


def test_real_tensors_and_results_of_unknown_shape_go_the_usual_way() -> None:
    real = torch.ones(3)
    with RepeatingFakeMode(), pytest.raises(AssertionError, match="convert all Tensors"):
        torch.ops.aten.add.Tensor(real, torch.empty(3))
    with RepeatingFakeMode(), pytest.raises(Exception, match="nonzero"):
        torch.empty(3).nonzero()
