"""`rewardprop plan`: its figures hold, its plan is the trainer's, its mistakes are named."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from PIL import Image

from rewardprop_fast.cli import _parser, main
from rewardprop_fast.cli.plan import _METHODS
from rewardprop_fast.cli.plan_question import Question, read_question
from rewardprop_fast.memory import MemoryTracker, find_device, parse_bytes, policy
from rewardprop_fast.memory.kinds import RESNET, TRANSFORMER_BLOCK
from rewardprop_fast.memory.plan import Plan, Policy
from rewardprop_fast.memory.planner import Limits
from rewardprop_fast.methods import METHODS, SRPO, AlignProp, DRaFT, DRaFTLV, DRTune, Method, ReFL
from rewardprop_fast.models.architectures import SCHEDULER
from rewardprop_fast.models.shapes import load_shapes
from rewardprop_fast.training.config import LoRAConfig, SamplingConfig, TrainConfig
from rewardprop_fast.training.dry_run import DryRun
from rewardprop_fast.training.estimate import estimate, make_profile, planner_for
from rewardprop_fast.training.forecast import composed_timeline
from rewardprop_fast.training.report import memory_plot

Ask = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pipeline's folder: the configs of its networks, and no weights."""
    folder = tmp_path_factory.mktemp("models") / "small"
    channels: dict[str, Any] = {"block_out_channels": (8, 16), "norm_num_groups": 4}
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        **channels,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        **channels,
    )
    for network, name in ((unet, "unet"), (vae, "vae"), (DDIMScheduler(**SCHEDULER), "scheduler")):
        network.save_config(folder / name)
    return folder


@pytest.fixture(scope="module")
def ask(model: Path) -> Ask:
    """The facts of a plan for the small model at 128 x 128; asked once for each question."""
    known: dict[tuple[str, ...], dict[str, Any]] = {}

    def facts(*options: str) -> dict[str, Any]:
        if options not in known:
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                assert main([*command_line(model), "--json", *options]) == 0
            known[options] = json.loads(out.getvalue())  # nothing else is on stdout
        return known[options]

    return facts


def command_line(model: Path) -> list[str]:
    size = ["--height", "128", "--width", "128"]
    return ["plan", "--model", str(model), "--reward", "none", "--rank", "4", "--steps", "6", *size]


def dry_run(model: Path, k: int = 1) -> DryRun:
    config = TrainConfig(
        method=DRaFT(k),
        sampling=SamplingConfig(steps=6, height=128, width=128),
        lora=LoRAConfig(rank=4),
        batch_size=1,
        dtype="bfloat16",
    )
    shapes = load_shapes(str(model), torch.bfloat16)
    return DryRun.of_shapes(shapes, lambda images, *_: images.mean((1, 2, 3)), config)


def tracked_peak(model: Path, plan: Plan, k: int = 1) -> int:
    """Of the step under the plan, by a tracker alone."""
    dry, tracker = dry_run(model, k), MemoryTracker()
    held = dry.resident()
    tracker.count(held)
    applied = policy.apply(plan, dry.engine.pipe.unet, dry.engine.pipe.vae)
    with tracker:
        dry.step()
    applied.remove()
    return tracker.peak_bytes


# --- figures ---


def test_the_figures_are_those_of_a_tracked_run(ask: Ask, model: Path) -> None:
    found = ask("--budget", "none")
    prediction = found["prediction"]
    assert prediction["peak_is"] == "exact"
    assert prediction["peak_bytes"] == tracked_peak(model, Plan())
    phases = prediction["peak_bytes_by_phase"]
    behind = ["decode", "reward", "decode_backward", "backward", "update"]
    assert list(phases) == ["prefix", "suffix", *behind]
    assert max(phases.values()) == prediction["peak_bytes"]
    assert sum(found["holders_at_peak_bytes"].values()) == prediction["peak_bytes"]
    rounded = prediction["rounded_bytes"]
    assert prediction["reserved_bytes"] >= rounded >= prediction["peak_bytes"]
    assert prediction["workspace_bytes"] > 0
    assert prediction["modelled_seconds"] == prediction["modelled_seconds_unlimited"] > 0
    assert set(found["policies"].values()) == {"everything kept"}
    assert "nothing was run on a GPU" in found["note"]


