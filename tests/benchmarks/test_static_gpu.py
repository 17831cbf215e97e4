"""Compiling, reading, counting and modelling GPU kernels; the gates catch each way to be bad."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.static_gpu import gates, launches, sass, traffic, workers
from benchmarks.static_gpu.compiling import Resources, resources
from benchmarks.static_gpu.devices import A100, DEVICES, RTX_3090, RTX_4090, nearest
from benchmarks.static_gpu.launches import PlainLaunch
from benchmarks.static_gpu.model import (
    Cache,
    blocks_per_multiprocessor,
    model,
    read_bytes,
    unevenness,
)
from benchmarks.static_gpu.traffic import Stream, Traffic
from tests.benchmarks import toy_kernels

# Kernels are compiled in processes of their own: here they are for the interpreter.


def _compiled(
    launch: Callable[[], None], arch: int, folder: Path
) -> tuple[list[PlainLaunch], list[Resources]]:
    found = launches.record(launch, arch)
    return found, [resources(one.configuration, arch, folder) for one in found]


@pytest.fixture(scope="module")
def compiler() -> Any:
    with workers.pool(interpreted=False, workers=1) as executor:
        yield executor


@pytest.fixture(scope="module")
def compiled(
    compiler: ProcessPoolExecutor, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[PlainLaunch, Resources]]:
    folder = tmp_path_factory.mktemp("compiled")

    def run(launch: Callable[[], None], arch: int = 86) -> tuple[PlainLaunch, Resources]:
        recorded, needs = compiler.submit(_compiled, launch, arch, folder).result()
        return recorded[0], needs[0]

    return run


@pytest.fixture(scope="module")
def counted() -> Any:
    with workers.pool(interpreted=True, workers=1) as executor:
        yield lambda launch: executor.submit(traffic.traffic, launch).result()


def _problems(launch: PlainLaunch, needs: Resources) -> list[str]:
    stages = launch.configuration.num_stages
    return gates.of_resources("kernel", needs.arch, stages, asdict(needs))


# --- what the compiler makes, and its gates ---


@pytest.mark.parametrize("arch", [80, 86, 89, 90])
def test_a_good_kernel_passes_and_its_products_are_where_theory_has_them(
    compiled: Callable[..., Any], arch: int
) -> None:
    launch, needs = compiled(partial(toy_kernels.launch_matmul, 512, 512, 512), arch)
    assert needs.problem is None
    assert needs.theory_macs == 64 * 64 * 32 // 4
    assert needs.tensor_macs == needs.theory_macs
    # One warp's instruction is 16x8x16; on 9.0 four warps share one of 64x64x16.
    assert needs.theory_instructions == needs.tensor_instructions == (2 if arch == 90 else 16)
    assert needs.tensor_instructions_in_loops == needs.tensor_instructions
    assert needs.async_copies > 0
    assert needs.shared_bytes >= 2 * (64 * 32 + 32 * 64) * 2
    assert _problems(launch, needs) == []


def test_a_kernel_that_spills_is_caught(compiled: Callable[..., Any]) -> None:
    launch, needs = compiled(
        partial(toy_kernels.launch_matmul, 512, 512, 512, tile=(128, 256, 16), num_stages=2)
    )
    assert any("spills registers" in problem for problem in _problems(launch, needs))


def test_a_kernel_that_wants_too_much_shared_memory_is_caught(
    compiled: Callable[..., Any],
) -> None:
    launch, needs = compiled(
        partial(toy_kernels.launch_matmul, 512, 512, 512, tile=(128, 64, 128), num_stages=4)
    )
    assert any("shared memory" in problem for problem in _problems(launch, needs))
    assert blocks_per_multiprocessor(needs, 4, RTX_3090) == 0


def test_products_of_float32_are_not_asked_of_tensor_cores(compiled: Callable[..., Any]) -> None:
    launch = partial(toy_kernels.launch_matmul, 64, 64, 64, torch.float32, precision="ieee")
    recorded, needs = compiled(launch)
    assert needs.theory_macs == needs.tensor_macs == 0
    assert _problems(recorded, needs) == []


def test_a_kernel_without_tl_dot_is_caught(
    compiled: Callable[..., Any], counted: Callable[..., Traffic]
) -> None:
    """Nothing in the machine code shows that there should have been products; the FLOPs do."""
    launch, needs = compiled(partial(toy_kernels.launch_without_tensor_cores, 128))
    assert needs.tensor_instructions == 0
    found = counted(launch)
    row = _row(matmul_flops=found.flops * found.programs, flops=2.0 * 128**3)
    assert any("without tl.dot" in problem for problem in gates.of_pass(row))


def test_a_kernel_that_does_not_compile_is_caught(compiled: Callable[..., Any]) -> None:
    launch, needs = compiled(
        partial(toy_kernels.launch_matmul, 64, 64, 64, tile=(64, 64, 8))  # K below 16
    )
    (problem,) = _problems(launch, needs)
    assert "does not compile" in problem


def _row(**changes: Any) -> dict[str, Any]:
    row = {
        "operator": "lora_linear",
        "phase": "forward",
        "case": "a case",
        "dtype": "bfloat16",
        "device": "RTX 3090",
        "kernels": ["a_kernel"],
        "bound": "memory",
        "bytes_over_floor": 1.0,
        "flops": 100.0,
        "matmul_flops": 100.0,
        "tensor_flops": 100.0,
    }
    return {**row, **changes}


def test_gates_of_a_pass() -> None:
    assert gates.of_pass(_row()) == []
    (problem,) = gates.of_pass(_row(bytes_over_floor=1.26, operator="geglu"))
    assert "1.26 times its floor" in problem
    assert gates.of_pass(_row(bytes_over_floor=1.26, device="A100", operator="geglu")) == []
    (problem,) = gates.of_pass(_row(tensor_flops=99.0))
    assert "tensor cores cannot take" in problem
    assert gates.of_pass(_row(tensor_flops=0.0, dtype="float32")) == []


def test_missing_tensor_instructions_and_copies_are_caught() -> None:
    good = Resources(86, 64, theory_macs=2048, tensor_macs=2048, async_copies=4)
    assert gates.of_resources("k", 86, 3, asdict(good)) == []
    half = replace(good, tensor_macs=1024)
    assert "multiply-adds" in gates.of_resources("k", 86, 3, asdict(half))[0]
    plain = replace(good, tensor_instructions_in_loops=1, async_copies=0)
    assert "no asynchronous copy" in gates.of_resources("k", 86, 3, asdict(plain))[0]


def test_an_exemption_holds_for_what_it_names_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    exemption = gates.Exemption(
        "geglu", "backward", "a_kernel", 1.5, "because", case="a case", bound="compute"
    )
    monkeypatch.setattr(gates, "EXEMPTIONS", (exemption,))
    row = _row(operator="geglu", phase="backward", bound="compute", bytes_over_floor=1.5)
    assert gates.of_pass(row) == []
    for other in (
        {"bytes_over_floor": 1.51},
        {"operator": "group_norm_silu"},
        {"phase": "forward"},
        {"kernels": ["another_kernel"]},
        {"case": "another"},
        {"bound": "memory"},
    ):
        assert len(gates.of_pass({**row, **other})) == 1, other


# --- reading machine code ---

_CODE = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;       /* 0x00000a0000017a02 */
                                                                /* 0x000fe40000000f00 */
        /*0010*/                   LDGSTS.E.BYPASS.128 [R8], [R2.64], P2 ;  /* 0x0 */
        /*0020*/                   STL [R1], R4 ;               /* 0x0 */
        /*0030*/                   HMMA.16816.F32.BF16 R4, R36.reuse, R2, R4 ;  /* 0x0 */
        /*0040*/                   HMMA.1688.F32.TF32 R4, R36, R2, R4 ;  /* 0x0 */
        /*0050*/              @!P0 BRA 0x30 ;                   /* 0x0 */
        /*0060*/                   LDL R4, [R1] ;               /* 0x0 */
        /*0070*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;  /* 0x0 */
        /*0080*/               @P3 BRA 0x90 ;                   /* 0x0 */
        /*0090*/                   BRA 0x90;                    /* 0x0 */
"""


