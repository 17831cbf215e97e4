"""Copies of frozen weights in oneDNN's own layouts, made once.

The copies lie on the weight tensor itself, as an attribute, and are gone when it is. They hold as
long as the weight is what it was: the same memory, dtype and values. Writes that autograd counts
are seen by the tensor's version; those through ``.data``, which it does not count, by a sample of
the values, or, where a write might change few of them, say `drop_packs`.

The memory of a weight that lies in a model's file is given back once a copy is made (`ops.mapped`):
it is read no more, but for the sample, which is then taken from its beginning alone.

Copies for the forward pass are read at every step of every chain and stay. The input gradient of a
large weight is needed once for each step with gradients: its copy is made for the first of them and
dropped, made for the second and kept, until the forward pass comes round again. So a chain with one
such step, DRaFT-1's, does not hold a second copy of its convolutions. Nor does a gauge that looks
at other images in between make a large weight keep a copy for these.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from rewardprop_fast.ops import mapped

_ATTRIBUTE = "_rewardprop_packs"

#: Values of the weight that are compared at every use: a few microseconds.
_SAMPLES = 256

#: Weights of so many bytes are large: SD 1.5's convolutions from 640 channels on.
_LARGE = 4 * 2**20

#: Copies of one name that a small weight keeps: for a batch of another size now and then.
_MOST_IMAGES = 2


#: What a copy is for: the operation and its settings.
Name = tuple[Any, ...]
#: The image that its layout is made for; () where it is one for all.
Image = tuple[int, ...]


class Packs:
    """The packed copies of one weight, each made when it is first asked for."""

    def __init__(self, weight: Tensor) -> None:
        self._storage = weakref.ref(weight.untyped_storage())
        self._version = weight._version
        self._look = (weight.dtype, tuple(weight.shape), weight.stride(), weight.storage_offset())
        self._span = (weight.data_ptr(), weight.nbytes)
        self._in_file = weight.device.type == "cpu" and mapped.lies_in_a_file(*self._span)
        self._sample = _sample(weight, self._in_file).clone()
        self._large = weight.nbytes >= _LARGE
        self._made: dict[Name, dict[Image, Tensor]] = {}
        self._of_gradients: dict[Name, dict[Image, Tensor]] = {}
        self._strangers: dict[Name, Image] = {}

    def hold_for(self, weight: Tensor) -> bool:
        """Whether the weight is still what it was when they were made."""
        return (
            self._storage() is weight.untyped_storage()
            and self._version == weight._version
            and self._look
            == (weight.dtype, tuple(weight.shape), weight.stride(), weight.storage_offset())
            and torch.equal(self._sample, _sample(weight, self._in_file))
        )

    def kept(self, name: Name, image: Image, make: Callable[[], Tensor]) -> Tensor:
        """The copy of this name for images of this shape, made now if it is not there.

        A large weight keeps one alone: that of the first images, until others come twice in a row.
        """
        if not self._large:
            return self._get(self._made, name, image, make)
        self.drop_passing()
        found = self._made.get(name, {})
        stranger = bool(found) and image not in found
        if stranger and self._strangers.get(name) != image:
            self._strangers[name] = image
            return self._make(make)
        self._strangers.pop(name, None)
        if stranger:
            found.clear()
        return self._get(self._made, name, image, make)

    def kept_if_repeated(self, name: Name, image: Image, make: Callable[[], Tensor]) -> Tensor:
        """Likewise, but a large weight's first one since `kept` was called is for one use alone."""
        if not self._large:
            return self._get(self._made, name, image, make)
        if name in self._of_gradients:
            return self._get(self._of_gradients, name, image, make)
        self._of_gradients[name] = {}
        return self._make(make)

    def _get(
        self,
        made: dict[Name, dict[Image, Tensor]],
        name: Name,
        image: Image,
        make: Callable[[], Tensor],
    ) -> Tensor:
        of_images = made.setdefault(name, {})
        packed = of_images.pop(image, None)
        if packed is None:
            packed = self._make(make)
        of_images[image] = packed  # the last is the one that was used last
        if len(of_images) > _MOST_IMAGES:
            del of_images[next(iter(of_images))]
        return packed

    def _make(self, make: Callable[[], Tensor]) -> Tensor:
        packed = make()
        self.let_go()
        return packed

    def let_go(self) -> None:
        """Give the weight's own memory back, where a file has what is in it."""
        if self._in_file and self._made:
            mapped.let_go(*self._span)

    def nbytes(self, *, passing: bool = False) -> int:
        """What they take, padding included; ``passing``: of those kept while gradients repeat."""
        return sum(
            torch.ops.mkldnn._nbytes(packed)
            for made in ((self._of_gradients,) if passing else (self._made, self._of_gradients))
            for of_images in made.values()
            for packed in of_images.values()
        )

    def drop_passing(self) -> None:
        """Free the copies that are kept while gradients repeat."""
        self._of_gradients.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        # A tensor is pickled and copied with its attributes; these are made anew when needed.
        return _nothing, ()


