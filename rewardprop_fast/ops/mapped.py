"""Weights that lie in a file: pages of it that nobody reads need no memory.

safetensors maps a file instead of reading it, and diffusers takes its tensors as they are where the
dtype is the one asked for. The system brings a page when it is read, and may be asked to let go of
it; it comes back from the file when it is read again, with the same values. Linux alone is asked
(MADV_PAGEOUT, since 5.4), which keeps what somebody wrote to such pages.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache
from pathlib import Path

_MADV_PAGEOUT = 21


def lies_in_a_file(address: int, nbytes: int) -> bool:
    """Whether this memory is mapped from a file, so that `let_go` frees it."""
    if not sys.platform.startswith("linux") or nbytes < mmap.PAGESIZE:
        return False
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return False
    for line in lines:
        span, _, _, device, inode, *_ = line.split(maxsplit=5)
        begin, _, end = span.partition("-")
        if int(begin, 16) <= address and address + nbytes <= int(end, 16):
            return inode != "0" and device != "00:00"
    return False


def let_go(address: int, nbytes: int) -> bool:
    """Free the whole pages of this memory, which `lies_in_a_file`; whether the system took it."""
    begin = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (address + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    madvise = _madvise()
    if madvise is None or end <= begin:
        return False
    return bool(madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_PAGEOUT) == 0)


@cache
def _madvise() -> ctypes._NamedFuncPointer | None:
    return getattr(ctypes.CDLL(None), "madvise", None)
