"""All settings of a run: one tree of frozen dataclasses <-> YAML.

    config = RunConfig.from_yaml("run.yaml", overrides=["train.optimizer.learning_rate=1e-4"])
    Path("resolved.yaml").write_text(config.to_yaml())

Every setting carries its meaning and its limits; `describe()` lists them all. Defaults are those of
DRaFT's small scale (arXiv 2309.17400): 2 000 steps of batch 4, AdamW at 4e-4, LoRA rank 8, 50 DDIM
steps at guidance 7.5.
"""

# ruff: noqa: RUF009 - `setting(...)` returns a dataclass field, and its defaults are frozen

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from rewardprop_fast.errors import ConfigError
from rewardprop_fast.memory.sizes import parse_bytes
from rewardprop_fast.methods import METHODS, DRaFT, Method
from rewardprop_fast.randomness import Draws
from rewardprop_fast.rewards import REWARDS
from rewardprop_fast.training import config_io
from rewardprop_fast.training.config_fields import (
    Problems,
    Rule,
    Settings,
    apply_rules,
    join,
    read_settings,
    setting,
)
from rewardprop_fast.training.config_values import show, suggestion


@dataclass(frozen=True)
class ModelConfig(Settings):
    """Which pipeline is fine-tuned."""

    path: str = setting(
        "bundled",
        pattern=r".*\S.*",
        allowed="bundled, a folder or a hub name",
        help="bundled, a diffusers folder, or a hub name such as owner/model.",
    )
    revision: str | None = setting(None, help="Branch, tag or commit of a hub model.")
    variant: str | None = setting(None, help="Weight variant of the model's files, such as fp16.")
    local_files_only: bool = setting(False, help="Never ask the network for the model.")


def _one_source_of_prompts(prompts: PromptsConfig) -> Iterable[str]:
    if prompts.list is not None and not prompts.list:
        yield "got an empty list; allowed: at least one prompt. Leave it out to use prompts.source."
    if prompts.list is not None and prompts.source != "bundled":
        yield f"given beside source {show(prompts.source)}; allowed: one of them. Remove either."


@dataclass(frozen=True)
class PromptsConfig(Settings):
    """What the images are asked to show."""

    source: str = setting(
        "bundled",
        pattern=r".*\S.*",
        allowed="a prompt set's name or a .txt file",
        help="Name of a prompt set (bundled, animals, ...) or a .txt file with a prompt a line.",
    )
    list: tuple[str, ...] | None = setting(
        None, help="The prompts themselves, instead of a source."
    )

    RULES: ClassVar[tuple[Rule, ...]] = (Rule("list", ("source", "list"), _one_source_of_prompts),)


def _mean_and_std(reward: RewardConfig) -> Iterable[str]:
    pair = reward.normalise
    if pair is not None and (len(pair) != 2 or not pair[1] > 0):
        yield f"got {show(list(pair))}; allowed: two numbers, [mean, std], the second above 0."


@dataclass(frozen=True)
class RewardConfig(Settings):
    """One reward of a weighted sum. `style` alone is short for `{name: style}`."""

    name: str = setting(help="A built-in reward, or python:module:attribute for your own.")
    weight: float = setting(1.0, help="Its share of the sum; negative to be driven down.")
    args: dict[str, Any] = setting(factory=dict, help="The reward's own arguments.")
    normalise: tuple[float, ...] | None = setting(
        None, help="[mean, std] that are taken out of it, so that weights mean the same."
    )

    RULES: ClassVar[tuple[Rule, ...]] = (Rule("normalise", ("normalise",), _mean_and_std),)
    SHORT_FORM: ClassVar[str | None] = "name"


@dataclass(frozen=True)
class SamplingConfig(Settings):
    """How an image is drawn while training: DDIM with classifier-free guidance."""

    steps: int = setting(50, at_least=1, help="DDIM steps from noise to image.")
    guidance_scale: float = setting(
        7.5, at_least=0, help="Guidance weight w; 1 is without guidance."
    )
    eta: float = setting(0.0, at_least=0, at_most=1, help="Noise of DDIM: 0 none, 1 as DDPM.")
    height: int | None = setting(None, at_least=1, help="Pixels; null for the model's own size.")
    width: int | None = setting(None, at_least=1, help="Pixels; null for the model's own size.")
    negative_prompt: str = setting("", help="What guidance leads away from.")

    @property
    def guided(self) -> bool:
        """Whether the UNet sees every latent twice."""
        return self.guidance_scale > 1


