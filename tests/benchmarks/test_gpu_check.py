"""The GPU check, run here with the CPU in the GPU's place: every fault becomes a row."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu_check import __main__ as command
from benchmarks.gpu_check import table
from benchmarks.gpu_check.checking import compare
from benchmarks.gpu_check.device import CudaDevice
from benchmarks.gpu_check.jobs import Job, Outcome
from rewardprop_fast import ops

SOURCE = "tests.benchmarks.gpu_check_cases"


def run(folder: Path, source: str, *more: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, JSON and page of the command on the CPU."""
    code = command.main(
        ["--device", "cpu", "--source", f"{SOURCE}:{source}", "--output", str(folder), *more]
    )
    (json_file,) = folder.glob("gpu_check_*.json")
    page = json_file.with_suffix(".md").read_text(encoding="utf-8")
    return code, json.loads(json_file.read_text(encoding="utf-8")), page


def test_without_a_gpu_it_says_so_and_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert command.main([]) == 2
    said = capsys.readouterr().out.strip()
    assert said.count("\n") == 0
    assert "GPU" in said


def test_every_operator_and_form_goes_through(tmp_path: Path) -> None:
    code, report, page = run(tmp_path, "small", "--dtypes", "float32", "bfloat16")
    failures = [row for row in report["rows"] if row["failed"]]
    assert not failures, failures
    assert code == 0
    assert report["finished"]
    assert len(report["rows"]) == report["jobs"]
    passed = {
        (row["operator"], row["variant"]) for row in report["rows"] if row["status"] == "passed"
    }
    for name, operator in ops.OPERATORS.items():
        assert (name, "reference") in passed
        assert (name, "baseline eager") in passed
        if "triton" in [form.backend for form in operator.implementations]:
            assert (name, "triton") in passed
        assert f"### {name}, bfloat16" in page
    networks = [row for row in report["rows"] if row["operator"] == "accelerate"]
    assert [row["dtype"] for row in networks] == ["float32", "bfloat16"]
    assert all(0 < row["error_over_eager"] <= 2 for row in networks)
    timed = [row for row in report["rows"] if row["kind"] == "time" and row["status"] == "passed"]
    for row in timed:
        for phase in ("forward", "backward"):
            if phase in row:
                assert 0 < row[phase]["p20_ms"] <= row[phase]["median_ms"] <= row[phase]["p80_ms"]
    assert "Not finished" not in page


def test_every_fault_is_a_row_and_the_next_job_runs(tmp_path: Path) -> None:
    arguments = ("--dtypes", "float32", "--timeout", "20", "--only", "reference|baseline")
    code, report, page = run(tmp_path, "bad", *arguments)
    assert code == 1
    checks = {row["case"]: row for row in report["rows"] if row["kind"] == "check"}
    assert {name: row["status"] for name, row in checks.items()} == {
        "first": "passed",
        "raises": "error",
        "dies": "crashed",
        "hangs": "hung",
        "has no memory": "out of memory",
        "leaves NaN": "wrong",
        "is wrong": "wrong",
        "is wrong from strides": "wrong",
        "fails from strides": "wrong",
        "is wrong the second time": "passed",  # of the reference the same bits are not asked
        "last": "passed",
    }
    assert "a fault" in checks["raises"]["message"]
    assert "gpu_check_cases.py" in checks["raises"]["message"]  # and where
    assert "exit code 3" in checks["dies"]["message"]
    assert "_hangs" in checks["hangs"]["message"]
    assert "not finite" in checks["leaves NaN"]["message"]
    assert "allowed" in checks["is wrong"]["message"]
    assert "with strided inputs: error" in checks["is wrong from strides"]["message"]
    assert "strided inputs: RuntimeError: a fault" in checks["fails from strides"]["message"]
    timed = {row["variant"]: row["status"] for row in report["rows"] if row["kind"] == "time"}
    assert timed == {
        "baseline eager": "passed",
        "baseline absent": "not here",
        "baseline broken": "error",
    }
    failed = sum(row["failed"] for row in report["rows"])
    assert failed == 8  # the broken baseline is not this library's
    assert f"**{failed} failures of this library**" in page
    assert "a fault \\| of its own<br>" in page
    assert "no module named 'absent'" in page


def failing_native_row(tmp_path: Path, groups: str, only: str) -> dict[str, Any]:
    """The one row of a native form that is to fail."""
    code, report, _ = run(
        tmp_path, groups, "--dtypes", "float32", "--only", f"{only}.*native", "--no-timing"
    )
    if not report["rows"] or report["rows"][0]["status"] == "not here":
        pytest.skip("the native module is not built")
    assert code == 1
    (row,) = report["rows"]
    return row


def test_the_same_bits_are_asked_of_own_forms(tmp_path: Path) -> None:
    row = failing_native_row(tmp_path, "bad", "second time")
    assert "differs from run to run" in row["message"]
    assert row["same_bits"] is False
    assert 5 <= row["runs"] <= 100


def test_a_form_that_hides_nan_is_found(tmp_path: Path) -> None:
    row = failing_native_row(tmp_path, "silent", "geglu")
    assert row["message"].startswith("output 0: nan in x spreads otherwise than in the reference")
    assert "inf in x" in row["message"]


def test_a_worker_that_does_not_start_ends_it_with_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPU_CHECK_TEST_PARENT", str(os.getpid()))
    code, report, page = run(tmp_path, "unable", "--dtypes", "float32", "--no-timing")
    assert code == 1
    assert [row["status"] for row in report["rows"]] == ["crashed"]
    assert "before its first job" in report["rows"][0]["message"]
    assert "Not finished" in page


