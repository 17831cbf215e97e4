"""Randomness as a function of (seed, stream, step, sample), without a state that runs along.

A resumed run is then the same run, and a sample's noise does not depend on the batch it is drawn
in, on the number of processes, or on what else consumed random numbers before. The idea is that
of counter-based generators (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC
2011), here with a hash in front of torch's own engine.

Everything is drawn on the CPU, so that a seed means the same on every device.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

import torch

T = TypeVar("T")

MAX_COPIES = 1024  # extra endpoints a sample may have, so that their counters never meet


class Stream(Enum):
    """What a draw is for. Values are part of every run's identity: add new ones, never renumber."""

    LATENTS = 1  # x_T, the start of a rollout
    PROMPTS = 2  # which prompts a step uses
    METHOD = 3  # a method's own draws, such as AlignProp's K
    NOISE = 4  # the noise of DDIM with eta > 0
    LV = 5  # the extra endpoints of DRaFT-LV
    EVALUATION = 6  # fixed images that are compared over a run
    INITIALISATION = 7  # LoRA weights at the start
    PRETRAINING = 8  # images to go on knowing: which, their noise, and samples of the base model


def seed_of(seed: int, stream: Stream, step: int = 0, sample: int = 0) -> int:
    """A stable 64-bit hash of the four numbers, equal on every machine and version.

    Each number must fit 64 bits; `step` and `sample` count from 0 or 1 as the caller likes.
    Errors: ValueError.
    """
    try:
        counter = struct.pack("<QQQQ", seed, stream.value, step, sample)
    except struct.error:
        raise ValueError(
            f"seed {seed!r}, step {step!r} and sample {sample!r} must be whole numbers from 0 to "
            "2**64 - 1."
        ) from None
    digest = hashlib.blake2b(counter, digest_size=8, person=b"rewardprop").digest()
    return int.from_bytes(digest, "little")


def generator(seed: int, stream: Stream, step: int = 0, sample: int = 0) -> torch.Generator:
    """A fresh CPU generator for one purpose, training step and sample.

    torch's CPU engine uses the lower 32 bits of a seed, so two given draws share their numbers
    with probability 2**-32: harmless for noise, but no basis for cryptography.
    """
    return torch.Generator(device="cpu").manual_seed(seed_of(seed, stream, step, sample))


def latents(
    seed: int,
    step: int,
    samples: Sequence[int],
    shape: Sequence[int],
    *,
    stream: Stream = Stream.LATENTS,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Standard normal noise (B, *shape), B = len(samples), drawn in fp32 and then converted.

    `samples` are positions within the whole step (over accumulation and processes), `shape` is
    that of one sample. Row i depends on samples[i] alone.
    """
    if not samples:
        return torch.empty((0, *shape), device=device, dtype=dtype)
    rows = [torch.randn(*shape, generator=generator(seed, stream, step, one)) for one in samples]
    return torch.stack(rows).to(device=device, dtype=dtype)


def uniform(seed: int, stream: Stream, step: int, sample: int = 0) -> float:
    """One number in [0, 1)."""
    draw = torch.rand((), dtype=torch.float64, generator=generator(seed, stream, step, sample))
    return float(draw)


def integer(seed: int, stream: Stream, step: int, low: int, high: int, sample: int = 0) -> int:
    """One whole number from `low` to `high`, both included, equally likely. Errors: ValueError."""
    if low > high:
        raise ValueError(f"there is no whole number from {low} to {high}.")
    source = generator(seed, stream, step, sample)
    return int(torch.randint(low, high + 1, (), generator=source))


def choice(options: Sequence[T], seed: int, stream: Stream, step: int, sample: int = 0) -> T:
    """One of the options, each equally likely. Errors: ValueError if there is none."""
    if not options:
        raise ValueError("there is nothing to choose from.")
    return options[integer(seed, stream, step, 0, len(options) - 1, sample)]


@dataclass(frozen=True)
class Draws:
    """The draws of one training step's batch, as a method sees them.

    Attributes:
        samples: position of each image within the whole step (over accumulation and processes).
    """

    seed: int
    step: int
    samples: tuple[int, ...]

    def uniform(self) -> float:
        """One number in [0, 1) for the whole batch; the same for every batch of the step."""
        return uniform(self.seed, Stream.METHOD, self.step)

    def uniforms(self, count: int) -> list[float]:
        """`count` numbers in [0, 1), the first of them `uniform()`."""
        source = generator(self.seed, Stream.METHOD, self.step)
        return torch.rand(count, dtype=torch.float64, generator=source).tolist()

    def extra_noise(self, copy: int, shape: Sequence[int]) -> torch.Tensor:
        """Standard normal (B, *shape), float32 on the CPU, for the extra endpoint `copy`."""
        rows = [sample * MAX_COPIES + copy for sample in self.samples]
        return latents(self.seed, self.step, rows, shape, stream=Stream.LV)

    def step_noise(self, steps: int, shape: Sequence[int]) -> torch.Tensor:
        """Standard normal (steps, B, *shape) for DDIM with eta > 0, float32 on the CPU."""
        return latents(
            self.seed, self.step, self.samples, (steps, *shape), stream=Stream.NOISE
        ).transpose(0, 1)