def test_weights_and_the_optimizer_are_among_the_holders(ask: Ask, model: Path) -> None:
    holders = ask("--budget", "none")["holders_at_peak_bytes"]
    dry = dry_run(model)
    unet = [p for p in dry.engine.pipe.unet.parameters() if not p.requires_grad]
    vae = [*dry.engine.pipe.vae.parameters(), *dry.engine.pipe.vae.buffers()]
    assert holders["UNet: weights"] == sum(p.nbytes for p in unet)
    assert holders["VAE: weights"] == sum(p.nbytes for p in vae)
    assert holders["LoRA and optimizer"] == 3 * sum(p.nbytes for p in dry.trained)
    assert holders["decoder: resnets"] > 0


def test_a_budget_is_kept_to_and_costs_time(ask: Ask, model: Path, tmp_path: Path) -> None:
    most = ask("--budget", "none")["prediction"]["peak_bytes"]
    budget = int(most * 0.8)
    file = tmp_path / "plan.json"
    found = ask("--budget", str(budget), "--output", str(file))
    prediction = found["prediction"]
    assert prediction["peak_bytes"] <= budget
    assert prediction["modelled_seconds"] > prediction["modelled_seconds_unlimited"]
    assert any("recomputed" in words for words in found["policies"].values())
    plan = Plan.load(file)
    assert plan.budget_bytes == budget
    assert plan.made_for == found["asked"]
    assert plan.prediction == prediction
    assert json.loads(plan.to_json()) == found["plan"]
    assert tracked_peak(model, plan) == prediction["peak_bytes"]


def test_the_least_budget_is_named_and_works(
    ask: Ask, model: Path, command: Callable[..., Any]
) -> None:
    line = [*command_line(model), "--residency", "all"]
    answer = command(*line, "--budget", "1MiB")
    assert (answer.code, answer.out) == (1, "")
    error = answer.err.splitlines()[-1]
    assert "residency by phases" in error
    assert "offloading" in error
    least = re.search(r"the least that works is (\S+ \w+)\.", error)
    assert least is not None
    nbytes = parse_bytes(least[1])
    peak = ask("--residency", "all", "--budget", str(nbytes))["prediction"]["peak_bytes"]
    assert 0.98 * nbytes < peak <= nbytes


def test_many_steps_are_composed_and_run_as_a_whole_where_that_is_asked(
    ask: Ask, model: Path
) -> None:
    composed = ask("--budget", "none", "--k", "4")
    exact = ask("--budget", "none", "--k", "4", "--exact")
    assert composed["prediction"]["peak_is"] == "composed"
    assert composed["prediction"]["reserved_bytes"] is None
    assert composed["prediction"]["rounded_bytes"] is None
    assert exact["prediction"]["peak_is"] == "exact"
    peak = exact["prediction"]["peak_bytes"]
    assert peak == tracked_peak(model, Plan(), 4)
    # beyond the second step each counts one float32 latent that it has let go of by then
    latents = 4 * 4 * 64 * 64
    assert 0 <= composed["prediction"]["peak_bytes"] - peak <= 2 * latents
    holders = composed["holders_at_peak_bytes"]
    assert sum(holders.values()) == composed["prediction"]["peak_bytes"]
    assert holders["transformer blocks"] > 0


def test_weights_by_phase_are_away_from_the_other_phases(ask: Ask) -> None:
    everything = ask("--budget", "none")
    phases = ask("--budget", "none", "--residency", "phases")
    holders = everything["holders_at_peak_bytes"]
    unet, vae = holders["UNet: weights"], holders["VAE: weights"]
    before = everything["prediction"]["peak_bytes_by_phase"]
    after = phases["prediction"]["peak_bytes_by_phase"]
    for phase in before:
        away = unet if phase in ("decode", "reward", "decode_backward") else vae
        assert before[phase] - after[phase] == away
    assert phases["plan"]["residency"] == "phases"
    assert phases["prediction"]["peak_bytes"] == max(after.values())
    assert phases["prediction"]["modelled_seconds"] > everything["prediction"]["modelled_seconds"]


def test_a_plan_for_a_cpu_moves_nothing() -> None:
    limits = question("--card", "cpu").limits
    assert limits.residencies == ("all",)
    assert not limits.apart


def test_other_budgets_cost_more_the_smaller_they_are(ask: Ask) -> None:
    rows = ask("--budget", "none")["other_budgets"]
    assert [row["budget_bytes"] / 2**30 for row in rows] == [22.5, 14.5, 10.5, 8.5, 6.5]
    assert all(row["fits"] and row["peak_bytes"] <= row["budget_bytes"] for row in rows)