@dataclass(frozen=True)
class RolloutConfig(Settings):
    """How the steps without gradient are run."""

    graphs: Literal["auto", "on", "off", "strict"] = setting(
        "auto",
        help="CUDA graphs: on, off, or where a timed trial says they pay; strict: check on a CPU.",
    )
    prefix_batches: int = setting(
        1,
        at_least=1,
        help="Batches whose steps without gradients run as one; divides accumulation_steps.",
    )
    merge_lora: bool = setting(
        False,
        help="In steps without gradients, run on W + s B A: faster, rounded to the weights' dtype.",
    )


@dataclass(frozen=True)
class EncodingConfig(Settings):
    """When prompts are encoded, and where the embeddings are kept."""

    when: Literal["auto", "ahead", "lazily"] = setting(
        "auto",
        help="ahead: all before training, and the text encoders leave the device; auto: on a GPU.",
    )
    cache: str | None = setting(
        None,
        pattern=r".*\S.*",
        allowed="a folder, or null",
        help="Folder where embeddings are kept for later runs; null: nowhere.",
    )


@dataclass(frozen=True)
class LoRAConfig(Settings):
    """The trained weights: low-rank additions to the UNet's projections, in peft's format."""

    rank: int = setting(8, at_least=1, help="Rank of each addition.")
    alpha: float | None = setting(
        None, above=0, help="Scale numerator (scale = alpha / rank); null = rank."
    )
    target_modules: Literal["attention", "attention+ff", "all-linear"] | tuple[str, ...] = setting(
        "attention",
        allowed="attention, attention+ff, all-linear, or a list of module name endings",
        help="Layers that get one: a preset, or a list such as [to_q, to_v].",
    )

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "target_modules",
            ("target_modules",),
            lambda lora: [] if lora.target_modules else ["got an empty list; nothing would train."],
        ),
    )


@dataclass(frozen=True)
class OptimizerConfig(Settings):
    """AdamW on fp32 parameters, with clipping and a schedule."""

    learning_rate: float = setting(4e-4, above=0, help="Peak step size.")
    betas: tuple[float, float] = setting(
        (0.9, 0.999), at_least=0, below=1, help="AdamW's decay rates."
    )
    weight_decay: float = setting(0.1, at_least=0, help="AdamW's decoupled decay.")
    epsilon: float = setting(1e-8, above=0, help="AdamW's denominator offset.")
    max_grad_norm: float | None = setting(
        1.0, above=0, help="Clip the gradient's norm; null: never."
    )
    schedule: Literal["constant", "cosine", "linear"] = setting(
        "constant", help="Learning rate after the warm-up; cosine and linear fall to 0."
    )
    warmup_steps: int = setting(0, at_least=0, help="Steps of linear rise to the peak.")
    ema_decay: float | None = setting(
        None, above=0, below=1, help="Average the LoRA weights with this decay; null: no average."
    )
    offload: bool = setting(
        False, help="Keep AdamW's moments and the average in host memory, and update there."
    )


def _one_source_of_images(settings: RegularisationConfig) -> Iterable[str]:
    if settings.pretraining_images is not None and not settings.pretraining_coeff:
        yield "given without pretraining_coeff, so it has no effect; set that above 0."


@dataclass(frozen=True)
class RegularisationConfig(Settings):
    """What keeps the model near the base model; any method may have it."""

    kl_coeff: float = setting(
        0.0, at_least=0, help="Weight of the squared distance to the base model's predictions."
    )
    pretraining_coeff: float = setting(
        0.0, at_least=0, help="Weight of the pretraining loss on images to go on knowing."
    )
    pretraining_images: str | None = setting(
        None,
        pattern=r".*\S.*",
        allowed="a folder, or null",
        help="Folder of these, each with a .txt caption; null: samples of the base model.",
    )
    pretraining_samples: int = setting(
        16, at_least=1, help="How many samples of the base model are drawn for it."
    )

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "pretraining_images",
            ("pretraining_images", "pretraining_coeff"),
            _one_source_of_images,
        ),
    )


@dataclass(frozen=True)
class EarlyStoppingConfig(Settings):
    """When a run ends before its last step, by its evaluation images."""

    every: int = setting(10, at_least=1, help="Steps between two looks at them.")
    heldout_fall: float | None = setting(
        None, above=0, help="Stop if the held-out reward is so far below its best; null: never."
    )
    diversity_share: float | None = setting(
        None, above=0, at_most=1, help="Stop if diversity is below this share of the base model's."
    )

    @property
    def active(self) -> bool:
        return self.heldout_fall is not None or self.diversity_share is not None


