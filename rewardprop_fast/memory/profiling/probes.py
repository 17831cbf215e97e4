"""What stands before the units' forwards, and the UNet's, and tells a run of their borders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves, tree_map

from rewardprop_fast.memory.profile import bytes_of
from rewardprop_fast.memory.profiling.notes import Call
from rewardprop_fast.memory.segments import Segment
from rewardprop_fast.nn.hoisted import Context, Moment

if TYPE_CHECKING:
    from rewardprop_fast.memory.profiling.run import Run


class Shadow:
    """Stands before a module's forward, whatever stands there already."""

    def __init__(self, run: Run, module: nn.Module) -> None:
        self.run, self.module = run, module
        self.before: Any = None

    def install(self) -> None:
        self.before = vars(self.module).get("forward")
        vars(self.module)["forward"] = self

    def uninstall(self) -> None:
        if self.before is None:
            vars(self.module).pop("forward", None)
        else:
            vars(self.module)["forward"] = self.before

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.before is None:
            return type(self.module).forward(self.module, *args, **kwargs)
        return self.before(*args, **kwargs)


class Probe(Shadow):
    """Notes a unit's borders."""

    def __init__(self, run: Run, segment: Segment, parts: list[Segment]) -> None:
        super().__init__(run, segment.module)
        self.segment, self.parts = segment, frozenset(part.kind for part in parts)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = self.run
        # without gradients also within a chain: a base model's call, a step that is passed over
        if run.phase not in ("suffix", "decode", "reward") or not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        index, step = len(run.calls), run.step if run.phase == "suffix" else 0
        mode = run.modes.get((self.segment.name, step), "keep")
        call = Call(self.segment, mode, self._signature(args, kwargs), step, self.parts)
        run.calls.append(call)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        call.inputs = bytes_of(tensors[:1])
        storages = [tensor.untyped_storage() for tensor in tensors]
        given = [(StorageWeakRef(storage), storage.nbytes()) for storage in storages]
        del storages
        # what the UNet was called on is not of one unit alone: `Profile.shared_input`
        of_all = run.steps_inputs[-1] if run.phase == "suffix" and run.steps_inputs else {}
        call.given = [(storage, nbytes) for storage, nbytes in given if storage not in of_all]
        args, kwargs = self._ended(index, args, kwargs)
        run.mark("enter", index)
        output = self.forward(*args, **kwargs)
        del args, kwargs
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        call.output = bytes_of(outputs, but=tensors)
        run.mark("exit", index)
        for leaf in outputs[:1]:
            if leaf.requires_grad:
                leaf.register_hook(lambda _: run.back(index))
        return output

    def _ended(self, index: int, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The same arguments; the first tensor says when its gradient is known: the unit's end."""
        done = False

        def mark(leaf: Any) -> Any:
            nonlocal done
            if done or not isinstance(leaf, Tensor) or not leaf.requires_grad:
                return leaf
            done = True
            leaf = leaf.view_as(leaf)
            leaf.register_hook(lambda _: self.run.mark("end", index))
            return leaf

        # Not within what a rollout has made beforehand: of that there are gradients at other times.
        made = (Context, Moment)
        return tree_map(mark, (args, kwargs), is_leaf=lambda node: isinstance(node, made))

    def _signature(self, args: Any, kwargs: Any) -> str:
        module = self.module
        weights = ",".join(str(tuple(p.shape)) for p in module.parameters())
        given = ",".join(
            f"{tuple(leaf.shape)}{leaf.dtype}{leaf.requires_grad}"
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor)
        )
        return f"{self.segment.kind} {type(module).__name__} {hash(weights)} {given}"


class StepCounter(Shadow):
    """Counts the UNet's calls with gradients."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = self.run
        if run.phase != "suffix":
            run.prefix_calls += 1
            return self.forward(*args, **kwargs)
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        storages = [tensor.untyped_storage() for tensor in tensors]
        run.steps_inputs.append({StorageWeakRef(one): one.nbytes() for one in storages})
        del tensors, storages
        run.mark("call", -1)
        output = self.forward(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        run.step_output = bytes_of(outputs)
        del outputs
        run.mark("step", -1)
        return output
