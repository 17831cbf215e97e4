"""The experiments: runs are done once, curves are read rightly, figures come from the CSVs."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

import pytest
import torch

import rewardprop_fast as rpf
from benchmarks.experiments import __main__ as command
from benchmarks.experiments import (
    collapse,
    generalisation,
    methods,
    mixing,
    overoptimisation,
    time_to_reward,
    trl_child,
    variance,
)
from benchmarks.experiments import context as contexts
from benchmarks.experiments.context import Context
from benchmarks.experiments.size import QUICK
from benchmarks.experiments.store import Store
from benchmarks.experiments.training import plan, trainer_of
from rewardprop_fast import lora
from rewardprop_fast.randomness import Draws
from rewardprop_fast.training.prompts import load_prompts

KEY = ("variant", "seed", "settings")


def test_a_run_is_found_again_by_its_settings(tmp_path: Path) -> None:
    store = Store(tmp_path / "a.csv", KEY, ("variant", "seed"))
    one = {"variant": "draft-1", "seed": 0, "settings": "aa"}
    assert store.find(**one) == []
    store.add([{**one, "step": 0, "reward": 1 / 3}, {**one, "step": 5, "drift": 0.25}])
    found = store.find(**one)
    assert [row["step"] for row in found] == ["0", "5"]
    assert found[0]["reward"] == "0.333333"
    assert found[1]["reward"] == ""
    assert store.find(**{**one, "seed": 1}) == []
    assert store.find(**{**one, "settings": "bb"}) == []
    with pytest.raises(ValueError, match="has the key"):
        store.find(variant="draft-1")


def test_a_run_of_other_settings_takes_its_place_and_no_others(tmp_path: Path) -> None:
    store = Store(tmp_path / "a.csv", KEY, ("variant", "seed"))
    for seed in (0, 1):
        store.add([{"variant": "draft-1", "seed": seed, "settings": "aa", "reward": 0.0}])
    store.add([{"variant": "draft-1", "seed": 0, "settings": "bb", "reward": 1.0}])
    left = {(row["seed"], row["settings"], row["reward"]) for row in store.rows()}
    assert left == {("1", "aa", "0"), ("0", "bb", "1")}
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]


def test_what_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []

    def train(run, size, judge, work):
        trained.append((run.variant, run.learning_rate, run.seed))
        if run.seed == 1:
            raise KeyboardInterrupt
        row = {**run.columns, "reward": 0.0, "heldout": run.learning_rate, "alignment": 1.0}
        return [row, row]

    monkeypatch.setattr(contexts, "train", train)
    monkeypatch.setattr(contexts, "Judge", lambda size: None)
    context = Context(QUICK, range(2), tmp_path, tmp_path)
    context.do("runs", context.short("draft-1", 0))
    with pytest.raises(KeyboardInterrupt):
        context.do("runs", context.short("draft-1", 1))
    # both rates of the search, then the better one
    expected = [("draft-1", 1e-3, 100), ("draft-1", 1e-2, 100), ("draft-1", 1e-2, 0)]
    assert trained == [*expected, ("draft-1", 1e-2, 1)]
    trained.clear()
    context.do("runs", context.short("draft-1", 0))
    assert trained == []
    with pytest.raises(KeyboardInterrupt):
        context.do("runs", context.short("draft-1", 1))
    larger = dataclasses.replace(context, size=dataclasses.replace(QUICK, updates=3))
    larger.do("runs", larger.short("draft-1", 0))
    assert trained[-1] == ("draft-1", 1e-2, 0)


@pytest.mark.parametrize(
    ("at_low", "at_high", "chosen"),
    [(0.9, 0.9, 1e-2), (0.95, 0.89, 1e-3), (0.5, 0.95, 1e-2), (0.89, 0.5, 1e-3)],
)
def test_a_rate_is_chosen_by_reward_among_those_that_keep_the_alignment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_low: float, at_high: float, chosen: float
) -> None:
    def train(run, size, judge, work):
        alignment = {1e-3: at_low, 1e-2: at_high}[run.learning_rate]
        start = {**run.columns, "reward": -1.0, "heldout": -1.0, "alignment": 1.0}
        return [start, {**start, "heldout": run.learning_rate, "alignment": alignment}]

    monkeypatch.setattr(contexts, "train", train)
    monkeypatch.setattr(contexts, "Judge", lambda size: None)
    context = Context(QUICK, range(1), tmp_path, tmp_path)
    assert context.rate("draft-1") == chosen
    # and again from the file
    assert context.rate("draft-1") == chosen


def test_a_fingerprint_tells_settings_apart_and_not_seeds() -> None:
    one = plan("draft-1", 1e-3, 0, QUICK)
    assert one.fingerprint == plan("draft-1", 1e-3, 7, QUICK).fingerprint
    assert one.fingerprint != plan("draft-1", 2e-3, 0, QUICK).fingerprint
    assert one.fingerprint != plan("draft-1", 1e-3, 0, QUICK, rank=3).fingerprint


def test_seconds_to_a_level_lie_on_the_line_between_evaluations() -> None:
    rows = [
        {"cpu_seconds": str(x), "heldout": str(y)} for x, y in ((0, -3.0), (10, -2.0), (30, -1.0))
    ]
    assert time_to_reward.seconds_to(rows, -2.5) == pytest.approx(5)
    assert time_to_reward.seconds_to(rows, -1.5) == pytest.approx(20)
    assert time_to_reward.seconds_to(rows, -3.5) == 0
    assert time_to_reward.seconds_to(rows, -0.5) is None


def test_factors_are_those_of_every_pair_of_runs_to_the_slow_ones_best() -> None:
    def run(variant: str, seed: int, *points: tuple[float, float]) -> list[dict[str, str]]:
        names = {"variant": variant, "seed": str(seed)}
        return [{**names, "samples": str(x), "heldout": str(y)} for x, y in points]

    rows = [
        *run("draft-1", 0, (0, -3.0), (10, -1.0)),
        *run("draft-1", 1, (0, -3.0), (40, -2.0)),
        *run("refl", 0, (0, -3.0), (10, -2.9)),
        *run("ddpo", 0, (0, -3.0), (100, -3.5), (300, -2.0), (400, -2.5)),
        *run("ddpo", 1, (0, -3.0), (100, -2.5), (200, -2.8)),
        *run("draft-5", 0, (0, -3.0), (1, -1.0)),  # not one of (d)'s
    ]
    found = methods.factors(rows, "heldout", "samples")
    # to -2.0 in 300 images, against 5 and 40; to -2.5 in 100, against 2.5 and 20
    assert found == {"draft-1": pytest.approx([60.0, 7.5, 40.0, 5.0]), "refl": []}


def test_a_strip_that_cannot_be_drawn_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    context = Context(QUICK, range(1), tmp_path, tmp_path)
    collapse.strip(context, tmp_path / "collapse.jpg")
    assert "collapse.jpg: not drawn" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_trl_gets_the_prompts_of_this_librarys_trainer() -> None:
    one = plan("draft-1", 1e-3, 5, QUICK)
    trainer = trainer_of(one, QUICK)
    drawn = []
    for step in range(one.updates):
        trainer.step = step
        drawn += trainer._drawn(0)[0]
    assert time_to_reward.prompts_of(one) == drawn


def test_the_trace_is_that_of_the_covariance() -> None:
    vectors = torch.randn(50, 7, generator=torch.Generator().manual_seed(1)) + 100
    trace = variance.Trace()
    for vector in vectors:
        trace.add(vector)
    assert trace.value == pytest.approx(float(torch.cov(vectors.double().T).trace()))
    torch.testing.assert_close(trace.mean, vectors.double().mean(0))


def test_the_mean_over_endpoints_is_the_gradient_of_draft_lv() -> None:
    size = dataclasses.replace(QUICK, batch=1)
    one = plan("draft-lv", 1e-3, 3, size)
    trainer = trainer_of(one, size)
    with torch.no_grad():
        for parameter in trainer.parameters.values():
            parameter.add_(0.1)
    prompt = trainer.prompts.prompts[0]
    trainer.step = 4
    trainer.training_step([prompt])
    whole = torch.cat([p.grad.flatten() for p in trainer.parameters.values()])
    found = variance.endpoint_gradients(trainer, prompt, Draws(3, 4, (0,)), copies=2)
    # the loss is minus the reward
    torch.testing.assert_close(-torch.stack(found).mean(0), whole, rtol=1e-3, atol=1e-6)
    assert float((found[0] - found[1]).norm()) > 1e-3 * float(found[0].norm())


def test_prompts_are_as_new_as_they_are_said_to_be() -> None:
    trained = load_prompts("bundled").prompts
    text = " / ".join(trained)
    sets = generalisation.prompt_sets(16)
    assert {len(prompts) for prompts in sets.values()} == {16}
    for name, prompts in sets.items():
        for prompt in prompts:
            subject, background = prompt.split(" on a ")
            assert (f"{subject} on" in text) == (name in ("known subjects", "new backgrounds"))
            assert (f" a {background}" in text) == (name in ("known subjects", "new subjects"))


def test_a_quick_experiment_from_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = ["--results", tmp_path / "csv", "--figures", tmp_path, "--work", tmp_path / "work"]
    arguments = ["experiments", "overoptimisation", "--quick", "--seeds", "1", *folders]
    monkeypatch.setattr(sys, "argv", [str(one) for one in arguments])
    assert command.main() == 0
    table = tmp_path / "csv" / "long.csv"
    rows = Store(table, KEY, KEY).rows()
    assert [row["step"] for row in rows] == ["0", "1", "2"]
    assert float(rows[2]["cpu_seconds"]) > float(rows[1]["cpu_seconds"]) > 0
    assert rows[1]["heldout"] != rows[0]["heldout"]
    assert (tmp_path / "overoptimisation.jpg").stat().st_size > 0
    assert "updates" in (tmp_path / "overoptimisation.svg").read_text()
    before = table.read_text()
    assert command.main() == 0
    assert table.read_text() == before


def test_signals_fire_at_the_first_evaluation_where_they_hold() -> None:
    columns = ("step", "reward", "heldout", "alignment", "recognised", "diversity")
    numbers = (
        (0, -3.0, -2.6, 0.8, 1.0, 0.30),
        (6, -1.0, -1.4, 0.73, 0.75, 0.29),
        (12, -0.5, -1.01, 0.71, 0.5, 0.29),
        (18, -0.1, -1.2, 0.3, 0.9, 0.28),
        (24, -0.1, -1.3, 0.9, 0.9, 0.26),
    )
    rows = [dict(zip(columns, map(str, row), strict=True)) for row in numbers]
    found = [overoptimisation.fires(rows, one) for one in overoptimisation.SIGNALS.values()]
    assert found == [24, 12, 12, 24]
    assert overoptimisation.fires(rows, overoptimisation.broken) == 12
    assert overoptimisation.fires(rows[:2], overoptimisation.broken) is None


def test_a_mix_at_its_ends_is_its_parts() -> None:
    trainer = trainer_of(plan("draft-1", 1e-3, 0, QUICK), QUICK)
    states = []
    for factor in (1, 2):
        with torch.no_grad():
            for parameter in trainer.parameters.values():
                parameter.add_(factor)
        states.append(lora.lora_state_dict(trainer.pipe.unet))
    first, second = map(mixing.layers, states)
    for parts, expected in (
        ([(first, 1.0), (second, 0.0)], states[0]),
        ([(first, 0.0), (second, 1.0)], states[1]),
    ):
        mixed = mixing.state_of(lora.mix(parts))
        assert mixed.keys() == expected.keys()
        assert all(torch.equal(mixed[name], expected[name]) for name in mixed)
    both = lora.mix([(first, 0.5), (second, 0.5)])
    assert {layer.rank for layer in both.values()} == {2 * QUICK.rank}


def test_an_update_of_trls_without_a_gradient_passes_by() -> None:
    class Trainer:
        def __init__(self, words: str) -> None:
            self.words = words

        def step(self, epoch: int, step: int) -> None:
            raise RuntimeError(self.words)

    trl_child._step(Trainer("element 0 of tensors does not require grad and has no grad_fn"), 1)
    with pytest.raises(RuntimeError, match="anything else"):
        trl_child._step(Trainer("anything else"), 1)


def test_every_figure_is_drawn_from_the_committed_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And with the same bytes, whichever was drawn before it."""
    folder = command.ROOT / "docs" / "experiments"
    for order, names in (("there", command.EXPERIMENTS), ("back", reversed(command.EXPERIMENTS))):
        monkeypatch.setattr(command, "EXPERIMENTS", {n: command.EXPERIMENTS[n] for n in names})
        arguments = ["experiments", "plot", "--figures", str(tmp_path / order)]
        arguments += ["--work", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", arguments)
        assert command.main() == 0
    drawn = {path.name: path.read_text() for path in (tmp_path / "there").glob("*.svg")}
    assert drawn == {path.name: path.read_text() for path in (tmp_path / "back").glob("*.svg")}
    assert drawn.keys() == {path.name for path in folder.glob("*.svg")} != set()
    page = (command.ROOT / "docs" / "experiments.md").read_text()
    for name, text in drawn.items():
        assert f"experiments/{name}" in page
        words, numbers = apart(text)
        committed_words, committed = apart((folder / name).read_text())
        assert words == committed_words, name
        # another processor may round otherwise
        assert numbers == pytest.approx(committed, abs=0.01), name


def apart(svg: str) -> tuple[list[str], list[float]]:
    """A picture's text without its numbers, and those."""
    number = re.compile(r"-?\d+\.\d+")
    return number.split(svg), [float(found) for found in number.findall(svg)]


def test_drafts_are_what_their_names_say() -> None:
    from benchmarks.experiments.variants import TITLES, method

    assert method("draft-T", QUICK) == rpf.DRaFT(None)
    assert method("draft-2", QUICK) == rpf.DRaFT(2)
    assert all(name.startswith("trl-") or method(name, QUICK) for name in TITLES)
