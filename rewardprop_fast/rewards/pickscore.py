"""PickScore: a CLIP ViT-H/14 trained on choices between two pictures."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rewardprop_fast.rewards.clip import ClipReward


class PickScore(ClipReward):
    """PickScore v1 (arXiv 2305.01569): exp(logit_scale) times the cosine, about 15 to 25.

    A CLIP ViT-H/14 trained on half a million choices between two pictures. The difference of two
    values is the log-odds of the first being preferred.

    Args, Raises: as `ClipReward`; the published model is yuvalkirstain/PickScore_v1, whose
        tokenizer is that of laion/CLIP-ViT-H-14-laion2B-s32B-b79K.
    """

    name = "pickscore"

    def forward(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        return self.scale * self.similarity(images, prompts)
