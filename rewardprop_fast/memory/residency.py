"""Frozen weights on the device only in the phases of a step that need them.

    residency = Residency({"unet": pipe.unet, "vae": pipe.vae, "reward": reward},
                          {"sample": {"unet"}, "score": {"vae", "reward"}, "backward": {"unet"}},
                          backend, budget_bytes=6 * 2**30)
    with residency.phase("sample", then="score"):
        ...

All frozen weights lie in one slab of host memory, made once. They are copied up, in few large
pieces, and never back. Parameters keep their identity, strides and sharing: only what their
``.data`` is changes, and of a module that is away it is the copy on the host, so ``state_dict``,
optimizers and peft go on working. Trained parameters stay where they are.

A backward pass may run in another phase than the forward pass it belongs to: what autograd saved of
weights then is the device memory that is there when it is asked for, not the one that was there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from rewardprop_fast.errors import ConfigError
from rewardprop_fast.memory.scheduling.backend import (
    BACK,
    COMPUTE,
    OUT,
    Backend,
    Buffer,
    Event,
    as_bytes,
)
from rewardprop_fast.memory.scheduling.slab import rounded
from rewardprop_fast.memory.sizes import format_bytes

CHUNK_BYTES = 2**28


class ResidencyError(RuntimeError):
    """Weights are asked for while they are away."""


@dataclass(eq=False)
class _Seat:
    """A parameter or buffer, and how it lies in its chunk."""

    tensor: Tensor
    begin: int  # of its storage within the chunk, in bytes
    nbytes: int  # of its storage
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int  # within its storage, in elements
    home: torch.device
    version: int = 0  # when it came to the device

    def over(self, memory: Tensor) -> Tensor:
        """It as a view of its chunk's memory, uint8."""
        whole = self.nbytes - self.nbytes % self.dtype.itemsize
        flat = memory[self.begin : self.begin + whole].view(self.dtype)
        return flat.as_strided(self.shape, self.stride, flat.storage_offset() + self.offset)


@dataclass(eq=False)
class _Chunk:
    """Storages that come and go together, because the same modules use them."""

    owners: frozenset[str]
    offset: int  # in the slab
    nbytes: int = 0
    seats: list[_Seat] = field(default_factory=list)
    buffer: Buffer | None = None
    arrival: Event = None  # behind the copy, until the computation has waited for it
    here: bool = False  # whether the seats are on the device


