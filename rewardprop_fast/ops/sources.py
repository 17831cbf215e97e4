"""What the compiled modules are made of, as one number: by it a build of other sources is known.

setup.py runs this file by itself, so that it imports nothing of the package.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]

_PARTS = {
    "_native": ("CMakeLists.txt", "csrc/bindings", "csrc/cpu", "csrc/math"),
    "_cuda": ("csrc/cuda", "csrc/bindings/arrays.h", "csrc/math"),
}


def fingerprint(module: str, root: Path = _ROOT) -> str | None:
    """Of the sources of ``module``; None where they are not here, as in an installed package."""
    files = sorted(_files(module, root))
    if not files:
        return None
    digest = hashlib.sha256()
    for path in files:
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def _files(module: str, root: Path) -> Iterator[Path]:
    if not (root / "csrc").is_dir():
        return
    for part in _PARTS[module]:
        yield from filter(Path.is_file, (root / part, *(root / part).rglob("*")))