@dataclass(frozen=True)
class OutputConfig(Settings):
    """What a run writes, and how often."""

    directory: str = setting(
        "runs/run", pattern=r".*\S.*", allowed="a folder", help="Folder of the run."
    )
    checkpoint_every: int = setting(
        100, at_least=0, help="Steps between checkpoints; 0: only last."
    )
    keep_checkpoints: int = setting(2, at_least=1, help="Newest checkpoints that are kept.")
    images_every: int = setting(
        50, at_least=0, help="Steps between image grids; 0: first and last."
    )
    grid_size: int = setting(8, at_least=1, help="Images in a grid.")
    drift_every: int = setting(
        10, at_least=0, help="Steps between measurements of the drift; 0: first and last."
    )
    tensorboard: bool = setting(True, help="Write tensorboard events, if it is installed.")


def _method_fits(train: TrainConfig) -> Iterable[str]:
    return train.method.validate(train.sampling.steps)


def _eta_fits(train: TrainConfig) -> Iterable[str]:
    return train.method.refuses_eta(train.sampling.eta)


def _batches_fit(train: TrainConfig) -> Iterable[str]:
    return train.method.refuses_batches(train.accumulation_steps)


def _one_kl(train: TrainConfig) -> Iterable[str]:
    if train.regularisation.kl_coeff and train.method.kl_weight():
        yield f"given beside {train.method.name}, which has a kl_coeff of its own; use that one."


def _pairs_to_compare(train: TrainConfig) -> Iterable[str]:
    if train.early_stopping.diversity_share is not None and train.output.grid_size < 2:
        yield (
            "given with output.grid_size 1: diversity is that of the evaluation images, of which "
            "there must be two at least. Raise output.grid_size."
        )


def _schedule_fits(train: TrainConfig) -> Iterable[str]:
    optimizer = train.optimizer
    if optimizer.schedule != "constant" and optimizer.warmup_steps >= train.steps:
        yield (
            f"got {optimizer.warmup_steps} with schedule {optimizer.schedule}; allowed: below "
            f"train.steps, {train.steps}. Warm up for fewer steps, or train longer."
        )


#: Training steps whose draws are looked at for one that begins without gradients.
_TRIED = 100


def _prefix_fits(train: TrainConfig) -> Iterable[str]:
    together, all_of_them = train.rollout.prefix_batches, train.accumulation_steps
    if all_of_them % together:
        yield (
            f"got {together} with accumulation_steps {all_of_them}; allowed: a divisor of it, so "
            "that every batch is one of as many."
        )
    elif together > 1:
        draws = (Draws(train.seed, step, ()) for step in range(_TRIED))
        if not any(train.method.common_steps(train.sampling.steps, one) for one in draws):
            yield (
                f"got {together}, but {train.method.name} with these settings begins with no step "
                "without gradients; allowed: 1."
            )


def _known_budget(train: TrainConfig) -> Iterable[str]:
    budget = train.memory_budget
    if budget is not None and budget != "auto" and not budget.endswith(".json"):
        try:
            parse_bytes(budget)
        except ValueError as error:
            yield f"{error} Or: auto, or the .json file of a plan."


def _plan_is_there(train: TrainConfig) -> Iterable[str]:
    budget = train.memory_budget
    if budget is not None and budget.endswith(".json") and not Path(budget).is_file():
        yield f"there is no file {budget!r}; `rewardprop plan --output {budget}` writes one."


def _merging_needs_operators(train: TrainConfig) -> Iterable[str]:
    if train.rollout.merge_lora and not train.accelerate:
        yield "got true with accelerate false; allowed: only with this library's operators."


_SLOW_HALF = "fp16 matmul on CPU is below 1 GFLOP/s. Use float32, bfloat16 or auto."


def _no_half_on_cpu(train: TrainConfig) -> Iterable[str]:
    if train.dtype == "float16" and train.device == "cpu":
        yield f"got float16 with device cpu; refused because {_SLOW_HALF}"


