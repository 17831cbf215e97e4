"""Run tests on CPU kernels built with AddressSanitizer and UndefinedBehaviorSanitizer.

    python -m tools.sanitize [arguments of pytest]

The module is built into build/sanitize and taken in place of rewardprop_fast._native by the tests'
process and all that it starts; the installed one stays as it is. Without arguments the operators'
tests run that this module has a part in.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tools.native_build import build

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "sanitize"
COMPILER = os.environ.get("CXX") or "g++"

#: Triton's interpreter and torch's compiler take their time and use no kernel of the module; the
#: emulated CUDA kernels have their own sanitizers (tests/ops/test_emulation.py).
TESTS = [
    "tests/ops",
    "--ignore=tests/ops/test_emulation.py",
    "-k",
    "not triton and not cuda and not test_compiles_into_one_graph",
]

# Python imports this module by itself when it starts. It loads nothing before that is asked for:
# torch goes first.
SITE = """
import importlib.abc, importlib.util, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "rewardprop_fast._native":
            return importlib.util.spec_from_file_location(name, {module!r})

sys.meta_path.insert(0, Finder())
"""


def main(arguments: list[str]) -> int:
    """The exit status of pytest."""
    module = build(ROOT, BUILD, "-DREWARDPROP_SANITIZE=ON")
    site = BUILD / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(SITE.format(module=str(module)), encoding="utf-8")
    environment = {
        **os.environ,
        # libstdc++ beside it: otherwise the sanitizer does not find what throws exceptions.
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so')}",
        # Python keeps memory until its end, which is no leak of ours.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join(
            filter(None, [str(site), str(ROOT), os.environ.get("PYTHONPATH")])
        ),
    }
    used = "import rewardprop_fast.ops.native as n; print(n.module().__file__)"
    found = subprocess.run(
        [sys.executable, "-c", used], env=environment, check=True, capture_output=True, text=True
    )
    if found.stdout.strip() != str(module):
        raise SystemExit(f"error: {found.stdout.strip()} is used, not {module}")
    # Only Python's output is captured: a sanitizer ends the process, and its words must be seen.
    options = ["-p", "no:cacheprovider", "--capture=sys"]
    command = [sys.executable, "-m", "pytest", *options, *(arguments or TESTS)]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


def library(name: str) -> str:
    """The path of one of the compiler's libraries."""
    result = subprocess.run(
        [COMPILER, f"-print-file-name={name}"], check=True, capture_output=True, text=True
    )
    return result.stdout.strip()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
