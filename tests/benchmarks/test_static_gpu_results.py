"""The committed figures: of the present sources, within the gates; the page is their own."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cases import check_cases
from benchmarks.static_gpu import cuda_kernels, gates, launches, report, sources, workers
from benchmarks.static_gpu.collect import MODELLED, SCENARIOS, record
from benchmarks.static_gpu.compiling import resources
from benchmarks.static_gpu.devices import RTX_3090, SHARED_LIMITS
from rewardprop_fast import ops

FOLDER = sources.ROOT / report.RESULTS

#: Of each operator so many kernels are compiled anew, the ones with the fewest products.
_COMPILED = 1


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    return report.read(FOLDER)


def test_they_come_from_the_present_sources(committed: dict[str, Any]) -> None:
    changed = sources.changed(committed["sources"])
    assert not changed, (
        f"{', '.join(changed)} changed: run {sources.COMMAND} and commit what it writes"
    )


def test_all_gates_hold(committed: dict[str, Any]) -> None:
    assert gates.of_report(committed) == []


def test_every_exemption_is_needed_and_no_wider_than_that(committed: dict[str, Any]) -> None:
    on_reference = [row for row in committed["passes"] if row["device"] == gates.REFERENCE]
    bandwidth = RTX_3090.bandwidth
    for exemption in gates.EXEMPTIONS:
        assert len(exemption.reason) > 40
        rows = [row for row in on_reference if gates.exemption(row) is exemption]
        worst = max(row["bytes_over_floor"] for row in rows)
        assert gates.BYTES_OVER_FLOOR < worst <= exemption.at_most < 1.05 * worst, exemption
        if exemption.bound == "compute":  # as its reason says
            for row in rows:
                assert row["moved_bytes"] / bandwidth < 0.55e-6 * row["microseconds"], row


def test_the_page_is_made_from_the_data(committed: dict[str, Any]) -> None:
    page = (FOLDER / "static_gpu.md").read_text(encoding="utf-8")
    assert page == report.page(committed), f"edited by hand? {sources.COMMAND} writes it"


def test_every_operator_with_gpu_kernels_is_there(committed: dict[str, Any]) -> None:
    backends = {
        name: {form.backend for form in operator.implementations}
        for name, operator in ops.OPERATORS.items()
    }
    in_triton = {row["operator"] for row in committed["passes"]}
    assert in_triton == {name for name, found in backends.items() if "triton" in found}
    files = {row["file"] for row in committed["cuda"]}
    assert files == {file.name for file in cuda_kernels.files()}
    assert {row["arch"] for row in committed["cuda"]} == set(SHARED_LIMITS)
    for one in committed["configurations"].values():
        assert one["resources"], one["kernel"]
    modelled = {(row["operator"], row["dtype"], row["device"]) for row in committed["passes"]}
    assert len(modelled) == len(in_triton) * len(MODELLED) * len(SHARED_LIMITS)
    assert committed["refused"] == []  # no call of a network is without a form


def _recorded() -> dict[str, dict[tuple[str, str], Any]]:
    """operator -> (key, architecture) -> configuration, for all networks in every dtype."""
    found: dict[str, dict[tuple[str, str], Any]] = {}
    for _, one in record(SCENARIOS):
        for launch in one.launches:
            configuration = launch.configuration
            place = (configuration.key, str(one.arch))
            found.setdefault(one.case.operator, {})[place] = configuration
    return found


def _compiled_anew(key: str, configuration: Any, folder: Path) -> tuple[str, dict[str, Any]]:
    return key, asdict(resources(configuration, 86, folder))


@pytest.fixture(scope="module")
def compiler() -> Iterator[ProcessPoolExecutor]:
    with workers.pool(interpreted=False, workers=1) as executor:
        yield executor


def test_what_would_be_launched_is_what_was_compiled(
    committed: dict[str, Any], compiler: ProcessPoolExecutor, tmp_path: Path
) -> None:
    """All launches are recorded anew; a few kernels of each operator are compiled anew too."""
    recorded = compiler.submit(_recorded).result()
    known = committed["configurations"]
    for operator, configurations in recorded.items():
        unknown = [
            one.kernel
            for (key, arch), one in configurations.items()
            if key not in known or arch not in known[key]["resources"]
        ]
        assert not unknown, f"{operator} launches {unknown} otherwise: run {sources.COMMAND}"
        on_86 = [one for (_, arch), one in configurations.items() if arch == "86"]
        light = sorted(on_86, key=lambda one: _weight(known[one.key]))[:_COMPILED]
        for one in light:
            key, needs = compiler.submit(_compiled_anew, one.key, one, tmp_path).result()
            assert needs == known[key]["resources"]["86"], f"{operator}: {one.kernel}"


def _weight(one: dict[str, Any]) -> tuple[int, int]:
    """Heavier ones take longer to compile."""
    needs = one["resources"]["86"]
    return (needs["theory_macs"], needs["registers"])


@pytest.mark.skipif(cuda_kernels.nvcc() is None, reason="nvcc is not installed")
def test_cuda_kernels_compile_to_what_is_committed(committed: dict[str, Any]) -> None:
    if cuda_kernels.version() != committed["versions"]["nvcc"]:
        pytest.skip(f"the figures are of nvcc {committed['versions']['nvcc']}")
    file = min(cuda_kernels.files(), key=lambda path: path.stat().st_size)
    found = cuda_kernels.compile_one(file, 86)
    expected = [r for r in committed["cuda"] if (r["file"], r["arch"]) == (file.name, 86)]
    assert found == expected


def test_cases_that_are_checked_can_be_launched(compiler: ProcessPoolExecutor) -> None:
    """Odd shapes too: each check of the GPU command has a launch, or a reason why it has none."""
    problems = compiler.submit(_unlaunchable).result()
    assert not problems, problems


def _unlaunchable() -> list[str]:
    """Cases whose Triton form fails in another way than by saying that it is not legal."""
    from rewardprop_fast.errors import ConfigError

    found = []
    for case in check_cases():
        if not launches.has_triton(case):
            continue
        for dtype in case.dtypes:
            try:
                forward, _ = launches.of_case(case, dtype, 86)
            except ConfigError:
                continue
            if not forward:
                found.append(f"{case.operator} {case.name} {dtype}: no launch")
    return found
