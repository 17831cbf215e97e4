"""The command `rewardprop`: one file per verb, and nothing heavy imported before it is needed."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rewardprop_fast.cli import (
    convert_reward,
    doctor,
    export,
    mix,
    plan,
    presets,
    quickstart,
    sample,
    settings,
    train,
)
from rewardprop_fast.cli.guard import USAGE, guarded
from rewardprop_fast.cli.parsing import Parser, overrides_of
from rewardprop_fast.cli.threads import wait_asleep
from rewardprop_fast.version import __version__

_VERBS = (quickstart, plan, train, sample, export, mix, convert_reward, presets, settings, doctor)

_DESCRIPTION = """\
Fine-tune a diffusion model towards a reward, by back-propagating the reward
through the sampler. What comes out is a LoRA for diffusers, ComfyUI and A1111."""

_EPILOG = """\
first steps:
  rewardprop quickstart                  minutes on any machine, no downloads
  rewardprop presets copy draft-small    a config for Stable Diffusion to change
  rewardprop train draft-small.yaml      train with it
  rewardprop sample --lora runs/draft-small --compare \\
      --prompts "a fox" --output fox.png

`rewardprop VERB --help` explains a verb. Exit codes: 0 done; 1 failed; 2 wrong
command line or config; 130, 143 stopped by Ctrl-C, SIGTERM (training: saved)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: this process's own) and return its exit code."""
    wait_asleep()
    return guarded(lambda traceback: _run(argv, traceback))


def _run(argv: Sequence[str] | None, traceback: list[bool]) -> int:
    parser = _parser()
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        parser.print_help(sys.stderr)
        return USAGE
    args, rest = parser.parse_known_args(argv)
    traceback[0] = args.traceback
    overrides_of(args, rest)
    code: int = args.run(args)
    return code


def _parser() -> Parser:
    parser = Parser(prog="rewardprop", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("--version", action="version", version=f"rewardprop {__version__}")
    parser.add_traceback(default=False)
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True, dest="verb")
    for verb in _VERBS:
        verb.add_to(verbs)
    return parser


__all__ = ["main"]
