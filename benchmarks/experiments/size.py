"""How large everything is: what was run for docs/experiments.md, larger, and one for trying."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """Settings that all experiments share.

    Attributes:
        model: "bundled" or "tiny" (random weights).
        steps: T of the chain.
        batch: images of an update.
        updates: of a short run; `every` of them lies between two evaluations.
        images: of an evaluation.
        long: updates of a run that goes too far; `brief` of one that does not.
        rates: the learning rates of the search, `search` updates each.
        rollouts: of the gradients whose variance is measured.
        batches: of the gradients by depth.
        ddpo: updates of DDPO, which takes four batches for one.
    """

    model: str = "bundled"
    steps: int = 10
    batch: int = 4
    updates: int = 50
    every: int = 10
    images: int = 16
    long: int = 100
    brief: int = 15
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    search: int = 20
    rollouts: int = 256
    batches: int = 2
    ddpo: int = 40
    dtype: str = "bfloat16"
    guidance: float = 4.0
    rank: int = 4


FULL = Size()
#: What docs/experiments.md shows.
SMALL = Size(
    updates=24, every=6, long=30, brief=8, search=24, batches=1, ddpo=30, dtype="float32",
)  # fmt: skip
QUICK = Size(
    model="tiny", steps=3, batch=2, updates=2, every=1, images=3, long=2, brief=1,
    rates=(1e-3, 1e-2), search=1, rollouts=4, batches=1, ddpo=1, dtype="float32",
)  # fmt: skip
SIZES = {"full": FULL, "small": SMALL, "quick": QUICK}
