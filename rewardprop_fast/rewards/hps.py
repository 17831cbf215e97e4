"""Human Preference Score v2: a CLIP ViT-H/14 trained on human choices."""

from __future__ import annotations

from rewardprop_fast.rewards.clip import ClipReward
from rewardprop_fast.rewards.preprocess import Preprocess


class HPS(ClipReward):
    """HPSv2 and v2.1 (arXiv 2306.09341): the cosine under a CLIP ViT-H/14, about 0.2 to 0.35.

    The published tables show it times 100. Pictures that are not square are shrunk whole and set on
    black, as the authors' own code does it.

    Args, Raises: as `ClipReward`; ``model`` is a folder that `rewardprop convert-reward hps` wrote
        from the published checkpoint of open_clip.
    """

    name = "hps"
    preprocess = Preprocess((224, 224), "fit")
