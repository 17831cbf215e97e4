"""The files a project stands on agree with each other."""

from __future__ import annotations

import re
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from rewardprop_fast.version import __version__

ROOT = Path(__file__).resolve().parents[2]


def requirements(name: str) -> dict[str, Requirement]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(r.name): r for r in found}


def pinned_version(requirement: Requirement) -> str:
    (specifier,) = requirement.specifier
    assert specifier.operator == "=="
    return specifier.version


def quoted_requirements(key: str) -> list[Requirement]:
    """The strings of a list in pyproject.toml; tomllib is not in Python 3.10."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    body = re.search(rf"^{key} = \[(.*?)\]$", text, re.MULTILINE | re.DOTALL)
    assert body is not None, key
    return [Requirement(item) for item in re.findall(r'"([^"]+)"', body[1])]


def test_the_lock_pins_exact_versions_and_no_cuda() -> None:
    lock = requirements("requirements-dev.lock")
    for name, requirement in lock.items():
        assert pinned_version(requirement), name
        assert not name.startswith(("nvidia", "cuda", "torchvision")), name
    assert pinned_version(lock["torch"]) == "2.13.0"


def test_the_lock_holds_what_the_package_and_its_build_and_development_ask_for() -> None:
    lock = requirements("requirements-dev.lock")
    wanted = [
        *requirements("requirements-dev.in").values(),
        *quoted_requirements("dependencies"),
        *quoted_requirements("requires"),
        *quoted_requirements("dev"),
    ]
    assert len(wanted) > 40
    for requirement in wanted:
        version = pinned_version(lock[canonicalize_name(requirement.name)])
        assert requirement.specifier.contains(version), f"{requirement} is locked at {version}"


def test_the_build_does_not_ask_for_torch_nor_include_it() -> None:
    assert "torch" not in [requirement.name for requirement in quoted_requirements("requires")]
    sources = [*(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cpp")]
    assert len(sources) > 5
    for source in sources:
        includes = re.findall(r"#include\s*[<\"](.+?)[>\"]", source.read_text(encoding="utf-8"))
        assert not [name for name in includes if re.match(r"(torch|ATen|c10)/", name)], source


def test_the_version_is_a_release_number() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)
