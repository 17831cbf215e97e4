"""What makes a run this run: written into its checkpoints, compared before one goes on."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from rewardprop_fast.rewards import Reward, name_of
from rewardprop_fast.training.config import RunConfig, TrainConfig
from rewardprop_fast.training.prompts import PromptSet

# May change on resume: memory plans, captured steps and where prompts are encoded do not change a
# bit of anything (a GPU's guidance in Triton, which a replay has not, is good for one rounding).
_FREE = (
    "output",
    "steps",
    "device",
    "target_reward",
    "early_stopping",
    "encoding",
    "memory_budget",
)
_FREE_OF_ROLLOUT = ("graphs",)
_PARTS = ("prompts", "metadata", "reward", "reward_settings")


def identity(
    config: TrainConfig, prompts: PromptSet, reward: Reward, run_config: RunConfig | None
) -> dict[str, Any]:
    """JSON values that two runs share if and only if one can go on from the other.

    `reward_settings` are known where the run came from a file; otherwise, and for metadata that
    JSON cannot hold, the value is None and nothing is compared.
    """
    return {
        "config": config.to_dict(),
        "prompts": list(prompts.prompts),
        "metadata": _digest(prompts.metadata),
        "reward": name_of(reward),
        "reward_settings": None if run_config is None else run_config.to_dict()["reward"],
    }


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two identities, in words; empty if one run can go on as the other."""
    before, after = _counted(then.get("config", {})), _counted(now["config"])
    found = [
        f"{key} was {before.get(key)!r} and is {after.get(key)!r}"
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key)
    ]
    parts = [
        part
        for part in _PARTS
        if then.get(part) is not None
        and now[part] is not None
        and then[part] != now[part]
        and not (part == "reward_settings" and then.get("reward") != now["reward"])
    ]
    words = {
        "prompts": "the prompts differ",
        "metadata": "the prompts' metadata differ",
        "reward": f"the reward was {then.get('reward')} and is {now['reward']}",
        "reward_settings": (
            f"reward was {then.get('reward_settings')} and is {now['reward_settings']}"
        ),
    }
    return found + [words[part] for part in parts]


def _counted(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide values."""
    found = {key: value for key, value in config.items() if key not in _FREE}
    if isinstance(found.get("rollout"), dict):
        rollout = found["rollout"].items()
        found["rollout"] = {key: value for key, value in rollout if key not in _FREE_OF_ROLLOUT}
    return found


def _digest(metadata: tuple[dict[str, Any], ...]) -> str | None:
    try:
        return hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()
    except (TypeError, ValueError):
        return None
