"""Putting a plan to work: every segment's calls go where the plan says.

A segment for which the plan has more than "keep" has its method shadowed by an attribute of its
module, which decides at every call; without gradients the method itself runs. Nothing else of the
module changes; `AppliedPlan.remove` takes the attributes away again. A copy of the module, or what
is unpickled, is under no plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rewardprop_fast.errors import ConfigError
from rewardprop_fast.memory.kinds import STEP
from rewardprop_fast.memory.plan import Plan, Policy, Rules, check_rules, policy_for
from rewardprop_fast.memory.recompute import RecomputeError, is_second_run, recompute
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
    latents without a gradient begin a new chain, latents with one go on with it. Where
    `AppliedPlan.begin` says when a chain begins, they are counted instead, which is right also
    where a method detaches the latents.

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
        self.removed = False
        self.index = -1  # of the gradient step that runs or ran last
        self.counted = False  # whether somebody says when a chain begins
        self.runners: list[Runner] = []
        if unet is not None:
            self._place("steps", unet_segments(unet), plan.steps)
        if vae is not None:
            self._place("decode", vae_segments(vae), (plan.decode,))
        if reward is not None:
            self._place("reward", reward_segments(reward), (plan.reward,))
        for runner in self.runners:
            runner.install()

    def _place(self, title: str, segments: list[Segment], rules: Sequence[Rules]) -> None:
        """Make the runners of one network, of segments that are not always kept alone."""
        self._check(title, segments, rules)
        policies = [[policy_for(rule, s.name, s.kind) for rule in rules] for s in segments]
        # Which step it is, the UNet's own runner tells the others.
        told = any(len(set(own)) > 1 for own in policies)
        for segment, own in zip(segments, policies, strict=True):
            if set(own) != {Policy.KEEP} or (told and segment.kind == STEP):
                self.runners.append(Runner(self, segment, own))

    def _check(self, title: str, segments: list[Segment], rules: Sequence[Rules]) -> None:
        names, kinds = [s.name for s in segments], [s.kind for s in segments]
        asked = {policy for rule in rules for policy in rule.values()}
        for rule in rules:
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
        """Every module is as it was before `apply`. To be called after backward, not before it."""
        for runner in reversed(self.runners):
            runner.uninstall()
        self.runners = []
        self.removed = True

    def begin(self) -> None:
        """The UNet's next call with gradients is the first of a chain."""
        self.index, self.counted = -1, True

    def advance(self, goes_on: bool) -> None:
        """The UNet is called with gradients, on latents that have one or not."""
        self.index = self.index + 1 if self.counted or goes_on else 0

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

    def install(self) -> None:
        attributes = vars(self.segment.module)
        self.shadowed = attributes.get(self.segment.method, _MISSING)
        attributes[self.segment.method] = self

    def uninstall(self) -> None:
        attributes = vars(self.segment.module)
        if attributes.get(self.segment.method) is not self:
            return  # somebody has put a forward of his own around this one, and will call it
        if self.shadowed is _MISSING:
            del attributes[self.segment.method]
        else:
            attributes[self.segment.method] = self.shadowed

    def __reduce__(self) -> Any:
        """For copying and pickling: what the module's method is without the plan."""
        if self.shadowed is not _MISSING:
            return _same, (self.shadowed,)
        return Unplanned, (self.segment.module, self.segment.method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.run(*args, **kwargs)
        applied = self.applied
        if applied.removed:
            return self.run(*args, **kwargs)
        if self.is_step:
            latents = args[0] if args else kwargs["sample"]
            applied.advance(latents.requires_grad)
        index = applied.index
        policy = self.policies[max(0, min(index, len(self.policies) - 1))]
        with self.elsewhere(policy):
            if policy not in (Policy.RECOMPUTE, Policy.RECOMPUTE_OFFLOAD):
                return self.run(*args, **kwargs)
            name, verify = self.segment.name, applied.verify
            return recompute(self.run_at, index, args, kwargs, name=name, verify=verify)

    def elsewhere(self, policy: Policy) -> AbstractContextManager[Any]:
        """Inside, what is saved goes where the policy sends it."""
        if policy in (Policy.KEEP, Policy.RECOMPUTE):
            return nullcontext()
        hooks = torch.autograd.graph.saved_tensors_hooks
        if is_second_run():  # of a segment around this one; the first has sent them already
            return hooks(_let_go, _let_go)
        if policy is Policy.QUANTISE:
            assert self.applied.codec is not None
            return hooks(self.applied.codec.encode, self.applied.codec.decode)
        assert self.applied.offloader is not None
        return self.applied.offloader.segment(self.segment.name)

    def run_at(self, index: int, args: Any, kwargs: Any) -> Any:
        if self.applied.removed:
            raise RecomputeError(
                f"The plan was removed before the backward pass of {self.segment.name}, which it "
                "recomputes. Remove it after the backward pass."
            )
        with self.applied.at(index):
            return self.run(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        if self.shadowed is not _MISSING:
            return self.shadowed(*args, **kwargs)
        # looked up anew: `accelerate` and `restore` change the module's class
        module = self.segment.module
        return getattr(type(module), self.segment.method)(module, *args, **kwargs)


class Unplanned:
    """The method of a module's class: what stands in the place of a `Runner` in a copy."""

    def __init__(self, module: nn.Module, method: str) -> None:
        self.module, self.method = module, method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(type(self.module), self.method)(self.module, *args, **kwargs)


def _same(value: Any) -> Any:
    return value


def _let_go(_: Any) -> Any:
    return None
