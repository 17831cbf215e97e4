"""Loading pipelines, and their text encoders and decoder as the trainer needs them."""

from __future__ import annotations

from rewardprop_fast.models.decode import decode
from rewardprop_fast.models.embedding_cache import EmbeddingCache
from rewardprop_fast.models.encode import PromptEncoder
from rewardprop_fast.models.load import BUNDLED, load_bundled, load_pipeline
from rewardprop_fast.models.support import check_pipeline, check_size, default_size, is_sdxl

__all__ = [
    "BUNDLED",
    "EmbeddingCache",
    "PromptEncoder",
    "check_pipeline",
    "check_size",
    "decode",
    "default_size",
    "is_sdxl",
    "load_bundled",
    "load_pipeline",
]
