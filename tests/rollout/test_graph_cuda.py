"""Capture and replay where a replay runs none of the step's Python: on a double of torch.cuda."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rewardprop_fast import lora, ops
from rewardprop_fast.lora import Annealed
from rewardprop_fast.memory import policy
from rewardprop_fast.memory.plan import Plan
from rewardprop_fast.rollout import Sampler, graph
from rewardprop_fast.rollout.graph import Cuda
from tests.memory.conftest import make_pipeline
from tests.rollout.chains import T, latents, sampler_of
from tests.rollout.fake_cuda import FakeCuda


@pytest.fixture
def pipe() -> Any:
    return make_pipeline()


@pytest.fixture
def fake() -> FakeCuda:
    return FakeCuda()


def called(sampler: Sampler, x: Tensor) -> Tensor:
    return sampler.run(x, 0, T, gradients=False)


def replayed(sampler: Sampler, x: Tensor, backend: Cuda) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return replace(sampler, graphs=backend).run(x, 0, T, gradients=False)


def replayed_all(chains: list[tuple[Sampler, Tensor]], backend: Cuda) -> list[Tensor]:
    """One after the other, whatever they warn of."""
    return [replace(s, graphs=backend).run(x, 0, T, gradients=False) for s, x in chains]


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_replays_are_calls_to_the_last_bit(kind: str, fake: FakeCuda) -> None:
    pipe = make_pipeline(kind)
    sampler, x, cuda = sampler_of(pipe), latents(pipe), Cuda(cuda=fake)
    first = replayed(sampler, x, cuda)
    kept = first.clone()
    assert torch.equal(first, called(sampler, x))
    # other prompts, guidance and noise; weights that change in place
    conditioning = replace(sampler.conditioning, positive=sampler.conditioning.positive + 1)
    other = replace(sampler, conditioning=conditioning, guidance_scale=5.0)
    with torch.no_grad():
        for parameter in lora.lora_parameters(pipe.unet).values():
            parameter.mul_(1.5)
    assert torch.equal(replayed(other, x + 1, cuda), called(other, x + 1))
    assert torch.equal(first, kept)  # what a chain gave is the caller's
    assert (cuda.captures, cuda.replays) == (1, 2 * T)
    assert cuda.describe() == "1 of 1 steps captured, 10 replays"


def test_noise_batch_and_guidance_have_graphs_of_their_own_in_one_pool(
    pipe: Any, fake: FakeCuda
) -> None:
    cuda = Cuda(cuda=fake)
    chains = [
        (sampler_of(pipe, eta=1.0), latents(pipe)),
        (sampler_of(pipe, 1), latents(pipe, 1)),
        (sampler_of(pipe, guided=False), latents(pipe)),
    ]
    for _ in range(2):
        for sampler, x in chains:
            assert torch.equal(replayed(sampler, x, cuda), called(sampler, x))
    assert cuda.captures == 3
    assert len(fake.pools) == 1
    with ops.backend("reference"):
        assert torch.equal(replayed(*chains[1], cuda), called(*chains[1]))
    assert cuda.captures == 4
    # the oldest of more than four is forgotten
    replayed(sampler_of(pipe, 3), latents(pipe, 3), cuda)
    replayed(*chains[1], cuda)
    assert cuda.captures == 5
    replayed(*chains[0], cuda)
    assert cuda.captures == 6


def test_what_a_graph_takes_for_granted_is_captured_anew(pipe: Any, fake: FakeCuda) -> None:
    sampler, x, cuda = sampler_of(pipe), latents(pipe), Cuda(cuda=fake)
    replayed(sampler, x, cuda)

    def rebind() -> None:
        weight = pipe.unet.conv_in.weight
        weight.data = weight.data * 1.5

    def exchange() -> None:
        layer = pipe.unet.conv_out
        layer.bias = torch.nn.Parameter(layer.bias.detach() + 1, requires_grad=False)

    changes = [
        lambda: lora.set_strength(pipe.unet, 0.5),
        pipe.unet.disable_adapters,
        pipe.unet.enable_adapters,
        rebind,
        exchange,
    ]
    for count, change in enumerate(changes, start=2):
        change()
        assert torch.equal(replayed(sampler, x, cuda), called(sampler, x))
        assert cuda.captures == count


def test_a_weight_that_moves_within_a_chain_is_noticed(
    pipe: Any, fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler, x, cuda = sampler_of(pipe), latents(pipe), Cuda(cuda=fake)
    weight, plain, left = pipe.unet.conv_in.weight, graph.cuda._CudaGraph.replay, [2]
    own = weight.data.clone()

    def moving(self: Any) -> Tensor:
        output = plain(self)
        left[0] -= 1
        if left[0] == 0:
            weight.data = own * 2
        return output

    monkeypatch.setattr(graph.cuda._CudaGraph, "replay", moving)
    result = replayed(sampler, x, cuda)
    assert (cuda.captures, cuda.replays) == (2, T)
    weight.data = own
    middle = sampler.run(x, 0, 2, gradients=False)
    weight.data = own * 2
    assert torch.equal(result, sampler.run(middle, 2, T, gradients=False))


def test_warm_up_is_beside_the_callers_stream(pipe: Any, fake: FakeCuda) -> None:
    replayed(sampler_of(pipe), latents(pipe), Cuda(cuda=fake))
    assert fake.log == [
        "stream", "side waits", "stream", "caller waits", "empty_cache", "capture", "synchronize"
    ]  # fmt: skip
    assert fake.stack == ["the caller's"]


def test_a_failing_capture_is_said_once_and_the_step_is_called(pipe: Any, fake: FakeCuda) -> None:
    sampler, x, cuda = sampler_of(pipe), latents(pipe), Cuda(cuda=fake)
    fake.failing = True
    expected = called(sampler, x)
    chains = [(sampler, x), (sampler, x), (sampler_of(pipe, 1), latents(pipe, 1))]
    with pytest.warns(UserWarning, match="called, not replayed: capturing") as seen:
        results = replayed_all(chains, cuda)
    assert torch.equal(results[0], expected)
    assert torch.equal(results[1], expected)
    (warning,) = [w for w in seen if "replayed" in str(w.message)]
    assert str(warning.message) == (
        "Steps are called, not replayed: capturing a step failed with RuntimeError: operation not "
        "permitted when stream is capturing."
    )
    assert fake.stack == ["the caller's"]
    assert cuda.held_bytes == 0
    assert cuda.describe().startswith("called, because capturing a step failed")


def _hook(pipe: Any) -> None:
    pipe.unet.mid_block.register_forward_hook(lambda *_: None)


def _forward(pipe: Any) -> None:
    plain = pipe.unet.conv_out.forward
    pipe.unet.conv_out.forward = lambda x: plain(x)


def _foreign(pipe: Any) -> None:
    layer = pipe.unet.conv_out
    layer.__class__ = type("Mine", (type(layer),), {"__module__": "mine"})


def _processor(pipe: Any) -> None:
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    kind = type(layer.processor)
    layer.processor = type("Mine", (kind,), {"__module__": "mine"})()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_hook, "mid_block has a hook"),
        (_forward, "the forward of conv_out has been replaced"),
        (_foreign, "conv_out is a Mine"),
        (_processor, "attn1 has the processor Mine"),
    ],
)
def test_what_may_do_other_things_at_every_call_is_called(
    change: Any, reason: str, pipe: Any, fake: FakeCuda
) -> None:
    sampler, x, cuda = sampler_of(pipe), latents(pipe), Cuda(cuda=fake)
    change(pipe)
    expected = called(sampler, x)
    with pytest.warns(UserWarning, match=reason) as seen:
        results = replayed_all([(sampler, x)] * 2, cuda)
    assert all(torch.equal(result, expected) for result in results)
    assert len([w for w in seen if "replayed" in str(w.message)]) == 1
    assert cuda.captures == 0


def test_wrapped_unets_and_missing_gpus_are_said(pipe: Any, fake: FakeCuda) -> None:
    sampler, x = sampler_of(pipe), latents(pipe)
    annealed = replace(sampler, unet=Annealed(pipe.unet, T, 1.0), graphs=Cuda(cuda=fake))
    with pytest.warns(UserWarning, match="the UNet is a Annealed"):
        annealed.run(x, 0, T, gradients=False)
    fake.available = False
    with pytest.warns(UserWarning, match="need a GPU, and torch finds none"):
        replace(sampler, graphs=Cuda(cuda=fake)).run(x, 0, T, gradients=False)


def test_a_memory_plan_may_be_at_work(pipe: Any, fake: FakeCuda) -> None:
    """Without gradients its runners do no more than call what they stand for."""
    plan = Plan.from_json(
        '{"format": "rewardprop-plan", "version": 1, "steps": [{"count": 1, "rules": '
        '{"resnet": "recompute", "feed-forward": "recompute"}}]}'
    )
    applied = policy.apply(plan, pipe.unet, None, None)
    sampler, x, cuda = sampler_of(pipe), latents(pipe), Cuda(cuda=fake)
    assert torch.equal(replayed(sampler, x, cuda), called(sampler, x))
    assert cuda.captures == 1
    applied.remove()


def test_dropping_gives_the_memory_back(pipe: Any, fake: FakeCuda) -> None:
    sampler, x, cuda = sampler_of(pipe), latents(pipe), Cuda(cuda=fake)
    assert cuda.held_bytes == 0
    expected = replayed(sampler, x, cuda)
    (program,) = cuda._programs.values()
    buffers = sum(t.untyped_storage().nbytes() for t in program.buffers.values())
    assert cuda.held_bytes == 64 + buffers > 64
    fake.log.clear()
    cuda.drop()
    assert (cuda.held_bytes, program.graph, program.buffers) == (0, None, {})
    assert fake.log == ["empty_cache"]
    assert torch.equal(replayed(sampler, x, cuda), expected)
    assert cuda.captures == 2
    assert len(fake.pools) == 2


class Clock:
    """Steps take what they are said to; everything else takes no time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, call: float, replay: float, capture: float):
        self.now, self.seconds = 0.0, {"call": call, "replay": replay, "capture": capture}
        self.seen: list[str] = []
        self.wrap(monkeypatch, graph.captured.Captured, "_capture", "capture")
        self.wrap(monkeypatch, graph.cuda._CudaGraph, "replay", "replay")
        self.wrap(monkeypatch, graph.captured.Captured, "_called", "call", inner="Step")
        self.in_capture = False

    def __call__(self) -> float:
        return self.now

    def wrap(self, monkeypatch: Any, owner: Any, name: str, kind: str, inner: str = "") -> None:
        target, name = (graph.Step, "__call__") if inner else (owner, name)
        plain = getattr(target, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if kind == "call" and self.in_capture:
                return plain(*args, **kwargs)
            self.seen.append(kind)
            if kind == "capture":
                self.in_capture = True
            else:
                self.now += self.seconds[kind]
            try:
                return plain(*args, **kwargs)
            finally:
                if kind == "capture":
                    self.in_capture = False

        monkeypatch.setattr(target, name, timed)
        if kind == "capture":
            record = graph.cuda._CudaRecorder.capture

            def slow(*args: Any) -> Any:
                self.now += self.seconds["capture"]
                return record(*args)

            monkeypatch.setattr(graph.cuda._CudaRecorder, "capture", slow)


@pytest.mark.parametrize(("replay", "kept"), [(0.5, True), (0.99, False), (2.0, False)])
def test_the_faster_is_kept(
    replay: float, kept: bool, pipe: Any, fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler, x = sampler_of(pipe), latents(pipe)
    expected = called(sampler, x)
    clock = Clock(monkeypatch, call=1.0, replay=replay, capture=3.0)
    cuda = Cuda(cuda=fake, trial=True, clock=clock)
    for _ in range(2):
        assert torch.equal(replayed(sampler, x, cuda), expected)
    trial = ["call"] * 3 + ["capture", "replay", "replay"]
    rest = "replay" if kept else "call"
    assert clock.seen == trial + [rest] * T
    assert (cuda.held_bytes > 0) == kept


@pytest.mark.parametrize(("capture", "again"), [(2.0, True), (3.0, False)])
def test_after_a_drop_it_is_captured_where_the_chain_pays_for_it(
    capture: float, again: bool, pipe: Any, fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a second saved in each of five steps."""
    sampler, x = sampler_of(pipe), latents(pipe)
    clock = Clock(monkeypatch, call=1.0, replay=0.5, capture=capture)
    cuda = Cuda(cuda=fake, trial=True, clock=clock)
    expected = replayed(sampler, x, cuda)
    cuda.drop()
    clock.seen.clear()
    assert torch.equal(replayed(sampler, x, cuda), expected)
    assert clock.seen == (["capture"] + ["replay"] * T if again else ["call"] * T)