def test_machine_code_is_read() -> None:
    machine = sass.read(_CODE, "REG:96 STACK:16 SHARED:0 LOCAL:0 CONSTANT[0]:416")
    assert machine.registers == 96
    assert machine.stack_bytes == 16
    assert machine.spill_instructions == 2
    assert machine.tensor_instructions == 3
    assert machine.tensor_instructions_in_loops == 2
    assert machine.tensor_macs == 2048 + 1024 + 64 * 128 * 16 // 4
    assert machine.async_copies == 1


def test_functions_of_a_dump_are_told_apart() -> None:
    text = f"\t\tFunction : first\n{_CODE}\n\t\tFunction : second\n{_CODE}"
    assert [name for name, _ in sass.split_functions(text)] == ["first", "second"]


# --- the signature ---


def test_the_signature_is_what_the_jit_would_choose(compiled: Callable[..., Any]) -> None:
    launch, _ = compiled(partial(toy_kernels.launch_matmul, 100, 64, 1))
    configuration = launch.configuration
    assert configuration.signature["x"] == "*bf16"
    assert configuration.signature["M"] == "i32"
    assert configuration.signature["K"] == "constexpr"  # 1 is compiled in
    assert configuration.constexprs["K"] == 1
    assert "M" not in configuration.aligned
    assert {"x", "N", "stride_w"} <= set(configuration.aligned)


