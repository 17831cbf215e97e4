"""The native build is there where it can be, and installing goes on where it cannot."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from rewardprop_fast.ops import compiled, cuda_module, native, sources
from rewardprop_fast.version import __version__

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
    package = ("rewardprop_fast/version.py", "rewardprop_fast/ops/sources.py")
    for file in ("setup.py", "pyproject.toml", *package):
        (tree / file).parent.mkdir(parents=True, exist_ok=True)
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


@pytest.mark.parametrize("name", ["_native", "_cuda"])
def test_a_module_of_other_sources_is_not_used(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was built before the last change of csrc, or before modules could say."""

    class Older:
        version = staticmethod(lambda: __version__)

    class Other(Older):
        sources = staticmethod(lambda: "0123456789abcdef")

    class Same(Older):
        sources = staticmethod(lambda: sources.fingerprint(name))

    found = []
    for module in (Older, Other, Same):
        monkeypatch.setattr(compiled, "import_module", lambda _, module=module: module)
        found.append(compiled.load(name, Path("no note")))
    assert found[2] == (Same, None)
    assert [module for module, _ in found[:2]] == [None, None]
    assert "from other sources (older ones) than those here" in str(found[0][1])
    assert "(0123456789abcdef)" in str(found[1][1])
    assert "python setup.py build_ext --inplace" in str(found[1][1])
    monkeypatch.setattr(compiled, "import_module", lambda _: Other)
    monkeypatch.setattr(sources, "fingerprint", lambda _: None)  # installed, without sources
    assert compiled.load(name, Path("no note")) == (Other, None)


def test_every_source_counts_for_its_module_alone(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    assert sources.fingerprint("_native", root) is None
    shutil.copy(ROOT / "CMakeLists.txt", root)
    shutil.copytree(ROOT / "csrc", root / "csrc")
    before = {name: sources.fingerprint(name, root) for name in ("_native", "_cuda")}
    assert before == {name: sources.fingerprint(name) for name in before}
    for path, changed in (
        ("csrc/cpu/isa.h", {"_native"}),
        ("csrc/bindings/geglu.cpp", {"_native"}),
        ("CMakeLists.txt", {"_native"}),
        ("csrc/cuda/geglu.cu", {"_cuda"}),
        ("csrc/math/exp.h", {"_native", "_cuda"}),
        ("csrc/bindings/arrays.h", {"_native", "_cuda"}),
    ):
        content = (root / path).read_bytes()
        (root / path).write_bytes(content + b" ")
        after = {name: sources.fingerprint(name, root) for name in before}
        assert {name for name in before if after[name] != before[name]} == changed, path
        (root / path).write_bytes(content)
    (root / "csrc/cpu/isa.h").rename(root / "csrc/cpu/other.h")
    assert sources.fingerprint("_native", root) != before["_native"]


def _not_found(name: str) -> None:
    raise ModuleNotFoundError(name)
