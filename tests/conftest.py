"""What holds for every test."""

from __future__ import annotations

import os

# Before anything imports them: no test reaches the network, none opens a window.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
# Triton kernels run in its interpreter, where they are asked for; read when they are imported.
os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same random numbers whatever ran before."""
    torch.manual_seed(0)
