"""Weights that lie in a file: pages of it that nobody reads need no memory.

safetensors maps a file instead of reading it, and diffusers takes its tensors as they are where the
dtype is the one asked for. The system brings a page when it is read, and may be asked to let go of
it; it comes back when it is read again, with the same values, from the system's cache of the file
or from the file. Pages that somebody wrote to are this process's own and in no file: where there is
one among them, or where the system does not say (Linux does, in /proc/self/pagemap), it is asked to
write them to swap and free the others (MADV_PAGEOUT, since 5.4), which is slower, and takes
unchanged pages out of the cache too.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache
from pathlib import Path

import torch

_MADV_DONTNEED, _MADV_PAGEOUT = 4, 21
#: Of an entry of /proc/self/pagemap: the page is in memory, it is in swap, it is a file's.
_PRESENT, _SWAPPED, _OF_A_FILE = 1 << 63, 1 << 62, 1 << 61


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
    advice = _MADV_DONTNEED if _as_in_the_file(begin, end) else _MADV_PAGEOUT
    return bool(madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), advice) == 0)


def _as_in_the_file(begin: int, end: int) -> bool:
    """Whether every page that is there is the file's own; False where that is not known."""
    first, count = begin // mmap.PAGESIZE, (end - begin) // mmap.PAGESIZE
    try:
        with Path("/proc/self/pagemap").open("rb", buffering=0) as file:
            file.seek(8 * first)
            entries = torch.frombuffer(bytearray(file.read(8 * count)), dtype=torch.int64)
    except (OSError, ValueError):
        return False
    if entries.numel() != count:
        return False
    there = (entries & _signed(_PRESENT | _SWAPPED)) != 0
    return not bool((there & ((entries & _OF_A_FILE) == 0)).any())


def _signed(bits: int) -> int:
    return bits - (1 << 64) if bits >> 63 else bits


@cache
def _madvise() -> ctypes._NamedFuncPointer | None:
    return getattr(ctypes.CDLL(None), "madvise", None)
