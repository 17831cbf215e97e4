"""Prompts to conditioning, each prompt encoded once in a run, or once for all with a cache."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rewardprop_fast.models.embedding_cache import EmbeddingCache, identity_of_encoders, key_of
from rewardprop_fast.models.encoders import Encoders
from rewardprop_fast.models.support import is_sdxl
from rewardprop_fast.rollout import Conditioning


class PromptEncoder:
    """Encodes through the pipeline's own `encode_prompt`, one prompt at a time, and remembers.

    One at a time, so that a prompt's embedding does not depend on its neighbours in a batch. What
    is remembered lies in host memory.

    Args:
        pipe: SD 1.x, 2.x or SDXL pipeline.
        height, width: image size in pixels, part of SDXL's conditions.
        negative_prompt: what guidance leads away from.
        guided: whether negative embeddings are needed.
        cache: of earlier runs.
    """

    def __init__(
        self,
        pipe: Any,
        height: int,
        width: int,
        negative_prompt: str = "",
        guided: bool = True,
        cache: EmbeddingCache | None = None,
    ) -> None:
        self.pipe, self.guided, self.cache = pipe, guided, cache
        self.encoders = Encoders(pipe)
        # None, not "", lets SDXL zero the embeddings of an empty negative prompt as it was trained
        self.negative_prompt = negative_prompt or None
        self.size = (height, width)
        self._known: dict[str, Conditioning] = {}
        self._identity: str | None = None

    @contextmanager
    def ahead(self, prompts: Iterable[str]) -> Iterator[None]:
        """Encode these prompts now; inside, the networks that encode are not on the device.

        Another prompt inside is encoded all the same: they come back for it.
        """
        for prompt in prompts:
            self._one(prompt)
        self.encoders.leave()
        try:
            yield
        finally:
            self.encoders.come_back()

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        """Conditions of B prompts, on the UNet's device and in its dtype."""
        parts = [self._one(prompt).to(self.pipe.unet.device) for prompt in prompts]

        def joined(tensors: list[Tensor]) -> Tensor:
            return torch.cat(tensors)

        return Conditioning(
            joined([part.positive for part in parts]),
            joined([part.negative for part in parts if part.negative is not None])
            if self.guided
            else None,
            {
                key: joined([p.positive_added[key] for p in parts])
                for key in parts[0].positive_added
            },
            {
                key: joined([p.negative_added[key] for p in parts])
                for key in parts[0].negative_added
            },
        )

    def _one(self, prompt: str) -> Conditioning:
        if prompt not in self._known:
            self._known[prompt] = self._look_up(prompt)
        return self._known[prompt]

    def _look_up(self, prompt: str) -> Conditioning:
        if self.cache is None:
            return self._encode(prompt)
        if self._identity is None:
            self._identity = identity_of_encoders(self.pipe)
        key = key_of(self._identity, prompt, self.negative_prompt, self.size, self.guided)
        found = self.cache.get(key)
        if found is None:
            found = self._encode(prompt)
            self.cache.put(key, found)
        return found

    def _encode(self, prompt: str) -> Conditioning:
        """With the pipeline's networks; the result is in host memory."""
        away = self.encoders.away
        self.encoders.come_back()
        try:
            with torch.no_grad():
                found = self._sdxl(prompt) if is_sdxl(self.pipe) else self._sd(prompt)
        finally:
            if away:
                self.encoders.leave()
        return found.to("cpu")

    def _arguments(self, prompt: str) -> dict[str, Any]:
        return {
            "prompt": prompt,
            "device": self.pipe.unet.device,
            "num_images_per_prompt": 1,
            "do_classifier_free_guidance": self.guided,
            "negative_prompt": self.negative_prompt,
        }

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.pipe.unet.device, self.pipe.unet.dtype)

    def _sd(self, prompt: str) -> Conditioning:
        positive, negative = self.pipe.encode_prompt(**self._arguments(prompt))
        return Conditioning(self._cast(positive), self._cast(negative) if self.guided else None)

    def _sdxl(self, prompt: str) -> Conditioning:
        positive, negative, pooled, negative_pooled = self.pipe.encode_prompt(
            **self._arguments(prompt)
        )
        # original size, crop corner and target size, as the pipeline's defaults have them
        time_ids = self._cast(torch.tensor([[*self.size, 0, 0, *self.size]]))
        positive_added = {"text_embeds": self._cast(pooled), "time_ids": time_ids}
        if not self.guided:
            return Conditioning(self._cast(positive), None, positive_added)
        negative_added = {"text_embeds": self._cast(negative_pooled), "time_ids": time_ids}
        return Conditioning(
            self._cast(positive), self._cast(negative), positive_added, negative_added
        )
