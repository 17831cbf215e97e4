"""The CUDA backend's calls, on a stand-in for `torch.cuda`. On a GPU it has not run."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from rewardprop_fast.memory.offload import Offloader
from rewardprop_fast.memory.residency import Residency
from rewardprop_fast.memory.scheduling.backend import BACK, COMPUTE, OUT
from rewardprop_fast.memory.scheduling.cuda import Cuda
from rewardprop_fast.memory.scheduling.scheduler import Scheduler
from tests.memory.offloads import MIB, assert_same
from tests.memory.scheduling.late_cuda import LateCuda
from tests.memory.scheduling.programs import run, some_programs


class OnCpu(Cuda):
    """Whose tensors lie on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        assert self.device == torch.device("cuda:0")
        self.device = torch.device("cpu")

    def compute(self, seconds: float) -> None:
        pass


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> LateCuda:
    cuda = LateCuda()
    cuda.install(monkeypatch)
    return cuda


def test_random_programs_bring_back_what_left(late: LateCuda) -> None:
    for program in some_programs(30):
        scheduler = Scheduler(OnCpu(), program.slab_bytes, program.window, program.stash)
        run(program, scheduler, scheduler.backend)
        assert scheduler.slab.used == 0


def test_gradients(late: LateCuda) -> None:
    weights = [torch.randn(32, 32, requires_grad=True) for _ in range(5)]
    x = torch.randn(16, 32, requires_grad=True)

    def loss(away: Offloader) -> Tensor:
        y = x
        for number, weight in enumerate(weights):
            with away.segment(f"{number}"):
                y = torch.tanh(y @ weight).exp()
        return y.sum()

    expected = torch.autograd.grad(loss(Offloader(OnCpu(), 0)), [x, *weights])
    away = Offloader(OnCpu(), MIB, 0)
    for _ in range(2):
        assert_same(torch.autograd.grad(loss(away), [x, *weights]), expected)
    numbers = away.statistics()
    assert numbers.bytes_back > 0
    assert numbers.stall_seconds > 0  # of every wait, as the stand-in has it
    assert numbers.stall_seconds % 0.25 == 0


def test_weights_by_phase(late: LateCuda) -> None:
    networks = {name: torch.nn.Linear(8, 8).requires_grad_(False) for name in "ab"}
    values = {name: network.weight.clone() for name, network in networks.items()}
    residency = Residency(networks, {"a": {"a"}, "b": {"b"}}, OnCpu())
    for _ in range(2):
        for name, other in ("ab", "ba"):
            with residency.phase(name, then=other):
                assert torch.equal(networks[name].weight, values[name])
    with residency.phase("a"):
        networks["a"].weight.add_(1)
    residency.close()
    assert torch.equal(networks["a"].weight, values["a"] + 1)
    assert torch.equal(networks["b"].weight, values["b"])


@pytest.mark.parametrize("forgotten", [OUT, BACK, COMPUTE])
def test_a_forgotten_wait_shows_in_the_values(late: LateCuda, forgotten: int) -> None:
    """So the tests above can fail."""

    class Forgetful(OnCpu):
        def wait(self, stream: int, event: object) -> None:
            if stream != forgotten:
                super().wait(stream, event)

    def fails() -> bool:
        for program in some_programs(30):
            scheduler = Scheduler(Forgetful(), program.slab_bytes, program.window, program.stash)
            try:
                run(program, scheduler, scheduler.backend)
            except (AssertionError, RuntimeError):
                return True
        return False

    # the computation runs at once here, so copies back, which wait for it alone, need not
    assert fails() == (forgotten != BACK)


def test_host_memory_is_registered_as_long_as_it_lives(late: LateCuda) -> None:
    host = OnCpu().host(5000)
    assert host.tensor is not None
    assert host.tensor.numel() == 5000
    assert late.registered == {host.tensor.data_ptr(): 5000}
    view = host.tensor[7:]
    del host
    gc.collect()
    assert late.registered == {}
    assert view.numel() == 4993
    assert OnCpu().host(0).nbytes == 0


def test_only_tensors_of_its_device(late: LateCuda) -> None:
    device = Cuda("cuda:3")
    assert device.device == torch.device("cuda:3")
    assert not device.takes(torch.zeros(1))
