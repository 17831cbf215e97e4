"""What "auto" means for device and dtype."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rewardprop_fast.training import precision
from rewardprop_fast.training.precision import resolve_device, resolve_dtype

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_a_gpu_is_taken_if_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == GPU
    assert resolve_device("cpu") == CPU
    assert resolve_device("cuda:1") == torch.device("cuda", 1)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.filterwarnings("ignore:This CPU has no bfloat16")
def test_what_is_named_is_taken(name):
    assert resolve_dtype(name, CPU) == getattr(torch, name)


@pytest.mark.filterwarnings("error")
def test_bfloat16_is_warned_of_where_the_cpu_has_no_instructions_for_it(monkeypatch):
    monkeypatch.setattr(precision, "cpu_has_fast_bf16", lambda: False)
    resolve_dtype("bfloat16", GPU)
    resolve_dtype("float32", CPU)
    with pytest.raises(UserWarning, match="several times as long as in float32"):
        resolve_dtype("bfloat16", CPU)
    monkeypatch.setattr(precision, "cpu_has_fast_bf16", lambda: True)
    resolve_dtype("bfloat16", CPU)


def test_bfloat16_is_taken_where_it_is_fast_and_float16_never(monkeypatch):
    for fast, wanted in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(precision, "cpu_has_fast_bf16", lambda fast=fast: fast)
        assert resolve_dtype("auto", CPU) == wanted
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda fast=fast: fast)
        assert resolve_dtype("auto", GPU) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("model name : x\nflags\t\t: fpu avx2 avx512f avx512_bf16\n", True),
        ("flags : fpu amx_bf16 amx_tile\n", True),
        ("Features\t: fp asimd bf16 i8mm\n", True),
        ("flags : fpu avx2 avx512f\n", False),
        ("flags : fpu bf16x\nbugs : avx512_bf16\n", False),
        ("", False),
    ],
)
def test_the_cpus_own_words(text, wanted, monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: text)
    assert precision.cpu_has_fast_bf16() is wanted


def test_a_system_without_cpuinfo(monkeypatch):
    def refuse(*_, **__):
        raise OSError("no such file")

    monkeypatch.setattr(Path, "read_text", refuse)
    assert precision.cpu_has_fast_bf16() is False
