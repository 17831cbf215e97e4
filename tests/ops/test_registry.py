"""Which backend runs, who decides, and what is said about it."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import pytest
import torch
from torch._subclasses import FakeTensorMode

from rewardprop_fast import ops
from rewardprop_fast.errors import ConfigError
from rewardprop_fast.ops import native, registry, triton_runtime
from rewardprop_fast.ops.guided_ddim_step import GUIDED_DDIM_STEP, op

ARGUMENTS = GUIDED_DDIM_STEP.example("cpu", torch.float32)


@pytest.fixture
def native_present(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled module counts as there: these tests ask for choices and run nothing."""
    monkeypatch.setattr(native, "_load", lambda: (object(), None))


def chosen(*arguments: object) -> str:
    return registry.choose(GUIDED_DDIM_STEP, *(arguments or ARGUMENTS)).implementation.backend


@pytest.mark.usefixtures("native_present")
def test_takes_the_first_legal_backend() -> None:
    assert chosen() == "native"
    assert ops.explain(GUIDED_DDIM_STEP, *ARGUMENTS) == "native (the first that is legal here)"


@pytest.mark.usefixtures("native_present")
@pytest.mark.parametrize(
    ("position", "name"), [(0, "model_output is"), (1, "latents are"), (2, "coefficients are")]
)
def test_passes_over_native_for_float64_and_says_so(position: int, name: str) -> None:
    arguments = list(ARGUMENTS)
    arguments[position] = arguments[position].double()
    assert chosen(*arguments) == "reference"
    assert f"not native: {name} torch.float64" in ops.explain(GUIDED_DDIM_STEP, *arguments)


@pytest.mark.usefixtures("native_present")
def test_passes_over_native_on_another_device() -> None:
    arguments = GUIDED_DDIM_STEP.example("meta", torch.float32)
    assert chosen(*arguments) == "reference"
    assert "it runs on the CPU" in ops.explain(GUIDED_DDIM_STEP, *arguments)


def test_passes_over_native_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_load", lambda: (None, "not built: no C++ compiler was found"))
    assert chosen() == "reference"
    assert "no C++ compiler was found" in ops.explain(GUIDED_DDIM_STEP, *ARGUMENTS)
    with pytest.raises(ImportError, match="no C\\+\\+ compiler was found"):
        native.module()


@pytest.mark.usefixtures("native_present")
def test_code_goes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARDPROP_BACKEND", "reference")
    assert chosen() == "reference"
    assert "REWARDPROP_BACKEND asks for it" in ops.explain(GUIDED_DDIM_STEP, *ARGUMENTS)
    with ops.backend("native"):
        assert chosen() == "native"
        with ops.backend("auto"):
            assert chosen() == "native"
    assert chosen() == "reference"


@pytest.mark.usefixtures("native_present")
def test_an_error_inside_the_block_ends_the_wish() -> None:
    with pytest.raises(KeyError), ops.backend("reference"):
        raise KeyError
    assert chosen() == "native"


@pytest.mark.usefixtures("native_present")
def test_the_reference_runs_where_the_backend_asked_for_cannot() -> None:
    model_output, *rest = ARGUMENTS
    arguments = (model_output.half(), *rest)
    with ops.backend("native"):
        assert chosen(*arguments) == "reference"
        line = ops.explain(GUIDED_DDIM_STEP, *arguments)
    assert "'native' is asked for and cannot run" in line
    assert "not native: model_output is torch.float16" in line
    with ops.backend("xformers"):
        assert chosen() == "reference"
        line = ops.explain(GUIDED_DDIM_STEP, *ARGUMENTS)
    assert "not xformers: this operator does not have it" in line


@pytest.mark.usefixtures("native_present")
def test_a_strict_wish_is_met_or_an_error() -> None:
    model_output, *rest = ARGUMENTS
    with (
        ops.backend("native", strict=True),
        pytest.raises(ConfigError, match="cannot run guided_ddim_step here: model_output is"),
    ):
        ops.guided_ddim_step(model_output.half(), *rest)
    with (
        ops.backend("xformers", strict=True),
        pytest.raises(ConfigError, match="guided_ddim_step does not have; it has native,"),
    ):
        ops.guided_ddim_step(*ARGUMENTS)


@pytest.mark.usefixtures("native_present")
def test_one_operator_can_have_a_backend_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    with ops.backend(guided_ddim_step="reference"):
        assert chosen() == "reference"
    with ops.backend("reference", guided_ddim_step="native"):
        assert chosen() == "native"
    monkeypatch.setenv("REWARDPROP_BACKEND", "native, guided_ddim_step=reference")
    assert chosen() == "reference"
    monkeypatch.setenv("REWARDPROP_BACKEND", "guided_ddim_step=native,reference")
    assert chosen() == "native"


