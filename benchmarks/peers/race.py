"""The race itself: gradients and peaks alone, then steps interleaved."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers.protocol import Worker, WorkerError
from benchmarks.peers.workloads import Workload

GIB = 2**30

#: Relative error of all LoRA gradients together that rounding explains, by dtype.
FLOOR = {"float32": 1e-3, "bfloat16": 2e-2}
#: Or this many times the error of the best plain form in the same dtype.
SLACK = 2.0
PLAIN = ("loop", "loop-checkpoint", "trl")

Start = Callable[[str], Worker]


@dataclass
class Entry:
    """One competitor in one workload and dtype; becomes a row of the results."""

    competitor: str
    failed: str | None = None
    error: float | None = None
    cosine: float | None = None
    limit: float | None = None
    rewards_error: float | None = None
    prepare_seconds: float | None = None
    idle: int = 0
    step_peak: int = 0
    reserved_peak: int | None = None
    process_peak: int = 0
    tracked_peak: int | None = None
    seconds: list[float] = field(default_factory=list)
    phases: list[dict[str, float]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def counts(self) -> bool:
        """Whether its times are a result."""
        return self.failed is None and self.error is not None and self.error <= (self.limit or 0)

    def to_dict(self) -> dict[str, Any]:
        phases = {
            name: statistics.median(one[name] for one in self.phases)
            for name in (self.phases[0] if self.phases else ())
        }
        row = {**vars(self), "phases": phases, "counts": self.counts}
        if self.seconds:
            row |= {"median": statistics.median(self.seconds), "min": min(self.seconds)}
        return row


def compare(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[float, float]:
    """(relative L2 error, cosine) over all gradients together, in float64.

    Raises:
        ValueError: other names or shapes, or something that is not finite.
    """
    import torch

    if found.keys() != wanted.keys():
        odd = sorted(found.keys() ^ wanted.keys())[:3]
        raise ValueError(f"gradients of other parameters: {', '.join(odd)}")
    for name, value in wanted.items():
        if found[name].shape != value.shape:
            raise ValueError(f"{name} has the shape {tuple(found[name].shape)}")
    flat = [torch.cat([g[name].double().flatten() for name in wanted]) for g in (found, wanted)]
    if not all(bool(torch.isfinite(one).all()) for one in flat):
        raise ValueError("gradients that are not finite")
    a, b = flat
    if not float(b.norm()) > 0:
        raise ValueError("the reference's gradients are zero")
    return float((a - b).norm() / b.norm()), float(a @ b / (a.norm() * b.norm()).clamp(min=1e-300))


def judge(entries: Sequence[Entry], dtype: str) -> None:
    """Set the limit of each: what rounding explains, or twice the best plain form's error."""
    plain = [e.error for e in entries if e.competitor in PLAIN and e.error is not None]
    limit = max(FLOOR[dtype], SLACK * min(plain)) if plain else FLOOR[dtype]
    for entry in entries:
        entry.limit = limit


def alone(pool: Pool, entry: Entry, reference: Sequence[Mapping[str, Any]], track: bool) -> None:
    """Gradients against the reference's, and peaks, of one competitor, no other being there.

    The error is the root mean square over the draws that the reference is there for.

    Another one, idle, would hold the same files' pages, and the system gives back what one process
    alone has. It stays in the pool, warm, until the next comes.
    """
    from safetensors.torch import load_file

    pool.close()
    try:
        worker = pool.fresh(entry)
        prepared = worker.ask("prepare", job=pool.job)
        entry.prepare_seconds, entry.versions = prepared["seconds"], prepared["versions"]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "gradients.safetensors")
            found = []
            for draw, wanted in enumerate(reference):
                worker.ask("gradients", path=str(path), draw=draw)
                found.append(compare(load_file(path), wanted))
            entry.error = statistics.fmean(error**2 for error, _ in found) ** 0.5
            entry.cosine = min(cosine for _, cosine in found)
        worker.ask("step")  # an optimizer's state is made in the first update
        peak = worker.ask("peak")
        for name in ("idle", "step_peak", "process_peak", "reserved_peak"):
            setattr(entry, name, peak.get(name))
        if track:
            entry.tracked_peak = worker.ask("tracked")["tracked_peak"]
    except (WorkerError, ValueError) as error:
        entry.failed = str(error)
        pool.drop(entry)


