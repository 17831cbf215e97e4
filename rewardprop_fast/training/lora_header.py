"""How a LoRA was sampled while it was trained, in the header of its files.

So that a LoRA that has left its run is still drawn with the steps and the guidance it was made for.
The model's path is not in it: that is of one machine.
"""

from __future__ import annotations

import json
from pathlib import Path

from rewardprop_fast import lora
from rewardprop_fast.errors import ConfigError
from rewardprop_fast.training.config import SamplingConfig

_KEY = "rewardprop.sampling"


def header(sampling: SamplingConfig) -> dict[str, str]:
    """For the `metadata` of `lora.save_lora`."""
    return {_KEY: json.dumps(sampling.to_dict())}


def sampling_of(path: Path) -> SamplingConfig | None:
    """What `header` wrote into a LoRA file or a folder's; None where it says nothing of the kind.

    Raises:
        ExportError: there is no such file, or it cannot be read.
    """
    text = lora.read_metadata(path).get(_KEY)
    try:
        return None if text is None else SamplingConfig.from_dict(json.loads(text))
    except (ValueError, ConfigError):
        return None  # of another program or a later version, whose settings are not these
