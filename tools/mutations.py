"""Deliberate faults in the operators, one at a time: a test must catch each.

    python -m tools.mutations [--list] [WORD ...]

The faults are in tests/ops/faults.toml: a swapped index, a missing scale, a wrong mask, a stale
saved tensor, for every form of every operator, forward and backward. Each goes into a copy of the
sources in build/mutations; what is compiled of the changed file is compiled anew; the tests that
are named beside the fault run, and one that passes without the fault must fail. WORDs choose faults
by what their names contain. Exit code 1 where a fault was not caught.

All of them take about half an hour on one core: forms in C++ are built for every fault.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tomllib

from tools.native_build import build

ROOT = Path(__file__).resolve().parents[1]
FAULTS = ROOT / "tests" / "ops" / "faults.toml"
COPY = ROOT / "build" / "mutations"

#: What a copy needs to run the operators' tests.
_PARTS = ("rewardprop_fast", "tests", "csrc", "benchmarks", "CMakeLists.txt", "pyproject.toml")
_NATIVE = ("csrc/cpu", "csrc/bindings", "csrc/math")

#: pytest's exit code where tests ran and some failed.
_CAUGHT = 1


@dataclass(frozen=True)
class Fault:
    """One change of one file, and the tests that it must make fail.

    Attributes:
        operator, form: which implementation is wrong; form "op" is what all of them share.
        phase: "forward" or "backward".
        kind: what is wrong, in words.
        file: from the root.
        before, after: text that stands there once, and what replaces it.
        tests: arguments of pytest.
    """

    operator: str
    form: str
    phase: str
    kind: str
    file: str
    before: str
    after: str
    tests: str

    @property
    def name(self) -> str:
        return f"{self.operator} {self.form} {self.phase}: {self.kind}"

    def put_into(self, root: Path) -> str:
        """Change the file under ``root``; returns what it was. ValueError if it does not fit."""
        path = root / self.file
        whole = path.read_text(encoding="utf-8")
        if whole.count(self.before) != 1:
            raise ValueError(
                f"{self.name}: {self.before!r} stands {whole.count(self.before)} times in "
                f"{self.file}, it must stand there once"
            )
        path.write_text(whole.replace(self.before, self.after), encoding="utf-8")
        return whole


@dataclass(frozen=True)
class Outcome:
    """What the tests made of a fault: the first that failed, or the words of pytest."""

    caught: bool
    words: str
    seconds: float


def faults(path: Path = FAULTS) -> list[Fault]:
    """The list."""
    return [Fault(**one) for one in tomllib.loads(path.read_text(encoding="utf-8"))["fault"]]


def copied(root: Path = ROOT, copy: Path = COPY) -> Path:
    """A fresh copy of the sources, and of the modules compiled from them."""
    tree = copy / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    for part in filter(lambda part: (root / part).exists(), _PARTS):
        if (root / part).is_dir():
            shutil.copytree(root / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(root / part, tree / part)
    return tree


def failing(tests: str, tree: Path) -> list[str]:
    """Tests that fail without any fault, on this machine say: of a fault they tell nothing."""
    return _failed(_pytest(tests, tree).stdout)


def run(fault: Fault, tree: Path, without: Sequence[str] = ()) -> Outcome:
    """Put the fault into ``tree``, run its tests, and take it out again.

    Args:
        without: tests that do not count.
    """
    begin = time.monotonic()
    in_native = fault.file.startswith(_NATIVE)
    module = next((tree / "rewardprop_fast").glob("_native*.so"), None) if in_native else None
    right = module.read_bytes() if module else None
    whole = fault.put_into(tree)
    try:
        if module:
            shutil.copyfile(build(tree, tree.parent / "native"), module)
        caught, words = _tested(fault, tree, without)
    finally:
        (tree / fault.file).write_text(whole, encoding="utf-8")
        if module and right is not None:
            module.write_bytes(right)
    return Outcome(caught, words, time.monotonic() - begin)


def _tested(fault: Fault, tree: Path, without: Sequence[str]) -> tuple[bool, str]:
    said = _pytest(fault.tests, tree, "-x", *(f"--deselect={test}" for test in without))
    failed = _failed(said.stdout)
    lines = (said.stdout + said.stderr).strip().splitlines()
    return said.returncode == _CAUGHT, failed[0] if failed else lines[-1] if lines else ""


def _pytest(tests: str, tree: Path, *more: str) -> subprocess.CompletedProcess[str]:
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:randomly", *more]
    return subprocess.run(
        [sys.executable, "-B", "-m", "pytest", *options, *shlex.split(tests)],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def _failed(output: str) -> list[str]:
    return re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)


def chosen(words: Iterable[str]) -> list[Fault]:
    return [fault for fault in faults() if all(word in fault.name for word in words)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="WORD")
    parser.add_argument("--list", action="store_true", help="name the faults, run nothing")
    arguments = parser.parse_args()
    wanted = chosen(arguments.words)
    if arguments.list:
        print(*(fault.name for fault in wanted), sep="\n")
        return 0
    tree = copied()
    survived = []
    without: dict[str, list[str]] = {}
    for number, fault in enumerate(wanted, 1):
        if fault.tests not in without:
            without[fault.tests] = failing(fault.tests, tree)
            for test in without[fault.tests]:
                print(f"fails without a fault, and does not count: {test}", flush=True)
        outcome = run(fault, tree, without[fault.tests])
        verdict = "caught" if outcome.caught else "NOT CAUGHT"
        print(f"[{number}/{len(wanted)}] {verdict} {fault.name} ({outcome.seconds:.0f} s)")
        print(f"    {outcome.words}", flush=True)
        if not outcome.caught:
            survived.append(fault.name)
    print(f"{len(wanted) - len(survived)} of {len(wanted)} faults caught")
    return 1 if survived else 0


if __name__ == "__main__":
    raise SystemExit(main())
