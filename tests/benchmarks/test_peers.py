"""The race's parts without a race: processes, the judgement of gradients, who stays, the table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.peers import environments, race, table
from benchmarks.peers.protocol import Worker, WorkerError
from benchmarks.peers.race import Entry, Pool, alone, compare, interleave, judge
from benchmarks.peers.reward import Reward
from benchmarks.peers.workloads import CPU_DEFAULT, GPU_DEFAULT, WORKLOADS

CHILD = """
import os, sys
from benchmarks.peers.protocol import serve

def add(a, b):
    print("a library greets")
    os.system("echo and its child too")
    return {"sum": a + b}

def fail():
    raise ValueError("no such thing")

def die():
    print("out of luck", file=sys.stderr)
    os._exit(3)

serve({"add": add, "fail": fail, "die": die, "nothing": lambda: None})
"""


class Scripted(Worker):
    def _command(self, python: str, competitor: str) -> list[str]:
        return [python, "-c", CHILD]


def test_a_worker_answers_whatever_is_printed_within() -> None:
    with Scripted(sys.executable, "scripted", 1) as worker:
        assert worker.ask("add", a=1, b=2) == {"sum": 3}
        assert worker.ask("nothing") == {}
        with pytest.raises(WorkerError, match="scripted at 'fail': ValueError: no such thing"):
            worker.ask("fail")
        assert worker.ask("add", a=2, b=2) == {"sum": 4}  # it goes on after an error
        with pytest.raises(WorkerError, match=r"ended \(3\) at 'die': out of luck"):
            worker.ask("die")
    assert worker.process.poll() == 3


def test_a_worker_ends_with_its_block() -> None:
    with Scripted(sys.executable, "scripted", 1) as worker:
        pass
    assert worker.process.poll() == 0


GRADIENTS = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])}


def test_the_comparison_is_that_of_all_gradients_together() -> None:
    error, cosine = compare({"a": torch.tensor([3.0, 0.5]), "b": GRADIENTS["b"]}, GRADIENTS)
    assert error == pytest.approx(0.1)
    assert cosine == pytest.approx(25 / (5 * 25.25**0.5))
    error, cosine = compare({k: -v for k, v in GRADIENTS.items()}, GRADIENTS)
    assert (error, cosine) == pytest.approx((2.0, -1.0))
    error, cosine = compare({k: 2 * v for k, v in GRADIENTS.items()}, GRADIENTS)
    assert (error, cosine) == pytest.approx((1.0, 1.0))  # a cosine alone would not see it


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"a": GRADIENTS["a"]}, "other parameters: b"),
        ({**GRADIENTS, "b": torch.zeros(2)}, "b has the shape"),
        ({**GRADIENTS, "b": torch.tensor([[float("nan")]])}, "not finite"),
    ],
)
def test_what_cannot_be_compared_is_refused(found: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        compare(found, GRADIENTS)


def test_a_reference_of_zeros_proves_nothing() -> None:
    zeros = {k: torch.zeros_like(v) for k, v in GRADIENTS.items()}
    with pytest.raises(ValueError, match="zero"):
        compare(zeros, zeros)


def entry(competitor: str, error: float | None, **more: Any) -> Entry:
    return Entry(competitor, error=error, **more)


def test_the_limit_is_roundings_or_twice_that_of_the_plain_forms() -> None:
    entries = [entry("loop", 0.03), entry("trl", 0.05), entry("ours", 0.059), entry("x", 0.061)]
    judge(entries, "bfloat16")
    assert [e.counts for e in entries] == [True, True, True, False]
    # a bad run of this library cannot widen it
    entries = [entry("loop", 1e-5), entry("ours", 0.5)]
    judge(entries, "float32")
    assert [e.counts for e in entries] == [True, False]
    entries = [entry("ours", 0.5)]
    judge(entries, "bfloat16")
    assert not entries[0].counts
    entries = [entry("ours", None), entry("loop", 0.0, failed="killed")]
    judge(entries, "float32")
    assert not any(e.counts for e in entries)


class Fake:
    """A competitor that answers at once. Sizes in bytes."""

    log: list[tuple[str, str]] = []  # noqa: RUF012 - shared by all on purpose
    gradients = {  # noqa: RUF012
        "loop": GRADIENTS,
        "ours": {k: v * 1.0001 for k, v in GRADIENTS.items()},
        "wrong": {k: -v for k, v in GRADIENTS.items()},
        "broken": GRADIENTS,
    }

    def __init__(self, competitor: str) -> None:
        self.competitor = competitor
        self.log.append((competitor, "start"))

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        self.log.append((self.competitor, command))
        if self.competitor == "broken" and command == "peak":
            raise WorkerError("broken ended")
        if command == "gradients":
            save_file(self.gradients[self.competitor], arguments["path"])
        return {
            "prepare": {"seconds": 1.0, "versions": {"torch": "0"}},
            "gradients": {"rewards": [0.0]},
            "step": {"seconds": 2.0, "phases": {"prefix": 1.5}},
            "peak": {"idle": 10, "step_peak": 30, "process_peak": 40},
            "tracked": {"tracked_peak": 25},
        }[command]

    def close(self) -> None:
        self.log.append((self.competitor, "close"))


@pytest.fixture
def log() -> list[tuple[str, str]]:
    Fake.log = []
    return Fake.log


def test_a_run_whose_gradients_disagree_is_not_raced(log: list[tuple[str, str]]) -> None:
    entries = [Entry(name) for name in ("loop", "wrong", "broken", "ours")]
    pool = Pool(Fake, {}, limit=1000)
    for one in entries:
        alone(pool, one, [GRADIENTS, GRADIENTS], track=True)
    judge(entries, "float32")
    before = len(log)
    interleave(pool, entries, repeats=3)
    pool.close()
    steps = [name for name, command in log[before:] if command == "step"]
    # one to warm up for whoever had to make room; what is timed is in turning order
    assert steps == ["loop", "loop", "ours", "ours", "loop", "loop", "ours"]
    assert {e.competitor: len(e.seconds) for e in entries} == {
        "loop": 3,
        "wrong": 0,
        "broken": 0,
        "ours": 3,
    }
    assert entries[2].failed == "broken ended"
    assert {name for name, command in log if command == "close"} == {e.competitor for e in entries}
    # alone: nobody else is there at a competitor's peak
    for place in (i for i, (_, command) in enumerate(log) if command == "peak"):
        there: set[str] = set()
        for name, command in log[:place]:
            there = there | {name} if command == "start" else there
            there = there - {name} if command == "close" else there
        assert there == {log[place][0]}
    row = entries[0].to_dict()
    assert (row["median"], row["min"], row["phases"]) == (2.0, 2.0, {"prefix": 1.5})
    assert json.loads(json.dumps(row)) == row


def test_the_longest_unused_makes_room(log: list[tuple[str, str]]) -> None:
    entries = [entry(n, 0.0, idle=10, step_peak=30, process_peak=40) for n in ("a", "b", "c")]
    # two idle and one at its start: 10 + 40; three would be 20 + 40
    pool = Pool(Fake, {}, limit=55)
    for one in entries:
        pool.get(one)
    assert list(pool.alive) == ["b", "c"]
    pool.get(entries[1])
    assert list(pool.alive) == ["c", "b"]
    pool.get(entries[0])
    assert list(pool.alive) == ["b", "a"]
    pool.close()
    assert log.count(("a", "start")) == 2
    assert len([one for one in log if one[1] == "close"]) == 4


def rows() -> list[dict[str, Any]]:
    made = []
    for name, seconds, error, failed in (
        ("ours", [1.0, 2.0], 1e-4, None),
        ("trl", [3.0, 8.0], 1e-4, None),
        ("loop", [2.0, 2.0], 1e-4, None),
        ("loop-compile", [], 0.4, None),
        ("loop-xformers", [], None, "no | such\nmodule"),
    ):
        one = Entry(name, failed, error, 1.0, 1e-3, step_peak=2**30, tracked_peak=2**29)
        one.seconds = seconds
        made.append(
            {"workload": "tiny", "title": "tiny", "dtype": "float32", **one.to_dict(), "share": 0.5}
        )
    return made


def test_the_table_says_who_is_how_much_slower_and_who_does_not_count() -> None:
    lines = table.table(rows()).splitlines()
    assert len(lines) == 7
    assert {line.count("|") for line in lines} == {10}
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert [c[1] for c in cells][:3] == ["rewardprop_fast", "diffusers + peft loop", "TRL 0.23.1"]
    # of the rounds' own ratios, 3 and 4: not of the medians, 5.5 / 1.5
    assert cells[2][2:6] == ["5.5", "3", "3.50×", "50 %"]
    assert cells[0][4] == ""
    assert cells[0][6:8] == ["1.00 GiB", "0.50 GiB"]
    assert "does not count" in cells[3][2]
    assert "limit 1.0e-03" in cells[3][8]
    assert cells[4][2] == "did not run: no / such module"


def test_new_rows_take_the_place_of_the_same_race(tmp_path: Path) -> None:
    old = [{**row, "dtype": "bfloat16"} for row in rows()] + rows()
    new = rows()[:1]
    merged = table.merge(old, new)
    assert len(merged) == 6
    assert [row["competitor"] for row in merged if row["dtype"] == "float32"] == ["ours"]
    table.plot(merged, tmp_path / "plot.svg")
    assert 1000 < (tmp_path / "plot.svg").stat().st_size < 60_000


def test_what_was_to_be_raced_is_there() -> None:
    named = {(w.model, w.size, w.steps, w.k, w.batch) for w in map(WORKLOADS.get, CPU_DEFAULT)}
    assert named == {
        ("bundled", 64, 20, 1, 8),
        ("bundled", 64, 20, 5, 8),
        ("sd15", 256, 5, 1, 1),
        ("sd15", 256, 5, 5, 1),
        ("sd15", 256, 20, 1, 1),
        ("sd15", 512, 3, 1, 1),
        ("sdxl", 512, 3, 1, 1),
    }
    gpu = {(w.model, w.size, w.steps, w.k) for w in map(WORKLOADS.get, GPU_DEFAULT)}
    assert gpu == {(m, s, 50, k) for m, s in (("sd15", 512), ("sdxl", 1024)) for k in (1, 5)}


def test_the_reward_is_the_same_everywhere_and_has_a_gradient() -> None:
    images = torch.rand(2, 3, 40, 40, requires_grad=True)
    torch.manual_seed(1)
    first = Reward()(images, ["a fox", "a cat"])
    torch.manual_seed(2)
    second = Reward()(images, ["a fox", "a cat"])
    assert torch.equal(first, second)
    assert first.shape == (2,)
    (gradient,) = torch.autograd.grad(first.sum(), images)
    assert gradient.flatten(1).any(1).all()


def test_without_a_registry_it_says_what_to_do(tmp_path: Path, monkeypatch: Any) -> None:
    def run(command: list[str], **_: Any) -> Any:
        if "venv" in command:
            Path(command[-1]).mkdir(parents=True)
            return subprocess.CompletedProcess(command, 0, "", "")
        return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: no route to host\n")

    monkeypatch.setattr(environments.subprocess, "run", run)
    with pytest.raises(environments.EnvironmentError_) as caught:
        environments.trl_python(tmp_path)
    for words in ("no route to host", "--competitors ours", "--trl-python"):
        assert words in str(caught.value)


def test_an_environment_is_made_once(tmp_path: Path, monkeypatch: Any) -> None:
    commands = []

    def run(command: list[str], **_: Any) -> Any:
        commands.append(command)
        if "venv" in command:
            python = Path(command[-1], "bin", "python")
            python.parent.mkdir(parents=True)
            python.touch()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(environments.subprocess, "run", run)
    python = environments.trl_python(tmp_path)
    made = len(commands)
    assert "trl==0.23.1" in commands[-1]
    assert environments.trl_python(tmp_path) == python
    assert len(commands) == made
    # another version of anything makes it again
    (tmp_path / "trl-environment" / "complete.json").write_text('["torch==1.0"]')
    environments.trl_python(tmp_path)
    assert len(commands) > made
    assert race.PLAIN == ("loop", "loop-checkpoint", "trl")
