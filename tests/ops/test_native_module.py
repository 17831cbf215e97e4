"""The compiled module itself: instruction sets, threads, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rewardprop_fast import doctor
from rewardprop_fast.ops import native
from rewardprop_fast.version import __version__

pytestmark = pytest.mark.skipif(
    native.why_missing() is not None, reason=f"the native module is {native.why_missing()}"
)

# Loads the module by its path, without the package and torch, and prints a digest of everything the
# kernel computes: both dtypes, with and without guidance and noise, forward and backward.
DIGEST = """
import ctypes, hashlib, importlib.util, itertools, sys
import numpy as np

for library in sys.argv[2:]:
    ctypes.CDLL(library)  # the OpenMP runtime that torch would have loaded
spec = importlib.util.spec_from_file_location("rewardprop_fast._native", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)

random = np.random.default_rng(0)
count = 4099
digest = hashlib.sha256()
for dtype, guided, noisy in itertools.product(("float32", "bfloat16"), (0, 1), (0, 1)):
    model = random.standard_normal((1 + guided) * count, dtype=np.float32)
    if dtype == "bfloat16":
        model = (model.view(np.uint32) >> 16).astype(np.uint16)
    latents, noise = random.standard_normal((2, count), dtype=np.float32)
    coefficients = np.array([1.0371, -0.2213, 0.0817], np.float32)
    out, grad = np.empty_like(latents), np.empty_like(model)
    shared = {"coefficients": coefficients.ctypes.data, "model_dtype": dtype,
              "guidance_scale": 7.5 if guided else None, "count": count}
    module.guided_ddim_step(
        model_output=model.ctypes.data, model_output_count=model.size, latents=latents.ctypes.data,
        noise=noise.ctypes.data if noisy else None, out=out.ctypes.data, **shared)
    module.guided_ddim_step_backward(
        grad=latents.ctypes.data, out=grad.ctypes.data, out_count=grad.size, **shared)
    digest.update(out.tobytes() + grad.tobytes())
print(module.isa_report()["selected"], digest.hexdigest())
"""


def run_python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def digest(isa: str) -> subprocess.CompletedProcess[str]:
    pools = doctor.report()["openmp"]["pools"] or []
    return run_python(DIGEST, native.module().__file__, *pools, REWARDPROP_ISA=isa)


def test_version_is_the_packages() -> None:
    assert native.module().version() == __version__


def test_instruction_sets_agree_to_the_last_bit() -> None:
    supported = native.module().isa_report()["supported"]
    assert supported[0] == "scalar"
    results = [digest(isa) for isa in supported]
    assert [result.returncode for result in results] == [0] * len(supported), results[0].stderr
    answers = [result.stdout.split() for result in results]
    assert [selected for selected, _ in answers] == supported
    assert len({value for _, value in answers}) == 1


def test_the_best_instruction_set_is_taken_unless_one_is_named() -> None:
    assert digest("").stdout.split()[0] == native.module().isa_report()["supported"][-1]


def test_an_instruction_set_that_is_not_here_is_refused_in_words() -> None:
    result = digest("neon9000")
    assert result.returncode != 0
    assert "ValueError: REWARDPROP_ISA is 'neon9000'; on this machine it can be scalar" in (
        result.stderr
    )


THREADS = """
import os
import torch
torch.set_num_threads(2)
a = torch.ones(1 << 21)
(a + a).sum()
before = len(os.listdir("/proc/self/task"))
from rewardprop_fast import doctor, ops
from rewardprop_fast.ops import native
with ops.backend("native", strict=True):
    x = torch.ones(1, 8, 512, 512)
    assert ops.guided_ddim_step(x.repeat(2, 1, 1, 1), x, torch.ones(3), 2.0).sum() == 2 * x.numel()
after = len(os.listdir("/proc/self/task"))
two = native.module().max_threads()
torch.set_num_threads(1)
one = native.module().max_threads()
print(after - before, two, one, *doctor.report()["openmp"]["pools"])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_shares_the_openmp_pool_of_torch() -> None:
    """Its threads are torch's: none are added, no second runtime is loaded, and it obeys torch."""
    result = run_python(THREADS, OMP_NUM_THREADS="2")
    assert result.returncode == 0, result.stderr
    added, two, one, *pools = result.stdout.split()
    assert int(added) == 0
    assert len(pools) == 1, pools
    assert Path(torch.__file__).parent in Path(pools[0]).parents
    assert (int(two), int(one)) in {(2, 1), (1, 1)}  # (1, 1): built without OpenMP


def forward(**changes: object) -> None:
    """A correct call of 8 elements, with changes."""
    memory = torch.zeros(64)
    at = [memory.data_ptr() + 4 * i for i in range(64)]
    arguments: dict[str, object] = {
        "model_output": at[0],
        "model_output_count": 16,
        "model_dtype": "float32",
        "latents": at[16],
        "noise": at[24],
        "coefficients": at[32],
        "guidance_scale": 7.5,
        "out": at[40],
        "count": 8,
    }
    arguments.update({k: v(at) if callable(v) else v for k, v in changes.items()})
    native.module().guided_ddim_step(**arguments)


def backward(**changes: object) -> None:
    memory = torch.zeros(64)
    at = [memory.data_ptr() + 4 * i for i in range(64)]
    arguments: dict[str, object] = {
        "grad": at[0],
        "count": 8,
        "coefficients": at[8],
        "guidance_scale": 7.5,
        "model_dtype": "float32",
        "out": at[16],
        "out_count": 16,
    }
    arguments.update({k: v(at) if callable(v) else v for k, v in changes.items()})
    native.module().guided_ddim_step_backward(**arguments)


@pytest.mark.parametrize(
    ("call", "changes", "message"),
    [
        (forward, {"count": -1}, "latents has a negative count: -1"),
        (forward, {"model_output": 0}, "model_output is null"),
        (forward, {"noise": 0}, "noise is null"),
        (forward, {"coefficients": 0}, "coefficients is null"),
        (forward, {"out": 0}, "out is null"),
        (forward, {"latents": lambda at: at[16] + 1}, "latents is not aligned"),
        (forward, {"model_output_count": 8}, "model_output has 8 elements; expected 16"),
        (forward, {"guidance_scale": None}, "model_output has 16 elements; expected 8"),
        (forward, {"model_dtype": "float16"}, "model_dtype is 'float16'; allowed are float32"),
        (forward, {"out": lambda at: at[23]}, "out overlaps latents"),
        (forward, {"out": lambda at: at[7]}, "out overlaps model_output"),
        (forward, {"out": lambda at: at[25]}, "out overlaps noise"),
        (backward, {"out_count": 8}, "out has 8 elements; expected 16"),
        (backward, {"out": lambda at: at[7]}, "out overlaps grad"),
        (backward, {"grad": 0}, "grad is null"),
        (backward, {"model_dtype": "int8"}, "model_dtype is 'int8'"),
    ],
)
def test_wrong_arguments_are_refused_before_memory_is_touched(
    call: Callable[..., None], changes: dict[str, object], message: str
) -> None:
    call()
    with pytest.raises(ValueError, match=message):
        call(**changes)
