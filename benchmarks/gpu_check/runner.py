"""Gives jobs to a worker process, one at a time, and survives what becomes of it."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.jobs import Job, Outcome
from benchmarks.gpu_check.worker import serve
from benchmarks.static_gpu.workers import environment


@dataclass(frozen=True)
class Limits:
    """Seconds that a worker may take to start, and that one job may take, compiling included."""

    start: float = 300.0
    job: float = 300.0


class WorkerFailed(Exception):
    """The worker does not start at all: no job can run."""


class Worker:
    """A process that serves jobs; a new one for each time the last one had to go."""

    def __init__(self, device_type: str, source: str, limits: Limits) -> None:
        self._device_type, self._source, self._limits = device_type, source, limits
        self._context = multiprocessing.get_context("spawn")
        self._process: Any = None
        self._connection: Any = None
        self._folder = tempfile.TemporaryDirectory(prefix="gpu_check_")
        self._notes = Path(self._folder.name) / "stack.txt"

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        self._folder.cleanup()

    def run(self, job: Job) -> Outcome:
        """The job's outcome; a crash or a hang is one. Raises WorkerFailed."""
        if self._process is None:
            self._start()
        begin = time.monotonic()
        try:
            self._connection.send((self._limits.job, job))
            answered = self._connection.poll(self._limits.job)
            outcome, go_on = self._connection.recv() if answered else (self._hung(job), False)
        except (EOFError, OSError):
            outcome, go_on = self._crashed(job), False
        if not go_on:
            self._stop()
        outcome.figures["seconds"] = round(time.monotonic() - begin, 3)
        return outcome

    def _start(self) -> None:
        self._connection, theirs = self._context.Pipe()
        self._process = self._context.Process(
            target=serve,
            args=(theirs, self._device_type, self._source, str(self._notes)),
            daemon=True,
        )
        # Kernels run on the GPU whatever the shell asks for; on the CPU only the interpreter can.
        with environment(TRITON_INTERPRET="1" if self._device_type == "cpu" else "0"):
            self._process.start()
        theirs.close()  # so that the worker's death ends the pipe
        try:
            ready = self._connection.poll(self._limits.start) and self._connection.recv() == "ready"
        except (EOFError, OSError):
            ready = False
        if not ready:
            self._process.join(10)
            code = self._process.exitcode
            self._stop()
            raise WorkerFailed(
                f"the worker process did not start within {self._limits.start:.0f} s"
                if code is None
                else f"the worker process ended with exit code {code} before its first job"
            )

    def _hung(self, job: Job) -> Outcome:
        stack = self._notes.read_text(encoding="utf-8") if self._notes.exists() else ""
        where = "; ".join(line.strip() for line in stack.splitlines()[1:5])
        text = f"no answer within {self._limits.job:.0f} s"
        return Outcome(job, "hung", f"{text}; it was in: {where}" if where else text)

    def _crashed(self, job: Job) -> Outcome:
        self._process.join(10)
        code = self._process.exitcode
        reason = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return Outcome(job, "crashed", f"the process ended with {reason}")

    def _stop(self) -> None:
        if self._process is None:
            return
        self._connection.close()  # an idle worker ends by itself
        self._process.join(0.2)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(10)
        self._process = self._connection = None


def run_all(jobs: Iterable[Job], worker: Worker) -> Iterator[Outcome]:
    """Each job's outcome as it comes.

    A worker that cannot be started twice in a row ends it all: WorkerFailed.
    """
    failed_before = False
    for job in jobs:
        try:
            yield worker.run(job)
            failed_before = False
        except WorkerFailed as error:
            if failed_before:
                raise
            failed_before = True
            yield Outcome(job, "crashed", str(error))
