"""The backend "xformers" against a stand-in of `xformers.ops`: not run on a GPU, nor on xformers.

The stand-in is as xformers' source has it (xformers/ops/fmha, CUTLASS kernels): (B, L, H, D) with
rows at multiples of 16 bytes; LSE (B, H, M), M the queries rounded up to 32, the rest not written;
backward in the order grad, output, lse, query, key, value, any M from the queries on; gradients of
q, k and v of one memory lie as one chunk.
"""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rewardprop_fast import ops
from rewardprop_fast.errors import ConfigError
from rewardprop_fast.ops.attention import ATTENTION, reference, xformers
from tests.ops.oracle import assert_as_exact_as_torch, kept_for_backward


def check(*tensors: Tensor) -> None:
    aligned = 16 // tensors[0].dtype.itemsize
    for tensor in tensors:
        assert (tensor.dim(), tensor.stride(-1), tensor.shape[-1] % aligned) == (4, 1, 0)
        assert all(stride % aligned == 0 for stride in tensor.stride()[:3]), tensor.stride()
        assert tensor.data_ptr() % 16 == 0


class StandIn(ModuleType):
    """`xformers.ops`, as far as it is called."""

    calls = 0

    def memory_efficient_attention_forward_requires_grad(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_bias: None = None,
        p: float = 0.0,
        scale: float | None = None,
        *,
        op: None = None,
    ) -> tuple[Tensor, Tensor]:
        self.calls += 1
        check(query, key, value)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        out, lse = reference.forward(*(x.transpose(1, 2) for x in (query, key, value)), scale)
        lse = F.pad(lse, (0, -lse.shape[-1] % 32), value=float("nan"))
        return out.transpose(1, 2), lse

    def memory_efficient_attention_backward(
        self,
        grad: Tensor,
        output: Tensor,
        lse: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_bias: None = None,
        p: float = 0.0,
        scale: float | None = None,
        *,
        op: None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        self.calls += 1
        check(grad, output, query, key, value)
        batch, queries, heads, width = query.shape
        assert lse.shape[:2] == (batch, heads)
        assert lse.shape[2] >= queries
        assert lse.dtype == torch.float32
        assert not lse.isnan().any()
        scale = width**-0.5 if scale is None else scale
        found = reference.backward(
            *(x.transpose(1, 2) for x in (grad, query, key, value, output)),
            lse[..., :queries],
            scale,
            (True, True, True),
        )
        grads = [gradient.transpose(1, 2) for gradient in found]
        if query.untyped_storage().data_ptr() == value.untyped_storage().data_ptr():
            grads = list(torch.stack(grads, 2).unbind(2))
        return grads[0], grads[1], grads[2]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    package, module = ModuleType("xformers"), StandIn("xformers.ops")
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", module)
    monkeypatch.setattr(xformers, "_DEVICE", "cpu")
    return module


def leaves(dtype: torch.dtype, layout: str) -> list[Tensor]:
    """(B, H, L, D): of one projection; as linear layers leave it; rows at odd addresses."""
    if layout == "packed":
        packed = torch.randn(2, 37, 3, 3, 40).to(dtype)
        return [part.transpose(1, 2) for part in packed.unbind(2)]
    extra = {"odd rows": 1, "odd start": 8}.get(layout, 0)
    start = 1 if extra else 0
    return [
        torch.randn(2, length, 3, 40 + extra).to(dtype)[..., start : start + 40].transpose(1, 2)
        for length in (37, 45, 45)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["packed", "linear", "odd rows", "odd start"])
@pytest.mark.parametrize("needed", [(True, True, True), (True, False, False), (False, True, True)])
def test_is_as_exact_as_pytorch(
    stand_in: StandIn, dtype: torch.dtype, layout: str, needed: tuple[bool, bool, bool]
) -> None:
    given = leaves(dtype, layout)
    grad = torch.randn(given[0].shape).to(dtype)

    def run(function: object, tensors: list[Tensor]) -> list[Tensor]:
        own = [t.detach().requires_grad_(n) for t, n in zip(tensors, needed, strict=True)]
        out = function(*own, scale=0.3)  # type: ignore[operator]
        wanted = [tensor for tensor in own if tensor.requires_grad]
        return [out.detach(), *torch.autograd.grad(out, wanted, grad.to(out.dtype))]

    with ops.backend("xformers", strict=True):
        ours = run(ops.attention, given)
    assert stand_in.calls == 2
    assert all(tensor.transpose(1, 2).is_contiguous() for tensor in ours)
    exact = run(F.scaled_dot_product_attention, [tensor.double() for tensor in given])
    assert_as_exact_as_torch(ours, run(F.scaled_dot_product_attention, given), exact)


def test_keeps_what_the_other_forms_keep(stand_in: StandIn) -> None:
    q, k, v = (tensor.requires_grad_() for tensor in leaves(torch.float32, "linear"))
    with ops.backend("xformers", strict=True):
        kept = kept_for_backward(lambda: ops.attention(q, k, v))
    shapes = sorted(tuple(tensor.shape) for tensor in kept)
    assert shapes == sorted([tuple(q.shape)] * 2 + [tuple(k.shape)] * 2 + [tuple(q.shape[:3])])


def test_runs_only_where_it_is_asked_for(stand_in: StandIn) -> None:
    q, k, v = leaves(torch.float32, "linear")
    ops.attention(q, k, v)
    assert stand_in.calls == 0
    names = [form.backend for form in ATTENTION.implementations]
    assert names.index("sdpa") < names.index("xformers") < names.index("reference")


@pytest.mark.parametrize(
    ("q", "reason"),
    [
        (torch.zeros(1, 1, 2, 8, dtype=torch.float64), "q is torch.float64, it takes float32,"),
        (torch.zeros(1, 1, 2, 12, dtype=torch.bfloat16), "must be a multiple of 8 in"),
        (torch.zeros(1, 1, 2, 6), "must be a multiple of 4 in"),
        (torch.zeros(1, 1, 0, 8), "there are no queries"),
    ],
)
def test_says_what_it_does_not_take(stand_in: StandIn, q: Tensor, reason: str) -> None:
    k = torch.zeros(1, 1, 3, q.shape[-1], dtype=q.dtype)
    with ops.backend("xformers", strict=True), pytest.raises(ConfigError, match=reason):
        ops.attention(q, k, k)
    with ops.backend("xformers"):
        assert "reference (" in ops.explain(ATTENTION, q, k, k, 1.0)


def test_says_that_xformers_is_missing_or_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.zeros(1, 1, 2, 8)
    assert "runs on CUDA devices" in str(xformers.why_not(q, q, q, 1.0))
    monkeypatch.setattr(xformers, "_DEVICE", "cpu")

    def missing(name: str) -> ModuleType:
        raise ModuleNotFoundError(f"No module named {name!r}", name="xformers")

    monkeypatch.setattr(xformers, "import_module", missing)
    assert "xformers is not installed (pip install" in str(xformers.why_not(q, q, q, 1.0))

    def broken(name: str) -> ModuleType:
        raise OSError("undefined symbol")

    monkeypatch.setattr(xformers, "import_module", broken)
    assert xformers.why_not(q, q, q, 1.0) == "xformers does not load: undefined symbol"
