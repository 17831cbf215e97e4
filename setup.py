"""Builds the native modules with CMake and Ninja. Everything else is in pyproject.toml.

`_native` holds the CPU's kernels, `_cuda` those in CUDA C++; it is built only where nvcc is found.
Both are optional: without a C++ compiler, Python's headers or CMake the package installs as pure
Python, runs on its PyTorch reference code, and keeps a note of what was missing that
`rewardprop doctor` shows. What goes wrong with one leaves the other alone.

    REWARDPROP_REQUIRE_NATIVE=1   a build of _native that fails is an error
    REWARDPROP_REQUIRE_CUDA=1     a build of _cuda that fails is an error, also for want of nvcc
    REWARDPROP_NO_CUDA=1          do not build _cuda
    REWARDPROP_NO_NATIVE=1        build neither
    CUDACXX=...                   the nvcc to use
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from runpy import run_path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class BuildError(Exception):
    """Why a module could not be built, in a sentence for a person."""


@dataclass(frozen=True)
class Module:
    """A compiled module: rewardprop_fast.<name>, built by the CMakeLists.txt in ``source``."""

    name: str
    source: Path
    required: str  # the environment variable that makes a failed build an error
    options: Callable[[], list[str]]  # of CMake, beside those that all take

    @property
    def full_name(self) -> str:
        return f"rewardprop_fast.{self.name}"

    @property
    def note(self) -> str:
        """Lies where the module would; read by rewardprop_fast/ops/compiled.py."""
        return f"{self.name}_missing.txt"


class CMakeBuild(build_ext):
    def run(self) -> None:
        super().run()
        if self.inplace:
            # Editable installs build elsewhere, and setuptools copies back only the modules.
            for ext in self.extensions:
                note = MODULES[ext.name].note
                self._leave_note(self._note_path(note), ROOT / "rewardprop_fast" / note)

    def build_extension(self, ext: Extension) -> None:
        module = MODULES[ext.name]
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        note = self._note_path(module.note)
        note.parent.mkdir(parents=True, exist_ok=True)
        note.unlink(missing_ok=True)
        try:
            build_with_cmake(module, target, Path(self.build_temp).resolve() / module.name)
        except BuildError as error:
            if is_set(module.required):
                raise SystemExit(
                    f"error: {ext.name} was required and could not be built: {error}"
                ) from None
            target.unlink(missing_ok=True)  # a module of an earlier build would be of other sources
            note.write_text(f"{error}\n", encoding="utf-8")
            print(
                f"\nwarning: {ext.name} was not built: {error}\n"
                "warning: the package installs without it and runs on its other implementations.\n",
                file=sys.stderr,
            )

    def _note_path(self, name: str) -> Path:
        return Path(self.build_lib).resolve() / "rewardprop_fast" / name

    @staticmethod
    def _leave_note(source: Path, target: Path) -> None:
        target.unlink(missing_ok=True)
        if source.exists():
            shutil.copyfile(source, target)


def build_with_cmake(module: Module, target: Path, build_folder: Path) -> None:
    """Configure, build, and leave the module at ``target``. Raises BuildError with the reason."""
    options = module.options()
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        raise BuildError("Python's headers are missing (on Debian: apt install python3-dev)")
    cmake, ninja = tool("cmake"), tool("ninja")
    pybind11_folder = subprocess.check_output(
        [sys.executable, "-m", "pybind11", "--cmakedir"], text=True
    ).strip()
    step(
        cmake,
        # An isolated build's tools, which CMake's cache remembers, are gone by the next build.
        "--fresh",
        "-S",
        str(module.source),
        "-B",
        str(build_folder),
        "-G",
        "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        "-DCMAKE_BUILD_TYPE=Release",
        # The interpreter that runs this file, not the newest one on the machine.
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11_folder}",
        f"-DREWARDPROP_VERSION={version()}",
        f"-DREWARDPROP_SOURCES={fingerprint(module.name)}",
        *options,
    )
    step(cmake, "--build", str(build_folder), "--parallel")
    built = next(build_folder.glob(f"{module.name}*.so"), None)
    if built is None:
        raise BuildError(f"the build ended without a module in {build_folder}")
    shutil.copyfile(built, target)


def cuda_options() -> list[str]:
    """Which nvcc, and the compiler it hands the host's part to."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    # The one asked for, or one in PATH, or where NVIDIA's installer puts it, in nobody's PATH.
    asked_for = os.environ.get("CUDACXX")
    places = [asked_for] if asked_for else ["nvcc", f"{home}/bin/nvcc"]
    nvcc = next(filter(None, map(shutil.which, places)), None)
    if nvcc is None:
        raise BuildError(f"nvcc was not found (looked for {', '.join(places)})")
    host = [f"-DCMAKE_CUDA_HOST_COMPILER={os.environ['CXX']}"] if os.environ.get("CXX") else []
    return [f"-DCMAKE_CUDA_COMPILER={nvcc}", *host]


def tool(name: str) -> str:
    """The build tool from the environment that runs this file, else from PATH."""
    places = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    found = shutil.which(name, path=places)
    if found is None:
        raise BuildError(f"{name} was not found (pip install {name})")
    return found


def step(*command: str) -> None:
    """Run one command; its output is shown, and the reason is taken from it where it fails."""
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(result.stdout, flush=True)
    if result.returncode != 0:
        raise BuildError(reason(result.stdout))


def reason(output: str) -> str:
    """The telling part of a failed build's output."""
    named = f" (CXX={os.environ['CXX']})" if os.environ.get("CXX") else ""
    if re.search("No CMAKE_CXX_COMPILER could be found|Could not find (the )?compiler", output):
        return f"no C++ compiler was found{named}; on Debian: apt install g++"
    if re.search(r'The CUDA compiler\s+"[^"]*"\s+is not able to compile', output):
        return f"nvcc cannot compile a simple program; it may not know the C++ compiler{named}"
    if "is not able to compile a simple test program" in output:
        return f"the C++ compiler{named} cannot compile a simple program"
    lines = [line.strip() for line in output.splitlines() if "error" in line.lower()]
    return lines[0] if lines else "see the build's output (pip install -v)"


def version() -> str:
    names: dict[str, str] = {}
    exec((ROOT / "rewardprop_fast" / "version.py").read_text(encoding="utf-8"), names)
    return names["__version__"]


def fingerprint(module: str) -> str:
    found = run_path(str(ROOT / "rewardprop_fast" / "ops" / "sources.py"))
    return str(found["fingerprint"](module))


def is_set(variable: str) -> bool:
    return os.environ.get(variable, "") not in ("", "0")


MODULES = {
    module.full_name: module
    for module in (
        Module("_native", ROOT, "REWARDPROP_REQUIRE_NATIVE", list),
        Module("_cuda", ROOT / "csrc" / "cuda", "REWARDPROP_REQUIRE_CUDA", cuda_options),
    )
}


def wanted() -> list[str]:
    """The modules to build, by the environment."""
    if is_set("REWARDPROP_NO_NATIVE"):
        return []
    return [name for name in MODULES if not (is_set("REWARDPROP_NO_CUDA") and "_cuda" in name)]


setup(
    ext_modules=[Extension(name, sources=[], optional=True) for name in wanted()],
    cmdclass={"build_ext": CMakeBuild},
)
