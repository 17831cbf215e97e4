"""From a name in a config file to a reward: built-in ones, and ``python:module:attribute``."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

from rewardprop_fast.errors import ConfigError, ModelError, RewardError
from rewardprop_fast.rewards.base import Reward, check_signature
from rewardprop_fast.rewards.ensemble import Ensemble
from rewardprop_fast.rewards.normalised import Normalised

# Module and attribute, imported only when asked for: a config naming one reward does not load the
# others.
REWARDS: Mapping[str, str] = MappingProxyType(
    {
        "adversarial": "rewardprop_fast.rewards.adversarial:Adversarial",
        "aesthetic": "rewardprop_fast.rewards.aesthetic:Aesthetic",
        "alignment": "rewardprop_fast.rewards.alignment:AlignmentReward",
        "brightness": "rewardprop_fast.rewards.brightness:BrightnessReward",
        "clip_score": "rewardprop_fast.rewards.clip:ClipReward",
        "colour": "rewardprop_fast.rewards.colour:ColourReward",
        "detection": "rewardprop_fast.rewards.detection:Detection",
        "hps": "rewardprop_fast.rewards.hps:HPS",
        "image_reward": "rewardprop_fast.rewards.image_reward:ImageReward",
        "jpeg_compressibility": "rewardprop_fast.rewards.jpeg:JPEGCompressibility",
        "jpeg_incompressibility": "rewardprop_fast.rewards.jpeg:JPEGIncompressibility",
        "jpeg_size": "rewardprop_fast.rewards.jpeg_size:JPEGSize",
        "object_count": "rewardprop_fast.rewards.detection:ObjectCount",
        "pickscore": "rewardprop_fast.rewards.pickscore:PickScore",
        "removal": "rewardprop_fast.rewards.detection:Removal",
        "style": "rewardprop_fast.rewards.style:StyleReward",
        "symmetry": "rewardprop_fast.rewards.symmetry:SymmetryReward",
    }
)

_PREFIX = "python:"


def build(name: str, /, **kwargs: Any) -> Reward:
    """The reward called ``name``, made with ``kwargs``.

    ``name`` is a key of `REWARDS`, or ``python:module.path:attribute`` for your own. There, a class
    is instantiated with ``kwargs``; any other callable is the reward itself, and ``kwargs`` are
    passed along with every call. The module is looked for where Python looks, then in the working
    directory; importing it runs its code. Raises ConfigError that says what is allowed.
    """
    if not isinstance(name, str):
        raise ConfigError(f"A reward's name must be a string, got {name!r}.")
    if name.startswith(_PREFIX):
        return _from_user(name, kwargs)
    if name not in REWARDS:
        close = difflib.get_close_matches(name, REWARDS, n=1)
        suggestion = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigError(
            f"There is no reward called {name!r}.{suggestion} "
            f"Rewards: {', '.join(sorted(REWARDS))}; your own: python:module:attribute."
        )
    module, attribute = REWARDS[name].split(":")
    return _make(name, getattr(importlib.import_module(module), attribute), kwargs)


def build_all(specs: Iterable[tuple[Any, ...]]) -> Reward:
    """The reward for a list of (name, weight, arguments): the only one itself, or an `Ensemble`.

    A fourth entry, (mean, std) or None, puts a reward on a scale of its own (`Normalised`). One
    reward of weight 1 is returned bare. All that is wrong with the list is reported in one
    ConfigError.
    """
    pairs: list[tuple[Reward, float]] = []
    errors: list[str] = []
    for name, weight, kwargs, *scale in specs:
        if not isinstance(kwargs, Mapping) or not all(isinstance(key, str) for key in kwargs):
            errors.append(
                f"The arguments of the reward {name!r} must be names with values, got {kwargs!r}."
            )
            continue
        try:
            reward = build(name, **kwargs)
            if scale and scale[0] is not None:
                reward = Normalised(reward, *scale[0])
            Ensemble([(reward, weight)])  # for its checks
            pairs.append((reward, weight))
        except (ConfigError, RewardError) as error:
            errors.append(str(error))
    if errors:
        raise ConfigError("\n".join(errors))
    if not pairs:
        raise ConfigError(f"No reward is given; name at least one of {', '.join(sorted(REWARDS))}.")
    if len(pairs) == 1 and pairs[0][1] == 1:
        return pairs[0][0]
    return Ensemble(pairs)


def _make(name: str, factory: Callable[..., Any], kwargs: Mapping[str, Any]) -> Any:
    """Call a class with arguments from a config file, turning its complaints into ConfigErrors."""
    try:
        inspect.signature(factory).bind(**kwargs)
    except TypeError as error:
        raise ConfigError(
            f"The reward {name!r} cannot be made with the arguments {_listed(kwargs)} ({error}). "
            f"It takes: {_arguments_of(factory)}."
        ) from error
    try:
        return factory(**kwargs)
    except (ConfigError, ModelError, RewardError):
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"The reward {name!r} refused its arguments {dict(kwargs)!r}: {error}"
        ) from error


def _from_user(name: str, kwargs: Mapping[str, Any]) -> Reward:
    target = _load(name)
    reward: Any
    if inspect.isclass(target):
        reward = _make(name, target, kwargs)
    elif kwargs and callable(target):
        try:
            inspect.signature(target).bind(None, None, None, **kwargs)
        except TypeError as error:
            raise ConfigError(
                f"The reward {name!r} is called as reward(images, prompts, metadata, "
                f"{', '.join(f'{key}=...' for key in kwargs)}), which it does not accept "
                f"({error}). It takes: {_arguments_of(target)}."
            ) from error
        reward = functools.partial(target, **kwargs)
    else:
        reward = target
    try:
        check_signature(reward)
    except RewardError as error:
        raise ConfigError(f"{name!r} does not name a reward. {error}") from error
    return reward


def _load(name: str) -> Any:
    """The object that ``python:module.path:attribute`` points at."""
    module_name, _, path = name.removeprefix(_PREFIX).partition(":")
    well_formed = all(part.isidentifier() for part in (module_name + "." + path).split("."))
    if not well_formed:
        raise ConfigError(
            f"The reward {name!r} must be written python:module.path:attribute, with Python names "
            "and no file name, for instance python:my_rewards:brightness for the function "
            "brightness in my_rewards.py."
        )
    # The command `rewardprop`, unlike `python -m`, does not look for modules in the working
    # directory. Appended, so that nothing lying there shadows an installed package.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        importlib.invalidate_caches()
        target: Any = importlib.import_module(module_name)
    except Exception as error:
        where = " (looked where Python looks and in the working directory)"
        missing = isinstance(error, ModuleNotFoundError) and error.name == module_name.split(".")[0]
        raise ConfigError(
            f"The reward {name!r} cannot be loaded: importing {module_name} raised "
            f"{type(error).__name__}: {error}{where if missing else ''}."
        ) from error
    for part in path.split("."):
        try:
            target = getattr(target, part)
        except AttributeError as error:
            close = difflib.get_close_matches(part, dir(target), n=1)
            suggestion = f" Did you mean {close[0]!r}?" if close else ""
            raise ConfigError(
                f"The reward {name!r} cannot be loaded: {module_name} has no {path!r}.{suggestion}"
            ) from error
    return target


def _listed(kwargs: Mapping[str, Any]) -> str:
    return ", ".join(kwargs) or "(none)"


def _arguments_of(factory: Callable[..., object]) -> str:
    parameters = inspect.signature(factory).parameters.values()
    return ", ".join(str(parameter) for parameter in parameters) or "no arguments"
