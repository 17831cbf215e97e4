"""`accelerate` and `restore`: exchanging the classes of a model's modules, and back.

A module keeps its identity: only ``module.__class__`` changes, to a subclass with another forward.
Parameters, buffers, state dict keys, hooks, peft's view of the model, copying and pickling stay as
they are, and going back is exact.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from peft.tuners.lora import layer as peft_lora
from torch import nn

from rewardprop_fast import ops
from rewardprop_fast.errors import ModelError
from rewardprop_fast.nn.layers import AbsorbedSiLU, FastGroupNormSiLU
from rewardprop_fast.nn.legality import has_hooks
from rewardprop_fast.nn.merged import drop_merged
from rewardprop_fast.nn.table import (
    ABSORPTIONS,
    ORIGINALS,
    REPLACEMENTS,
    Absorption,
    is_trained,
)

_BY_TYPE = {line.original: line for line in REPLACEMENTS}

#: The networks of a pipeline that gradients of a reward pass through.
_COMPONENTS = ("unet", "vae")


@dataclass(frozen=True)
class Report:
    """What a call of `accelerate` did.

    Attributes:
        swapped: module name -> its new class, for those exchanged by this call.
        kept: module name -> its class, for those that an earlier call exchanged.
        left: module name -> why it was left as it is, for those of a kind the table knows.
    """

    swapped: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """A line for each class and each reason, with its number of modules."""
        lines = [f"{count} x {kind}" for kind, count in _counted(self.swapped)]
        if self.kept:
            lines.append(f"{len(self.kept)} were swapped before")
        lines += [f"{count} left: {reason}" for reason, count in _counted(self.left)]
        return "\n".join(lines) or "nothing to swap"


def accelerate(model: Any) -> Report:
    """Put the fast operators into a diffusers model, in place.

    For UNets and autoencoders of Stable Diffusion 1.x, 2.x and XL, with or without peft LoRA
    layers, in any dtype, on any device, in anybody's training loop. Gradients of frozen weights are
    not computed, and activations that only they would need are not kept; modules whose weights
    require a gradient stay as they are. Call it again after adding an adapter or moving modules in:
    it picks up what is new and leaves the rest.

    Args:
        model: a pipeline, of which the UNet and the VAE are taken, or a module.

    Returns:
        What was swapped and what was left, and why.

    Raises:
        ModelError: ``model`` is neither a module nor has a UNet or VAE.
    """
    report = Report()
    for prefix, root in _roots(model):
        for name, module in root.named_modules(prefix=prefix):
            if not _is_part_of_an_adapter(name):
                _swap(name, module, report)
    return report


def restore(model: Any) -> int:
    """Undo `accelerate`: all modules are of their old classes; packed and merged weights are freed.

    Returns:
        The number of modules changed back.

    Raises:
        ModelError: as in `accelerate`.
    """
    count = 0
    for _, root in _roots(model):
        for module in root.modules():
            original = ORIGINALS.get(type(module))
            if original is not None:
                module.__class__ = original
                count += 1
        ops.drop_packs(root)
        drop_merged(root)
    return count


def _swap(name: str, module: nn.Module, report: Report) -> None:
    for absorption in ABSORPTIONS:
        if type(module) is absorption.owner:
            _absorb(name, module, absorption, report)
    if name in report.swapped or name in report.left:
        return
    if type(module) in ORIGINALS:
        report.kept[name] = type(module).__name__
        return
    kind = next((kind for kind in type(module).__mro__ if kind in _BY_TYPE), None)
    if kind is None:
        return
    replacement = _BY_TYPE[kind]
    problem = _why_not(module, kind) or replacement.why_not(module)
    if problem is not None:
        report.left[name] = f"{kind.__name__}: {problem}"
        return
    module.__class__ = replacement.fast
    report.swapped[name] = replacement.fast.__name__


def _absorb(name: str, owner: nn.Module, absorption: Absorption, report: Report) -> None:
    """The normalisation and the activation together, or neither."""
    parts: list[tuple[str, nn.Module, type[nn.Module], type[nn.Module]]] = [
        (absorption.norm, getattr(owner, absorption.norm), nn.GroupNorm, FastGroupNormSiLU),
        (absorption.activation, getattr(owner, absorption.activation), nn.SiLU, AbsorbedSiLU),
    ]
    if any(
        _why_not(part, original) is not None or has_hooks(part) or is_trained(part)
        for _, part, original, _ in parts
    ):
        return
    for attribute, part, _, fast in parts:
        part.__class__ = fast
        report.swapped[f"{name}.{attribute}" if name else attribute] = fast.__name__


def _why_not(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """None where the module does what its type's forward says."""
    if type(module) is not kind:
        return f"{type(module).__name__} is a subclass of it"
    if "forward" in vars(module):
        return "its forward has been replaced"
    return None


def _is_part_of_an_adapter(name: str) -> bool:
    """Whether it is inside one of peft's: the layer that carries it knows what to do with them."""
    return any(part in peft_lora.LoraLayer.adapter_layer_names for part in name.split("."))


def _roots(model: Any) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(model, nn.Module):
        yield "", model
        return
    found = {name: getattr(model, name, None) for name in _COMPONENTS}
    roots = {name: part for name, part in found.items() if isinstance(part, nn.Module)}
    if not roots:
        raise ModelError(
            f"{type(model).__name__} is no torch module and has no {' or '.join(_COMPONENTS)}; "
            "give a diffusers pipeline, or one of its networks."
        )
    yield from roots.items()


def _counted(names: dict[str, str]) -> list[tuple[str, int]]:
    return Counter(names.values()).most_common()
