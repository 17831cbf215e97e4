"""What an experiment is given: sizes, seeds, folders, the judge, and runs that are done once."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.experiments.judge import Judge
from benchmarks.experiments.size import Size
from benchmarks.experiments.store import Row, Store, text
from benchmarks.experiments.training import DDPO_BATCHES, Run, Values, adapter, plan, train

#: The rows of a run, from whoever trains it.
Train = Callable[[Run], list[Values]]

#: The seed of the search, which no experiment uses.
SEARCH_SEED = 100
#: Share of the base model's alignment that a learning rate must keep to be chosen for its reward.
KEPT = 0.9


@dataclass(frozen=True)
class Context:
    """Of one command.

    Attributes:
        results: folder of the CSVs.
        work: folder of adapters.
        seeds: 0, 1, ...
        trl_python: interpreter of TRL's environment, or None to make one.
    """

    size: Size
    seeds: Sequence[int]
    results: Path
    work: Path
    trl_python: str | None = None

    @functools.cached_property
    def judge(self) -> Judge:
        return Judge(self.size)

    def store(self, name: str, *key: str) -> Store:
        """The CSV of that name: its key, and within it "settings" where a run has any."""
        return Store(self.results / f"{name}.csv", key, tuple(k for k in key if k != "settings"))

    def runs(self, name: str) -> Store:
        """The CSV of that name, of training runs."""
        return self.store(name, "variant", "seed", "rank", "settings")

    def found(self, name: str, run: Run) -> list[Row]:
        """The rows of a training run in NAME.csv; empty if it is still to be done."""
        key = {"variant": run.variant, "seed": run.seed, "rank": run.rank}
        return self.runs(name).find(**key, settings=run.fingerprint)

    def do(self, name: str, run: Run, trained: Train | None = None) -> None:
        """Train and add to NAME.csv what is not there; `trained` by another trainer than ours."""
        if not self.found(name, run):
            rows = (trained or self.train)(run)
            self.runs(name).add(rows)
            self.say(f"{name}: {run.variant}, rank {run.rank}, seed {run.seed}", rows)

    def train(self, run: Run) -> list[Values]:
        """The rows of a run of this library's."""
        return train(run, self.size, self.judge, self.work)

    def say(self, what: str, rows: Sequence[Values]) -> None:
        """A line for whoever waits."""
        words = [
            f"{name} {rows[0].get(name, float('nan')):.3f} to {rows[-1][name]:.3f}"
            for name in ("reward", "heldout", "alignment", "diversity")
            if name in rows[-1]
        ]
        seconds = rows[-1].get("cpu_seconds", 0.0)
        print(f"{what}: {', '.join(words)}; {seconds:.0f} s", flush=True)

    def short(self, variant: str, seed: int) -> Run:
        """A short run at the learning rate that the search chose.

        DDPO's is the highest: it learns so slowly that a search as short as that chooses by chance.
        """
        rate = max(self.size.rates) if variant == "ddpo" else self.rate(variant)
        return plan(variant, rate, seed, self.size)

    def brief(self, variant: str, seed: int, **changes: Any) -> Run:
        """A run at the highest rate that stops before pictures break: of (e) and (g)."""
        size = self.size
        rate, updates = max(size.rates), size.brief
        return plan(variant, rate, seed, size, updates=updates, every=updates, **changes)

    def adapter(self, run: Run) -> dict[str, Tensor]:
        return adapter(run, self.size, self.judge, self.work)

    def rate(self, variant: str, trained: Train | None = None) -> float:
        """The learning rate that a small search chooses, done once.

        Of those that keep `KEPT` of the base model's alignment the one of the highest held-out
        reward; the lowest of all if none does. Every variant gets the same: the size's rates, the
        same number of images, one seed of its own, one evaluation at the end; `trained` by another
        trainer than ours.
        """
        size = self.size
        store = self.store("learning_rates", "variant", "learning_rate", "settings")
        best, highest = min(size.rates), -math.inf
        for rate in size.rates:
            updates = size.search if variant != "ddpo" else max(1, size.search // DDPO_BATCHES)
            run = plan(variant, rate, SEARCH_SEED, size, updates=updates, every=updates)
            key = {"variant": variant, "learning_rate": rate, "settings": run.fingerprint}
            rows = store.find(**key)
            if not rows:
                done = (trained or self.train)(run)
                kept = done[-1]["alignment"] >= KEPT * done[0]["alignment"]
                store.add([{**done[-1], "kept": int(kept)}])
                self.say(f"search: {variant} at {text(rate)}", done)
                rows = store.find(**key)
            row = rows[-1]
            broke = math.isnan(float(row["reward"]))
            if not broke and row["kept"] == "1" and float(row["heldout"]) > highest:
                best, highest = rate, float(row["heldout"])
        return best