def _device_is_here(train: TrainConfig) -> Iterable[str]:
    if train.device.startswith("cuda") and not torch.cuda.is_available():
        yield f"got {show(train.device)}, but torch finds no GPU; allowed here: auto, cpu."
    elif train.device.startswith("cuda:"):
        index, count = int(train.device.removeprefix("cuda:")), torch.cuda.device_count()
        if index >= count:
            yield f"got {show(train.device)}; allowed here: cuda:0 to cuda:{count - 1}, auto, cpu."


def _no_half_without_gpu(train: TrainConfig) -> Iterable[str]:
    if train.dtype == "float16" and train.device == "auto" and not torch.cuda.is_available():
        yield f"got float16, but torch finds no GPU; refused because {_SLOW_HALF}"


@dataclass(frozen=True)
class TrainConfig(Settings):
    """The training itself: all that `RewardPropTrainer` needs beside its pipeline and rewards."""

    method: Method = setting(
        DRaFT(), registry=lambda: METHODS, help="Where gradients flow, and its own settings."
    )
    sampling: SamplingConfig = setting(SamplingConfig(), help="How images are drawn.")
    rollout: RolloutConfig = setting(RolloutConfig(), help="Steps without gradient.")
    encoding: EncodingConfig = setting(EncodingConfig(), help="Prompts to embeddings.")
    lora: LoRAConfig = setting(LoRAConfig(), help="The trained weights.")
    optimizer: OptimizerConfig = setting(OptimizerConfig(), help="The update.")
    regularisation: RegularisationConfig = setting(
        RegularisationConfig(), help="What keeps the model near the base model."
    )
    early_stopping: EarlyStoppingConfig = setting(
        EarlyStoppingConfig(), help="When to stop before the last step."
    )
    output: OutputConfig = setting(OutputConfig(), help="What is written.")
    steps: int = setting(2000, at_least=1, help="Optimizer updates.")
    batch_size: int = setting(4, at_least=1, help="Images drawn at once.")
    accumulation_steps: int = setting(1, at_least=1, help="Batches averaged into one update.")
    seed: int = setting(0, at_least=0, below=2**63, help="Fixes prompts, noise and method draws.")
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = setting(
        "auto",
        help="Of frozen weights and arithmetic; the LoRA is float32 (or 64, for checks).",
    )
    device: str = setting(
        "auto",
        pattern=r"auto|cpu|cuda(:\d{1,4})?",
        allowed="auto, cpu, cuda or cuda:N",
        help="auto, cpu, cuda or cuda:N; auto takes a GPU if there is one.",
    )
    accelerate: bool = setting(
        True, help="Run the UNet and the VAE on this library's operators; false: on diffusers' own."
    )
    memory_budget: str | None = setting(
        None,
        allowed="auto, a size such as 24GiB, a plan's .json file, or null",
        help="Fit into this much device memory by recomputing and offloading; null: keep all.",
    )
    target_reward: float | None = setting(None, help="Stop once the mean reward gets here.")

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule("method", ("method", "sampling.steps"), _method_fits),
        Rule("sampling.eta", ("method", "sampling.eta"), _eta_fits),
        Rule("accumulation_steps", ("method", "accumulation_steps"), _batches_fit),
        Rule(
            "optimizer.warmup_steps",
            ("optimizer.schedule", "optimizer.warmup_steps", "steps"),
            _schedule_fits,
        ),
        Rule(
            "rollout.prefix_batches",
            ("rollout.prefix_batches", "accumulation_steps", "method", "sampling.steps"),
            _prefix_fits,
        ),
        Rule("regularisation.kl_coeff", ("method", "regularisation.kl_coeff"), _one_kl),
        Rule(
            "early_stopping.diversity_share",
            ("early_stopping.diversity_share", "output.grid_size"),
            _pairs_to_compare,
        ),
        Rule("dtype", ("dtype", "device"), _no_half_on_cpu),
        Rule("rollout.merge_lora", ("rollout.merge_lora", "accelerate"), _merging_needs_operators),
        Rule("memory_budget", ("memory_budget",), _known_budget),
    )
    # Asked only before training: the config of a GPU run stays readable on any machine.
    MACHINE_RULES: ClassVar[tuple[Rule, ...]] = (
        Rule("device", ("device",), _device_is_here),
        Rule("dtype", ("dtype", "device"), _no_half_without_gpu),
        Rule("memory_budget", ("memory_budget",), _plan_is_there),
    )

    @property
    def kl_coeff(self) -> float:
        """Weight of the distance to the base model, the method's own or that of all."""
        return self.regularisation.kl_coeff or self.method.kl_weight()

    def validate(self) -> None:
        """Whether this can train on this machine. Errors: one ConfigError with every problem."""
        problems = Problems()
        _revisit(self, "", problems)
        problems.raise_if_any("TrainConfig")


