"""`rewardprop plan`: whether a training step fits, how, and what that costs, before a run."""

from __future__ import annotations

import sys
from argparse import BooleanOptionalAction, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewardprop_fast.cli.guard import RunError
from rewardprop_fast.cli.parsing import add_verb, choices
from rewardprop_fast.errors import ConfigError

if TYPE_CHECKING:
    from rewardprop_fast.cli.plan_question import Question

_MORE = """\
The step runs on tensors without memory: no weights, no GPU, about a minute.
Bytes are those of the real step; times are modelled from the card's data."""

_EPILOG = """\
examples:
  rewardprop plan --model sdxl --card rtx3090
  rewardprop plan --model sdxl --k 5 --budget 12GiB --offload
  rewardprop plan --model sd15 --k all --budget none --plot step.svg
  rewardprop plan --config my.yaml --budget 10GiB --output plan.json

Without --budget it is the card's memory less 1.5 GiB for the driver's context,
workspaces and fragmentation. The plan file is what the trainer's memory_budget
and rpf.accelerate(pipe, plan=...) read."""

_METHODS = ("draft", "draft_lv", "draft_plus", "alignprop", "refl", "drtune", "srpo", "ddpo")
_REWARDS = (
    *("clip-h", "clip-l", "pickscore", "hps", "clip_score", "aesthetic", "image_reward"),
    *("detection", "none"),
)
_PLOTS = (".png", ".svg", ".pdf")


def add_to(verbs: Any) -> None:
    """Add the verb."""
    parser = add_verb(
        verbs,
        "plan",
        "say whether a training step fits into memory, and how",
        run,
        more=_MORE,
        epilog=_EPILOG,
    )
    add = parser.add_argument
    add("--model", help="sdxl, sd15, bundled, a pipeline's folder or hub name (default: bundled)")
    add("--height", type=int, metavar="PIXELS", help="default: the model's own size")
    add("--width", type=int, metavar="PIXELS", help="default: the model's own size")
    add(
        "--method",
        choices=_METHODS,
        metavar="METHOD",
        help=f"{', '.join(_METHODS)} (default: draft)",
    )
    add("--k", metavar="K", help="steps with gradients, at most; a number or all (default: 1)")
    add("--steps", type=int, metavar="T", help="sampling steps (default: 50)")
    add("--guidance", type=float, metavar="W", help="guidance; 1 is without (default: 7.5)")
    add("--batch", type=int, metavar="N", help="images drawn at once (default: 1)")
    add("--rank", type=int, metavar="R", help="of the LoRA (default: 16)")
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="default: bfloat16")
    add(
        "--reward",
        choices=_REWARDS,
        metavar="REWARD",
        help=f"its size: {', '.join(_REWARDS)} (default: clip-h)",
    )
    add("--config", metavar="FILE", help="a config's settings and rewards instead of the defaults")
    add("--card", default="rtx3090", metavar="CARD", help="whose times count (default: rtx3090)")
    add("--budget", metavar="SIZE", help="such as 24GiB, or none (default: what the card has)")
    add(
        "--offload",
        action=BooleanOptionalAction,
        default=False,
        help="block inputs may wait in host memory (default: no)",
    )
    add(
        "--residency",
        choices=("all", "phases", "auto"),
        default="auto",
        help="weights on the device all the time, by phase, or what is faster (default: auto)",
    )
    add("--exact", action="store_true", help="run the planned step as a whole also for K above 3")
    add("--json", action="store_true", help="everything as data")
    add("--output", metavar="PLAN.json", help="write the plan")
    add("--plot", metavar="FILE", help="draw the bytes over the step: .svg, .png, .pdf")


def run(args: Namespace) -> int:
    """Answer, and write what was asked for."""
    output = _writable("--output", args.output, (".json",))
    plot = _writable("--plot", args.plot, _PLOTS)
    from rewardprop_fast.cli.plan_question import read_question

    question = read_question(args)
    answer = _answer(question, args.exact)
    if output is not None:
        _write("--output", output, lambda: output.write_text(answer.plan().to_json(), "utf-8"))
    if plot is not None:
        from rewardprop_fast.training.report import memory_plot

        _write("--plot", plot, lambda: memory_plot.draw(answer.curve(), plot))
    if args.json:
        import json

        print(json.dumps(answer.facts(), indent=2))
    else:
        from rewardprop_fast.cli.plan_page import show

        show(answer, [path for path in (output, plot) if path is not None])
    return 0


def _answer(question: Question, exact: bool) -> Any:
    from rewardprop_fast.cli.plan_answer import Answer
    from rewardprop_fast.memory.planner import BudgetError
    from rewardprop_fast.training.forecast import forecast

    _say("Building the networks' shapes ...")
    dry = question.dry_run()
    try:
        found = forecast(
            dry, question.card, question.limits, question.others, exact=exact, say=_say
        )
    except BudgetError as error:
        raise RunError(f"{error}") from error
    return Answer(question, dry, found)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _writable(option: str, given: str | None, suffixes: tuple[str, ...]) -> Path | None:
    """The path, once it is known that a file can be written there. Raises ConfigError."""
    if given is None:
        return None
    path = Path(given).expanduser()
    if path.suffix.lower() not in suffixes:
        raise ConfigError(f"{option}: {choices(path.suffix or given, suffixes)}")
    if path.is_dir():
        raise ConfigError(f"{option}: {path} is a folder; give a file.")
    existed = path.exists()
    try:
        with path.open("ab"):
            pass
    except OSError as error:
        raise ConfigError(f"{option}: {path} cannot be written: {error.strerror}.") from error
    if not existed:
        path.unlink()
    return path


def _write(option: str, path: Path, write: Any) -> None:
    try:
        write()
    except OSError as error:
        raise RunError(f"{option}: {path} cannot be written: {error.strerror}.") from error
