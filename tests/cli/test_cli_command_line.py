"""The command line itself: help that is fast, mistakes that are named, exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rewardprop_fast import presets
from rewardprop_fast.cli import main
from rewardprop_fast.version import __version__

ROOT = Path(__file__).parents[2]
VERBS = [
    "quickstart",
    "plan",
    "train",
    "sample",
    "export",
    "mix",
    "convert-reward",
    "presets",
    "settings",
    "doctor",
]


def test_help_errors_and_presets_wait_for_no_heavy_library(tmp_path: Path) -> None:
    script = """
import sys
from rewardprop_fast.cli import main
assert main(["--help"]) == 0
assert main(["train", "--help"]) == 0
assert main(["train", "nothing.yaml"]) == 2
assert main(["sample", "--prompts", "a cat"]) == 2
assert main(["presets"]) == 0
print(*(sorted({"torch", "diffusers", "transformers", "matplotlib"} & set(sys.modules))), "loaded")
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].strip() == "loaded"


def test_a_config_is_judged_without_diffusers(tmp_path: Path) -> None:
    """torch is needed to ask for a GPU; diffusers takes longer and is not."""
    script = """
import sys
from rewardprop_fast.cli import main
assert main(["train", "quickstart", "train.stepps=3"]) == 2
assert "diffusers" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_as_a_process_version_help_and_a_reader_that_leaves(process, tmp_path: Path) -> None:
    version = process("--version", cwd=tmp_path)
    out, err = version.communicate()
    assert (version.returncode, out, err) == (0, f"rewardprop {__version__}\n", "")

    wrong = process("trian", cwd=tmp_path)
    out, err = wrong.communicate()
    assert (wrong.returncode, out) == (2, "")
    assert "Did you mean train?" in err
    assert len(err.splitlines()) == 1

    listing = process("presets", "show", "quickstart", cwd=tmp_path)
    assert listing.stdout is not None
    assert listing.stderr is not None
    listing.stdout.close()
    assert listing.stderr.read() == ""
    assert listing.wait() == 141
    listing.stderr.close()


def test_python_m_of_the_package_is_the_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rewardprop_fast", "presets"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == presets.names()


def test_the_overview_names_every_verb(command) -> None:
    overview = command("--help")
    assert overview.code == 0
    for verb in VERBS:
        assert f"\n    {verb}" in overview.out
    assert "rewardprop quickstart " in overview.out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_within_80_columns(
    verb: str, command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    answer = command(verb, "--help")
    assert answer.code == 0
    assert "examples:" in answer.out
    assert max(map(len, answer.out.splitlines())) <= 80


def test_nothing_at_all_shows_the_overview(command) -> None:
    answer = command()
    assert answer.code == 2
    assert "verbs:" in answer.err


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("trian", "Did you mean train?"),
        ("train", "CONFIG"),
        ("train nothing.yaml", "There is no config file nothing.yaml"),
        ("train quickstrat", "Did you mean quickstart?"),
        ("train quickstart --untl 3", "Did you mean --until?"),
        ("train quickstart --until three", "--until"),
        ("train quickstart --until -1", "--until"),
        ("quickstart --steps many", "--steps"),
        ("sample --prompts cat", "--output"),
        ("sample --output a.png", "--prompts-file"),
        ("sample --prompts cat --prompts-file f --output a.png", "one of them"),
        ("sample --prompts cat --output a.gif", ".png"),
        ("sample --prompts cat --output a.png --compare", "--lora"),
        ("sample --prompts cat --output a.png --lora nowhere", "nowhere"),
        ("sample --prompts cat --output a.png --count 0", "--count"),
        ("sample --prompts cat --output a.png --dtype int8", "bfloat16"),
        ("sample --prompts-file nofile --output a.png", "nofile"),
        ("export nowhere --output o", "nowhere"),
        ("export . --output o --format konya", "Did you mean kohya?"),
        ("presets lst", "Did you mean list?"),
        ("presets show quickstat", "Did you mean quickstart?"),
        ("presets copy", "NAME"),
        ("presets copy quickstart no/such/folder/x.yaml", "cannot be written"),
        ("settings nosuchsetting", "nosuchsetting"),
        ("doctor --jsn", "Did you mean --json?"),
        ("doctor extra", "extra"),
    ],
)
def test_mistakes_are_named_in_one_line(
    line: str, named: str, command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = command(*line.split())
    assert answer.code == 2
    assert answer.out == ""
    assert answer.err.startswith("error: ")
    assert named in answer.err
    assert len(answer.err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "code", "named"),
    [
        (KeyboardInterrupt(), 130, "stopped"),
        (SystemExit(143), 143, ""),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "train.batch_size"),
        (MemoryError(), 1, "train.batch_size"),
        (OSError(28, "No space left on device", "out/x"), 1, "out/x: No space left on device"),
        (KeyError("surprise"), 1, "surprise"),
    ],
)
def test_whatever_is_raised_ends_in_a_sentence_and_a_code(
    error: BaseException, code: int, named: str, command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("rewardprop_fast.cli.common.read_config", fail)
    answer = command("train", "quickstart")
    assert answer.code == code
    assert named in answer.err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_before_training_starts_leaves_quietly(
    number: signal.Signals, code: int, command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "rewardprop_fast.cli.common.read_config", lambda *_: os.kill(os.getpid(), number)
    )
    earlier = signal.getsignal(number)
    answer = command("train", "quickstart")
    assert (answer.code, answer.out) == (code, "")
    assert signal.getsignal(number) == earlier


def test_a_traceback_is_there_for_the_asking(command, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr("rewardprop_fast.cli.common.read_config", fail)
    assert "Traceback" not in command("train", "quickstart").err
    for line in (["train", "quickstart", "--traceback"], ["--traceback", "train", "quickstart"]):
        assert "Traceback" in command(*line).err
    monkeypatch.setenv("REWARDPROP_TRACEBACK", "1")
    assert main(["train", "quickstart"]) == 1


def test_presets_are_listed_shown_and_copied(
    command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("presets").out == command("presets", "list").out
    shown = command("presets", "show", "draft-lv")
    copied = command("presets", "copy", "draft-lv", "mine.yaml")
    assert (copied.code, "mine.yaml" in copied.out) == (0, True)
    assert (tmp_path / "mine.yaml").read_text(encoding="utf-8") == shown.out
    again = command("presets", "copy", "draft-lv", "mine.yaml")
    assert again.code == 2
    assert "not overwritten" in again.err


def test_settings_can_be_searched(command) -> None:
    everything = command("settings").out
    lora = command("settings", "train.lora").out
    assert "train.optimizer.learning_rate = 0.0004" in everything
    assert "train.lora.rank = 8" in lora
    assert "train.optimizer" not in lora


def test_doctor_speaks_to_people_and_to_programs(command) -> None:
    import json

    people, programs = command("doctor"), command("doctor", "--json")
    assert (people.code, programs.code) == (0, 0)
    assert "native module" in people.out
    assert json.loads(programs.out)["versions"]["rewardprop_fast"] == __version__
