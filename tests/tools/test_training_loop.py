"""The loop that trains the bundled model resumes bitwise; pictures follow from their seed."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch

import rewardprop_fast as rpf

TOOLS = Path(__file__).parents[2] / "tools" / "bundled_model"


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"bundled_model_{name}", TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Stopped(Exception):
    pass


def run(folder: Path, stop: int | None = None) -> torch.nn.Module:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    loop = load("loop").Loop(folder, model, steps=12, learning_rate=1e-2, warmup=3)

    def loss_at(step: int) -> dict[str, torch.Tensor]:
        if step == stop:
            loop.save()
            raise Stopped
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        return {"loss": (model(x) - x.sum(1, keepdim=True)).square().mean()}

    loop.run(loss_at)
    loop.use_ema()
    return model


def test_a_stopped_stage_ends_as_if_it_had_not_been_stopped(tmp_path):
    whole = run(tmp_path / "whole").state_dict()
    for stop in (3, 7):
        with pytest.raises(Stopped):
            run(tmp_path / "parts", stop)
    parts = run(tmp_path / "parts").state_dict()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    untrained = torch.nn.Linear(3, 8).weight.shape
    assert whole["0.weight"].shape == untrained
    assert whole["0.weight"].abs().sum() > 0


def test_a_stage_killed_while_saving_goes_on_from_the_checkpoint_before(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole").state_dict()
    with pytest.raises(Stopped):
        run(tmp_path / "parts", 3)

    def killed(*names):
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", killed)
        with pytest.raises(Stopped):
            run(tmp_path / "parts", 7)
    parts = run(tmp_path / "parts").state_dict()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_the_log_gives_means_also_right_after_a_resume(tmp_path, capsys):
    folder = tmp_path / "run"
    for until in (30, 50):  # 50 and then 20 steps since the last line
        module = torch.nn.Linear(1, 1, bias=False)
        loop = load("loop").Loop(folder, module, steps=until, learning_rate=0.0)

        def loss_at(step, module=module):
            return {"loss": module.weight.sum() * 0 + 2.0}

        loop.run(loss_at)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(30, 2.0), (50, 2.0)]


def test_a_pool_is_made_once_and_read_back_exactly(tmp_path):
    kept = load("pools").kept
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).reshape(2, 3, 4, 4)
    images = images.contiguous(memory_format=torch.channels_last)
    made = []

    def make():
        made.append(1)
        return {"images": images}, ["a cat", 'a "red" car']

    for _ in range(2):
        tensors, captions = kept(tmp_path / "work" / "pool.safetensors", make)
        assert torch.equal(tensors["images"], images)
        assert captions == ["a cat", 'a "red" car']
    assert made == [1]


def test_captions_read_like_english():
    pictures = load("pictures")
    assert pictures.caption("owl", None, "teal") == "an owl on a teal background"
    assert pictures.caption("unicorn", None, None) == "a unicorn"
    assert pictures.caption("fox", "noto", "white") == "a noto style fox on a white background"


def test_subjects_are_distinct_and_enough():
    subjects = load("pictures").read_subjects()
    names = [subject.name for subject in subjects]
    assert 150 <= len(names) <= 250
    assert len(set(names)) == len(names)
    assert not next(subject for subject in subjects if subject.name == "taxi").mirror


def test_each_caption_word_is_one_token_of_the_committed_vocabulary():
    sys.path.insert(0, str(TOOLS))
    try:
        words = load("text").words()
    finally:
        sys.path.remove(str(TOOLS))
    vocabulary = json.loads((TOOLS / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    shipped = Path(rpf.models.BUNDLED) / "tokenizer" / "vocab.json"
    assert json.loads(shipped.read_text(encoding="utf-8")) == vocabulary
    assert [word for word in words if f"{word}</w>" not in vocabulary] == []
