"""From cases to rows: record, compile, count, model."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import layer_cases
from benchmarks.cases.protocol import Case
from benchmarks.static_gpu import launches, sources, traffic, workers
from benchmarks.static_gpu.compiling import CACHE, Resources, resources
from benchmarks.static_gpu.devices import DEVICES, Device
from benchmarks.static_gpu.launches import CaseLaunches, PlainLaunch
from benchmarks.static_gpu.model import Cache, Modelled, model
from benchmarks.static_gpu.signature import Configuration
from benchmarks.static_gpu.traffic import Stream, Traffic


@dataclass(frozen=True)
class Scenario:
    """A network at the size it is used at."""

    name: str
    network: str
    pixels: int
    batch: int

    def cases(self) -> list[Case]:
        return layer_cases(self.network, self.pixels, self.batch)


#: Guidance doubles the batch of a UNet; the decoder sees one image.
SCENARIOS = (
    Scenario("SD 1.5, 512²", "sd15", 512, 2),
    Scenario("SDXL, 1024²", "sdxl", 1024, 2),
    Scenario("VAE decoder, 512²", "vae", 512, 1),
    Scenario("VAE decoder, 1024²", "vae", 1024, 1),
)


#: Every launch in each of them is compiled, for every architecture.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

#: Times and bytes are modelled in these; bytes are counted once for both, whose tiles are alike.
MODELLED = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Row:
    """One pass of one case on one device; seconds and bytes are modelled."""

    scenario: str
    recorded: CaseLaunches
    device: Device
    modelled: tuple[Modelled, ...]  # of each launch
    matmul_flops: float  # of products in the launches, padding included
    tensor_flops: float  # those whose operands tensor cores take

    @property
    def seconds(self) -> float:
        return sum(launch.seconds for launch in self.modelled)

    @property
    def bytes_moved(self) -> float:
        return sum(launch.bytes_moved for launch in self.modelled)

    @property
    def bound(self) -> str:
        """That of the launch that takes longest."""
        longest = max(self.modelled, key=lambda launch: launch.seconds, default=None)
        return "nothing" if longest is None else longest.bound


@dataclass(frozen=True)
class Found:
    """Everything that the table and the gates need."""

    configurations: dict[str, Configuration]
    resources: dict[tuple[str, int], Resources]  # by configuration key and architecture
    operators: dict[str, set[str]]  # configuration key -> operators that launch it
    rows: list[Row]
    refused: list[str]  # cases that have no Triton form, and why


def record(scenarios: Iterable[Scenario]) -> list[tuple[str, CaseLaunches]]:
    """Every launch in every dtype on every architecture."""
    return [
        (scenario.name, one)
        for scenario in scenarios
        for dtype in DTYPES
        for device in DEVICES
        for one in launches.of_cases(scenario.cases(), dtype, device.arch)
    ]


def collect(
    recorded: list[tuple[str, CaseLaunches]],
    *,
    cores: int | None = None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Found:
    """Compile and count each distinct launch once, then model every pass in 16 bits.

    ``progress(what, done, of)`` is called as the work goes on.
    """
    cores = cores or os.cpu_count() or 1
    configurations: dict[str, Configuration] = {}
    operators: dict[str, set[str]] = {}
    jobs: dict[tuple[str, int], Configuration] = {}
    distinct: dict[Any, PlainLaunch] = {}
    refused: dict[str, None] = {}
    for _, one in recorded:
        if one.refusal:
            refused[f"{one.case.operator} {one.case.name}: {one.refusal}"] = None
        for launch in one.launches:
            key = launch.configuration.key
            configurations[key] = launch.configuration
            operators.setdefault(key, set()).add(one.case.operator)
            jobs[key, one.arch] = launch.configuration
            if one.dtype in MODELLED:
                distinct.setdefault(launch.key, launch)
    compiled = _compile(jobs, cores, progress)
    counted = _count(distinct, cores, progress)
    rows = [
        _row(name, one, compiled, counted)
        for name, one in recorded
        if one.launches and one.dtype in MODELLED
    ]
    return Found(configurations, compiled, operators, rows, list(refused))


def _row(
    scenario: str,
    one: CaseLaunches,
    compiled: dict[tuple[str, int], Resources],
    counted: dict[Any, Traffic],
) -> Row:
    device = next(device for device in DEVICES if device.arch == one.arch)
    cache = Cache(device)
    modelled = []
    products = on_tensor_cores = 0.0
    for launch in one.launches:
        traffic_ = counted[launch.key]
        needs = compiled[launch.configuration.key, one.arch]
        cached = {name for name in traffic_.streams if launch.memory[name] in cache.held}
        warps = launch.configuration.num_warps
        modelled.append(model(traffic_, needs, warps, device, cached))
        for name, stream in traffic_.streams.items():
            cache.use(launch.memory[name], stream.nbytes)
        products += traffic_.flops * traffic_.programs
        if traffic_.operand != "float32":
            on_tensor_cores += traffic_.flops * traffic_.programs
    return Row(scenario, one, device, tuple(modelled), products, on_tensor_cores)


def _compile(
    jobs: dict[tuple[str, int], Configuration],
    cores: int,
    progress: Callable[[str, int, int], None],
) -> dict[tuple[str, int], Resources]:
    tasks = [(configuration, arch, CACHE) for (_, arch), configuration in jobs.items()]
    with workers.pool(interpreted=False, workers=cores) as executor:
        found = workers.in_order(
            executor, resources, tasks, _Ticker("compile", len(tasks), progress)
        )
    return dict(zip(jobs, found, strict=True))


def _count(
    distinct: dict[Any, PlainLaunch], cores: int, progress: Callable[[str, int, int], None]
) -> dict[Any, Traffic]:
    tasks = [(launch, _traffic_place(launch)) for launch in distinct.values()]
    known = [_known_traffic(place) for _, place in tasks]
    missing = [task for task, one in zip(tasks, known, strict=True) if one is None]
    if missing:
        ticker = _Ticker("count", len(missing), progress)
        with workers.pool(interpreted=True, workers=cores) as executor:
            workers.in_order(executor, count_one, missing, ticker)
    found = [one or _known_traffic(place) for one, (_, place) in zip(known, tasks, strict=True)]
    return {key: one for key, one in zip(distinct, found, strict=True) if one is not None}


def count_one(launch: PlainLaunch, place: Path) -> None:
    """Count in a process with the interpreter; the result is kept at once."""
    place.parent.mkdir(parents=True, exist_ok=True)
    part = place.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(asdict(traffic.traffic(launch))))
    part.replace(place)


def _known_traffic(place: Path) -> Traffic | None:
    if not place.exists():
        return None
    fields = json.loads(place.read_text())
    streams = {
        name: Stream(**{**stream, "tiles": tuple(stream["tiles"])})
        for name, stream in fields.pop("streams").items()
    }
    return Traffic(**fields, streams=streams)


def _traffic_place(launch: PlainLaunch) -> Path:
    text = f"{_folder(launch.configuration.module)}\n{launch.key}\n{_counting()}"
    return CACHE / "traffic" / f"{hashlib.sha256(text.encode()).hexdigest()}.json"


@cache
def _folder(module: str) -> str:
    """The code beside a kernel, which it may call."""
    file = Path(str(import_module(module).__file__))
    return "\n".join(sources.code(path) for path in sorted(file.parent.glob("*.py")))


@cache
def _counting() -> str:
    return sources.code(Path(traffic.__file__))


class _Ticker:
    """Counts finished tasks and says so."""

    def __init__(self, what: str, total: int, progress: Callable[[str, int, int], None]) -> None:
        self.what, self.total, self.progress, self.done = what, total, progress, 0

    def __call__(self) -> None:
        self.done += 1
        self.progress(self.what, self.done, self.total)
