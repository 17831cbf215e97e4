"""Attention's products of bfloat16, of pairs (AVX512-BF16) and of tiles (AMX), on any processor.

The same loops, with the products' instructions replaced by what they compute; conversions and
transpositions are plain C++ here.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.oracle import assert_as_exact_as_torch, output_and_gradients

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=["PAIRS", "TILES"])
def library(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> ctypes.CDLL:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    built = tmp_path_factory.mktemp(request.param) / "attention.so"
    cpu = ROOT / "csrc" / "cpu"
    sources = [cpu / name for name in ("attention_loops.cpp", "attention_dispatch.cpp", "isa.cpp")]
    sources.append(Path(__file__).with_name("attention_bfloat16.cpp"))
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", f"-I{cpu}"]
    macros = ["-DREWARDPROP_ISA=scalar", f"-DREWARDPROP_{request.param}"]
    command = [compiler, *flags, *macros, *sources, "-o", built]
    subprocess.run(command, check=True, timeout=300)
    return ctypes.CDLL(str(built))


def attention(library: ctypes.CDLL, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    """O and the gradients of q, k and v, all (H, L, D)."""
    heads, queries, width = q.shape
    sizes = [ctypes.c_int64(n) for n in (heads, queries, k.shape[1], width)]
    scale = ctypes.c_float(width**-0.5)

    def call(name: str, *tensors: Tensor) -> None:
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
        getattr(library, name)(*sizes, scale, *pointers)

    out, dq, dk, dv = (torch.full_like(x, float("nan")) for x in (q, q, k, v))
    lse = torch.full((heads, queries), float("nan"))
    call("attention_forward", q, k, v, out, lse)
    call("attention_backward", grad, q, k, v, out, lse, dq, dk, dv)
    return [out, dq, dk, dv]


@pytest.mark.parametrize(
    ("queries", "keys", "width"),
    [
        (64, 64, 40),
        (33, 77, 40),
        (70, 210, 37),  # an odd width: its last pair is half empty
        (5, 401, 80),  # odd keys over three tiles
        (100, 2, 64),
        (1, 13, 1),
        (40, 130, 200),  # narrower tiles
        (9, 60, 400),
        (40, 100, 360),  # tiles' keys are not a multiple of 32 there, but of 48
    ],
)
@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_is_as_exact_as_pytorch(
    library: ctypes.CDLL, queries: int, keys: int, width: int, spread: float
) -> None:
    heads = 3
    shapes = [(heads, length, width) for length in (queries, keys, keys, queries)]
    q, k, v, grad = (torch.randn(shape).mul(spread).bfloat16() for shape in shapes)
    found = attention(library, q, k, v, grad)
    plain = F.scaled_dot_product_attention
    batched = [x[None] for x in (q, k, v)]
    torchs = output_and_gradients(plain, batched, grad[None])
    exact = output_and_gradients(plain, [x.double() for x in batched], grad[None].double())
    assert_as_exact_as_torch([x[None] for x in found], torchs, exact)


def test_nan_reaches_the_rows_that_pytorch_gives_it(library: ctypes.CDLL) -> None:
    q, k, v, grad = (torch.randn(2, 48, 40).bfloat16() for _ in range(4))
    q[1, 7, 3] = float("nan")
    out = attention(library, q, k, v, grad)[0]
    expected = F.scaled_dot_product_attention(q, k, v)
    assert torch.equal(out.isnan(), expected.isnan())
