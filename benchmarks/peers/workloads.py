"""What is raced: model, size, steps, batch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Workload:
    """One kind of training step.

    Attributes:
        model: "tiny", "bundled", "sd15" or "sdxl"; the latter two with random weights.
        size: pixels of a side.
        steps: T, UNet calls of a rollout.
        k: the last K of them carry gradients.
        batch: images; guidance doubles what the UNet sees.
        dtypes: what is raced, each against its like.
        gpu: meant for a GPU.
    """

    model: str
    size: int
    steps: int
    k: int
    batch: int = 1
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    gpu: bool = False

    @property
    def title(self) -> str:
        names = {"tiny": "tiny", "bundled": "bundled", "sd15": "SD 1.5", "sdxl": "SDXL"}
        return f"{names[self.model]} {self.size}², T={self.steps}, K={self.k}, batch {self.batch}"

    @property
    def large(self) -> bool:
        return self.model in ("sd15", "sdxl")

    @property
    def draws(self) -> int:
        """How many draws of noise gradients are compared for.

        The chain of a small model carries what is rounded early far, and one draw says little: of
        four of them one had twice the error of the others.
        """
        return 1 if self.large else 4

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


WORKLOADS: dict[str, Workload] = {
    "tiny": Workload("tiny", 16, 3, 1, batch=2),
    "bundled-k1": Workload("bundled", 64, 20, 1, batch=8),
    "bundled-k5": Workload("bundled", 64, 20, 5, batch=8),
    "sd15-256-k1": Workload("sd15", 256, 5, 1),
    "sd15-256-k5": Workload("sd15", 256, 5, 5),
    "sd15-256-t20": Workload("sd15", 256, 20, 1),
    "sd15-512": Workload("sd15", 512, 3, 1),
    "sdxl-512": Workload("sdxl", 512, 3, 1, dtypes=("bfloat16",)),
    "gpu-sd15-512-k1": Workload("sd15", 512, 50, 1, dtypes=("bfloat16",), gpu=True),
    "gpu-sd15-512-k5": Workload("sd15", 512, 50, 5, dtypes=("bfloat16",), gpu=True),
    "gpu-sdxl-1024-k1": Workload("sdxl", 1024, 50, 1, dtypes=("bfloat16",), gpu=True),
    "gpu-sdxl-1024-k5": Workload("sdxl", 1024, 50, 5, dtypes=("bfloat16",), gpu=True),
}

#: Raced where nothing else is asked for.
CPU_DEFAULT = tuple(key for key, one in WORKLOADS.items() if not one.gpu and key != "tiny")
GPU_DEFAULT = tuple(key for key, one in WORKLOADS.items() if one.gpu)

GUIDANCE = 7.5
RANK = 4  # of the LoRA, TRL's own
LEARNING_RATE = 1e-6  # small: after thousands of steps the work is still the same
