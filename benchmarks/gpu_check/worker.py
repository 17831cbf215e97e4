"""The process that does the jobs: one at a time, an answer to each, until something breaks it."""

from __future__ import annotations

import faulthandler
import os
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TextIO

from benchmarks.cases.protocol import Case
from benchmarks.gpu_check import network
from benchmarks.gpu_check.checking import check
from benchmarks.gpu_check.device import DEVICES, Device
from benchmarks.gpu_check.jobs import NETWORK, Groups, Job, Outcome, find, load
from benchmarks.gpu_check.measuring import measure
from rewardprop_fast.errors import ConfigError

_KINDS: dict[str, Callable[[Case, Job, Device], Outcome]] = {"check": check, "time": measure}


def serve(connection: Connection, device_type: str, source: str, notes: str) -> None:
    """Answer each Job that comes through ``connection`` with (Outcome, whether to go on).

    ``notes`` is a file for the stack of a job that hangs: (seconds, Job) comes, and shortly before
    the seconds are over the stack is written.
    """
    # Nothing anybody could act on, and it would stand between the progress bar's lines.
    warnings.simplefilter("ignore")
    device = DEVICES[device_type]()
    device.prepare()
    groups = load(source)
    with open(notes, "w", encoding="utf-8") as file:
        connection.send("ready")
        while (message := _next(connection)) is not None:
            seconds, job = message
            connection.send(_answer(job, groups, device, seconds, file))


def _next(connection: Connection) -> tuple[float, Job] | None:
    """None where the other end is closed: there is no more to do."""
    try:
        message: tuple[float, Job] = connection.recv()
    except EOFError:
        return None
    return message


def _answer(
    job: Job, groups: Groups, device: Device, seconds: float, notes: TextIO
) -> tuple[Outcome, bool]:
    notes.seek(0)
    notes.truncate()
    faulthandler.dump_traceback_later(0.9 * seconds, file=notes)
    try:
        return do(job, groups, device)
    finally:
        faulthandler.cancel_dump_traceback_later()


def do(job: Job, groups: Groups, device: Device) -> tuple[Outcome, bool]:
    """The outcome, whatever happens, and whether this process can go on."""
    try:
        if job.group == NETWORK:
            return network.check(job, device), True
        return _KINDS[job.kind](find(groups, job), job, device), True
    except ConfigError as error:  # the backend that was asked for is not legal here
        return Outcome(job, "not here", _cannot(error)), True
    except ImportError as error:
        status = "not here" if not job.ours else "error"
        return Outcome(job, status, f"{type(error).__name__}: {error}"), True
    except Exception as error:  # a row of the table, and the next job
        if device.out_of_memory(error):
            outcome = Outcome(job, "out of memory", _first_line(error))
        else:
            outcome = Outcome(job, "error", f"{type(error).__name__}: {error}\n{_where(error)}")
        broken = device.broken_by(error)
    # Outside of the handler: the error's frames hold the tensors.
    if not broken:
        _release(device)
    return outcome, not broken


def _release(device: Device) -> None:
    try:
        device.release()
    except Exception as error:
        print(f"memory could not be released: {error}", flush=True)


def _cannot(error: ConfigError) -> str:
    """The reason alone, without who asked for what."""
    text = str(error)
    _, found, reason = text.partition(" here: ")
    return reason.rpartition(". Use ")[0] if found else text


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def _where(error: BaseException) -> str:
    """The last calls before the error, innermost last."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    return "; ".join(f"{os.path.basename(f.filename)}:{f.lineno} {f.name}" for f in frames)
