"""Every preset is a complete, valid config, and is copied without harm."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rewardprop_fast import presets
from rewardprop_fast.errors import ConfigError
from rewardprop_fast.methods import AlignProp, DRaFT, DRaFTLV
from rewardprop_fast.training.config import RunConfig

NAMES = [
    "alignprop",
    "ddpo",
    "draft-large",
    "draft-lv",
    "draft-plus",
    "draft-small",
    "drtune",
    "quickstart",
    "refl",
    "sdxl-draft1",
    "srpo",
]


def read(name: str) -> RunConfig:
    return RunConfig.from_yaml(presets.path(name))


def test_these_presets_ship() -> None:
    assert presets.names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_is_valid_and_round_trips(name: str) -> None:
    config = read(name)
    config.validate()
    assert RunConfig.from_yaml(config.to_yaml()) == config
    assert config.heldout_reward, "a preset teaches to watch a held-out reward"
    assert config.train.output.directory == f"runs/{name}"


@pytest.mark.parametrize("name", NAMES)
def test_other_yaml_readers_see_the_same_values(name: str) -> None:
    """YAML 1.1 reads 1e-4 as a text; presets are written so that nobody stumbles over it."""

    def leaves(tree: object) -> list[object]:
        if isinstance(tree, dict):
            return [leaf for value in tree.values() for leaf in leaves(value)]
        return (
            [leaf for value in tree for leaf in leaves(value)] if isinstance(tree, list) else [tree]
        )

    plain = yaml.safe_load(presets.path(name).read_text(encoding="utf-8"))
    texts = [leaf for leaf in leaves(plain) if isinstance(leaf, str)]
    assert texts
    assert not any(text[0].isdigit() for text in texts), texts


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_says_what_it_does(name: str) -> None:
    sentence = presets.describe(name)
    assert sentence.endswith(".")
    assert 30 < len(sentence) <= 100
    assert not sentence.startswith("#")


def test_the_numbers_of_the_papers() -> None:
    small, large = read("draft-small").train, read("draft-large").train
    alignprop, lv = read("alignprop").train, read("draft-lv").train
    assert (small.steps, small.batch_size, small.optimizer.learning_rate) == (2000, 4, 4e-4)
    assert (small.lora.rank, small.optimizer.weight_decay, small.method) == (8, 0.1, DRaFT(k=1))
    assert (large.steps, large.batch_size * large.accumulation_steps) == (10_000, 16)
    assert (large.lora.rank, large.optimizer.learning_rate) == (32, 2e-4)
    assert lv.method == DRaFTLV(n=2)
    assert (alignprop.steps, alignprop.batch_size * alignprop.accumulation_steps) == (14, 128)
    assert (alignprop.lora.rank, alignprop.optimizer.max_grad_norm) == (4, 5.0)
    assert alignprop.optimizer.learning_rate == 1e-3
    assert alignprop.method == AlignProp(k_min=1, k_max=50)
    ddpo = read("ddpo").train
    assert ddpo.batch_size * ddpo.accumulation_steps == 256
    assert (ddpo.sampling.steps, ddpo.sampling.guidance_scale, ddpo.sampling.eta) == (50, 5.0, 1.0)
    for train in (small, large, alignprop, lv):
        assert (train.sampling.steps, train.sampling.guidance_scale) == (50, 7.5)
        assert train.optimizer.betas == (0.9, 0.999)


def test_quickstart_needs_no_files() -> None:
    config = read("quickstart")
    assert config.model.path == config.prompts.source == "bundled"


def test_copy_into_a_folder_or_to_a_name(tmp_path: Path) -> None:
    original = presets.path("quickstart").read_text(encoding="utf-8")
    copied = presets.copy("quickstart", tmp_path)
    assert copied == tmp_path / "quickstart.yaml"
    assert copied.read_text(encoding="utf-8") == original
    assert presets.copy("quickstart.yaml", tmp_path / "mine.yaml").name == "mine.yaml"
    assert RunConfig.from_yaml(tmp_path / "mine.yaml") == read("quickstart")


def test_copy_never_overwrites(tmp_path: Path) -> None:
    mine = tmp_path / "quickstart.yaml"
    mine.write_text("mine")
    for destination in (tmp_path, mine):
        with pytest.raises(ConfigError, match=r"quickstart\.yaml exists and is not overwritten"):
            presets.copy("quickstart", destination)
    assert mine.read_text() == "mine"
    with pytest.raises(ConfigError, match="cannot be written: No such file or directory"):
        presets.copy("quickstart", tmp_path / "no" / "folder.yaml")


@pytest.mark.parametrize("call", [presets.path, presets.describe, presets.copy])
def test_unknown_names_get_a_suggestion(call: object) -> None:
    assert callable(call)
    with pytest.raises(ConfigError, match=r"no preset 'draft_small'.*Did you mean draft-small\?"):
        call("draft_small")
    with pytest.raises(ConfigError, match="no preset"):
        call("../presets/quickstart")