def test_a_composed_curve_has_the_peaks_of_its_phases_and_the_step_s_seconds(model: Path) -> None:
    """With more steps than two, in groups: every one of them is there, and each in its place."""
    card = find_device("rtx3090")
    dry = dry_run(model, 6)
    profiled = make_profile(dry, card)
    planner = planner_for(dry, profiled, Limits(None))
    for budget in (None, planner.least()):
        plan = planner.plan(budget)
        points = composed_timeline(plan)
        for phase, peak in plan.by_phase.items():
            assert max((b for _, b, p in points if p == phase), default=peak) == peak
        order = [p for p, _ in groupby(p for *_, p in points)]
        assert order == ["suffix", "decode", "reward", "decode_backward", "backward", "update"]
        run = estimate(dry, plan.plan, card)
        # units that are alike count with the dearest one's seconds, which adds up gradients too
        assert run.seconds < points[-1][0] < 1.05 * run.seconds


def test_the_least_plan_of_one_step_holds_the_inputs_it_recomputes_from(model: Path) -> None:
    card = find_device("rtx3090")
    dry = dry_run(model)
    blocks = Plan(({TRANSFORMER_BLOCK: Policy.RECOMPUTE, RESNET: Policy.RECOMPUTE},))
    profiled = make_profile(dry, card)
    planner = planner_for(dry, profiled, Limits(None))
    least, most = planner.least(), planner.plan(None).peak
    for budget in (least, (least + most) // 2):
        plan = planner.plan(budget)
        run = estimate(dry, plan.plan, card)
        assert run.peak <= plan.peak <= budget
    assert estimate(dry, blocks, card).peak < most


# --- what is asked ---


def question(*options: object) -> Question:
    return read_question(_parser().parse_args(["plan", *map(str, options)]))


def test_a_config_says_what_is_planned_and_options_lie_over_it(config: Path) -> None:
    asked = question("--config", config)
    train = asked.train
    assert (asked.reward, asked.specs[0].name, train.batch_size) == ("colour", "colour", 2)
    assert (train.dtype, train.sampling.guidance_scale, train.lora.rank) == ("float32", 3, 2)
    options = ("--steps", 9, "--k", 4, "--rank", 7, "--dtype", "float16", "--guidance", 2.5)
    train = question("--config", config, *options, "--batch", 3, "--height", 64).train
    assert (train.sampling.steps, train.method, train.lora.rank) == (9, DRaFT(4), 7)
    assert (train.dtype, train.sampling.guidance_scale, train.batch_size) == ("float16", 2.5, 3)
    assert (train.sampling.height, train.sampling.width) == (64, None)
    assert question("--config", config, "--reward", "none").specs == ()


def test_the_rewards_of_a_config_are_run_too(config: Path, command: Callable[..., Any]) -> None:
    line = ["plan", "--config", config, "--method", "draft_lv", "--card", "RTX 4090"]
    answer = command(*line, "--json")
    assert answer.code == 0, answer.err
    asked = json.loads(answer.out)["asked"]
    assert (asked["reward"], asked["card"], asked["rank"]) == ("colour", "rtx4090", 2)
    assert asked["budget_bytes"] == int(22.5 * 2**30)
    assert (asked["method"], asked["k"]) == ("draft_lv", 1)


@pytest.mark.parametrize(
    ("options", "method"),
    [
        ((), DRaFT(1)),
        (("--k", "all"), DRaFT(50)),
        (("--method", "draft_lv"), DRaFTLV()),
        (("--method", "alignprop", "--k", "7"), AlignProp(k_max=7)),
        (("--method", "drtune", "--k", "7"), DRTune(k=7)),
        (("--method", "refl"), ReFL()),
        (("--method", "srpo", "--k", "1"), SRPO()),
    ],
)
def test_every_method_can_be_asked_for(options: tuple[str, ...], method: Method) -> None:
    assert question(*options).train.method == method


def test_the_command_line_knows_every_method() -> None:
    assert set(_METHODS) == set(METHODS)


def test_copies_take_as_long_as_the_card_s_link_needs() -> None:
    asked = question("--card", "rtx4060", "--offload", "--residency", "phases")
    card = find_device("rtx4060")
    assert (asked.limits.to_host, asked.limits.to_device) == (card.download, card.upload)
    assert (asked.limits.offload, asked.limits.residencies) == (True, ("phases",))
    assert asked.limits.budget == int(6.5 * 2**30)
    assert question().limits.residencies == ("all", "phases")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--card", "rtx309"), ("Unknown device 'rtx309'", "Nearest: rtx3090", "a100-80gb")),
        (("--budget", "24 gigs"), ("--budget: '24 gigs' is no size", "24GiB", "none")),
        (("--budget", "0"), ("--budget is '0'",)),
        (("--budget=-3GiB",), ("--budget: '-3GiB' is no size", "24GiB")),
        (("--budget", "-3GiB"), ("--budget has no value", "--budget=VALUE")),
        (("--dtype", "int8"), ("--dtype: got 'int8'", "bfloat16, float16, float32")),
        (("--height", "1e3"), ("--height is '1e3'", "a whole number")),
        (("--height", "-64"), ("--height is -64", "a whole number from 1")),
        (("--guidance", "inf"), ("--guidance is inf", "a number from 0")),
        (("--steps", "2000"), ("2000 sampling steps", "1 to 1000")),
        (("--model", ""), ("--model is empty", "sdxl")),
        (("--k", "-1"), ("--k is -1", "allowed: 1 to", "6", "all")),
        (("--k", "7"), ("--k is 7", "6")),
        (("--k", "two"), ("--k is two",)),
        (("--batch", "0"), ("--batch is 0",)),
        (("--guidance", "-1"), ("--guidance is -1",)),
        (("--model", "./nowhere"), ("There is no folder './nowhere'", "sdxl")),
        (("--output", "nowhere/plan.json"), ("--output: nowhere/plan.json cannot be written",)),
        (("--output", "plan.txt"), ("--output", ".json")),
        (("--plot", "plot.gif"), ("--plot", ".svg")),
        (("--method", "draft_lv", "--k", "3"), ("draft_lv has one step",)),
        (("--config", "nothing.yaml"), ("There is no config file",)),
        (("--height", "129"), ("sampling.height is 129", "multiples of")),
        (("--card", "cpu", "--offload"), ("--offload with --card cpu", "a graphics card")),
        (("--card", "cpu", "--residency", "phases"), ("--residency phases with --card cpu",)),
    ],
)
def test_what_cannot_be_is_one_error_before_any_work(
    model: Path,
    config: Path,
    command: Callable[..., Any],
    options: tuple[str, ...],
    parts: tuple[str, ...],
) -> None:
    answer = command(*command_line(model), *options)
    assert (answer.code, answer.out) == (2, "")
    *progress, error = answer.err.splitlines()
    assert error.startswith("error: ")
    assert all(part in error for part in parts), error
    assert not any(line.startswith("Running") for line in progress)
    assert not Path("plan.json").exists()


