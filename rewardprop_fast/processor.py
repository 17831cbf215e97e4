"""What /proc/cpuinfo says of this machine's processor."""

from __future__ import annotations

import re
from pathlib import Path

_BF16 = {"amx": "amx_bf16", "avx512_bf16": "avx512_bf16", "arm": "bf16"}


def name() -> str | None:
    """The model, None where it is not said."""
    return _field("model name")


def is_intel() -> bool:
    """Whether Intel made it."""
    return _field("vendor_id") == "GenuineIntel"


def bfloat16() -> str | None:
    """What multiplies bfloat16: "amx", "avx512_bf16", "arm"; None where nothing is said to."""
    flags = (_field("flags") or _field("Features") or "").split()
    return next((kind for kind, flag in _BF16.items() if flag in flags), None)


def _field(title: str) -> str | None:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(rf"^{title}\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else None
