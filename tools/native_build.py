"""The CPU's compiled module, built aside: with a sanitizer, or of sources with a fault in them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pybind11

from rewardprop_fast.ops.sources import fingerprint
from rewardprop_fast.version import __version__


def build(root: Path, folder: Path, *options: str) -> Path:
    """Build the sources under ``root`` in ``folder``; only what has changed is compiled.

    Args:
        options: for CMake.

    Returns:
        The module's file.

    Raises:
        subprocess.CalledProcessError: it does not build; the compiler has said why.
    """
    scripts = Path(sys.executable).parent
    cmake, ninja = (shutil.which(tool, path=scripts) or tool for tool in ("cmake", "ninja"))
    configure = [
        *(cmake, "-S", str(root), "-B", str(folder), "-G", "Ninja"),
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DREWARDPROP_VERSION={__version__}",
        f"-DREWARDPROP_SOURCES={fingerprint('_native', root)}",
        *options,
    ]
    subprocess.run(configure, check=True)
    subprocess.run([cmake, "--build", str(folder), "--parallel"], check=True)
    return next(folder.glob("_native*.so"))
