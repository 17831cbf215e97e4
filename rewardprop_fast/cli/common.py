"""From a config's name on the command line to a trainer, shared by the verbs that run a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from rewardprop_fast import presets
from rewardprop_fast.cli.parsing import choices
from rewardprop_fast.cli.quiet import without_loading_bars
from rewardprop_fast.errors import ConfigError, ExportError, ModelError, RewardError
from rewardprop_fast.training import run_files

if TYPE_CHECKING:
    from rewardprop_fast.rewards import Reward
    from rewardprop_fast.training.config import RewardConfig, RunConfig, SamplingConfig
    from rewardprop_fast.training.trainer import RewardPropTrainer


def config_file(source: str) -> Path:
    """The YAML file that is meant by a path, a run's folder or a preset's name.

    Errors: ConfigError that names the presets.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if (path / run_files.CONFIG).is_file():
        return path / run_files.CONFIG
    if source in presets.names():
        return presets.path(source)
    if path.is_dir():
        raise ConfigError(
            f"{path} is a folder without a {run_files.CONFIG}; give a run or a config."
        )
    missing = "" if path.suffix in (".yaml", ".yml") else " or preset"
    raise ConfigError(
        f"There is no config file{missing} {source}. Presets: "
        f"{choices(path.stem, presets.names()).partition('allowed: ')[2]} "
        "`rewardprop presets copy NAME` makes one yours."
    )


def read_config(source: str, overrides: Sequence[str]) -> RunConfig:
    """The resolved config. Errors: one ConfigError with everything that is wrong."""
    path = config_file(source)
    from rewardprop_fast.training.config import RunConfig

    return RunConfig.from_yaml(path, overrides)


def enclosing_run(path: Path) -> RunConfig | None:
    """The config of the run that `path` lies in (as its folder, lora or a checkpoint), if any."""
    from rewardprop_fast.training.config import RunConfig

    # RUN, RUN/lora, RUN/lora/file, RUN/checkpoints/step_000100
    for folder in (path, *list(path.absolute().parents)[:2]):
        if (folder / run_files.CONFIG).is_file():
            try:
                return RunConfig.from_yaml(folder / run_files.CONFIG, check_machine=False)
            except ConfigError:
                return None  # of a run from Python, which holds no model, or of another program
    return None


def sampling_of(path: Path, run: RunConfig | None) -> SamplingConfig | None:
    """How the LoRA at `path` was sampled while it was trained: its run knows, or its header."""
    from rewardprop_fast.training import lora_header

    if run is not None:
        return run.train.sampling
    try:
        return lora_header.sampling_of(path)
    except ExportError:
        return None  # what is wrong with the file is said by whoever reads the LoRA itself


@contextmanager
def loading(console: Console, what: str) -> Iterator[None]:
    """Say what is going on: a spinner in a terminal, nothing in a log."""
    if console.is_terminal:
        with console.status(what):
            yield
    else:
        yield


def build_trainer(config: RunConfig) -> RewardPropTrainer:
    """Everything a run needs, loaded and checked; nothing is written yet.

    Errors: one ConfigError for all that is wrong with prompts and rewards; ModelError.
    """
    from rewardprop_fast.models.load import load_pipeline, locate

    model = config.model
    # first, since it is known before diffusers is imported
    locate(model.path, revision=model.revision, local_files_only=model.local_files_only)
    from rewardprop_fast.training.precision import resolve_device, resolve_dtype
    from rewardprop_fast.training.prompts import load_prompts
    from rewardprop_fast.training.trainer import RewardPropTrainer

    without_loading_bars()
    chosen = config.prompts.list or config.prompts.source
    problems: list[str] = []
    parts: list[Any] = []
    makers: tuple[Callable[[], Any], ...] = (
        lambda: load_prompts(chosen),
        lambda: _reward(config.reward),
        lambda: _reward(config.heldout_reward),
    )
    for make in makers:
        try:
            parts.append(make())
        except (ConfigError, ModelError, RewardError) as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    _, reward, heldout = parts
    device = resolve_device(config.train.device)
    pipe = load_pipeline(
        model.path,
        dtype=resolve_dtype(config.train.dtype, device),
        revision=model.revision,
        variant=model.variant,
        local_files_only=model.local_files_only,
    )
    return RewardPropTrainer(
        pipe, reward, chosen, config.train, heldout_reward=heldout, run_config=config
    )


def _reward(specs: Sequence[RewardConfig]) -> Reward | None:
    from rewardprop_fast.rewards import build_all

    return (
        build_all([(spec.name, spec.weight, spec.args, spec.normalise) for spec in specs])
        if specs
        else None
    )


def holds_run(directory: Path) -> bool:
    """Whether a run has begun to write there."""
    return (directory / run_files.METRICS).exists()
