"""Prompt sets: named ones that ship, text files, and lists with metadata."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewardprop_fast.errors import ConfigError

FOLDER = Path(__file__).parent.parent / "prompts"

Prompt = str | tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class PromptSet:
    """Prompts and, beside each, whatever its reward needs to know."""

    prompts: tuple[str, ...]
    metadata: tuple[dict[str, Any], ...]

    def __len__(self) -> int:
        return len(self.prompts)


def names() -> list[str]:
    """The prompt sets that ship with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.txt"))


def load_prompts(source: str | Path | Sequence[Prompt]) -> PromptSet:
    """A prompt set from a shipped set's name, a .txt file (one prompt a line), or a list.

    In a file, empty lines and lines that start with `#` do not count. A list holds texts, or pairs
    of a text and a dict of metadata.

    Raises:
        ConfigError: no such set or file, no prompts, or prompts that are not texts.
    """
    if isinstance(source, (str, Path)):
        return _from_lines(_read(source), str(source))
    if isinstance(source, bytes | Mapping) or not isinstance(source, Iterable):
        raise ConfigError(
            f"prompts is {source!r}; allowed: a prompt set's name, a .txt file, or a list of texts."
        )
    prompts, metadata = [], []
    for i, entry in enumerate(source):
        text, facts = entry if isinstance(entry, tuple) and len(entry) == 2 else (entry, {})
        if not isinstance(text, str) or not isinstance(facts, dict):
            raise ConfigError(
                f"prompts[{i}] is {entry!r}; allowed: a text, or a pair of a text and a dict."
            )
        prompts.append(text)
        metadata.append(facts)
    if not prompts:
        raise ConfigError("The list of prompts is empty; give at least one.")
    return PromptSet(tuple(prompts), tuple(metadata))


def texts(prompts: Sequence[str]) -> list[str]:
    """Prompts to draw at once. Raises ConfigError unless they are a list of texts, one or more."""
    wrong = isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Iterable)
    found = [] if wrong else list(prompts)
    if not found or not all(isinstance(prompt, str) for prompt in found):
        raise ConfigError(
            f"The prompts are {prompts!r}; give a list of texts, at least one prompt, such as "
            "['a fox']."
        )
    return found


def _read(source: str | Path) -> str:
    shipped = FOLDER / f"{source}.txt"
    path = shipped if str(source) in names() else Path(source).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"prompts.source is {str(source)!r}, which is neither a prompt set "
            f"({', '.join(names())}) nor a readable text file: {error}"
        ) from error


def _from_lines(text: str, source: str) -> PromptSet:
    lines = [line.strip() for line in text.splitlines()]
    prompts = tuple(line for line in lines if line and not line.startswith("#"))
    if not prompts:
        raise ConfigError(f"The prompt file {source} holds no prompts; write one a line.")
    return PromptSet(prompts, tuple({} for _ in prompts))
