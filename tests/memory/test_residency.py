"""Weights that come and go: the same results, the same parameters, and no more on the device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rewardprop_fast import lora
from rewardprop_fast.errors import ConfigError
from rewardprop_fast.memory.offload import Offloader
from rewardprop_fast.memory.residency import Residency, ResidencyError
from rewardprop_fast.models.random_init import tiny_stable_diffusion
from tests.memory.offloads import MIB, assert_same, double

PHASES = {"sample": {"unet"}, "decode": {"vae"}, "both": {"unet", "vae"}, "none": set()}


def two_networks() -> dict[str, nn.Module]:
    pipe = tiny_stable_diffusion()
    networks = {"unet": pipe.unet, "vae": pipe.vae}
    for network in networks.values():
        network.requires_grad_(False).eval().to(memory_format=torch.channels_last)
    return networks


def tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def looks(module: nn.Module) -> list[tuple[object, ...]]:
    return [(id(t), t.shape, t.stride(), t.dtype, t.device) for t in tensors(module)]


def is_away(module: nn.Module, residency: Residency) -> bool:
    memory = residency._host.tensor
    assert memory is not None
    slab = memory.untyped_storage()._cdata
    found = {t.untyped_storage()._cdata == slab for t in tensors(module) if not t.requires_grad}
    assert len(found) == 1
    return found.pop()


@pytest.mark.parametrize("chunk_bytes", [1, 100_000, 2**28])
def test_a_phase_has_what_it_needs_and_no_more(chunk_bytes: int) -> None:
    networks = two_networks()
    before = {name: looks(network) for name, network in networks.items()}
    values = {n: [t.clone() for t in tensors(network)] for n, network in networks.items()}
    nbytes = {n: sum(t.nbytes for t in tensors(network)) for n, network in networks.items()}
    device = double()
    residency = Residency(networks, PHASES, device, chunk_bytes=chunk_bytes)
    for phase in ("sample", "decode", "decode", "both", "none", "sample"):
        with residency.phase(phase):
            for name, network in networks.items():
                assert is_away(network, residency) == (name not in PHASES[phase])
                assert_same(tensors(network), values[name])  # also of what is away
                assert looks(network) == before[name]
            needed = sum(nbytes[name] for name in PHASES[phase])
            assert needed <= device.device_bytes_now == residency.bytes_of(phase)
            assert device.device_bytes_now <= needed + 512 * 700  # what alignment takes
    residency.close()
    assert device.device_bytes_now == 0
    for name, network in networks.items():
        assert looks(network) == before[name]
        assert_same(tensors(network), values[name])
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in tensors(network))
    assert device.violations == []


def test_sharing_and_offsets_are_kept() -> None:
    a, b = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
    b.weight = a.weight
    a.register_buffer("row", a.weight.data[2, 1:4])
    a.register_buffer("wide", torch.randn(5, dtype=torch.float64))
    a.register_buffer("flag", torch.tensor([True, False, True]))
    a.register_buffer("nothing", torch.empty(0))
    networks = {"a": a.requires_grad_(False), "b": b.requires_grad_(False)}
    before = [t.clone() for t in tensors(a)]
    residency = Residency(networks, {"a": {"a"}, "b": {"b"}, "none": set()}, double())

    def check() -> None:
        assert a.weight is b.weight
        assert_same(tensors(a), before)
        row = a.get_buffer("row")
        assert row.data_ptr() == a.weight.data_ptr() + 7 * 2 * 4 - 4
        assert row.untyped_storage()._cdata == a.weight.untyped_storage()._cdata

    for phase in ("a", "b", "none"):
        with residency.phase(phase):
            check()
            assert residency.resident_bytes == {"a": 3 * 512, "b": 512, "none": 0}[phase]
    residency.close()
    check()
    assert a.weight.untyped_storage().nbytes() == 144


def test_trained_parameters_stay_where_they_are() -> None:
    networks = two_networks()
    lora.inject(networks["unet"], 4, 4, "attention", seed=1)
    trained = list(lora.lora_parameters(networks["unet"]).values())
    pointers = [p.data_ptr() for p in trained]
    optimizer = torch.optim.AdamW(trained)
    residency = Residency(networks, PHASES, double())
    with residency.phase("sample"):
        loss = networks["unet"](torch.randn(1, 4, 8, 8), 3, torch.randn(1, 5, 16)).sample.sum()
        loss.backward()
    with residency.phase("decode"):
        assert [p.data_ptr() for p in trained] == pointers
        optimizer.step()
    assert [p.data_ptr() for p in trained] == pointers
    assert all(p.requires_grad for p in trained)


def test_gradients_when_weights_leave_between_forward_and_backward() -> None:
    networks = two_networks()
    unet, vae = networks["unet"], networks["vae"]
    lora.inject(unet, 4, 4, "attention", seed=1)
    trained = list(lora.lora_parameters(unet).values())
    for parameter in trained:
        nn.init.normal_(parameter, std=0.1)
    latents = torch.randn(2, 4, 8, 8)
    context = torch.randn(2, 5, 16)

    def denoise() -> Tensor:
        return unet(latents, 300, context).sample

    def score(x0: Tensor) -> Tensor:
        return vae.decode(x0).sample.square().sum()

    expected = torch.autograd.grad(score(denoise()), trained)
    device = double()
    phases = {"sample": {"unet"}, "score": {"vae"}, "backward": {"unet"}}
    residency = Residency(networks, phases, device, chunk_bytes=50_000)
    away = Offloader(device, MIB, 0, weights=residency, verify=True)
    for hooks in (False, True):
        with residency.phase("sample", then="score"):
            if hooks:
                with away.segment("unet"):
                    x0 = denoise()
            else:
                x0 = denoise()
        held = device.device_bytes_now
        with residency.phase("score", then="backward"):
            leaf = x0.detach().requires_grad_()
            grad = torch.autograd.grad(score(leaf), leaf)
            assert device.device_bytes_now >= held
            with pytest.raises(ResidencyError, match="weights of unet"):
                torch.autograd.grad(x0, trained, grad, retain_graph=True)
        with residency.phase("backward"):
            assert_same(torch.autograd.grad(x0, trained, grad), expected)
    # no weight went to the host, though by then they lay elsewhere than before
    residency.close()
    reference = Offloader(double(), MIB, 0, never=[unet])
    with reference.segment("unet"):
        denoise()
    assert away.statistics().bytes_out == reference.statistics().bytes_out > 0
    assert device.violations == []


def test_no_view_of_a_weight_keeps_the_device_memory_alive() -> None:
    linear = nn.Linear(8, 8).requires_grad_(False)
    residency = Residency({"a": linear}, {"a": {"a"}, "none": set()}, double())
    with residency.phase("a"):
        x = torch.randn(3, 8, requires_grad=True)
        loss = (x @ linear.weight.t() + linear.bias).sum()
        [chunk] = residency._chunks
        assert chunk.buffer is not None
        memory = torch.multiprocessing.reductions.StorageWeakRef(
            chunk.buffer.tensor.untyped_storage()  # type: ignore[union-attr]
        )
        assert not memory.expired()
    with residency.phase("none"):
        assert memory.expired()
    with residency.phase("a"):
        loss.backward()
        assert torch.equal(x.grad, torch.ones(3, 8) @ linear.weight)  # type: ignore[arg-type]


def test_the_next_phase_is_brought_up_meanwhile() -> None:
    def stalled(then: str | None, budget_bytes: int | None) -> float:
        device = double(to_device_bandwidth=1e8)
        networks = two_networks()
        residency = Residency(networks, PHASES, device, budget_bytes, chunk_bytes=40_000)
        with residency.phase("sample", then=then):
            begin = device.stall_seconds
            device.compute(1.0)
        with residency.phase("decode"):
            device.compute(1.0)
        assert device.violations == []
        if budget_bytes is not None:
            assert device.peak_device_bytes <= budget_bytes
        return device.stall_seconds - begin

    sizes = Residency(two_networks(), PHASES, double(), chunk_bytes=40_000)
    unet, vae = (sizes.bytes_of(phase) for phase in ("sample", "decode"))
    assert stalled(None, None) == pytest.approx(vae / 1e8)
    assert stalled("decode", None) == stalled("decode", unet + vae) == 0
    assert stalled("decode", unet) == pytest.approx(vae / 1e8)
    assert 0 < stalled("decode", unet + vae - 1) < vae / 1e8  # all but the last piece


def test_a_state_dict_of_what_is_away(tmp_path: Path) -> None:
    networks = two_networks()
    before = {key: value.clone() for key, value in networks["vae"].state_dict().items()}
    residency = Residency(networks, PHASES, double())
    for phase in ("sample", "decode"):
        with residency.phase(phase):
            state = networks["vae"].state_dict()
            assert state.keys() == before.keys()
            assert_same(list(state.values()), list(before.values()))
            save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "vae.safetensors")
            assert_same(
                [load_file(tmp_path / "vae.safetensors")[key] for key in before],
                list(before.values()),
            )


def test_weights_that_are_changed_stay_changed() -> None:
    linear = nn.Linear(4, 4).requires_grad_(False)
    residency = Residency({"a": linear}, {"a": {"a"}, "none": set()}, double())
    one, two = torch.randn(4, 4), torch.randn(4, 4)
    with residency.phase("a"):
        linear.weight.copy_(one)
    with residency.phase("none"):
        assert torch.equal(linear.weight, one)
        linear.load_state_dict({"weight": two, "bias": torch.zeros(4)})
    with residency.phase("a"):
        assert torch.equal(linear.weight, two)
    residency.close()
    assert torch.equal(linear.weight, two)


def test_what_cannot_be() -> None:
    networks = two_networks()
    with pytest.raises(ConfigError, match=r"'score' needs 'reward'.*unet, vae"):
        Residency(networks, {"score": {"reward"}}, double())
    residency = Residency(networks, PHASES, double())
    with pytest.raises(ConfigError, match="no phase 'decoding'; there are sample"):
        residency.phase("decoding").__enter__()
    with pytest.raises(ConfigError, match="no phase 'x'"):
        residency.phase("decode", then="x").__enter__()
    with residency.phase("sample"), pytest.raises(ConfigError, match="within the phase 'sample'"):
        residency.phase("decode").__enter__()
    with residency.phase("decode"):  # the one before has ended
        pass
