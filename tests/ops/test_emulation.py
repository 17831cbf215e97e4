"""The CUDA C++ kernels under sanitizers, and proof that these see what is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops import emulation

HERE = Path(__file__).parent


def require(sanitizer: str) -> None:
    why_not = emulation.why_not(sanitizer)
    if why_not is not None:
        pytest.skip(why_not)


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_kernels_run_clean(sanitizer: str) -> None:
    """Every test on emulated kernels once more in a process under the sanitizer.

    ThreadSanitizer runs those marked `races`, on threads of the system.
    """
    require(sanitizer)
    files = [str(f) for f in sorted(HERE.glob("test_*.py")) if "emulated_cuda" in f.read_text()]
    files.remove(__file__)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files],
        cwd=emulation.ROOT,
        env={**os.environ, **emulation.preload(sanitizer)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
    assert "Sanitizer" not in result.stdout + result.stderr


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """emulated_faults.cpp, built for each sanitizer."""
    folder = tmp_path_factory.mktemp("faults")
    built = {}
    for sanitizer, flags in emulation.SANITIZERS.items():
        if sanitizer and emulation.why_not(sanitizer) is None:
            built[sanitizer] = folder / sanitizer
            source = str(HERE / "emulated_faults.cpp")
            emulation.run(
                emulation.COMPILER,
                *emulation.COMMON,
                *flags,
                source,
                "-o",
                str(built[sanitizer]),
            )
    return built


@pytest.mark.parametrize(
    ("sanitizer", "fault", "found"),
    [
        ("address", "past_the_end", "heap-buffer-overflow"),
        ("address", "past_shared", "heap-buffer-overflow"),
        ("address", "past_dynamic", "heap-buffer-overflow"),
        ("address", "unaligned", "misaligned address"),
        ("address", "unreached", "wait at a barrier that others never reach"),
        ("address", "half_warp", "a shuffle among a part of a warp"),
        ("thread", "no_barrier", "data race"),
        ("thread", "one_result", "data race"),
    ],
)
def test_faults_are_found(faults: dict[str, Path], sanitizer: str, fault: str, found: str) -> None:
    require(sanitizer)
    result = subprocess.run([faults[sanitizer], fault], capture_output=True, text=True, timeout=300)
    assert result.returncode != 0, result.stdout
    assert found in result.stderr


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_without_a_fault_nothing_is_found(faults: dict[str, Path], sanitizer: str) -> None:
    require(sanitizer)
    result = subprocess.run(
        [faults[sanitizer], "none"], capture_output=True, text=True, timeout=300
    )
    assert (result.returncode, result.stdout) == (0, "1999000\n"), result.stderr
    assert "ERROR" not in result.stderr


def test_shared_memory_that_is_not_written_is_not_zero(faults: dict[str, Path]) -> None:
    require("address")
    result = subprocess.run(
        [faults["address"], "not_written"], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0
    assert "nan" in result.stdout
