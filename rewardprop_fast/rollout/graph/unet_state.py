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
_PLAIN = (bool, int, float, str)
_SETTINGS = ("forward", "processor", "_active_adapter", "merged_adapters", "scaling")


@dataclass(frozen=True, eq=False)
class UNetState:
    """A UNet as it was when it was looked at.

    Attributes:
        modules: their names.
        names: of the tensors.
        tensors: parameters and buffers.
        addresses: where they were.
        settings: what else decides what is computed.
    """

    modules: Mapping[nn.Module, str]
    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    addresses: tuple[int, ...]
    settings: tuple[Any, ...]

    @classmethod
    def of(cls, unet: nn.Module) -> UNetState:
        """Look at all of it: some milliseconds for the largest models, so once a chain."""
        modules: dict[nn.Module, str] = {}
        names: list[str] = []
        tensors: list[Tensor] = []
        settings: list[Any] = []
        for path, module in unet.named_modules():
            own, modules[module] = vars(module), path or "the UNet"
            settings += (module, type(module))
            settings += (value for value in own.values() if type(value) in _PLAIN)
            for name in _SETTINGS:
                value = own.get(name)
                # a copy: what is in it changes in place
                settings.append(str(value) if isinstance(value, dict | list) else value)
            whole = own.get("_rewardprop_merged")  # of `nn.merged_lora`
            settings += (whole, whole is not None and whole.active)
            held = [*own["_parameters"].items(), *own["_buffers"].items()]
            if whole is not None and whole.active:
                held.append(("merged weight", whole.weight))
            for name, tensor in held:
                if tensor is not None:
                    names.append(f"{path}.{name}" if path else name)
                    tensors.append(tensor)
                    settings += (tensor.dtype, tensor.shape, tensor.stride())
        addresses = tuple(map(Tensor.data_ptr, tensors))
        return cls(modules, tuple(names), tuple(tensors), addresses, tuple(settings))

    def is_that_of(self, other: UNetState) -> bool:
        """Whether what was captured of the one is right for the other."""
        return self.addresses == other.addresses and self.settings == other.settings

    def moved(self) -> str | None:
        """The name of a tensor that is not where it was; cheap enough for every step."""
        if tuple(map(Tensor.data_ptr, self.tensors)) == self.addresses:
            return None
        pairs = zip(self.names, self.tensors, self.addresses, strict=True)
        return next(name for name, tensor, address in pairs if tensor.data_ptr() != address)


def why_not(unet: Any) -> str | None:
    """None where replaying would do all that calling does, otherwise the reason it would not."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    from rewardprop_fast.nn.legality import has_hooks

    if not isinstance(unet, UNet2DConditionModel):
        return f"the UNet is a {type(unet).__name__}, which may do other things at every call"
    for path, module in unet.named_modules():
        where = path or "the UNet"
        if has_hooks(module):
            return f"{where} has a hook, which a replay would not call"
        if not _is_known(module):
            return f"{where} is a {type(module).__name__}, which is not known to be repeatable"
        forward = vars(module).get("forward")
        if forward is not None and not _is_known(forward):
            return f"the forward of {where} has been replaced"
        processor = vars(module).get("processor")
        if processor is not None and not _is_known(processor):
            return f"{where} has the processor {type(processor).__name__}, which is not known"
    return None


def _is_known(part: Any) -> bool:
    """By its class: a function put in place of a forward is nobody's."""
    return type(part).__module__.partition(".")[0] in _KNOWN