def test_nothing_to_do_is_no_success(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--source", f"{SOURCE}:bad", "--only", "no such operator"]
    assert command.main([*arguments, "--output", str(tmp_path)]) == 1


# --- comparing ---


def test_each_way_to_be_wrong_has_its_words() -> None:
    truth = torch.linspace(1, 2, 100, dtype=torch.float64)
    eager = truth.float()

    def text(found: torch.Tensor | None) -> str:
        return compare(["y"], (found,), (eager,), (truth,))["y"][0]

    assert text(eager.clone()) == ""
    assert text((truth * (1 + 2e-8)).float()) == ""
    assert text(None) == "is missing"
    assert text(eager[:50]) == "is (50,) torch.float32, not (100,) torch.float32"
    assert "torch.float64" in text(truth)
    assert "not finite" in text(eager.where(eager < 1.9, torch.nan))
    assert "allowed" in text(eager * (1 + 1e-6))


# --- the device, with another torch.cuda in the place of the one that needs a GPU ---


class FakeEvent:
    clock = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        FakeEvent.clock += 1.5
        self.time = FakeEvent.clock

    def elapsed_time(self, other: FakeEvent) -> float:
        return other.time - self.time


def fake_cuda(**changes: Any) -> Any:
    log: list[str] = []
    functions = {
        "is_available": lambda: True,
        "get_device_name": lambda: "NVIDIA GeForce RTX 3090",
        "get_device_capability": lambda: (8, 6),
        "get_device_properties": lambda index: SimpleNamespace(
            total_memory=24 * 2**30, multi_processor_count=82
        ),
        "Event": FakeEvent,
        "synchronize": lambda: log.append("synchronize"),
        "memory_allocated": lambda: 100,
        "max_memory_allocated": lambda: 350,
        "reset_peak_memory_stats": lambda: log.append("reset"),
        "empty_cache": lambda: log.append("empty_cache"),
    }
    return SimpleNamespace(**{**functions, **changes}, log=log)


def test_a_gpu_is_asked_and_timed_by_events() -> None:
    cuda = fake_cuda()
    device = CudaDevice(cuda)
    device.type = "cpu"  # where the flushed memory lies
    assert device.why_missing() is None
    assert device.describe()["name"] == "NVIDIA GeForce RTX 3090"
    assert device.describe()["memory_gib"] == 24
    ran: list[int] = []
    assert device.milliseconds(lambda: ran.append(1), 3) == [1.5, 1.5, 1.5]
    assert len(ran) == 3
    assert cuda.log[-1] == "synchronize"
    assert device.peak_bytes(lambda: None) == 250
    device.release()
    assert cuda.log[-1] == "empty_cache"


def test_a_gpu_is_prepared_for_exact_products() -> None:
    before = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    try:
        CudaDevice(fake_cuda()).prepare()
        assert not torch.backends.cuda.matmul.allow_tf32
        assert not torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_why_a_gpu_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    none = fake_cuda(is_available=lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in str(CudaDevice(none).why_missing())
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    assert "No NVIDIA GPU" in str(CudaDevice(none).why_missing())
    old = fake_cuda(get_device_capability=lambda: (7, 5))
    assert "8.0 or newer" in str(CudaDevice(old).why_missing())


def test_errors_of_a_gpu_are_told_apart() -> None:
    device = CudaDevice(fake_cuda())
    assert device.out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert device.out_of_memory(RuntimeError("cuBLAS: out of memory"))
    assert not device.out_of_memory(RuntimeError("shape"))
    assert device.broken_by(RuntimeError("CUDA error: an illegal memory access"))
    assert not device.broken_by(RuntimeError("shape"))


# --- the page ---


def timed(variant: str, milliseconds: float) -> dict[str, Any]:
    job = Job("time", "SDXL, 1024²", "geglu", "2x4096x5120", "bfloat16", variant)
    one = {"median_ms": milliseconds, "p20_ms": milliseconds, "p80_ms": milliseconds}
    return table.record(Outcome(job, "passed", "", {"forward": one}))


def test_times_stand_beside_eager_and_the_model() -> None:
    report = {
        "device": {"name": "NVIDIA GeForce RTX 3090"},
        "versions": {"torch": "2"},
        "date": "2026-01-01 00:00",
        "jobs": 2,
        "finished": True,
        "modelled": {"geglu / forward / SDXL, 1024² / 2x4096x5120 / bfloat16": 200.0},
        "rows": [timed("baseline eager", 1.0), timed("triton", 0.25)],
    }
    (line,) = [line for line in table.page(report).splitlines() if "2x4096x5120" in line]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[2] == "forward"
    assert cells[-3:] == ["4.00x", "0.200", "1.25"]


def test_modelled_figures_are_found_by_the_driver_s_name(tmp_path: Path) -> None:
    row = {
        "operator": "geglu",
        "phase": "forward",
        "scenario": "SDXL, 1024²",
        "case": "c",
        "dtype": "bfloat16",
        "device": "RTX 4090",
        "microseconds": 7.0,
    }
    static = tmp_path / "static_gpu.json"
    static.write_text(json.dumps({"passes": [row]}))
    key = "geglu / forward / SDXL, 1024² / c / bfloat16"
    assert table.modelled_for("NVIDIA GeForce RTX 4090", static) == {key: 7.0}
    assert table.modelled_for("NVIDIA A100-SXM4-80GB", static) == {}
    assert table.modelled_for("NVIDIA L4", static) == {}
    assert table.modelled_for("NVIDIA GeForce RTX 4090", tmp_path / "none.json") == {}