# --- counting ---


@pytest.fixture(scope="module")
def counted_matmul(compiled: Callable[..., Any], counted: Callable[..., Traffic]) -> Traffic:
    launch, _ = compiled(partial(toy_kernels.launch_matmul, 32768, 256, 128))
    return counted(launch)


def test_bytes_and_flops_are_those_of_the_tiles(counted_matmul: Traffic) -> None:
    assert counted_matmul.programs == 512 * 4
    assert counted_matmul.flops == 2 * 64 * 64 * 128
    assert counted_matmul.operand == "bfloat16"
    x, w, y = (counted_matmul.streams[name] for name in "xwy")
    assert x.read == x.read_distinct == 64 * 128 * 2
    assert w.read == 128 * 64 * 2
    assert (y.read, y.written) == (0, 64 * 64 * 2)
    assert x.nbytes == 32768 * 128 * 2
    # Programs go down the rows first: each reads another tile of x. w stays in L2 anyway.
    assert x.tiles == tuple(range(132))
    assert w.tiles == ()


def test_programs_that_share_a_tile_are_seen(
    compiled: Callable[..., Any], counted: Callable[..., Traffic]
) -> None:
    launch, _ = compiled(partial(toy_kernels.launch_matmul, 512, 32768, 128))
    assert counted(launch).streams["w"].tiles == tuple(i // 8 for i in range(132))


def test_a_second_reading_is_seen(
    compiled: Callable[..., Any], counted: Callable[..., Traffic]
) -> None:
    launch, _ = compiled(partial(toy_kernels.launch_twice, 10_000_000, 4096))
    stream = counted(launch).streams["x"]
    assert stream.read == 2 * stream.read_distinct > 0


def test_programs_that_are_unlike_are_counted_by_their_share(
    compiled: Callable[..., Any], counted: Callable[..., Traffic]
) -> None:
    launch, _ = compiled(partial(toy_kernels.launch_one_of_five, 200, 64))
    found = counted(launch)
    assert found.programs == 1000
    assert found.streams["x"].read == 64 * 2
    written = found.streams["sums"].written * found.programs
    assert written == pytest.approx(200 * 4, rel=0.05)


# --- the model ---


def test_reads_come_from_memory_once_unless_l2_is_too_small() -> None:
    mib = 2**20
    small = Stream(nbytes=2 * mib, read=2e4, read_distinct=1e4, written=0)
    assert read_bytes(small, 1000, 100, RTX_3090) == 2 * mib
    # All programs read the same 8 MiB, 100 at a time: again for each wave, where L2 has 6 MiB.
    shared = Stream(8 * mib, 8 * mib, 8 * mib, 0, tiles=(0,) * 100)
    assert read_bytes(shared, 1000, 100, RTX_3090) == 80 * mib
    assert read_bytes(shared, 1000, 100, RTX_4090) == 8 * mib
    # Each reads its own 1 MiB twice: 100 MiB pass before it comes back.
    own = Stream(1000 * mib, 2 * mib, mib, 0, tiles=tuple(range(100)))
    assert read_bytes(own, 1000, 100, RTX_3090) == 2000 * mib
    narrow = replace(own, nbytes=int(1000e4), read=2e4, read_distinct=1e4)
    assert read_bytes(narrow, 1000, 100, RTX_3090) == 1000e4


def test_a_later_launch_finds_in_l2_what_fits_into_half_of_it() -> None:
    mib = 2**20
    cache = Cache(RTX_3090)  # 6 MiB
    cache.use(1, mib)
    cache.use(2, 2 * mib)
    assert set(cache.held) == {1, 2}
    cache.use(1, mib)  # used again: 2 is now the older one
    cache.use(3, mib)
    assert set(cache.held) == {1, 3}
    cache.use(4, 4 * mib)  # larger than all
    assert not cache.held
    stream = Stream(mib, mib / 8, mib / 8, 1024.0)
    traffic_ = Traffic(8, 0.0, "", {"x": stream})
    needs = Resources(86, registers=32)
    assert model(traffic_, needs, 4, RTX_3090).bytes_moved == mib + 8 * 1024
    assert model(traffic_, needs, 4, RTX_3090, {"x"}).bytes_moved == 8 * 1024


def test_blocks_on_a_multiprocessor() -> None:
    assert blocks_per_multiprocessor(Resources(86, registers=32), 4, RTX_3090) == 12  # threads
    assert blocks_per_multiprocessor(Resources(86, registers=255), 4, RTX_3090) == 2  # registers
    needs = Resources(86, registers=64, shared_bytes=32 * 1024)
    assert blocks_per_multiprocessor(needs, 4, RTX_3090) == 3  # 33 KiB of 100 each
    assert blocks_per_multiprocessor(needs, 4, A100) == 4
    assert blocks_per_multiprocessor(Resources(86, registers=16), 1, RTX_3090) == 16  # blocks
    assert blocks_per_multiprocessor(Resources(86, 64, shared_bytes=99 * 1024), 4, RTX_3090) == 1
    assert blocks_per_multiprocessor(Resources(86, 64, shared_bytes=100 * 1024), 4, RTX_3090) == 0


def test_uneven_grids_take_longer() -> None:
    assert unevenness(82 * 2, 82 * 2, RTX_3090) == 1
    assert unevenness(82 * 2 + 1, 82 * 2, RTX_3090) == pytest.approx(3 * 82 / 165)
    assert unevenness(41, 82, RTX_3090) == 2
    assert unevenness(0, 82, RTX_3090) == 1


def test_time_is_the_larger_of_products_and_bytes() -> None:
    needs = Resources(86, registers=64, shared_bytes=16 * 1024)
    stream = Stream(10**9, 1e6, 1e6, 0.0)
    heavy = Traffic(820, 1e12, "bfloat16", {"x": stream})
    found = model(heavy, needs, 4, RTX_3090)
    assert (found.bound, found.seconds) == ("compute", pytest.approx(820e12 / 71e12))
    light = model(replace(heavy, flops=0.0), needs, 4, RTX_3090)
    assert (light.bound, light.seconds) == ("memory", pytest.approx(820e6 / 936e9))
    assert model(replace(heavy, operand="float32"), needs, 4, RTX_3090).seconds > found.seconds
    once = model(replace(heavy, operand="tf32"), needs, 4, RTX_3090).seconds
    thrice = model(replace(heavy, operand="tf32x3"), needs, 4, RTX_3090).seconds
    assert thrice == pytest.approx(3 * once)


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA A100-SXM4-40GB", None),
        ("NVIDIA L4", None),
    ],
)
def test_a_driver_s_name_means_a_device_or_none(name: str, device: str | None) -> None:
    found = nearest(name)
    assert (None if found is None else found.name) == device


def test_the_devices_are_ordered_as_their_makers_say() -> None:
    assert [device.arch for device in DEVICES] == [86, 89, 80, 90]
    for device in DEVICES:
        assert device.peak_16bit >= 2 * device.peak_float32 * 0.99
        assert device.shared_per_block < device.shared_per_multiprocessor
