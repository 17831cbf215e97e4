"""The native build is there where it can be, and installing goes on where it cannot."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from rewardprop_fast.ops import compiled, cuda_module, native

ROOT = Path(__file__).resolve().parents[2]
COMPILER = os.environ.get("CXX") or "g++"
HEADERS = Path(sysconfig.get_paths()["include"]) / "Python.h"

needs_build_tools = pytest.mark.skipif(
    not HEADERS.exists(), reason="Python's headers are missing, which setup.py finds first"
)


@pytest.mark.skipif(
    shutil.which(COMPILER) is None or not HEADERS.exists(),
    reason="no C++ compiler or no Python headers",
)
def test_the_module_is_there_where_it_can_be_built() -> None:
    """Otherwise every native test would be skipped and nobody would notice."""
    assert native.why_missing() is None


@pytest.mark.skipif(
    shutil.which(COMPILER) is None or not HEADERS.exists() or shutil.which("nvcc") is None,
    reason="no C++ compiler, no Python headers or no nvcc",
)
def test_the_module_of_cuda_kernels_is_there_where_it_can_be_built() -> None:
    assert cuda_module.why_missing() is None


def build(
    tmp_path: Path, tree: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    folders = ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", *folders],
        cwd=tree,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@needs_build_tools
@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        (shutil.which("false") or "false", "cannot compile a simple program"),
        ("no-such-compiler", "no C++ compiler was found"),
    ],
)
def test_without_a_working_compiler_it_installs_and_leaves_a_note(
    tmp_path: Path, compiler: str, reason: str
) -> None:
    stale = tmp_path / "lib" / "rewardprop_fast"
    stale.mkdir(parents=True)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    (stale / f"_native{suffix}").write_bytes(b"of an earlier build")

    result = build(tmp_path, CXX=compiler, REWARDPROP_NO_CUDA="1")

    assert result.returncode == 0, result.stderr
    assert "warning: rewardprop_fast._native was not built" in result.stderr
    assert [file.name for file in stale.iterdir()] == ["_native_missing.txt"]
    note = (stale / "_native_missing.txt").read_text(encoding="utf-8")
    assert reason in note
    assert f"CXX={compiler}" in note


@needs_build_tools
def test_without_a_working_compiler_it_fails_where_native_is_required(tmp_path: Path) -> None:
    result = build(
        tmp_path, CXX="no-such-compiler", REWARDPROP_REQUIRE_NATIVE="1", REWARDPROP_NO_CUDA="1"
    )
    assert result.returncode != 0
    assert "was required and could not be built: no C++ compiler was found" in result.stderr


@needs_build_tools
@pytest.mark.skipif(shutil.which(COMPILER) is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    ("nvcc", "reason"),
    [
        (shutil.which("false") or "false", "nvcc cannot compile a simple program"),
        ("/no/such/nvcc", "nvcc was not found (looked for /no/such/nvcc)"),
    ],
)
def test_without_a_working_nvcc_the_other_module_is_there_all_the_same(
    tmp_path: Path, nvcc: str, reason: str
) -> None:
    """On the build files alone, with a file in place of the CPU's module, which takes its time."""
    tree = tmp_path / "tree"
    for file in ("setup.py", "pyproject.toml", "rewardprop_fast/version.py"):
        (tree / file).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / file, tree / file)
    shutil.copytree(ROOT / "csrc" / "cuda", tree / "csrc" / "cuda")
    (tree / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.24)\nproject(stand_in LANGUAGES NONE)\n"
        "file(WRITE ${CMAKE_BINARY_DIR}/_native.so built)\n",
        encoding="utf-8",
    )

    result = build(tmp_path, tree, CUDACXX=nvcc)

    assert result.returncode == 0, result.stderr
    assert "warning: rewardprop_fast._cuda was not built" in result.stderr
    folder = tmp_path / "lib" / "rewardprop_fast"
    assert reason in (folder / "_cuda_missing.txt").read_text(encoding="utf-8")
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    assert (folder / f"_native{suffix}").read_text(encoding="utf-8") == "built"

    required = build(tmp_path, tree, CUDACXX=nvcc, REWARDPROP_REQUIRE_CUDA="1")
    assert required.returncode != 0
    assert f"rewardprop_fast._cuda was required and could not be built: {reason}" in required.stderr


def test_native_can_be_left_out(tmp_path: Path) -> None:
    result = build(tmp_path, REWARDPROP_NO_NATIVE="1")
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "temp").exists()


def test_every_file_of_the_package_is_installed(tmp_path: Path) -> None:
    """Also prompts, presets, templates and the bundled model, which no import would miss."""
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=300,
    )
    installed, ours = files_of(tmp_path / "rewardprop_fast"), files_of(ROOT / "rewardprop_fast")
    assert len(ours) > 50
    assert ours - installed == set()


def files_of(folder: Path) -> set[str]:
    """Paths below ``folder``, without what Python and the native build leave there."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {
        str(p)
        for p in paths
        if "__pycache__" not in p.parts and not p.stem.startswith(("_native", "_cuda"))
    }


def test_the_note_is_the_reason_that_people_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = tmp_path / "note.txt"
    monkeypatch.setattr(native, "_NOTE", note)
    monkeypatch.setattr(compiled, "import_module", _not_found)
    without_note = native._load.__wrapped__()
    note.write_text("no C++ compiler was found\n", encoding="utf-8")
    with_note = native._load.__wrapped__()
    assert without_note == (None, "not built: installed without it, or run from a source tree")
    assert with_note == (None, "not built: no C++ compiler was found")


def test_a_module_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    class Module:
        @staticmethod
        def version() -> str:
            return "0.0.1"

    monkeypatch.setattr(compiled, "import_module", lambda _: Module)
    module, problem = native._load.__wrapped__()
    assert module is None
    assert problem is not None
    assert problem.startswith("built for version 0.0.1")


def _not_found(name: str) -> None:
    raise ModuleNotFoundError(name)
