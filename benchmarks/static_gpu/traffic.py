"""Bytes and FLOPs of a launch, counted from the kernel itself.

A few of the launch's programs run in Triton's interpreter on addresses that stand for no memory:
loads give zeros, products give zeros, and every address is noted. So the count follows the kernel's
own tiles, masks and loops, whatever the size of the tensors. Needs TRITON_INTERPRET=1 before triton
is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from benchmarks.static_gpu.devices import DEVICES
from benchmarks.static_gpu.launches import PlainLaunch, TensorArgument

#: So many programs are run to the end, and so many where those are found to differ (at the edges,
#: or because one of a row writes what all have computed). They are spread over the grid by the
#: golden ratio, so each kind weighs nearly as much as it does in the whole grid.
_WHOLE, _WHOLE_OF_UNLIKE = 3, 34

#: Of so many programs, the first in launch order, the first tiles are looked at, as far as so many
#: reads show them: some turn to a tensor only after a loop over another.
_LOOKED_AT, _READS = 132, 400

_SMALLEST_L2 = min(device.l2_bytes for device in DEVICES)

#: Each storage gets an address range of its own.
_SPAN = 1 << 44


@dataclass(frozen=True)
class Stream:
    """What one program does with one tensor, averaged over the programs that were run; bytes.

    Tensors that share memory (views of a packed input) are one stream, named after the first.
    """

    nbytes: int  # of the tensor
    read: float  # all that is asked for
    read_distinct: float  # each element once
    written: float
    #: For the first programs in launch order, which tile each reads first; empty if not looked at.
    tiles: tuple[int, ...] = ()


@dataclass(frozen=True)
class Traffic:
    """What one launch computes and moves."""

    programs: int
    flops: float  # of one program's products, padding included
    operand: str  # of products: "bfloat16" (any 16 bits), "tf32", "tf32x3", "float32", "" for none
    streams: dict[str, Stream]


def traffic(launch: PlainLaunch) -> Traffic:
    """Run a few programs of the launch and count."""
    traces = _traces(launch)
    storages: dict[int, str] = {}
    for name, argument in launch.arguments.items():
        if isinstance(argument, TensorArgument):
            storages.setdefault(argument.storage, name)
    reads = {n: _mean(traces, n, lambda access: access.distinct_bytes) for n in storages}
    # Others stay in L2 as a whole, or are too little to matter.
    large = {
        number
        for number, read in reads.items()
        if _nbytes(launch, number) > _SMALLEST_L2 / 2 and read > max(reads.values()) / 100
    }
    tiles = _first_tiles(launch, large)
    streams = {
        name: Stream(
            nbytes=_nbytes(launch, number),
            read=_mean(traces, number, lambda access: access.read_bytes),
            read_distinct=reads[number],
            written=_mean(traces, number, lambda access: access.written_bytes),
            tiles=tiles.get(number, ()),
        )
        for number, name in storages.items()
    }
    operand = next((trace.operand for trace in traces if trace.operand), "")
    flops = float(np.mean([trace.flops for trace in traces]))
    return Traffic(launch.programs, flops, operand, streams)


def _traces(launch: PlainLaunch) -> list[_Counter]:
    """Of programs that stand for the whole grid."""
    found: dict[int, _Counter] = {}
    for count in (_WHOLE, _WHOLE_OF_UNLIKE):
        for i in range(count):
            program = int(launch.programs * ((0.5 + 0.618034 * i) % 1))
            if program not in found:
                found[program] = _whole(launch, program)
        if len({trace.amounts for trace in found.values()}) == 1:
            break
    return list(found.values())


@dataclass
class _Access:
    """One program's accesses to one storage.

    Tiles are told apart by where they begin and end and by their size: programs read whole tiles.
    """

    read_bytes: int = 0
    tiles: dict[tuple[int, int, int], int] = field(default_factory=dict)  # bytes of each, once
    written_bytes: int = 0

    @property
    def distinct_bytes(self) -> int:
        return sum(self.tiles.values())


@dataclass
class _Counter:
    """Takes the place of the interpreter's memory and of its products."""

    accesses: dict[int, _Access] = field(default_factory=dict)
    flops: float = 0.0
    operand: str = ""
    forms: dict[tuple[int, int, int], int] = field(default_factory=dict)

    @property
    def amounts(self) -> tuple[Any, ...]:
        """What programs that do the same have in common."""
        each = ((n, a.read_bytes, a.written_bytes) for n, a in self.accesses.items())
        return (self.flops, *sorted(each))

    def load(self, pointers: Any, mask: Any, other: Any, *_: Any) -> Any:
        from triton.runtime.interpreter import TensorHandle, _get_np_dtype

        kind = pointers.get_element_ty()
        addresses = _unmasked(pointers, mask)
        if addresses.size:
            self.note_read(int(addresses[0]) // _SPAN, addresses, kind.primitive_bitwidth // 8)
        return TensorHandle(np.zeros(pointers.data.shape, dtype=_get_np_dtype(kind)), kind)

    def note_read(self, storage: int, addresses: np.ndarray, itemsize: int) -> None:
        access = self.accesses.setdefault(storage, _Access())
        access.read_bytes += addresses.size * itemsize
        begin, end = int(addresses.min()), int(addresses.max())
        tile = (begin, end, addresses.size)
        if tile not in access.tiles:
            access.tiles[tile] = itemsize * self.distinct(storage, addresses, end - begin)

    def distinct(self, storage: int, addresses: np.ndarray, span: int) -> int:
        """How many of a tile's addresses differ; the same for all tiles of one form."""
        form = (storage, addresses.size, span)
        if form not in self.forms:
            self.forms[form] = int(np.unique(addresses).size)
        return self.forms[form]

    def store(self, pointers: Any, value: Any, mask: Any, *_: Any) -> None:
        addresses = _unmasked(pointers, mask)
        if addresses.size:
            access = self.accesses.setdefault(int(addresses[0]) // _SPAN, _Access())
            size = pointers.get_element_ty().primitive_bitwidth // 8
            access.written_bytes += addresses.size * size

    def dot(self, a: Any, b: Any, d: Any, precision: Any, *_: Any) -> Any:
        from triton.runtime.interpreter import TensorHandle

        self.flops += 2.0 * d.data.size * a.data.shape[-1]
        named = str(precision).upper()
        float32 = "float32" if "IEEE" in named else "tf32x3" if "TF32X3" in named else "tf32"
        sixteen = str(a.dtype.scalar) in ("bf16", "fp16")
        self.operand = "bfloat16" if sixteen else float32
        return TensorHandle(np.zeros_like(d.data), d.dtype.scalar)


class _Enough(BaseException):  # not an Exception: the interpreter would wrap it
    """All storages that were looked for have been read from."""


@dataclass
class _Finder(_Counter):
    """Notes the first address read from each storage, and ends the program when it has all."""

    looked_for: set[int] = field(default_factory=set)
    first: dict[int, int] = field(default_factory=dict)
    reads: int = 0

    def note_read(self, storage: int, addresses: np.ndarray, itemsize: int) -> None:
        self.first.setdefault(storage, int(addresses.min()))
        self.reads += 1
        if self.looked_for <= self.first.keys() or self.reads == _READS:
            raise _Enough


def _whole(launch: PlainLaunch, program: int) -> _Counter:
    counter = _Counter()
    with _interpreter(launch, counter) as run:
        run(program)
    return counter


def _first_tiles(launch: PlainLaunch, storages: set[int]) -> dict[int, tuple[int, ...]]:
    """storage -> the number of the tile that each of the first programs reads first."""
    if not storages:
        return {}
    found: dict[int, list[int]] = {number: [] for number in storages}
    finder = _Finder(looked_for=storages)
    with _interpreter(launch, finder) as run:
        for program in range(min(launch.programs, _LOOKED_AT)):
            finder.first.clear()
            finder.reads = 0
            run(program)
            for number in storages:
                if number in finder.first:  # q, k and v of one launch have a weight each
                    found[number].append(finder.first[number])
    return {number: _numbered(addresses) for number, addresses in found.items()}


def _numbered(addresses: list[int]) -> tuple[int, ...]:
    numbers: dict[int, int] = {}
    return tuple(numbers.setdefault(address, len(numbers)) for address in addresses)


@contextmanager
def _interpreter(launch: PlainLaunch, counter: _Counter) -> Iterator[Any]:
    """A function that runs one program, by its number in launch order, under ``counter``."""
    from triton.runtime import interpreter

    kernel = launch.configuration.function()
    assert hasattr(kernel, "rewrite"), "TRITON_INTERPRET=1 must be set before triton is imported"
    function, builder = kernel.rewrite(), interpreter.interpreter_builder
    given = {
        name: interpreter._implicit_cvt(_Pointer(value) if _is_tensor(value) else value)
        for name, value in launch.arguments.items()
    }
    width, height, _ = launch.grid

    def run(program: int) -> None:
        builder.set_grid_idx(
            program % width, program // width % height, program // (width * height)
        )
        try:
            with np.errstate(all="ignore"):
                function(**given, **launch.constexprs)
        except _Enough:
            pass

    replaced = {
        "create_masked_load": counter.load,
        "create_masked_store": counter.store,
        "create_dot": counter.dot,
    }
    scope = interpreter._patch_lang(function)
    builder.set_grid_dim(*launch.grid)
    vars(builder).update(replaced)
    try:
        yield run
    finally:
        for name in replaced:
            del vars(builder)[name]
        scope.restore()


class _Pointer:
    """An argument as the interpreter asks for it: an address that stands for no memory."""

    def __init__(self, argument: TensorArgument) -> None:
        self.dtype = getattr(torch, argument.dtype)
        self._address = (argument.storage + 1) * _SPAN + argument.offset

    def data_ptr(self) -> int:
        return self._address


def _is_tensor(value: Any) -> bool:
    return isinstance(value, TensorArgument)


def _unmasked(pointers: Any, mask: Any) -> np.ndarray:
    # Address ranges begin at 1, so that a null pointer is none of them.
    shown = np.broadcast_to(mask.data, pointers.data.shape)
    found: np.ndarray = pointers.data[shown].astype(np.int64) - _SPAN
    return found


def _mean(traces: list[_Counter], storage: int, value: Any) -> float:
    return float(np.mean([value(trace.accesses.get(storage, _Access())) for trace in traces]))


def _nbytes(launch: PlainLaunch, storage: int) -> int:
    arguments = [a for a in launch.arguments.values() if _is_tensor(a) and a.storage == storage]
    begin = min(argument.offset for argument in arguments)
    return max(argument.offset + argument.nbytes for argument in arguments) - begin
