"""LAION's aesthetic predictor: how much people like a picture, whatever it shows."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from rewardprop_fast.rewards.clip import load_clip
from rewardprop_fast.rewards.head import load_head
from rewardprop_fast.rewards.preprocess import Preprocess


class Aesthetic(nn.Module):
    """LAION's aesthetic predictor v2 (improved-aesthetic-predictor), about 1 to 10.

    A head on the unit image features of CLIP ViT-L/14: five linear layers with dropout between them
    and nothing else, so in use one linear map, to which they are multiplied here. Prompts are not
    read.

    Args:
        model: folder or hub name of CLIP ViT-L/14, such as openai/clip-vit-large-patch14.
        head: .safetensors file that `rewardprop convert-reward aesthetic` wrote, or its folder.

    Raises:
        ModelError: not there, not safetensors, or head and model do not belong together.
    """

    name = "aesthetic"

    def __init__(self, model: str, head: str) -> None:
        super().__init__()
        # the predictor's own code scales and cuts with torchvision
        _, self.images = load_clip(model, self.name, Preprocess((224, 224), offset="even"))
        self.head = load_head(head, self.name, self.images.width)

    def forward(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        return self.head(self.images(images))