def test_the_backward_pass_keeps_the_wish_of_the_forward_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also in autograd's own threads, where the caller's context is unknown."""
    seen: list[str] = []
    choose = registry.choose

    def spy(operator: registry.Operator, *arguments: object) -> registry.Choice:
        seen.append(registry.current().name)
        return choose(operator, *arguments)

    monkeypatch.setattr(op, "choose", spy)
    model_output, *rest = ARGUMENTS
    with ops.backend("reference"):
        loss = ops.guided_ddim_step(model_output.clone().requires_grad_(), *rest).sum()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert seen == ["reference", "reference"]


def test_an_unknown_name_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="got 'fast'; allowed are 'auto', 'native', 'triton'"):
        ops.backend("fast").__enter__()
    with pytest.raises(
        ConfigError, match=r"names the operator 'atention'; there are .*guided_ddim"
    ):
        ops.backend(atention="native").__enter__()
    monkeypatch.setenv("REWARDPROP_BACKEND", "cpu")
    with pytest.raises(ConfigError, match="REWARDPROP_BACKEND got 'cpu'"):
        chosen()


def test_observing_tells_what_a_call_on_fake_tensors_would_choose() -> None:
    """Also for a GPU that is not there, and nothing is computed."""
    with registry.observing() as seen:
        with FakeTensorMode():
            ops.guided_ddim_step(*GUIDED_DDIM_STEP.example("cpu", torch.bfloat16))
        with triton_runtime.recording((8, 9)) as recording:
            output = ops.guided_ddim_step(*GUIDED_DDIM_STEP.example("meta", torch.bfloat16))
    assert output.shape == (1, 4, 8, 8)
    assert recording.launches == []
    assert [one.operator for one in seen] == ["guided_ddim_step"] * 2
    assert [one.arguments[0].device.type for one in seen] == ["cpu", "meta"]
    assert seen[1].choice.implementation.backend != "native"
    assert "it runs on the CPU" in seen[1].choice.explain()


@dataclass(frozen=True)
class Form:
    """An implementation that is legal, or pays, from so many on."""

    backend: str
    legal_from: int = 0
    pays_from: int = 0

    def implementation(self) -> registry.Implementation:
        def why_not(count: int) -> str | None:
            return None if count >= self.legal_from else f"legal from {self.legal_from}"

        def why_no_gain(count: int) -> str | None:
            assert why_not(count) is None, "it is asked only where it is legal"
            return None if count >= self.pays_from else f"it pays from {self.pays_from}"

        return registry.Implementation(self.backend, why_not, print, print, why_no_gain)


def with_forms(*forms: Form) -> registry.Operator:
    implementations = tuple(form.implementation() for form in (*forms, Form("reference")))
    return registry.Operator("geglu", implementations, lambda *_: ())


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (9, "native (the first that is legal here)"),
        (5, "sdpa (the first that is legal here and pays; not native: legal, but it pays from 8)"),
        (
            3,
            "reference (the first that is legal here and pays; not native: legal, but it pays from "
            "8; not sdpa: legal, but it pays from 4)",
        ),
        (
            1,
            "reference (the first that is legal here and pays; not native: legal from 2; not sdpa: "
            "legal, but it pays from 4)",
        ),
    ],
)
def test_by_itself_the_first_runs_that_is_legal_and_pays(count: int, expected: str) -> None:
    operator = with_forms(Form("native", legal_from=2, pays_from=8), Form("sdpa", pays_from=4))
    assert ops.explain(operator, count) == expected
    assert registry.choose(operator, count).explain() == expected


def test_asked_for_by_name_it_runs_where_it_is_legal(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = with_forms(Form("native", legal_from=2, pays_from=8), Form("sdpa", pays_from=4))
    for asked in ({"name": "native"}, {"geglu": "native"}):
        with ops.backend(strict=True, **asked):
            assert (
                registry.choose(operator, 2).explain().startswith("native (ops.backend(...) asks")
            )
        with ops.backend(**asked):
            assert registry.choose(operator, 1).implementation.backend == "reference"
    monkeypatch.setenv("REWARDPROP_BACKEND", "geglu=sdpa")
    assert registry.choose(operator, 0).implementation.backend == "sdpa"


def test_every_operator_ends_with_its_reference() -> None:
    for name, operator in ops.OPERATORS.items():
        assert operator.name == name
        assert operator.implementations[-1].backend == "reference"
        assert operator.implementations[-1].why_not(*operator.example("cpu", torch.float64)) is None
