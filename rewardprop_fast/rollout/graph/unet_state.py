"""What a captured step takes for granted about the UNet: where its weights are, how it is set.

Weights may change in place, as optimizers change them. Where they lie may not, nor which modules
there are, nor what Python decides by: adapters that are on, their scales, training mode.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

#: Whose modules do the same at every call, as far as Python goes.
_KNOWN = ("torch", "diffusers", "peft", "rewardprop_fast")

#: Attributes that modules decide by: all that are one of these, and of peft's layers some others.
_PLAIN = frozenset((bool, int, float, str))
_CONTAINERS = ("_active_adapter", "merged_adapters", "scaling")
_MERGED = "_rewardprop_merged"  # of `nn.merged_lora`, beside an adapter

#: Half of the modules only hold modules, and are never called.
_SHELVES = frozenset((nn.ModuleList, nn.ModuleDict, nn.ParameterDict))


@dataclass(frozen=True, eq=False)
class UNetState:
    """A UNet as it was when it was looked at.

    Attributes:
        reason: None where replaying would do all that calling does, otherwise why it would not.
        modules: their names.
        tensors: parameters and buffers.
        addresses: where they were.
        settings: what else decides what is computed.
    """

    reason: str | None
    modules: Mapping[nn.Module, str]
    tensors: tuple[Tensor, ...]
    addresses: tuple[int, ...]
    settings: tuple[Any, ...]

    @classmethod
    def of(cls, unet: Any) -> UNetState:
        """Look at all of it: some milliseconds for the largest models, so once a chain."""
        # here, not above: reading a config imports this file and should not wait for diffusers
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        from rewardprop_fast.nn.legality import has_hooks

        if not isinstance(unet, UNet2DConditionModel):
            name = type(unet).__name__
            reason = f"the UNet is a {name}, which may do other things at every call"
            return cls(reason, {}, (), (), ())
        modules: dict[nn.Module, str] = {}
        tensors: list[Tensor] = []
        settings: list[Any] = []
        found: str | None = None
        waiting: list[tuple[str, nn.Module]] = [("", unet)]
        while waiting:
            path, module = waiting.pop()
            if module in modules:
                continue
            modules[module] = path or "the UNet"
            own = vars(module)
            settings.append(module)
            if type(module) not in _SHELVES:
                found = found or _why_not(module, modules[module], has_hooks(module))
                settings += (type(module), own.get("forward"), own.get("processor"))
                settings += [value for value in own.values() if type(value) in _PLAIN]
                if "scaling" in own:
                    # in words: what is in them changes in place
                    settings += [str(own.get(name)) for name in _CONTAINERS]
                    whole = own.get(_MERGED)
                    settings += (whole, whole is not None and whole.active)
            tensors += [tensor for _, tensor in _held(module)]
            start = f"{path}." if path else ""
            waiting += [(start + name, m) for name, m in own["_modules"].items() if m is not None]
        for tensor in tensors:
            settings += (tensor.dtype, tensor.shape, tensor.stride())
        addresses = tuple(map(Tensor.data_ptr, tensors))
        return cls(found, modules, tuple(tensors), addresses, tuple(settings))

    def is_that_of(self, other: UNetState) -> bool:
        """Whether what was captured of the one is right for the other."""
        return self.addresses == other.addresses and self.settings == other.settings

    def moved(self) -> str | None:
        """The name of a tensor that is not where it was; cheap enough for every step."""
        if tuple(map(Tensor.data_ptr, self.tensors)) == self.addresses:
            return None
        pairs = zip(self.names(), self.tensors, self.addresses, strict=True)
        return next(name for name, tensor, address in pairs if tensor.data_ptr() != address)

    def names(self) -> list[str]:
        """Of the tensors."""
        found = {
            id(tensor): f"{path}.{name}".removeprefix("the UNet.")
            for module, path in self.modules.items()
            for name, tensor in _held(module)
        }
        return [found.get(id(tensor), "a tensor that is gone") for tensor in self.tensors]


def _held(module: nn.Module) -> list[tuple[str, Tensor]]:
    """What of its own it computes with, by name."""
    own = vars(module)
    held = [*own["_parameters"].items(), *own["_buffers"].items()]
    whole = own.get(_MERGED)
    if whole is not None and whole.active:
        held.append(("merged weight", whole.weight))
    return [(name, tensor) for name, tensor in held if tensor is not None]


def _why_not(module: nn.Module, where: str, hooked: bool) -> str | None:
    """None where a replay would do all that calling this module does."""
    if hooked:
        return f"{where} has a hook, which a replay would not call"
    if not _is_known(module):
        return f"{where} is a {type(module).__name__}, which is not known to be repeatable"
    own = vars(module)
    forward = own.get("forward")
    if forward is not None and not _is_known(forward):
        return f"the forward of {where} has been replaced"
    processor = own.get("processor")
    if processor is not None and not _is_known(processor):
        return f"{where} has the processor {type(processor).__name__}, which is not known"
    return None


def _is_known(part: Any) -> bool:
    """By its class: a function put in place of a forward is nobody's."""
    return type(part).__module__.partition(".")[0] in _KNOWN
