"""Sizes in bytes as people write them."""

from __future__ import annotations

import re

#: Decimal units are the makers' and the standard's: 24 GB is 22.35 GiB.
UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}

_BY_LOWER_CASE = {name.lower(): factor for name, factor in UNITS.items()}
_WRITTEN = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]+)\s*", re.IGNORECASE)


def parse_bytes(size: int | str) -> int:
    """Bytes of "24GiB", "23.5 GiB", "24GB" (24 * 10^9) or of a whole number of bytes.

    Upper and lower case are alike; what is no whole number of bytes is rounded down.

    Raises:
        ValueError: anything else, a negative number included.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    found = _WRITTEN.fullmatch(size) if isinstance(size, str) else None
    factor = _BY_LOWER_CASE.get(found[2].lower()) if found else None
    if found is None or factor is None:
        raise ValueError(
            f"{size!r} is no size; write a number and a unit, such as '24GiB', '23.5 GiB' or "
            f"'24GB' (10^9 bytes), or a whole number of bytes. Units: {', '.join(UNITS)}."
        )
    whole, _, fraction = found[1].partition(".")
    # In whole numbers: a float has no 2^53 + 1.
    return int(whole or 0) * factor + int(fraction or 0) * factor // 10 ** len(fraction)


def format_bytes(nbytes: int, *, up: bool = False) -> str:
    """ "23.50 GiB": in the largest binary unit that the size reaches; whole bytes below 1 KiB.

    Args:
        up: never below ``nbytes``, for what is to be asked for.
    """
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if abs(nbytes) >= UNITS[unit]:
            hundredths = -(-nbytes * 100 // UNITS[unit]) if up else nbytes * 100 / UNITS[unit]
            return f"{hundredths / 100:.2f} {unit}"
    return f"{nbytes} B"