def _some_reward(run: RunConfig) -> Iterable[str]:
    if not run.reward:
        yield "got an empty list; allowed: at least one reward, such as [style]."
    elif all(reward.weight == 0 for reward in run.reward):
        yield "every weight is 0, so nothing would be learnt. Give one of them a weight."


def _known_rewards(rewards: Sequence[RewardConfig]) -> Iterable[str]:
    for reward in rewards:
        if reward.name in REWARDS or reward.name.startswith("python:"):
            continue
        close = suggestion(reward.name, REWARDS)
        advice = f" Did you mean {close}?" if close else ""
        known = ", ".join(sorted(REWARDS))
        yield f"got {show(reward.name)}; allowed: {known}, or python:module:attribute.{advice}"


@dataclass(frozen=True)
class RunConfig(Settings):
    """A whole run: model, prompts, rewards and training. What a config file holds."""

    reward: tuple[RewardConfig, ...] = setting(
        help="The rewards that are trained on; their weighted sum counts."
    )
    model: ModelConfig = setting(ModelConfig(), help="The pipeline.")
    prompts: PromptsConfig = setting(PromptsConfig(), help="The prompts.")
    heldout_reward: tuple[RewardConfig, ...] = setting(
        (), help="Rewards only watched: they expose a reward that is being cheated."
    )
    train: TrainConfig = setting(TrainConfig(), help="The training.")

    RULES: ClassVar[tuple[Rule, ...]] = (Rule("reward", ("reward",), _some_reward),)
    MACHINE_RULES: ClassVar[tuple[Rule, ...]] = (
        Rule("reward", ("reward",), lambda run: _known_rewards(run.reward)),
        Rule("heldout_reward", ("heldout_reward",), lambda run: _known_rewards(run.heldout_reward)),
    )

    @classmethod
    def from_yaml(
        cls, source: str | Path, overrides: Sequence[str] = (), *, check_machine: bool = True
    ) -> RunConfig:
        """Read a config file, or YAML text, with `a.b=value` overrides laid over it.

        A text of several lines, or with a `key: value`, is YAML; anything else is a path.
        `check_machine=False` skips what only matters for training here and now: whether the device
        and the rewards exist.
        Errors: one ConfigError with every problem of the file and of the overrides.
        """
        title, text = _load_text(source)
        problems = Problems(config_io.places(cls))
        raw = config_io.apply_overrides(
            config_io.parse_yaml(text, title), overrides, config_io.default_tree(cls), problems
        )
        config: RunConfig = read_settings(cls, {} if raw is None else raw, "", problems)
        if check_machine:
            _revisit(config, "", problems)
        problems.raise_if_any(title)
        return config

    def to_yaml(self) -> str:
        """Every setting, defaults included; `from_yaml` reads back an equal config."""
        return config_io.dump_yaml(self.to_dict())

    def validate(self) -> None:
        """Whether this can train on this machine. Errors: one ConfigError with every problem."""
        problems = Problems()
        _revisit(self, "", problems)
        problems.raise_if_any("RunConfig")


def describe() -> list[tuple[str, str, str, str]]:
    """Every setting of a config file as rows (key, allowed values, default, meaning)."""
    return config_io.describe(RunConfig)


def _revisit(config: Any, path: str, problems: Problems) -> None:
    """Ask what depends on this machine; the rest was asked when the settings were built."""
    if isinstance(config, (RunConfig, TrainConfig)):
        apply_rules(config, config.MACHINE_RULES, path, problems)
    if isinstance(config, RunConfig):
        _revisit(getattr(config, "train", None), join(path, "train"), problems)


def _load_text(source: str | Path) -> tuple[str, str]:
    """(title for messages, YAML text)"""
    if isinstance(source, str):
        is_file_name = "\n" not in source and source.endswith((".yaml", ".yml"))
        if not is_file_name and ("\n" in source or ": " in source or not source.strip()):
            return "config", source
    path = Path(source)
    try:
        return str(path), path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"There is no config file {path}. `rewardprop presets` lists ready ones to copy."
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"The config file {path} is not text in UTF-8.") from None
    except OSError as error:
        raise ConfigError(f"The config file {path} cannot be read: {error.strerror}.") from None