# --- what people see ---


def test_the_page_says_it_all(model: Path, config: Path, command: Callable[..., Any]) -> None:
    answer = command(*command_line(model), "--plot", "step.svg", "--output", "plan.json")
    assert answer.code == 0
    page = " ".join(answer.out.split())
    for part in (
        "at the peak, within 22.50 GiB (RTX 3090's 24.00 GiB less 1.50 GiB",
        "modelled for RTX 3090",
        "The peak is exact",
        "K = 1 of 6 sampling steps",
        "peak by phase",
        "in the allocator's blocks, rounded up",
        "reserved by it, without workspaces",
        "largest workspace",
        "decoder: resnets",
        "everything kept",
        "8 GiB 6.50 GiB",
        "Wrote plan.json",
        "nothing was run on a GPU",
    ):
        assert part in page, part
    assert answer.err.splitlines()[0] == "Building the networks' shapes ..."
    assert len(answer.err.splitlines()) >= 4
    drawing = Path("step.svg").read_text(encoding="utf-8")
    for part in ("budget 22.50 GiB", "UNet backward", "GiB allocated", "K = 1 of 6"):
        assert part in drawing


def test_a_curve_is_thinned_and_keeps_its_peaks(tmp_path: Path) -> None:
    points = [(i / 1000, i * i % 977 + 100, "suffix") for i in range(20000)]
    points[7777] = (7.777, 5000, "suffix")
    points[7778] = (7.778, 1, "suffix")
    thin = memory_plot._thinned(points)
    assert len(thin) <= memory_plot._MOST_POINTS + 2
    assert (7.777, 5000) in thin
    assert (7.778, 1) in thin
    assert thin == sorted(thin)
    curve = memory_plot.Curve(points, None, "title", "card", exact=True)
    memory_plot.draw(curve, tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.size == (1350, 540)
    for name in "ab":
        memory_plot.draw(curve, tmp_path / f"{name}.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