def reference_gradients(
    start: Start, workload: Workload, job: dict[str, Any]
) -> list[dict[str, Any]]:
    """Of the plain loop, for every draw: in float64 where that is cheap, else in float32."""
    from safetensors.torch import load_file

    dtype = "float32" if workload.large else "float64"
    with start("loop-checkpoint") as worker, tempfile.TemporaryDirectory() as folder:
        worker.ask("prepare", job={**job, "dtype": dtype})
        path, found = Path(folder, "gradients.safetensors"), []
        for draw in range(workload.draws):
            worker.ask("gradients", path=str(path), draw=draw)
            found.append(dict(load_file(path)))
        return found


class Pool:
    """Competitors that are ready; those unused for longest make room for others.

    Args:
        limit: bytes that all of them together may take, once `alone` has measured them.
    """

    def __init__(self, start: Start, job: dict[str, Any], limit: float) -> None:
        self.start, self.job, self.limit = start, job, limit
        self.alive: dict[str, tuple[Entry, Worker]] = {}  # the longest unused first

    def fresh(self, entry: Entry) -> Worker:
        """A new process of its, not prepared."""
        self.drop(entry)
        while self.alive and self._taken(entry) > self.limit:
            _, worker = self.alive.pop(next(iter(self.alive)))
            worker.close()
        worker = self.start(entry.competitor)
        self.alive[entry.competitor] = (entry, worker)
        return worker

    def get(self, entry: Entry) -> Worker:
        """Its worker, warm."""
        if entry.competitor in self.alive:
            self.alive[entry.competitor] = self.alive.pop(entry.competitor)
            return self.alive[entry.competitor][1]
        worker = self.fresh(entry)
        worker.ask("prepare", job=self.job)
        worker.ask("step")
        return worker

    def drop(self, entry: Entry) -> None:
        """End its process, if it has one."""
        if entry.competitor in self.alive:
            self.alive.pop(entry.competitor)[1].close()

    def _taken(self, newcomer: Entry) -> float:
        """The most that all take while the newcomer is prepared, or while any of them works."""
        entries = [entry for entry, _ in self.alive.values()]
        idle = sum(entry.idle for entry in [*entries, newcomer])
        grows = max(entry.step_peak - entry.idle for entry in [*entries, newcomer])
        # Preparing may take more than a step: TRL loads float32 first.
        return idle + max(grows, newcomer.process_peak - newcomer.idle)

    def close(self) -> None:
        """End all."""
        for _, worker in self.alive.values():
            worker.close()
        self.alive = {}


def interleave(pool: Pool, entries: Sequence[Entry], repeats: int) -> None:
    """Every competitor once a round, in turning order; seconds go onto the entries."""
    for entry in entries:
        if not entry.counts:
            pool.drop(entry)
    for number in range(repeats):
        for entry in entries if number % 2 == 0 else reversed(entries):
            if not entry.counts:
                continue
            try:
                answer = pool.get(entry).ask("step")
            except WorkerError as error:
                entry.failed = str(error)
                pool.drop(entry)
                continue
            entry.seconds.append(answer["seconds"])
            if answer["phases"]:
                entry.phases.append(answer["phases"])


def random_truncation(start: Start, job: dict[str, Any], seeds: Sequence[int]) -> list[float]:
    """Errors of this library's TRL interface against TRL itself, random truncation and noise."""
    from safetensors.torch import load_file

    found: dict[str, list[dict[str, Any]]] = {}
    for competitor in ("trl", "compat"):
        with start(competitor) as worker, tempfile.TemporaryDirectory() as folder:
            worker.ask("prepare", job=job)
            found[competitor] = []
            for seed in seeds:
                path = Path(folder, f"{seed}.safetensors")
                worker.ask("gradients", path=str(path), random_seed=seed)
                found[competitor].append(dict(load_file(path)))
    pairs = zip(found["compat"], found["trl"], strict=True)
    return [compare(ours, theirs)[0] for ours, theirs in pairs]
