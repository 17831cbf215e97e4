"""The module of CUDA C++ kernels as nvcc built it: what is in it, and what it refuses."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from rewardprop_fast.ops import cuda_module
from rewardprop_fast.version import __version__

pytestmark = pytest.mark.skipif(
    cuda_module.why_missing() is not None,
    reason=f"the module of CUDA kernels is {cuda_module.why_missing()}",
)

TARGETS = {"sm_80", "sm_86", "sm_89", "sm_90"}


def cuobjdump(*arguments: str) -> str:
    """What CUDA's tool says of the module; Triton brings one."""
    found = shutil.which("cuobjdump")
    triton = find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        found = shutil.which(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump")
    if found is None:
        pytest.skip("no cuobjdump, neither in PATH nor with triton")
    command = [found, *arguments, cuda_module.module().__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout


def kernels() -> Iterator[tuple[str, str, dict[str, int]]]:
    """(target, kernel, {"REG": ..., "STACK": ...}) of every kernel for every target."""
    target = name = ""
    for line in cuobjdump("-res-usage").splitlines():
        if found := re.search(r"\b(sm_\d+)\b", line):
            target = found[1]
        if found := re.search(r"Function (\S+?):", line):
            name = found[1]
        if "REG:" in line:
            yield target, name, {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)}


def test_version_is_the_packages() -> None:
    assert cuda_module.module().version() == __version__


def test_no_kernel_spills_registers_on_any_target() -> None:
    """Spilled registers live in the stack frame; a kernel that has none spills none."""
    by_target: dict[str, set[str]] = {}
    for target, name, usage in kernels():
        by_target.setdefault(target, set()).add(name)
        assert usage["STACK"] == 0, (target, name, usage)
        assert usage["LOCAL"] == 0, (target, name, usage)
        assert usage["REG"] <= 128, (target, name, usage)
        assert usage["SHARED"] <= 48 * 1024, (target, name, usage)
    assert by_target.keys() == TARGETS
    first, *others = by_target.values()
    assert len(first) >= 24
    assert all(names == first for names in others)


def test_later_gpus_find_intermediate_code() -> None:
    assert set(re.findall(r"sm_\d+", cuobjdump("-lptx"))) == {"sm_90"}


def geglu(**changes: Any) -> None:
    """A call whose every argument is right, with changes; memory lies on the CPU."""
    memory = torch.zeros(64)
    arguments = {"x": memory.data_ptr(), "out": memory.data_ptr() + 128, "rows": 2, "width": 8}
    cuda_module.module().geglu(
        **{**arguments, "dtype": "float32", "device": 0, "stream": 0, **changes}
    )


def guided_ddim_step(**changes: Any) -> None:
    memory = torch.zeros(64)
    at = [memory.data_ptr() + 4 * i for i in range(64)]
    arguments = {"model_output": at[0], "model_output_count": 16, "model_dtype": "float32"}
    arguments |= {"latents": at[16], "noise": at[24], "coefficients": at[32], "out": at[40]}
    arguments |= {"guidance_scale": 7.5, "count": 8, "device": 0, "stream": 0}
    cuda_module.module().guided_ddim_step(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("call", "changes", "message"),
    [
        (geglu, {"dtype": "float64"}, "dtype is 'float64'; allowed are float32, bfloat16 and"),
        (geglu, {"rows": -1}, "are not the sizes of an array"),
        (geglu, {"x": 0}, "x is null"),
        (geglu, {"rows": 3}, "out overlaps x"),
        (guided_ddim_step, {"model_output_count": 8}, "model_output has 8 elements; expected 16"),
        (guided_ddim_step, {"model_dtype": "int8"}, "model_dtype is 'int8'"),
        (guided_ddim_step, {"coefficients": 0}, "coefficients is null"),
        (guided_ddim_step, {"count": -1}, "latents has a negative count"),
    ],
)
def test_wrong_arguments_are_refused_before_a_device_is_asked_for(
    call: Callable[..., None], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        call(**changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
@pytest.mark.parametrize("call", [geglu, guided_ddim_step])
def test_without_a_device_the_error_is_cudas_in_words(call: Callable[..., None]) -> None:
    with pytest.raises(RuntimeError, match=r"CUDA.*\(cudaError\w+"):
        call()


def test_says_what_it_cannot_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cuda_module.why_not(torch.zeros(1)) == "it runs on CUDA devices, the tensors are on cpu"
    monkeypatch.setattr(cuda_module, "_load", lambda: (None, "not built: nvcc was not found"))
    with pytest.raises(ImportError, match=r"_cuda is not available: not built: nvcc was not"):
        cuda_module.module()
