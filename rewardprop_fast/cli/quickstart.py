"""`rewardprop quickstart`: the bundled model learns a drawing style, from nothing to a report."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from rewardprop_fast.cli.parsing import add_overrides, add_verb
from rewardprop_fast.errors import ConfigError
from rewardprop_fast.training import run_files

_EPILOG = """\
examples:
  rewardprop quickstart
  rewardprop quickstart --steps 20             a shorter look
  rewardprop quickstart train.method.k=2 'prompts.list=[a cat, a red car]'

An earlier run in the same folder is kept: it is renamed to quickstart-1,
quickstart-2 and so on. The config is the preset of this name, which
`rewardprop presets show quickstart` prints."""


def add_to(verbs: Any) -> None:
    """Add the verb."""
    parser = add_verb(
        verbs,
        "quickstart",
        "fine-tune the bundled model in minutes, show before and after",
        run,
        epilog=_EPILOG,
    )
    add_overrides(parser)
    parser.add_argument(
        "--directory", metavar="FOLDER", help="folder of the run (default: runs/quickstart)"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="training steps")


def run(args: Namespace) -> int:
    """Train, then print what was reached."""
    from rewardprop_fast.cli import common
    from rewardprop_fast.cli.train import train

    overrides = list(args.overrides)
    if args.directory is not None:
        # JSON quotes what YAML would read otherwise
        overrides.append(f"train.output.directory={json.dumps(args.directory)}")
    if args.steps is not None:
        overrides.append(f"train.steps={args.steps}")
    config = common.read_config("quickstart", overrides)
    return train(config, before=lambda: set_aside(Path(config.train.output.directory)))


def set_aside(directory: Path) -> str | None:
    """Rename an earlier run's folder to the next free number; says what was done, if anything.

    Errors: ConfigError for a folder that holds other things than a run.
    """
    from rewardprop_fast.cli.common import holds_run

    if not directory.is_dir() or not any(directory.iterdir()):
        return None
    if not (holds_run(directory) or (directory / run_files.CONFIG).is_file()):
        raise ConfigError(
            f"{directory} holds something that is not a run, which is left alone. Give another "
            "folder with --directory."
        )
    directory = directory.absolute()
    number = 1
    while (target := directory.with_name(f"{directory.name}-{number}")).exists():
        number += 1
    try:
        directory.rename(target)
    except OSError as error:
        raise ConfigError(
            f"The earlier run in {directory} cannot be renamed ({error.strerror}). Give another "
            "folder with --directory."
        ) from error
    return f"The earlier run is now in {_short(target)}."


def _short(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
