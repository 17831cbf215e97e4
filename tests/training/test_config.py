"""Settings: round trips, overrides, and every mistake of a file in one report."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch

from rewardprop_fast.errors import ConfigError
from rewardprop_fast.lora.targets import PRESETS
from rewardprop_fast.methods import (
    DDPO,
    METHODS,
    SRPO,
    AlignProp,
    DRaFT,
    DRaFTLV,
    DRaFTPlus,
    DRTune,
    Method,
    ReFL,
)
from rewardprop_fast.rewards import REWARDS
from rewardprop_fast.training.config import (
    LoRAConfig,
    ModelConfig,
    OptimizerConfig,
    OutputConfig,
    PromptsConfig,
    RewardConfig,
    RunConfig,
    SamplingConfig,
    TrainConfig,
    describe,
)

SMALL = "reward: [style]\n"


def run(text: str = SMALL, *overrides: str) -> RunConfig:
    return RunConfig.from_yaml(text, overrides)


def report(text: str = SMALL, *overrides: str) -> list[str]:
    """The lines of the error, without the headline."""
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_yaml(text, overrides)
    head, *lines = str(caught.value).splitlines()
    count = re.search(r"has (\d+) problems?:$", head)
    assert count is not None
    assert int(count[1]) == len(lines)
    return [line.strip() for line in lines]


# ---------------------------------------------------------------------- defaults and round trips


def test_defaults_are_those_of_the_paper() -> None:
    train = run().train
    assert (train.steps, train.batch_size, train.lora.rank) == (2000, 4, 8)
    assert (train.sampling.steps, train.sampling.guidance_scale) == (50, 7.5)
    assert train.optimizer == OptimizerConfig(4e-4, (0.9, 0.999), 0.1)


def test_yaml_and_python_build_the_same() -> None:
    text = """
    model: {path: owner/model, variant: fp16}
    prompts: {list: [a cat, "no", "1e-4", "2024-01-01"]}
    reward:
      - style
      - {name: jpeg_compressibility, weight: -0.5, args: {quality: 80, deep: [1, {a: null}]}}
    heldout_reward: [{name: style, args: {copy: heldout}}]
    train:
      method: {name: draft, k: 3}
      sampling: {steps: 20, eta: 1, height: 512}
      lora: {target_modules: [to_q, to_v], alpha: 16}
      optimizer: {betas: [0.8, 0.99], schedule: cosine, ema_decay: 0.99}
      output: {directory: "runs/ä b"}
      seed: 123456789012345678
      target_reward: 1
    """
    expected = RunConfig(
        model=ModelConfig("owner/model", variant="fp16"),
        prompts=PromptsConfig(list=("a cat", "no", "1e-4", "2024-01-01")),
        reward=(
            RewardConfig("style"),
            RewardConfig("jpeg_compressibility", -0.5, {"quality": 80, "deep": [1, {"a": None}]}),
        ),
        heldout_reward=(RewardConfig("style", args={"copy": "heldout"}),),
        train=TrainConfig(
            method=DRaFT(k=3),
            sampling=SamplingConfig(20, eta=1.0, height=512),
            lora=LoRAConfig(alpha=16.0, target_modules=("to_q", "to_v")),
            optimizer=OptimizerConfig(betas=(0.8, 0.99), schedule="cosine", ema_decay=0.99),
            output=OutputConfig("runs/ä b"),
            seed=123456789012345678,
            target_reward=1.0,
        ),
    )
    config = run(text)
    assert config == expected
    assert type(config.train.sampling.eta) is float
    assert run(config.to_yaml()) == config
    assert run(config.to_yaml()).to_yaml() == config.to_yaml()
    assert RunConfig.from_dict(config.to_dict()) == config
    assert TrainConfig.from_dict(config.train.to_dict()) == config.train


def test_resolved_yaml_names_every_setting() -> None:
    text = run().to_yaml()
    for key, *_ in describe():
        leaf = key.rpartition(".")[2]
        if key.startswith(("train.method.", "heldout_reward.")):
            continue
        assert re.search(rf"^\W*{leaf}:", text, re.MULTILINE), key


@pytest.mark.parametrize("value", [1e-4, 1 / 3, 5e-324, 1.7976931348623157e308, 1e22, 123456.789])
def test_floats_round_trip_exactly(value: float) -> None:
    config = RunConfig((RewardConfig("style", weight=value, args={"x": value, "y": -value}),))
    assert run(config.to_yaml()) == config


TEXTS_LIKE_NUMBERS = ["1e-4", "1e5", ".5e3", "0x10", "1_000", ".nan", "12:30:00", "2024-01-01"]
TEXTS_LIKE_YAML = ["yes", "null", "~", "", " ", "a: b", "#", "*a", "- x", "{}", "=", "<<", "'", '"']
OTHER_TEXTS = ["two\nlines", "\ttab", "ä", "é\u2028", "a cat, a dog", "x" * 300]


@pytest.mark.parametrize("text", [*TEXTS_LIKE_NUMBERS, *TEXTS_LIKE_YAML, *OTHER_TEXTS])
def test_texts_stay_texts(text: str) -> None:
    config = RunConfig((RewardConfig("style", args={"a": text, "list": [text]}),))
    config = dataclasses.replace(config, prompts=PromptsConfig(list=(text, "b")))
    assert run(config.to_yaml()) == config


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", ".1e-3", "0.0001", "'1e-4'", "+1e-4"])
def test_all_spellings_of_a_float(text: str) -> None:
    assert run(SMALL, f"train.optimizer.learning_rate={text}").train.optimizer.learning_rate == 1e-4


def test_whole_numbers_may_be_written_as_floats_only_if_whole() -> None:
    assert run(SMALL, "train.steps=2e3").train.steps == 2000
    assert type(run(SMALL, "train.steps=2e3").train.steps) is int
    assert report(SMALL, "train.steps=2.5") == [
        "train.steps: got 2.5; allowed: a whole number at least 1. "
        "Leave it out for the default, 2000."
    ]


def test_every_method_round_trips() -> None:
    methods = (
        DRaFT(),
        DRaFT(2),
        DRaFTLV(5),
        AlignProp(2, 20, "geometric", 0.5, True),
        ReFL(0.5),
        DRTune(4, 7),
        SRPO("Realistic", "Painting", 2, 1.0),
        DRaFTPlus(3, 0.5),
        DDPO(1e-3, 3, 5.0, 32, 8),
    )
    assert set(METHODS) == {method.name for method in methods}
    for method in methods:
        sampling = SamplingConfig(eta=1.0)
        train = TrainConfig(method=method, sampling=sampling)
        config = RunConfig((RewardConfig("style"),), train=train)
        assert run(config.to_yaml()).train.method == method


def test_presets_of_layers_are_those_of_the_lora_room() -> None:
    for preset in PRESETS:
        assert LoRAConfig(target_modules=preset).target_modules == preset  # type: ignore[arg-type]
    choices = get_args(get_args(get_type_hints(LoRAConfig)["target_modules"])[0])
    assert set(choices) == set(PRESETS)


def test_short_forms() -> None:
    config = run("reward: [style, {name: alignment}]\ntrain: {method: draft_lv}")
    assert config.reward == (RewardConfig("style"), RewardConfig("alignment"))
    assert config.train.method == DRaFTLV()


def test_a_section_whose_lines_are_all_commented_out() -> None:
    assert run("reward: [style]\ntrain:\n  # steps: 3\nmodel:\n") == run()


def test_settings_share_nothing_with_what_they_were_made_of() -> None:
    args = {"list": [1]}
    reward = RewardConfig("style", args=args)
    args["list"].append(2)
    assert reward.args == {"list": [1]}


# ---------------------------------------------------------------------- where a config comes from


def test_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(SMALL, encoding="utf-8")
    assert RunConfig.from_yaml(path) == RunConfig.from_yaml(str(path)) == run()


def test_the_headline_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("reward: []")
    with pytest.raises(ConfigError, match=rf"^{re.escape(str(path))} has 1 problem:\n"):
        RunConfig.from_yaml(path)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "There is no config file .*run.yaml.*presets"),
        (lambda path: path.mkdir(), "run.yaml cannot be read: Is a directory"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00"), "run.yaml is not text in UTF-8"),
        (
            lambda path: path.write_text("a: [1\nb: 2"),
            r"run.yaml is not valid YAML \(line 2, column",
        ),
        (
            lambda path: path.write_text("a: 1\na: 2"),
            r"line 2, column 1\): the key 'a' is given twice",
        ),
        (lambda path: path.write_text("a: &x 1\nb: *x"), r"aliases .* are not supported"),
        (lambda path: path.write_text("a: " + "[" * 3000), "run.yaml is not valid YAML"),
        (lambda path: path.write_text("a: !!python/object:os.system 1"), "not valid YAML"),
        (lambda path: path.write_text("- style"), "got .*; allowed: keys and values"),
        (lambda path: path.write_text("{[1]: 2}"), "not valid YAML"),
        (lambda path: path.write_text("1: 2"), "1: unknown key; allowed: reward, model"),
        (lambda path: path.write_text(""), "reward: missing, and it has no default"),
    ],
)
def test_unreadable_files(tmp_path: Path, make: Callable[[Path], None], reason: str) -> None:
    make(tmp_path / "run.yaml")
    with pytest.raises(ConfigError, match=reason):
        RunConfig.from_yaml(tmp_path / "run.yaml")


# ---------------------------------------------------------------------- overrides


def test_overrides_are_laid_over_the_file_in_order() -> None:
    config = run(
        "reward: [style]\ntrain: {method: draft, steps: 5}",
        "train.method.k=2",
        "reward.0.weight=0.5",
        "reward.0.args.copy=heldout",
        "reward.1=jpeg_compressibility",
        "heldout_reward.0.name=alignment",
        "train.optimizer.betas.0=0.5",
        "train.sampling.negative_prompt=ugly, bad",
        "train.sampling.height=256",
        "train.sampling.height=",
        "prompts.list=[a cat, a = b]",
        "train.steps=7",
        "train.steps=8",
    )
    assert config.train.method == DRaFT(k=2)
    assert config.reward == (
        RewardConfig("style", 0.5, {"copy": "heldout"}),
        RewardConfig("jpeg_compressibility"),
    )
    assert config.heldout_reward == (RewardConfig("alignment"),)
    assert config.train.optimizer.betas == (0.5, 0.999)
    assert config.train.sampling.negative_prompt == "ugly, bad"
    assert config.train.sampling.height is None
    assert config.prompts.list == ("a cat", "a = b")
    assert config.train.steps == 8


def test_a_method_is_replaced_whole() -> None:
    text = "reward: [style]\ntrain: {method: {name: draft, k: 3}}"
    assert run(text, "train.method=draft_lv").train.method == DRaFTLV()
    assert run(text, "train.method={name: draft_lv, n: 4}").train.method == DRaFTLV(n=4)
    assert report(text, "train.method.name=draft_lv") == [
        "train.method.k: not a setting of draft_lv; it has: n. "
        "Override train.method=draft_lv to start from its defaults."
    ]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("foo", "override 'foo': write key=value, such as train.steps=100."),
        ("=3", "override '=3': write key=value"),
        ("train..steps=3", "override 'train..steps=3': write key=value"),
        ("train.stepps=3", "train.stepps: unknown key. Did you mean train.steps?"),
        ("train.steps.x=3", "train.steps.x: cannot be set: train.steps is 5, without keys"),
        ("reward.2=style", "reward.2: no such place in a list of 1; allowed: 0 to 1 (appends)."),
        ("reward.-1=style", "reward.-1: no such place in a list of 1"),
        ("reward.x=style", "reward.x: no such place in a list of 1"),
        ("reward=style", "reward: got 'style'; allowed: a list. Put it in brackets"),
        ("train.steps=[1", "train.steps: the value in 'train.steps=[1' is not valid YAML"),
        ("train.sampling.negative_prompt=", "train.sampling.negative_prompt: got nothing (null)"),
    ],
)
def test_overrides_that_cannot_be(override: str, line: str) -> None:
    lines = report("reward: [style]\ntrain: {steps: 5}", override)
    assert len(lines) == 1
    assert lines[0].startswith(line)


# ---------------------------------------------------------------------- mistakes


def test_all_mistakes_in_one_report() -> None:
    lines = report(
        """
        learning_rate: 3
        modell: x
        reward: [{name: stlye}, {nam: style}]
        train:
          method: {name: draft, k: 60}
          steps: fifty
          batch_size: 0
          dtype: fp32
          sampling: {eta: 2, hight: 3, steps: 50}
          optimizer: {learning_rate: -1, schedule: cosin, warmup_steps: -5, betas: [0.9]}
          lora: {target_modules: atention}
        """,
        "train.output.grid_size=none",
    )
    keys = [line.split(":")[0] for line in lines]
    assert sorted(keys) == sorted(
        [
            "learning_rate",
            "modell",
            "reward.1.nam",
            "reward.1.name",
            "train.method",
            "train.steps",
            "train.batch_size",
            "train.dtype",
            "train.sampling.eta",
            "train.sampling.hight",
            "train.optimizer.learning_rate",
            "train.optimizer.schedule",
            "train.optimizer.warmup_steps",
            "train.optimizer.betas",
            "train.lora.target_modules",
            "train.output.grid_size",
        ]
    )


@pytest.mark.parametrize(
    ("override", "given", "allowed"),
    [
        ("train.batch_size=0", "0", "a whole number at least 1"),
        ("train.batch_size=true", "true", "a whole number at least 1"),
        ("train.batch_size=two", "'two'", "a whole number at least 1"),
        ("train.accumulation_steps=0", "0", "a whole number at least 1"),
        ("train.seed=-1", "-1", "at least 0 and below 9223372036854775808"),
        ("train.optimizer.learning_rate=-1e-4", "-0.0001", "a number above 0"),
        ("train.optimizer.learning_rate=.nan", "nan", "a number above 0"),
        ("train.optimizer.learning_rate=.inf", "inf", "a number above 0"),
        ("train.optimizer.learning_rate=fast", "'fast'", "a number above 0"),
        ("train.optimizer.betas=[0.9, 1]", "[0.9, 1]", "each a number at least 0 and below 1"),
        ("train.optimizer.betas=[0.9]", "[0.9]", "a list of 2"),
        ("train.optimizer.ema_decay=1", "1", "above 0 and below 1, or null"),
        ("train.optimizer.max_grad_norm=0", "0", "a number above 0, or null"),
        ("train.optimizer.weight_decay=-1", "-1", "a number at least 0"),
        ("train.sampling.eta=1.01", "1.01", "a number at least 0 and at most 1"),
        ("train.sampling.eta=-0.1", "-0.1", "a number at least 0 and at most 1"),
        ("train.sampling.height=0", "0", "a whole number at least 1, or null"),
        ("train.sampling.width=-8", "-8", "a whole number at least 1, or null"),
        ("train.sampling.steps=0", "0", "a whole number at least 1"),
        ("train.lora.rank=0", "0", "a whole number at least 1"),
        ("train.lora.alpha=0", "0", "a number above 0, or null"),
        ("train.dtype=int8", "'int8'", "auto | float32 | bfloat16 | float16 | float64"),
        ("train.device=tpu", "'tpu'", "auto, cpu, cuda or cuda:N"),
        ("train.output.tensorboard=2", "2", "true or false"),
        ("train.output.directory=' '", "' '", "a folder"),
        ("train.output.keep_checkpoints=0", "0", "a whole number at least 1"),
        ("prompts.list=[cat, no]", "['cat', False]", "a list, each text, or null"),
        ("model.path=3", "3", "bundled, a folder or a hub name"),
        ("model.local_files_only='yes'", "'yes'", "true or false"),
        ("reward.0.args={x: .nan}", "{'x': nan}", "a mapping of names to plain values"),
        ("reward.0.weight=.inf", "inf", "a number"),
    ],
)
def test_types_and_ranges(override: str, given: str, allowed: str) -> None:
    key = override.partition("=")[0]
    (line,) = report(SMALL, override)
    assert line.startswith(f"{key}: got {given}; allowed: ")
    assert allowed in line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("reward: [style]\ntrian: {}", "trian: unknown key. Did you mean train?"),
        ("reward: [style]\nzzz: {}", "zzz: unknown key; allowed: reward, model, prompts"),
        (
            "reward: [style]\nlearning_rate: 1",
            "learning_rate: unknown key here. Did you mean train.optimizer.learning_rate?",
        ),
        (
            "reward: [style]\nsteps: 1",
            "steps: unknown key here. Did you mean train.sampling.steps or train.steps?",
        ),
        ("reward: []", "reward: got an empty list; allowed: at least one reward"),
        ("reward: [{name: style, weight: 0}]", "reward: every weight is 0"),
        ("reward: [{weight: 2}]", "reward.0.name: missing, and it has no default"),
        ("reward: [stile]", f"reward: got 'stile'; allowed: {min(REWARDS)}, "),
        (
            "reward: [style]\nheldout_reward: [x]",
            f"heldout_reward: got 'x'; allowed: {min(REWARDS)}",
        ),
        ("reward: [style]\nheldout_reward:", "heldout_reward: got nothing (null); allowed: a list"),
        ("reward: [style]\nprompts: {list: []}", "prompts.list: got an empty list"),
        (
            "reward: [style]\nprompts: {list: [a], source: animals}",
            "prompts.list: given beside source 'animals'; allowed: one of them",
        ),
        ("reward: [style]\ntrain: 3", "train: got 3; allowed: keys and values, with the keys"),
        ("reward: [style]\ntrain: {method: drift}", "train.method.name: got 'drift'; allowed: "),
        ("reward: [style]\ntrain: {method: 3}", "train.method: got 3; allowed: a name and its"),
        ("reward: [style]\ntrain: {method: {k: 1}}", "train.method: got {'k': 1}; allowed: a name"),
        (
            "reward: [style]\ntrain: {method: {name: draft, k: x}}",
            "train.method.k: got 'x'; allowed",
        ),
        (
            "reward: [style]\ntrain: {lora: {target_modules: []}}",
            "train.lora.target_modules: got an",
        ),
        (
            "reward: [style]\ntrain: {dtype: bf16}",
            "train.dtype: got 'bf16'; allowed: auto | float32",
        ),
    ],
)
def test_single_mistakes(text: str, line: str) -> None:
    (found,) = report(text)
    assert found.startswith(line)


@pytest.mark.parametrize(("given", "meant"), [("bf16", "bfloat16"), ("fp32", "float32")])
def test_short_names_of_dtypes_are_understood_as_a_question(given: str, meant: str) -> None:
    assert report(SMALL, f"train.dtype={given}")[0].endswith(f"Did you mean {meant}?")


@pytest.mark.parametrize("k", [0, -1, 51])
def test_k_lies_within_the_steps(k: int) -> None:
    (line,) = report(SMALL, f"train.method={{name: draft, k: {k}}}")
    assert line.startswith("train.method")
    assert str(k) in line


def test_k_may_be_all_steps() -> None:
    assert run(SMALL, "train.method={name: draft, k: 50}").train.method == DRaFT(k=50)


def test_a_rule_is_not_asked_about_a_setting_that_is_wrong_itself() -> None:
    # The 60 steps were meant somewhere: no second message about k.
    (line,) = report(SMALL, "train.method={name: draft, k: 60}", "train.sampling.step=60")
    assert line == "train.sampling.step: unknown key. Did you mean train.sampling.steps?"


def test_a_rule_is_not_asked_about_a_section_that_is_wrong_itself() -> None:
    (line,) = report(SMALL, "train.method={name: draft, k: 60}", "train.sampling=3")
    assert line.startswith("train.sampling: got 3; allowed: keys and values")


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("warmup", [10, 11])
def test_warmup_ends_before_a_falling_schedule(schedule: str, warmup: int) -> None:
    settings = ["train.steps=10", f"train.optimizer.schedule={schedule}"]
    (line,) = report(SMALL, *settings, f"train.optimizer.warmup_steps={warmup}")
    assert line == (
        f"train.optimizer.warmup_steps: got {warmup} with schedule {schedule}; allowed: below "
        "train.steps, 10. Warm up for fewer steps, or train longer."
    )
    run(SMALL, *settings, "train.optimizer.warmup_steps=9")


def test_half_precision_on_a_cpu_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match="fp16 matmul on CPU is below 1 GFLOP/s"):
        TrainConfig(dtype="float16", device="cpu")
    (line,) = report(SMALL, "train.dtype=float16", "train.device=cpu")
    assert "fp16 matmul on CPU is below 1 GFLOP/s. Use float32, bfloat16 or auto." in line


# ---------------------------------------------------------------------- this machine


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


@pytest.mark.usefixtures("no_gpu")
def test_what_needs_a_gpu_is_refused_without_one() -> None:
    assert report(SMALL, "train.device=cuda:0") == [
        "train.device: got 'cuda:0', but torch finds no GPU; allowed here: auto, cpu."
    ]
    assert "but torch finds no GPU; refused because fp16" in report(SMALL, "train.dtype=float16")[0]


@pytest.mark.usefixtures("no_gpu")
def test_a_gpu_run_can_be_read_without_a_gpu_but_not_trained() -> None:
    text = "reward: [mine]\ntrain: {dtype: float16, device: cuda}"
    config = RunConfig.from_yaml(text, check_machine=False)
    with pytest.raises(ConfigError, match=r"(?s)RunConfig has 2 problems.*reward.*train\.device"):
        config.validate()
    with pytest.raises(ConfigError, match=r"TrainConfig has 1 problem:\n  device: got 'cuda'"):
        config.train.validate()
    run().validate()
    TrainConfig().validate()


@pytest.mark.usefixtures("one_gpu")
def test_with_a_gpu() -> None:
    run(SMALL, "train.device=cuda:0", "train.dtype=float16")
    run(SMALL, "train.dtype=float16")
    assert "got 'cuda:1'; allowed here: cuda:0 to cuda:0" in report(SMALL, "train.device=cuda:1")[0]


# ---------------------------------------------------------------------- from Python


def test_python_gets_the_messages_of_the_file() -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(method=DRaFT(k=60), batch_size=0)
    head, *lines = str(caught.value).splitlines()
    assert head == "TrainConfig has 2 problems:"
    assert lines[0] == f"  {report(SMALL, 'train.batch_size=0')[0].removeprefix('train.')}"
    assert lines[1].startswith("  method: ")


def test_python_values_are_brought_into_shape() -> None:
    optimizer = OptimizerConfig(learning_rate=1, betas=[0.9, 0.99])  # type: ignore[arg-type]
    assert type(optimizer.learning_rate) is float
    assert optimizer.betas == (0.9, 0.99)


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().steps = 3  # type: ignore[misc]
    assert dataclasses.replace(TrainConfig(), steps=3).steps == 3
    with pytest.raises(ConfigError, match="steps: got 0"):
        dataclasses.replace(TrainConfig(), steps=0)


@dataclasses.dataclass(frozen=True)
class Mine(Method):
    """Neither a rollout nor a name of its own."""

    def validate(self, steps: int) -> list[str]:
        return [f"never fits {steps}"] if steps == 13 else []

    def rollout(self, sampler: Any, latents: Any, draws: Any) -> Any:
        raise NotImplementedError


def test_methods_of_ones_own_are_welcome(monkeypatch: pytest.MonkeyPatch) -> None:
    train = TrainConfig(method=Mine())
    assert train.method == Mine()
    with pytest.raises(ConfigError, match="method: never fits 13"):
        TrainConfig(method=Mine(), sampling=SamplingConfig(steps=13))
    with pytest.raises(ConfigError, match=r"Mine cannot be written to a config.*Register it"):
        train.to_dict()
    monkeypatch.setitem(METHODS, "mine", Mine)
    assert TrainConfig.from_dict(train.to_dict()) == train
    assert run(SMALL, "train.method=mine").train.method == Mine()


def test_rewards_of_ones_own_are_welcome() -> None:
    assert run("reward: ['python:my_rewards:brightness']").reward[0].name.endswith("brightness")


# ---------------------------------------------------------------------- the table


def test_every_setting_is_explained() -> None:
    rows = describe()
    keys = [row[0] for row in rows]
    assert len(keys) > 40
    for key, allowed, default, meaning in rows:
        assert all(isinstance(cell, str) for cell in (allowed, default, meaning))
        assert allowed, key
        assert default, key
        assert meaning.endswith("."), key
        assert len(meaning) < 90 or key.startswith("train.method."), key
    assert ("train.lora.rank", "a whole number at least 1", "8", "Rank of each addition.") in rows
    assert set(METHODS) == set(
        next(row[1] for row in rows if row[0] == "train.method.name").split(" | ")
    )


def test_the_table_gives_defaults_as_they_are_written() -> None:
    defaults: dict[str, Any] = {row[0]: row[2] for row in describe()}
    written = [f"{key}={value}" for key, value in defaults.items() if ".0." not in key]
    written = [one for one in written if not one.endswith("=required")]
    written = [one for one in written if not one.startswith("train.method.")]
    assert RunConfig.from_yaml(SMALL, written) == run()


# ---------------------------------------------------------------------- regularisers, ddpo


@pytest.mark.parametrize(
    ("overrides", "key", "words"),
    [
        (["train.method=ddpo"], "train.sampling.eta", "allowed: above 0. The paper has 1."),
        (
            ["train.method=draft_plus", "train.regularisation.kl_coeff=1"],
            "train.regularisation.kl_coeff",
            "draft_plus, which has a kl_coeff of its own",
        ),
        (
            ["train.regularisation.pretraining_images=photos"],
            "train.regularisation.pretraining_images",
            "without pretraining_coeff",
        ),
        (
            ["train.early_stopping.diversity_share=0.5", "train.output.grid_size=1"],
            "train.early_stopping.diversity_share",
            "Raise output.grid_size",
        ),
        (["train.regularisation.kl_coeff=-1"], "train.regularisation.kl_coeff", "at least 0"),
        (["train.early_stopping.heldout_fall=0"], "train.early_stopping.heldout_fall", "above 0"),
    ],
)
def test_what_cannot_go_together(overrides: list[str], key: str, words: str) -> None:
    (line,) = report(SMALL, *overrides)
    assert line.startswith(f"{key}: ")
    assert words in line
