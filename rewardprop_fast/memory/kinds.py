"""The kinds of segments that a memory plan can name."""

from __future__ import annotations

STEP = "step"
TRANSFORMER_BLOCK = "transformer block"
ATTENTION = "attention"
FEED_FORWARD = "feed-forward"
RESNET = "resnet"
DECODER_BLOCK = "decoder block"
REWARD_BLOCK = "reward block"

#: The outer ones before those within them.
KINDS = (STEP, TRANSFORMER_BLOCK, DECODER_BLOCK, REWARD_BLOCK, RESNET, ATTENTION, FEED_FORWARD)
