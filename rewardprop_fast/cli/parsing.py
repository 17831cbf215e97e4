"""argparse with messages for people: near misses are named, overrides may stand anywhere."""

from __future__ import annotations

import argparse
import difflib
import re
import shutil
import sys
import textwrap
from argparse import SUPPRESS, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from rewardprop_fast.errors import ConfigError

OVERRIDES_HELP = "settings laid over the config, such as train.steps=200"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that keeps the lines of its texts and answers errors in one sentence."""

    def __init__(self, **arguments: Any) -> None:
        arguments.setdefault("formatter_class", _Formatter)
        super().__init__(allow_abbrev=False, **arguments)

    def add_traceback(self, default: Any = SUPPRESS) -> None:
        """--traceback, before the verb or after it."""
        self.add_argument(
            "--traceback",
            action="store_true",
            default=default,
            help="show where in the program an error arose (also REWARDPROP_TRACEBACK=1)",
        )

    def error(self, message: str) -> NoReturn:
        """Exit 2 with one message, which names the closest choice."""
        option = re.match(r"argument (?:-\w, ?)?(--[\w-]+): ", message)
        title = option[1] if option else ""
        if wrong := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            allowed = choices(wrong[1], re.findall(r"[\w-]+", wrong[2]))
            message = f"{title}: {allowed}" if title else allowed
        elif option and (wrong := re.search(r"invalid (int|float) value: (.*)", message)):
            kind = "a whole number" if wrong[1] == "int" else "a number"
            message = f"{title} is {wrong[2]}; allowed: {kind}"
        elif option and message.endswith("expected one argument"):
            message = f"{title} has no value; one that begins with - is written {title}=VALUE"
        end = "" if message.endswith((".", "?")) else "."
        raise ConfigError(f"{message}{end} `{self.prog} --help` explains.")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        columns = shutil.get_terminal_size().columns
        super().__init__(prog, max_help_position=26, width=min(columns, 100) - 1)

    def _format_action(self, action: argparse.Action) -> str:
        if isinstance(action, argparse._SubParsersAction):
            # the verbs themselves, without a line that says VERB above them
            return "".join(map(self._format_action, self._iter_indented_subactions(action)))
        return super()._format_action(action)


def choices(given: str, allowed: Sequence[str]) -> str:
    """What was given, what is allowed, and the closest of it."""
    close = difflib.get_close_matches(given, allowed, n=1, cutoff=0.5)
    advice = f" Did you mean {close[0]}?" if close else ""
    return f"got {given!r}; allowed: {', '.join(allowed)}.{advice}"


def add_verb(
    verbs: Any, name: str, summary: str, run: Any, *, epilog: str = "", more: str = ""
) -> Any:
    """A verb's parser. `summary` is its line in the overview, `more` goes on from there."""
    parser = verbs.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.\n\n{more}".rstrip(),
        epilog=epilog,
    )
    parser.add_traceback()
    parser.set_defaults(run=run, parser=parser)
    return parser


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """The positional `a.b=value ...`."""
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="a.b=value", help=OVERRIDES_HELP
    )


def overrides_of(args: Namespace, rest: Sequence[str]) -> None:
    """Put the overrides that argparse left over, because they follow an option, with the others.

    Errors: ConfigError for everything else that is left over.
    """
    unknown = [text for text in rest if text.startswith("-") or not hasattr(args, "overrides")]
    if unknown:
        options = [option for action in args.parser._actions for option in action.option_strings]
        close = difflib.get_close_matches(unknown[0].partition("=")[0], options, n=1)
        advice = f" Did you mean {close[0]}?" if close else ""
        args.parser.error(f"unknown argument {unknown[0]!r}.{advice}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    # `--resume train.steps=5`: argparse takes the override for the option's optional value
    resume = getattr(args, "resume", None)
    if isinstance(resume, str) and "=" in resume and not Path(resume).exists():
        args.overrides, args.resume = [resume, *args.overrides], ""


def hanging(head: str, text: str) -> str:
    """`head` and `text`, wrapped under its own beginning in a terminal; one line elsewhere."""
    if not sys.stdout.isatty():
        return head + text
    columns = min(100, shutil.get_terminal_size().columns) - 1
    return textwrap.fill(
        text, max(columns, len(head) + 20), initial_indent=head, subsequent_indent=" " * len(head)
    )