class Residency:
    """Moves frozen weights by phase; until the first phase, and between phases that need them, they
    are on the host.

    Args:
        modules: by name. A module that no phase names is always away.
        phases: the names of the modules each phase needs.
        backend: the device.
        budget_bytes: of weights on the device at once, as far as coming phases are fetched early;
            None for no limit. What a phase needs is brought in any case.
        chunk_bytes: how much is copied at once, at least one storage.

    Attributes:
        bytes_up: copied to the device so far.

    Raises:
        ConfigError: a phase needs a module that is not among ``modules``.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        phases: Mapping[str, Set[str]],
        backend: Backend,
        budget_bytes: int | None = None,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        for phase, needed in phases.items():
            for name in sorted(needed - modules.keys()):
                raise ConfigError(
                    f"The phase {phase!r} needs {name!r}, which is not among the modules: "
                    f"{', '.join(modules)}."
                )
        self.phases = {name: frozenset(needed) for name, needed in phases.items()}
        self.backend, self.budget_bytes = backend, budget_bytes
        self.bytes_up = 0
        self._phase: str | None = None
        self._chunks = _chunks(_storages(modules), chunk_bytes)
        self._host = backend.host(sum(chunk.nbytes for chunk in self._chunks))
        self._by_storage: dict[int, _Chunk] = {}  # the device memory of those that are here
        with torch.no_grad():
            for chunk in self._chunks:
                self._fill(chunk)

    @contextmanager
    def phase(self, name: str, then: str | None = None, room: int | None = None) -> Iterator[None]:
        """Inside, the weights this phase needs are on the device and no others.

        They stay until another phase begins.

        Args:
            then: the phase that follows: what it needs besides is brought up meanwhile, as far as
                the budget allows.
            room: bytes on the device that may be taken for it; None is all of the budget.

        Raises:
            ConfigError: there is no such phase, or another one has not ended.
        """
        for given in (name, then):
            if given is not None and given not in self.phases:
                raise ConfigError(
                    f"There is no phase {given!r}; there are {', '.join(self.phases)}."
                )
        if self._phase is not None:
            raise ConfigError(f"The phase {name!r} begins within the phase {self._phase!r}.")
        self._phase = name
        try:
            with torch.no_grad():
                self._enter(self._needed(name))
                if then is not None:
                    self._bring(self._affordable(self._needed(then), room))
            with saved_tensors_hooks(self._pack, _unpack):
                yield
        finally:
            self._phase = None

    def leave(self) -> None:
        """All weights are away."""
        with torch.no_grad():
            self._enter([])

    def close(self) -> None:
        """All weights are where they were before, in memory of their own."""
        self.leave()
        with torch.no_grad():
            for chunk in self._chunks:
                for seats in _by_storage(chunk.seats):
                    first = seats[0]
                    memory = torch.empty(first.nbytes, dtype=torch.uint8, device=first.home)
                    memory.copy_(self._on_host(chunk)[first.begin : first.begin + first.nbytes])
                    for seat in seats:
                        seat.begin = 0
                        seat.tensor.data = seat.over(memory)
        self._chunks = []

    @property
    def resident_bytes(self) -> int:
        """Of weights on the device, or on their way there."""
        return sum(chunk.nbytes for chunk in self._chunks if chunk.buffer is not None)

    def bytes_of(self, phase: str) -> int:
        """Of the weights that a phase needs."""
        return sum(chunk.nbytes for chunk in self._needed(phase))

    # --- coming and going ---

    def _needed(self, phase: str) -> list[_Chunk]:
        return [chunk for chunk in self._chunks if chunk.owners & self.phases[phase]]

    def _on_host(self, chunk: _Chunk) -> Tensor:
        assert self._host.tensor is not None
        return self._host.tensor[chunk.offset : chunk.offset + chunk.nbytes]

    def _fill(self, chunk: _Chunk) -> None:
        """Copy the weights to the host, and let them be there."""
        memory = self._on_host(chunk)
        for seats in _by_storage(chunk.seats):
            source = as_bytes(seats[0].tensor.data)
            memory[seats[0].begin : seats[0].begin + seats[0].nbytes].copy_(source)
        self.backend.filled(self._host, chunk.offset, chunk.nbytes)
        for seat in chunk.seats:
            seat.tensor.data = seat.over(memory)

    def _enter(self, needed: Sequence[_Chunk]) -> None:
        for chunk in self._chunks:
            if chunk not in needed and chunk.buffer is not None:
                self._send_away(chunk)
        self._bring([chunk for chunk in needed if chunk.buffer is None])
        for chunk in needed:
            if not chunk.here:
                self._arrive(chunk)

    def _affordable(self, wanted: Sequence[_Chunk], room: int | None) -> list[_Chunk]:
        found, total = [], 0
        limits = [] if room is None else [room]
        if self.budget_bytes is not None:
            limits.append(self.budget_bytes - self.resident_bytes)
        for chunk in wanted:
            if chunk.buffer is None:
                total += chunk.nbytes
                if any(total > limit for limit in limits):
                    break
                found.append(chunk)
        return found

    def _bring(self, chunks: Sequence[_Chunk]) -> None:
        if not chunks:
            return
        backend = self.backend
        for chunk in chunks:
            title = f"Weights of {' and '.join(sorted(chunk.owners))}"
            chunk.buffer = backend.allocate(chunk.nbytes, title)
        # what had this memory before is queued on the computation's stream
        backend.wait(BACK, backend.record(COMPUTE))
        for chunk in chunks:
            assert chunk.buffer is not None
            backend.copy_in(self._host, chunk.offset, chunk.buffer)
            chunk.arrival = backend.record(BACK)
            self.bytes_up += chunk.nbytes

    def _arrive(self, chunk: _Chunk) -> None:
        buffer = self._arrived(chunk)
        assert buffer.tensor is not None
        self.backend.use(buffer)
        for seat in chunk.seats:
            seat.tensor.data = seat.over(buffer.tensor)
            seat.version = seat.tensor._version
        self._by_storage[buffer.tensor.untyped_storage()._cdata] = chunk
        chunk.here = True

    def _arrived(self, chunk: _Chunk) -> Buffer:
        assert chunk.buffer is not None
        if chunk.arrival is not None:
            self.backend.wait(COMPUTE, chunk.arrival)
            chunk.arrival = None
        return chunk.buffer

    def _send_away(self, chunk: _Chunk) -> None:
        buffer = self._arrived(chunk)
        if chunk.here:
            assert buffer.tensor is not None
            del self._by_storage[buffer.tensor.untyped_storage()._cdata]
            if any(seat.tensor._version != seat.version for seat in chunk.seats):
                self._keep_changes(chunk, buffer)
            memory = self._on_host(chunk)
            for seat in chunk.seats:
                seat.tensor.data = seat.over(memory)
        self.backend.drop(buffer)
        chunk.buffer, chunk.here = None, False

    def _keep_changes(self, chunk: _Chunk, buffer: Buffer) -> None:
        """Somebody wrote to weights: loaded others, or merged a LoRA into them."""
        backend = self.backend
        backend.wait(OUT, backend.record(COMPUTE))
        backend.wait(OUT, backend.record(BACK))
        backend.copy_out(buffer, self._host, chunk.offset)
        event = backend.record(OUT)
        backend.wait(COMPUTE, event)
        backend.synchronize(event)

    # --- what autograd saves ---

    def saved(self, tensor: Tensor) -> _SavedWeight | None:
        """How to remember a weight or a view of one for the backward pass; None for all others.

        `Offloader` asks this too: hooks lie within each other, and the inner ones count.
        """
        if tensor.layout != torch.strided:
            return None
        chunk = self._by_storage.get(tensor.untyped_storage()._cdata)
        return None if chunk is None else _SavedWeight(chunk, tensor)

    def _pack(self, tensor: Tensor) -> Any:
        return self.saved(tensor) or tensor


class _SavedWeight:
    """A view of a chunk, wherever the chunk is when it is looked at."""

    __slots__ = ("chunk", "dtype", "offset", "shape", "stride")

    def __init__(self, chunk: _Chunk, tensor: Tensor) -> None:
        self.chunk, self.dtype = chunk, tensor.dtype
        self.shape, self.stride = tensor.shape, tensor.stride()
        self.offset = tensor.storage_offset()

    def get(self) -> Tensor:
        """Raises ResidencyError."""
        chunk = self.chunk
        if not chunk.here or chunk.buffer is None or chunk.buffer.tensor is None:
            raise ResidencyError(
                f"The backward pass needs weights of {' and '.join(sorted(chunk.owners))} "
                f"({format_bytes(chunk.nbytes)}), which are away. Run it in a phase that needs "
                "them."
            )
        memory = chunk.buffer.tensor
        whole = memory[: memory.numel() - memory.numel() % self.dtype.itemsize].view(self.dtype)
        return whole.as_strided(self.shape, self.stride, self.offset)


def _unpack(packed: Any) -> Tensor:
    return packed.get() if isinstance(packed, _SavedWeight) else packed


def pieces_of(
    modules: Mapping[str, nn.Module], chunk_bytes: int = CHUNK_BYTES
) -> list[tuple[frozenset[str], int]]:
    """What a `Residency` of these modules moves at once: whose weights, and how many bytes."""
    return [(chunk.owners, chunk.nbytes) for chunk in _chunks(_storages(modules), chunk_bytes)]


def _storages(modules: Mapping[str, nn.Module]) -> list[tuple[frozenset[str], list[Tensor]]]:
    """Frozen storages: the names of the modules that use one, and the tensors over it."""
    tensors: dict[int, list[Tensor]] = {}
    owners: dict[int, set[str]] = {}
    seen: set[int] = set()
    trained: set[int] = set()
    for name, module in modules.items():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.layout != torch.strided or not tensor.untyped_storage().nbytes():
                continue
            address = tensor.untyped_storage()._cdata
            owners.setdefault(address, set()).add(name)
            if tensor.requires_grad:
                trained.add(address)
            if id(tensor) not in seen:
                seen.add(id(tensor))
                tensors.setdefault(address, []).append(tensor)
    return [(frozenset(owners[key]), tensors[key]) for key in tensors if key not in trained]


def _chunks(
    storages: Sequence[tuple[frozenset[str], list[Tensor]]], chunk_bytes: int
) -> list[_Chunk]:
    """In the order of the modules, each in its place of the slab."""
    by_owners: dict[frozenset[str], list[_Chunk]] = {}
    for owners, tensors in storages:
        nbytes = tensors[0].untyped_storage().nbytes()
        chunks = by_owners.setdefault(owners, [])
        if not chunks or chunks[-1].nbytes + nbytes > chunk_bytes:
            chunks.append(_Chunk(owners, 0))
        chunk = chunks[-1]
        for tensor in tensors:
            chunk.seats.append(
                _Seat(
                    tensor,
                    chunk.nbytes,
                    nbytes,
                    tensor.dtype,
                    tensor.shape,
                    tensor.stride(),
                    int(tensor.storage_offset()),
                    tensor.device,
                )
            )
        chunk.nbytes += rounded(nbytes)
    everything = [chunk for chunks in by_owners.values() for chunk in chunks]
    offset = 0
    for chunk in everything:
        chunk.offset = offset
        offset += chunk.nbytes
    return everything


def _by_storage(seats: Sequence[_Seat]) -> list[list[_Seat]]:
    found: dict[int, list[_Seat]] = {}
    for seat in seats:
        found.setdefault(seat.begin, []).append(seat)
    return list(found.values())
