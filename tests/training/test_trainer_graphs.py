"""Captured steps under a trainer: the same run to the last bit, and memory given back in time."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from rewardprop_fast.errors import ConfigError
from rewardprop_fast.memory.plan import Plan
from rewardprop_fast.methods import DRaFT, DRaFTLV
from rewardprop_fast.rollout.graph import Cuda, Eager, Strict
from rewardprop_fast.training import budget, capture
from rewardprop_fast.training.config import (
    OptimizerConfig,
    RegularisationConfig,
    RolloutConfig,
    TrainConfig,
)

SAMPLING = {"steps": 4, "guidance_scale": 3.0, "eta": 0.5}


def run(make_trainer: Any, graphs: str, **settings: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    settings = {"method": DRaFT(k=1), "sampling": SAMPLING, "steps": 3} | settings
    trainer = make_trainer(rollout=RolloutConfig(graphs=graphs), **settings)
    for _ in range(2):
        trainer.update()
    images = trainer.sample(["a red apple"])
    return trainer, {name: p.detach() for name, p in trainer.parameters.items()} | {"": images}


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": OptimizerConfig(ema_decay=0.9)},
        {"method": DRaFTLV(n=2)},
        {"regularisation": RegularisationConfig(kl_coeff=0.1)},
    ],
    ids=["DRaFT", "DRaFT-LV", "KL"],
)
def test_replaying_changes_no_bit_of_a_run(settings: dict[str, Any], make_trainer: Any) -> None:
    plain, expected = run(make_trainer, "off", **settings)
    assert type(plain.engine.graphs) is Eager
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        strict, found = run(make_trainer, "strict", **settings)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    graphs = strict.engine.graphs
    assert type(graphs) is Strict
    # the batch that is trained on, and that of one image; whatever was updated in between
    assert graphs.captures == 2
    assert graphs.replays >= 2 * 3 + 4


def test_who_runs_the_steps() -> None:
    cpu, gpu, phases = torch.device("cpu"), torch.device("cuda"), Plan(residency="phases")
    assert type(capture.choose("auto", cpu)) is Eager
    assert type(capture.choose("off", gpu)) is Eager
    assert type(capture.choose("strict", cpu)) is Strict
    tried, forced = capture.choose("auto", gpu), capture.choose("on", gpu, Plan())
    assert isinstance(tried, Cuda)
    assert isinstance(forced, Cuda)
    assert (tried.trial, forced.trial) == (True, False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert type(capture.choose("auto", gpu, phases)) is Eager
    with pytest.warns(UserWarning, match="the memory plan moves weights by phase"):
        assert type(capture.choose("on", gpu, phases)) is Eager


def test_the_setting() -> None:
    assert TrainConfig().rollout.graphs == "auto"
    with pytest.raises(
        ConfigError, match=r"graphs: got .always.; allowed: auto . on . off . strict"
    ):
        TrainConfig(rollout=RolloutConfig(graphs="always"))


def test_graphs_that_are_wanted_on_a_cpu_are_missed_once(make_trainer: Any) -> None:
    trainer = make_trainer(method=DRaFT(k=1), sampling=SAMPLING, rollout=RolloutConfig(graphs="on"))
    with pytest.warns(UserWarning, match="CUDA graphs need a GPU") as seen:
        rows = [trainer.update() for _ in range(2)]
    assert len(rows) == 2
    assert len([w for w in seen if "CUDA graphs" in str(w.message)]) == 1


@pytest.mark.parametrize(
    ("budget_bytes", "prediction", "dropped"),
    [
        (None, {}, False),
        (2**30, {"peak_bytes": 2**20}, False),
        (2**20, {"peak_bytes": 2**20}, True),
        (2**30, {}, True),  # a plan that does not say what it needs may need all of it
    ],
)
def test_graphs_make_room_for_gradients_where_they_must(
    budget_bytes: int | None, prediction: dict[str, int], dropped: bool, make_trainer: Any
) -> None:
    trainer = make_trainer(
        method=DRaFT(k=1), sampling=SAMPLING, rollout=RolloutConfig(graphs="strict")
    )
    engine = trainer.engine
    plan = Plan(budget_bytes=budget_bytes, prediction=prediction)
    memory = budget.Memory(plan, trainer.pipe, trainer.reward, graphs=engine.graphs)
    held: dict[str, int] = {}

    def watch(name: str) -> Any:
        held.setdefault(f"before {name}", engine.graphs.held_bytes)
        surrounding = memory.phase(name)
        held.setdefault(name, engine.graphs.held_bytes)
        return surrounding

    engine.watch = watch
    trainer.update()
    memory.close()
    assert held["before suffix"] > 0
    assert (held["suffix"] == 0) == dropped
    assert (held["backward"] == 0) == dropped
