"""How the command's computing threads wait for one another."""

from __future__ import annotations

import os


def wait_asleep() -> None:
    """Have OpenMP's threads sleep while they wait, unless the user has set how; before torch loads.

    By default libgomp lets a thread spin for milliseconds at the end of each operator. If anything
    else runs on the machine, it spins for a partner that has no core, thousands of times a step.
    Measured: the quickstart on 2 cores beside 3 busy processes took 58 to 240 s a step, and 1.5 s
    asleep. Only the command does this, since the variable belongs to the whole process.
    """
    if "GOMP_SPINCOUNT" not in os.environ:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
