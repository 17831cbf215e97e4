"""Attention in the compiled module: instruction sets, threads, and what its binding refuses."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rewardprop_fast import ops
from rewardprop_fast.ops import native
from rewardprop_fast.ops.attention import ATTENTION
from tests.ops.oracle import assert_as_exact_as_torch, native_missing, output_and_gradients

pytestmark = pytest.mark.skipif(**native_missing())


def leaves(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the gradient of O."""
    batch, heads, queries, keys, width = shape
    return [
        torch.randn(batch, length, heads, width).to(dtype).transpose(1, 2)
        for length in (queries, keys, keys, queries)
    ]


RESULTS = """
import sys
import torch
from rewardprop_fast import ops
from rewardprop_fast.ops.attention import ATTENTION
from rewardprop_fast.ops import native
given, answers = torch.load(sys.argv[1]), []
for *leaves, grad in given:
    leaves = [leaf.requires_grad_() for leaf in leaves]
    with ops.backend("native", strict=True):
        out = ops.attention(*leaves)
        answers.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
torch.save((native.module().isa_report()["selected"], answers), sys.argv[2])
"""


def test_instruction_sets_agree(tmp_path: Path) -> None:
    """Not to the last bit: vectors of other lengths sum in another order, in float32."""
    given = [
        leaves(shape, dtype)
        for shape in ((1, 2, 37, 77, 40), (1, 1, 50, 210, 36), (1, 1, 9, 35, 200))
        for dtype in (torch.float32, torch.bfloat16)
    ]
    torch.save(given, tmp_path / "given.pt")
    for isa in native.module().isa_report()["supported"]:
        files = [str(tmp_path / "given.pt"), str(tmp_path / f"{isa}.pt")]
        environment = {"REWARDPROP_ISA": isa, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        subprocess.run(
            [sys.executable, "-c", RESULTS, *files],
            env={**os.environ, **environment},
            check=True,
            timeout=120,
        )
        selected, answers = torch.load(files[1])
        assert selected == isa
        for (*inputs, grad), ours in zip(given, answers, strict=True):
            plain = F.scaled_dot_product_attention
            torchs = output_and_gradients(plain, inputs, grad)
            exact = output_and_gradients(plain, [x.double() for x in inputs], grad)
            assert_as_exact_as_torch(ours, torchs, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_fills_up_the_keys_has_no_weight(dtype: torch.dtype) -> None:
    """All scores far below zero: beside them one of zero would be infinite."""
    for lse in torch.linspace(-90, -87, 31).tolist():
        leaf = torch.full((1, 1, 8, 16), (lse - math.log(77)) / 16)
        inputs = [leaf, torch.ones(1, 1, 77, 16), torch.randn(1, 1, 77, 16)]
        inputs = [x.to(dtype) for x in inputs]
        grad = torch.randn(1, 1, 8, 16).to(dtype)
        with ops.backend("native", strict=True):
            ours = output_and_gradients(partial(ops.attention, scale=1.0), inputs, grad)
        plain = partial(F.scaled_dot_product_attention, scale=1.0)
        exact = output_and_gradients(plain, [x.double() for x in inputs], grad.double())
        for own, truth in zip(ours, exact, strict=True):
            torch.testing.assert_close(own, truth.to(dtype), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("shape", [(1, 1, 300, 450, 40), (1, 3, 65, 20, 36), (1, 2, 70, 130, 400)])
def test_any_number_of_threads_gives_the_same_bits(
    shape: tuple[int, int, int, int, int],
) -> None:
    """With fewer heads than threads, ranges of queries and of keys are shared out."""
    *inputs, grad = leaves(shape, torch.float32)
    threads = torch.get_num_threads()
    answers = []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            with ops.backend("native", strict=True):
                answers.append(output_and_gradients(ops.attention, inputs, grad))
    finally:
        torch.set_num_threads(threads)
    for answer in answers[1:]:
        assert all(map(torch.equal, answer, answers[0]))


def given(**change: Any) -> dict[str, Any]:
    """Arguments of the binding for B, H, Lq, Lk, D = 1, 2, 3, 4, 8, with ``change`` made."""
    tensors = {name: torch.zeros(1, 3, 2, 8) for name in ("q", "out", "grad", "dq")}
    tensors |= {name: torch.zeros(1, 4, 2, 8) for name in ("k", "v", "dk", "dv")}
    lse = torch.zeros(6)
    kept.extend([*tensors.values(), lse])
    lent = {name: (one.data_ptr(), (one.stride(0), 8, 16)) for name, one in tensors.items()}
    return {
        "sizes": (1, 2, 3, 4, 8),
        "dtype": "float32",
        "scale": 1.0,
        "lse": lse.data_ptr(),
        **lent,
        **change,
    }


#: Memory whose addresses the binding is given.
kept: list[Tensor] = []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": (1, 2, 3, 0, 8)}, "Lk at least 1"),
        ({"sizes": (1, 2, -3, 4, 8)}, "must not be negative"),
        ({"sizes": (1, 2, 3, 4, 513)}, "D from 1 to 512"),
        ({"dtype": "float16"}, "dtype is 'float16'; allowed are float32 and bfloat16"),
        ({"q": (0, (48, 8, 16))}, "q is null"),
        ({"q": (2, (48, 8, 16))}, "q is not aligned"),
        ({"k": (64, (-64, 8, 16))}, "k has a negative stride"),
        ({"v": (64, (2**61, 2**61, 2**62))}, "v is too large"),
        ({"lse": 0}, "lse is null"),
    ],
)
def test_the_binding_refuses_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    arguments = given(**change)
    forward = {k: v for k, v in arguments.items() if k not in ("grad", "dq", "dk", "dv")}
    with pytest.raises(ValueError, match=message):
        native.module().attention(**forward)
    with pytest.raises(ValueError, match=message):
        native.module().attention_backward(**arguments)


def test_the_binding_refuses_results_that_overlap_or_are_not_dense() -> None:
    arguments = given()
    forward = {k: v for k, v in arguments.items() if k not in ("grad", "dq", "dk", "dv")}
    with pytest.raises(ValueError, match="out overlaps q"):
        native.module().attention(**{**forward, "out": forward["q"]})
    with pytest.raises(ValueError, match="out must be laid out as"):
        native.module().attention(**{**forward, "out": (forward["out"][0], (48, 24, 8))})
    with pytest.raises(ValueError, match="dv overlaps k"):
        native.module().attention_backward(**{**arguments, "dv": arguments["k"]})
    with pytest.raises(ValueError, match="dv overlaps dk"):
        native.module().attention_backward(**{**arguments, "dv": arguments["dk"]})
    with pytest.raises(ValueError, match="dq must be laid out as"):
        native.module().attention_backward(**{**arguments, "dq": (arguments["dq"][0], (0, 8, 16))})


@pytest.mark.parametrize(
    ("width", "dtype", "chosen"),
    [
        (256, torch.bfloat16, "native"),
        (257, torch.bfloat16, "sdpa"),
        (512, torch.bfloat16, "sdpa"),
        (512, torch.float32, "native"),
    ],
)
def test_wide_bfloat16_heads_are_left_to_pytorch(
    width: int, dtype: torch.dtype, chosen: str
) -> None:
    q = torch.zeros(1, 1, 2, width, dtype=dtype)
    line = ops.explain(ATTENTION, q, q, q, 1.0)
    assert line.startswith(f"{chosen} (the first that is legal")
    assert ("not native: legal, but for bfloat16 heads wider" in line) == (chosen == "sdpa")
    with ops.backend("native", strict=True):
        assert ops.explain(ATTENTION, q, q, q, 1.0).startswith("native (")
