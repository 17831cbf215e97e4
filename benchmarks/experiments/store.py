"""Results as CSV, a run at a time: what is there is not done again.

A run's rows are added together and the file is replaced whole, so that a command killed at any
moment leaves finished runs only.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Row = dict[str, str]


class Store:
    """A CSV file of runs.

    Args:
        path: made with its folder when the first run is added.
        key: columns that say which run a row belongs to; one of them may be a fingerprint of the
            settings, so that a run of other settings does not count as done.
        replaces: columns of the key by which a run replaces an older one.
    """

    def __init__(self, path: Path, key: tuple[str, ...], replaces: tuple[str, ...]) -> None:
        self.path, self.key, self.replaces = path, key, replaces

    def rows(self) -> list[Row]:
        """All rows, as text; none if there is no file."""
        if not self.path.is_file():
            return []
        with self.path.open(newline="") as file:
            return list(csv.DictReader(file))

    def find(self, **key: Any) -> list[Row]:
        """The rows of the run; empty if it is still to be done."""
        if set(key) != set(self.key):
            raise ValueError(f"a run of {self.path.name} has the key {self.key}, got {tuple(key)}")
        wanted = {name: text(value) for name, value in key.items()}
        return [row for row in self.rows() if all(row[n] == v for n, v in wanted.items())]

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add a finished run, in the place of one of older settings."""
        new = [{name: text(value) for name, value in row.items()} for row in rows]
        gone = {tuple(row[name] for name in self.replaces) for row in new}
        kept = [r for r in self.rows() if tuple(r[n] for n in self.replaces) not in gone]
        columns = list(dict.fromkeys(name for row in (*kept, *new) for name in row))
        out = io.StringIO()
        writer = csv.DictWriter(out, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept + new)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(out.getvalue())
        os.replace(partial, self.path)


def text(value: Any) -> str:
    """A value as it stands in the file: six digits are enough for a plot."""
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
