"""Putting a plan to work: every segment's calls go where the plan says.

Each segment's method is shadowed by an attribute of its module, which decides at every call:
without gradients, or where the plan says "keep", the method itself runs. Nothing else of the module
changes; `AppliedPlan.remove` takes the attributes away again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rewardprop_fast.errors import ConfigError
from rewardprop_fast.memory.kinds import STEP
from rewardprop_fast.memory.plan import Plan, Policy, Rules, check_rules, policy_for
from rewardprop_fast.memory.recompute import recompute
from rewardprop_fast.memory.segments import (
    Segment,
    reward_segments,
    unet_segments,
    vae_segments,
)

_MISSING = object()


class Codec(Protocol):
    """What the policy "quantise" asks for: a smaller form of a saved tensor, and the way back."""

    def encode(self, tensor: Tensor) -> Any: ...

    def decode(self, encoded: Any) -> Tensor: ...


class Offloads(Protocol):
    """Where the policies with "offload" send tensors: `offload.Offloader`."""

    def segment(self, name: str) -> AbstractContextManager[None]:
        """Inside, what autograd saves goes to host memory."""
        ...


def apply(
    plan: Plan,
    unet: nn.Module | None = None,
    vae: nn.Module | None = None,
    reward: object = None,
    *,
    offloader: Offloads | None = None,
    codec: Codec | None = None,
    verify: bool = False,
) -> AppliedPlan:
    """Let ``plan`` decide what the backward passes of these networks find, from now on.

    Accelerate the networks first. The gradient steps are told apart by what the UNet is called on:
    latents without a gradient begin a new chain, latents with one go on with it.

    Args:
        offloader: needed where the plan offloads.
        codec: needed where the plan quantises.
        verify: compare every recomputation with its first run, operation by operation; slow.

    Raises:
        ConfigError: a rule names nothing there is, or asks for what was not given; or a plan is at
            work there already.
    """
    return AppliedPlan(plan, unet, vae, reward, offloader, codec, verify)


class AppliedPlan:
    """A plan at work; see `apply`."""

    def __init__(
        self,
        plan: Plan,
        unet: nn.Module | None,
        vae: nn.Module | None,
        reward: object,
        offloader: Offloads | None,
        codec: Codec | None,
        verify: bool,
    ) -> None:
        self.plan, self.offloader, self.codec, self.verify = plan, offloader, codec, verify
        self.index = -1  # of the gradient step that runs or ran last
        parts: list[tuple[str, list[Segment], Sequence[Rules]]] = [
            ("steps", unet_segments(unet) if unet is not None else [], plan.steps),
            ("decode", vae_segments(vae) if vae is not None else [], (plan.decode,)),
            ("reward", reward_segments(reward), (plan.reward,)),
        ]
        self.runners: list[Runner] = []
        for title, segments, rules in parts:
            self._check(title, segments, rules)
            for segment in segments:
                policies = [policy_for(rule, segment.name, segment.kind) for rule in rules]
                self.runners.append(Runner(self, segment, policies))
        for runner in self.runners:
            runner.install()

    def _check(self, title: str, segments: list[Segment], rules: Sequence[Rules]) -> None:
        names, kinds = [s.name for s in segments], [s.kind for s in segments]
        asked = {policy for rule in rules for policy in rule.values()}
        for rule in rules if segments else ():
            check_rules(rule, names, kinds, f"The plan's {title!r}")
        if self.offloader is None and asked & {Policy.OFFLOAD, Policy.RECOMPUTE_OFFLOAD}:
            raise ConfigError(
                f"The plan's {title!r} offloads, but there is no offloader. Give one to `apply`, "
                "or replace its offload policies by keep or recompute."
            )
        if self.codec is None and Policy.QUANTISE in asked:
            raise ConfigError(
                f"The plan's {title!r} quantises, which needs a codec of your own: an object with "
                "encode(tensor) and decode(encoded), given to `apply`. Others: keep, recompute, "
                "offload."
            )
        for segment in segments:
            if isinstance(vars(segment.module).get(segment.method), Runner):
                raise ConfigError(f"A plan is at work in {segment.name}; remove it first.")

    def remove(self) -> None:
        """Every module is as it was before `apply`."""
        for runner in self.runners:
            runner.uninstall()
        self.runners = []

    @contextmanager
    def at(self, index: int) -> Iterator[None]:
        """Inside, the gradient step ``index`` runs, also when it is run again."""
        before, self.index = self.index, index
        try:
            yield
        finally:
            self.index = before


class Runner:
    """What stands in a module's method's place."""

    def __init__(self, applied: AppliedPlan, segment: Segment, policies: Sequence[Policy]) -> None:
        self.applied, self.segment, self.policies = applied, segment, policies
        self.is_step = segment.kind == STEP
        self.shadowed: Any = _MISSING  # a forward that was replaced before
        self.original: Callable[..., Any] | None = None

    def install(self) -> None:
        attributes = vars(self.segment.module)
        self.shadowed = attributes.get(self.segment.method, _MISSING)
        attributes[self.segment.method] = self

    def uninstall(self) -> None:
        attributes = vars(self.segment.module)
        if self.shadowed is _MISSING:
            attributes.pop(self.segment.method, None)
        else:
            attributes[self.segment.method] = self.shadowed

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.run(*args, **kwargs)
        applied = self.applied
        if self.is_step:
            latents = args[0] if args else kwargs["sample"]
            applied.index = applied.index + 1 if latents.requires_grad else 0
        index = applied.index
        policy = self.policies[max(0, min(index, len(self.policies) - 1))]
        return self.under(policy, index, args, kwargs)

    def under(self, policy: Policy, index: int, args: Any, kwargs: Any) -> Any:
        applied = self.applied
        if policy is Policy.KEEP:
            return self.run(*args, **kwargs)
        if policy is Policy.QUANTISE:
            assert applied.codec is not None
            codec = applied.codec
            with torch.autograd.graph.saved_tensors_hooks(codec.encode, codec.decode):
                return self.run(*args, **kwargs)
        with self.offloaded(policy):
            if policy is Policy.OFFLOAD:
                return self.run(*args, **kwargs)
            return recompute(
                self.run_at,
                index,
                *args,
                name=self.segment.name,
                random=self.segment.module.training,
                verify=applied.verify,
                **kwargs,
            )

    def offloaded(self, policy: Policy) -> AbstractContextManager[None]:
        if policy is Policy.RECOMPUTE:
            return nullcontext()
        assert self.applied.offloader is not None
        return self.applied.offloader.segment(self.segment.name)

    def run_at(self, index: int, *args: Any, **kwargs: Any) -> Any:
        with self.applied.at(index):
            return self.run(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        if self.shadowed is not _MISSING:
            return self.shadowed(*args, **kwargs)
        # looked up anew: `accelerate` and `restore` change the module's class
        return getattr(type(self.segment.module), self.segment.method)(
            self.segment.module, *args, **kwargs
        )
