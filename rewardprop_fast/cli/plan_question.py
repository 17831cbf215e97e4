"""What `rewardprop plan` is asked: options and a config, checked before any long work."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from rewardprop_fast.cli.common import config_file
from rewardprop_fast.errors import ConfigError, ModelError
from rewardprop_fast.memory.devices import Device, find_device
from rewardprop_fast.memory.planner import Limits, Residency, limits_on
from rewardprop_fast.memory.sizes import format_bytes, parse_bytes
from rewardprop_fast.methods import METHODS, AlignProp, DRaFT, DRTune, Method
from rewardprop_fast.training.config import (
    LoRAConfig,
    RewardConfig,
    RunConfig,
    SamplingConfig,
    TrainConfig,
)
from rewardprop_fast.training.dry_run import DryRun
from rewardprop_fast.training.forecast import RESERVE

#: Cards' memory, GiB, that the answer compares with.
_COMPARED = (24, 16, 12, 10, 8)

Reward = Callable[..., Any]


@dataclass(frozen=True)
class Question:
    """Everything that was asked.

    Attributes:
        model: "sdxl", "sd15", "bundled", a folder or a hub name.
        train: the step.
        reward: "none", one of `rewards.shapes.TOWERS`, or the names of the config's rewards.
        specs: the config's rewards, where they are meant.
        card: whose times are modelled.
        limits: the budget and what may be done to keep to it.
        budget_source: where the budget comes from, in words.
        others: budgets to compare with, bytes.
    """

    model: str
    train: TrainConfig
    reward: str
    card: Device
    limits: Limits
    budget_source: str
    others: tuple[int, ...]
    specs: tuple[RewardConfig, ...] = field(default=())

    def dry_run(self) -> DryRun:
        """The step on tensors without memory. Raises ConfigError, ModelError, RewardError."""
        from rewardprop_fast.models import check_size
        from rewardprop_fast.models.shapes import load_shapes

        dtype = getattr(torch, self.train.dtype)
        shapes = load_shapes(self.model, dtype)
        sampling = self.train.sampling
        own = int(shapes.unet.config.sample_size) * shapes.vae_scale_factor
        check_size(shapes, sampling.height or own, sampling.width or own)
        return DryRun.of_shapes(shapes, self._reward(dtype), self.train)

    def _reward(self, dtype: torch.dtype) -> Reward:
        if self.specs:
            from rewardprop_fast.rewards import build_all, prepare

            made = build_all(
                [(spec.name, spec.weight, spec.args, spec.normalise) for spec in self.specs]
            )
            return prepare(made, "cpu", dtype)
        if self.reward == "none":
            return _brightness
        from rewardprop_fast.rewards.shapes import tower

        return tower(self.reward, dtype)


def _brightness(images: torch.Tensor, prompts: Any, metadata: Any) -> torch.Tensor:
    """A reward without weights, which keeps next to nothing."""
    return images.mean((1, 2, 3))


def read_question(args: Namespace) -> Question:
    """What the options say. Raises ConfigError or ModelError for what cannot be."""
    card = _card(args.card)
    budget, source = _budget(args.budget, card)
    model, train, specs = _base(args.config)
    if args.reward is not None:
        specs = ()
    if args.model is not None:
        model = args.model
    reward = ", ".join(spec.name for spec in specs) or args.reward or "clip-h"
    limits = _limits(args, budget, card)
    train = _laid_over(train, args)
    _locate(model)
    others = tuple(gib * 2**30 - RESERVE for gib in _COMPARED)
    return Question(model, train, reward, card, limits, source, others, specs)


def _limits(args: Namespace, budget: int | None, card: Device) -> Limits:
    if not card.arch and (args.offload or args.residency == "phases"):
        given = "--offload" if args.offload else "--residency phases"
        raise ConfigError(
            f"{given} with --card {card.name} would move memory to where it is; leave it out, or "
            "name a graphics card."
        )
    residencies: dict[str, tuple[Residency, ...]] = {"auto": ("all", "phases")}
    asked = residencies.get(args.residency, (args.residency,))
    return limits_on(card, budget, args.offload, asked)


def _card(name: str) -> Device:
    try:
        return find_device(name)
    except ValueError as error:
        raise ConfigError(f"--card: {error}") from None


def _budget(given: str | None, card: Device) -> tuple[int | None, str]:
    if given is None:
        return (
            card.memory_bytes - RESERVE,
            f"{card.title}'s {format_bytes(card.memory_bytes)} less {format_bytes(RESERVE)} for "
            "context, workspaces and fragmentation",
        )
    if given.strip().lower() == "none":
        return None, "no limit"
    try:
        budget = parse_bytes(int(given) if given.isdecimal() else given)
    except ValueError as error:
        raise ConfigError(f"--budget: {error} Or none, for no limit.") from None
    if budget < 1:
        raise ConfigError(f"--budget is {given!r}; allowed: more than nothing, or none.")
    return budget, "as given"


def _base(source: str | None) -> tuple[str, TrainConfig, tuple[RewardConfig, ...]]:
    """Model, step and rewards before the options are laid over them."""
    if source is None:
        return (
            "bundled",
            TrainConfig(method=DRaFT(1), lora=LoRAConfig(rank=16), batch_size=1, dtype="bfloat16"),
            (),
        )
    config = RunConfig.from_yaml(config_file(source), check_machine=False)
    dtype = "bfloat16" if config.train.dtype == "auto" else config.train.dtype
    return config.model.path, replace(config.train, dtype=dtype), config.reward


def _laid_over(train: TrainConfig, args: Namespace) -> TrainConfig:
    _check(args)
    sampling, lora = train.sampling, train.lora
    for option, key in (
        ("height", "height"),
        ("width", "width"),
        ("steps", "steps"),
        ("guidance", "guidance_scale"),
    ):
        if getattr(args, option) is not None:
            sampling = replace(sampling, **{key: getattr(args, option)})
    if args.rank is not None:
        lora = replace(lora, rank=args.rank)
    changes: dict[str, Any] = {"sampling": sampling, "lora": lora}
    if args.batch is not None:
        changes["batch_size"] = args.batch
    if args.dtype is not None:
        changes["dtype"] = args.dtype
    changes["method"] = _method(train.method, args, sampling)
    # on no device: float16 is refused for a CPU, where nothing of this runs
    return replace(train, device="auto", **changes)


def _check(args: Namespace) -> None:
    for option in ("height", "width", "steps", "batch", "rank"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise ConfigError(f"--{option} is {value}; allowed: a whole number from 1.")
    if args.guidance is not None and not 0 <= args.guidance < math.inf:
        raise ConfigError(f"--guidance is {args.guidance}; allowed: a number from 0.")


def _method(method: Method, args: Namespace, sampling: SamplingConfig) -> Method:
    """The config's method, or the one asked for, with the K asked for."""
    steps = sampling.steps
    chosen = method
    if args.method is not None and type(method) is not METHODS[args.method]:
        chosen = METHODS[args.method]()
        if isinstance(chosen, DRaFT):
            chosen = replace(chosen, k=1)
    if args.k is not None:
        k = _k(args.k, steps)
        if isinstance(chosen, AlignProp):
            chosen = replace(chosen, k_max=k, k_min=min(chosen.k_min, k))
        elif isinstance(chosen, DRaFT | DRTune):
            chosen = replace(chosen, k=k)
        elif k != chosen.gradient_steps(steps):
            raise ConfigError(f"--k is {args.k}; {chosen.name} has one step with gradients.")
    for problem in chosen.validate(steps):
        raise ConfigError(f"{chosen.name}: {problem}")
    return chosen


def _k(given: str, steps: int) -> int:
    if given.strip().lower() == "all":
        return steps
    try:
        k = int(given)
    except ValueError:
        k = 0
    if not 1 <= k <= steps:
        raise ConfigError(
            f"--k is {given}; allowed: 1 to the number of sampling steps (--steps), {steps}, or "
            "all of them: all."
        )
    return k


def _locate(model: str) -> None:
    from rewardprop_fast.models.architectures import UNETS
    from rewardprop_fast.models.load import locate

    if model in UNETS:
        return
    if not model.strip():
        raise ConfigError(f"--model is empty; allowed: {', '.join(UNETS)}, bundled, or a folder.")
    try:
        locate(model)
    except ModelError as error:
        raise ModelError(f"{error} `rewardprop plan` also knows {', '.join(UNETS)}.") from None
