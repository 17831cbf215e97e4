"""The doctor tells the truth about what is here and what is missing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from rewardprop_fast import doctor
from rewardprop_fast.doctor import choices
from rewardprop_fast.errors import ConfigError
from rewardprop_fast.ops import cuda_module, native


def test_report_can_be_written_as_json_and_names_every_operator() -> None:
    facts = json.loads(json.dumps(doctor.report()))
    assert facts["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert set(facts["operators"]) >= {
        "guided_ddim_step, cpu, float32",
        "guided_ddim_step, cpu, bfloat16",
    }
    assert facts["memory"]["total"] > facts["memory"]["available"] > 0
    assert facts["cpu"]["cores"] >= 1


def test_text_says_which_backend_runs_and_why() -> None:
    text = doctor.render()
    expected = "reference" if native.why_missing() else "native"
    line = rf"guided_ddim_step, cpu, bfloat16 +{expected} \(the first that is legal here"
    assert re.search(line, text)


def test_says_what_is_missing_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_load", lambda: (None, "not built: no C++ compiler was found"))
    facts = doctor.report()
    assert facts["native"] == {
        "built": False,
        "problem": "not built: no C++ compiler was found",
        "path": None,
        "isa": None,
        "isa_problem": None,
    }
    text = doctor.render(facts)
    assert "reference (the first that is legal here; not native: not built: no C++" in text
    assert "what is missing\n  - the native module is not built: no C++ compiler was found" in text
    assert "install rewardprop-fast again" in text


def test_says_why_the_cuda_kernels_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_module, "_load", lambda: (None, "not built: nvcc was not found"))
    facts = doctor.report()
    assert "kernels in CUDA C++  not built: nvcc was not found" in doctor.render(facts)
    # Nothing to be done about on a machine without a GPU.
    for device, advised in ((None, False), ("RTX 3090", True)):
        facts["cuda"]["device"] = device
        advice = "\n".join(doctor._advice(facts))
        assert ("CUDA C++ kernels is not built: nvcc was not found" in advice) == advised


def test_wrong_settings_are_shown_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    class Module:
        __file__ = "_native.so"

        @staticmethod
        def isa_report() -> dict[str, object]:
            raise ValueError("REWARDPROP_ISA is 'mmx'; on this machine it can be scalar")

    monkeypatch.setattr(native, "_load", lambda: (Module, None))
    monkeypatch.setenv("REWARDPROP_BACKEND", "fast")
    text = doctor.render()
    assert "- REWARDPROP_ISA is 'mmx'" in text
    assert "REWARDPROP_BACKEND got 'fast'; allowed are" in text


def test_two_openmp_runtimes_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_openmp_pools", lambda: ["/a/libgomp.so.1", "/b/libomp.so"])
    assert any("2 OpenMP runtimes" in line for line in doctor.report()["advice"])


def test_a_missing_requirement_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda n: None if n == "peft" else installed(n))
    assert "peft is missing: pip install peft" in doctor.report()["advice"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("avx2 fma", "none"), ("avx2 avx512_bf16", "avx512_bf16"), ("avx512_bf16 amx_bf16", "amx")],
)
def test_bfloat16_rests_on_the_processors_flags(
    flags: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"processor\t: 0\nmodel name\t: A CPU\nflags\t\t: fpu {flags}\n"
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: text)
    assert doctor._cpu()["bf16"] == expected
    assert doctor._cpu()["name"] == "A CPU"


def test_says_which_backend_every_call_of_a_model_gets() -> None:
    """Here and on a card that is not there."""
    here = choices.of_model("bundled", "cpu", torch.float32)
    assert {row.operator for row in here} >= {
        "attention",
        "frozen_conv2d",
        "geglu",
        "group_norm_silu",
        "guided_ddim_step",
        "lora_linear",
    }
    fast = "reference" if native.why_missing() else "native"
    assert {row.backend for row in here if row.operator == "group_norm_silu"} == {fast}
    card = choices.of_model("bundled", "sm_89", torch.bfloat16)
    assert sum(row.calls for row in card) == sum(row.calls for row in here)
    gpu_forms = {row.backend for row in card if row.operator == "geglu"}
    assert gpu_forms <= {"cuda", "triton"}
    text = choices.render(card)
    assert "geglu\n" in text
    assert " x " in text
    assert "bfloat16" in text


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="'sm_70'; allowed are 'cpu', 'cuda', 'sm_80'"):
        choices.of_model("bundled", "sm_70")
