"""Whether the committed figures come from the present sources: code counts, comments do not."""

from __future__ import annotations

import hashlib
import io
import re
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

#: What regenerates the figures.
COMMAND = "python -m benchmarks.static_gpu"


def kernel_files(root: Path = ROOT) -> list[Path]:
    """Everything that holds a GPU kernel or decides how one is launched."""
    python = (root / "rewardprop_fast" / "ops").rglob("*.py")
    triton = [path for path in python if _is_triton(path)]
    native = [*(root / "csrc" / "cuda").rglob("*"), *(root / "csrc" / "math").rglob("*")]
    return sorted([*triton, *(path for path in native if path.suffix in (".cu", ".cuh", ".h"))])


def _is_triton(path: Path) -> bool:
    imports = re.search(r"^\s*import triton\b", path.read_text(encoding="utf-8"), re.MULTILINE)
    return path.name.startswith("triton") or imports is not None


def hashes(root: Path = ROOT) -> dict[str, str]:
    """Path from the root -> hash of its code."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(code(path).encode()).hexdigest()[:16]
        for path in kernel_files(root)
    }


def code(path: Path) -> str:
    """The file without comments and blank lines."""
    text = path.read_text(encoding="utf-8")
    text = _without_python_comments(text) if path.suffix == ".py" else _without_c_comments(text)
    return "\n".join(line.rstrip() for line in text.splitlines() if line.strip())


def _without_python_comments(text: str) -> str:
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return "\n".join(lines)


def _without_c_comments(text: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)


def changed(recorded: dict[str, str], root: Path = ROOT) -> list[str]:
    """Files whose code is not the one the figures were made from; new and lost ones too."""
    present = hashes(root)
    names = sorted(present.keys() | recorded.keys())
    return [name for name in names if present.get(name) != recorded.get(name)]