def _nothing() -> None:
    return None


def why_not(weight: Tensor) -> str | None:
    """None where this weight can carry packed copies, otherwise why it cannot."""
    if weight.is_inference():
        return "the weight was made in inference mode, where changes to it are not counted"
    if not (weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)):
        return "the weight is a strided view"
    return None


def packs_of(weight: Tensor) -> Packs:
    """The weight's own, new where there are none or the weight has changed."""
    packs: Packs | None = getattr(weight, _ATTRIBUTE, None)
    if packs is None or not packs.hold_for(weight):
        packs = Packs(weight)
        setattr(weight, _ATTRIBUTE, packs)
    return packs


def most_packed_bytes(weight: Tensor, gradient_steps: int) -> int:
    """What copies of a convolution's weight take at most, in a chain of so many with gradients."""
    passing = weight.nbytes >= _LARGE and gradient_steps < 2
    return weight.nbytes * (1 if passing else 2)


def let_go(weight: Tensor) -> None:
    """Give back the memory of a weight in a file that has just been read beside its copies."""
    packs: Packs | None = getattr(weight, _ATTRIBUTE, None)
    if packs is not None:
        packs.let_go()


def packed_bytes(of: nn.Module | Iterable[Tensor], *, passing: bool = False) -> int:
    """Bytes of all packed copies of these weights, or this module's; on top of their own.

    Args:
        passing: of those alone that large weights keep from one gradient to the next, and drop when
            the forward pass comes round.
    """
    return sum(packs.nbytes(passing=passing) for packs in _all(of))


def drop_packs(of: nn.Module | Iterable[Tensor], *, passing: bool = False) -> None:
    """Free packed copies of these weights, all or the ``passing``; the next use makes new ones."""
    if passing:
        for packs in _all(of):
            packs.drop_passing()
        return
    for weight in _tensors(of):
        if hasattr(weight, _ATTRIBUTE):
            delattr(weight, _ATTRIBUTE)


def _all(of: nn.Module | Iterable[Tensor]) -> Iterable[Packs]:
    found = (getattr(weight, _ATTRIBUTE, None) for weight in _tensors(of))
    return [packs for packs in found if packs is not None]


def _tensors(of: nn.Module | Iterable[Tensor]) -> Iterable[Tensor]:
    return of.parameters() if isinstance(of, nn.Module) else of


def _sample(weight: Tensor, at_the_beginning: bool) -> Tensor:
    """Bits of values spread over the weight's memory, a view; bits, since NaN equals nothing."""
    count = min(weight.numel(), _SAMPLES)
    step = 1 if at_the_beginning else weight.numel() // count
    bits = torch.int16 if weight.dtype.itemsize == 2 else torch.int32
    values = weight.detach().as_strided((count,), (step,))
    return values.view(bits)
