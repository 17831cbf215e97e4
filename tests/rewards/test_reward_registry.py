"""rewards/registry.py: names in a config become rewards, and mistakes become messages."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

from rewardprop_fast import rewards
from rewardprop_fast.errors import ConfigError, RewardError
from rewardprop_fast.rewards.base import probe_images

PROMPTS, METADATA = ["a", "b"], [{}, {}]


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """A user's my_rewards.py in the working directory, found and forgotten again."""
    (tmp_path / "my_rewards.py").write_text(
        textwrap.dedent(
            """
            class Contrast:
                def __init__(self, strength, floor=0.0):
                    if strength < 0:
                        raise ValueError("strength must not be negative")
                    self.strength, self.floor = strength, floor

                def __call__(self, images, prompts, metadata):
                    return self.strength * images.std(dim=(1, 2, 3)) + self.floor

                class Nested:
                    def __call__(self, images, prompts, metadata):
                        return images.mean(dim=(1, 2, 3))

            def brightness(images, prompts, metadata, target=1.0):
                return -(images.mean(dim=(1, 2, 3)) - target).square()

            def one_argument(images):
                return images.mean(dim=(1, 2, 3))

            ready = Contrast(3.0)
            number = 5
            """
        )
    )
    (tmp_path / "broken_rewards.py").write_text("import not_installed_anywhere\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    yield
    for name in ("my_rewards", "broken_rewards"):
        sys.modules.pop(name, None)


def message_of(function, *args, **kwargs):
    with pytest.raises(ConfigError) as info:
        function(*args, **kwargs)
    return str(info.value)


def test_the_names_of_the_contract_are_registered():
    assert set(rewards.REWARDS) == {
        "adversarial",
        "aesthetic",
        "alignment",
        "brightness",
        "clip_score",
        "colour",
        "detection",
        "hps",
        "image_reward",
        "jpeg_compressibility",
        "jpeg_incompressibility",
        "jpeg_size",
        "object_count",
        "pickscore",
        "removal",
        "style",
        "symmetry",
    }
    with pytest.raises(TypeError):
        rewards.REWARDS["mine"] = "a:b"


@pytest.mark.parametrize(
    "name",
    ["brightness", "colour", "jpeg_compressibility", "jpeg_incompressibility", "symmetry"],
)
def test_built_rewards_carry_their_registered_name_and_pass_the_probe(name):
    reward = rewards.build(name)
    assert rewards.name_of(reward) == name
    assert rewards.probe(reward, 24, 24).shape == (2,)


def test_arguments_arrive():
    assert rewards.build("jpeg_compressibility", quality=33).jpeg.quality == 33
    assert rewards.build("colour", colour=[0, 1, 0]).colour == (0.0, 1.0, 0.0)


def test_rewards_are_loaded_only_when_named():
    code = (
        "import sys; import rewardprop_fast.rewards as r; r.build('colour');"
        "assert 'rewardprop_fast.rewards.style' not in sys.modules;"
        "assert 'rewardprop_fast.rewards.alignment' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_lists_the_names_and_suggests_one():
    message = message_of(rewards.build, "jpeg_compresibility")
    assert "Did you mean 'jpeg_compressibility'?" in message
    for name in rewards.REWARDS:
        assert name in message
    assert "Did you mean" not in message_of(rewards.build, "zzz")
    assert "must be a string" in message_of(rewards.build, 7)


def test_wrong_arguments_name_the_allowed_ones():
    message = message_of(rewards.build, "jpeg_compressibility", qualty=80)
    assert "qualty" in message
    assert "It takes: quality" in message
    assert "1 to 100" in message_of(rewards.build, "jpeg_compressibility", quality=0)
    assert "name" in message_of(rewards.build, "jpeg_compressibility", name="x")


def test_build_all_returns_one_reward_bare_and_several_as_an_ensemble():
    one = rewards.build_all((("colour", 1.0, {}),))
    assert isinstance(one, rewards.ColourReward)
    negated = rewards.build_all((("colour", -1.0, {}),))
    assert isinstance(negated, rewards.Ensemble)
    assert negated.weights == (-1.0,)
    both = rewards.build_all((("colour", 1.0, {}), ("jpeg_compressibility", 0.1, {"quality": 50})))
    assert both.member_names == ("colour", "jpeg_compressibility")
    assert both.weights == (1.0, 0.1)
    assert rewards.probe(both, 16, 16).shape == (2,)


def test_build_all_reports_everything_that_is_wrong_at_once():
    message = message_of(
        rewards.build_all,
        [
            ("colr", 1.0, {}),
            ("colour", 0.0, {}),
            ("jpeg_compressibility", 1.0, {"quality": 500}),
            ("colour", 1.0, {1: 2}),
        ],
    )
    assert len(message.splitlines()) == 4
    for part in ("'colr'", "other than zero", "got 500", "{1: 2}"):
        assert part in message
    assert "at least one" in message_of(rewards.build_all, ())


def test_a_users_function_class_and_object(user_module):
    images = probe_images(8, 8)
    function = rewards.build("python:my_rewards:brightness")
    with_arguments = rewards.build("python:my_rewards:brightness", target=0.25)
    mean = images.mean(dim=(1, 2, 3))
    torch.testing.assert_close(function(images, PROMPTS, METADATA), -((mean - 1) ** 2))
    torch.testing.assert_close(with_arguments(images, PROMPTS, METADATA), -((mean - 0.25) ** 2))
    assert rewards.name_of(with_arguments) == "brightness"
    made = rewards.build("python:my_rewards:Contrast", strength=2.0)
    assert (made.strength, made.floor) == (2.0, 0.0)
    assert rewards.build("python:my_rewards:ready").strength == 3.0
    assert rewards.probe(rewards.build("python:my_rewards:Contrast.Nested"), 8, 8).shape == (2,)
    mixed = rewards.build_all(
        [("python:my_rewards:brightness", 2, {"target": 0.5}), ("colour", 1, {})]
    )
    assert mixed.member_names == ("brightness", "colour")


@pytest.mark.parametrize(
    ("name", "kwargs", "words"),
    [
        ("python:my_rewards", {}, ["python:module.path:attribute", "python:my_rewards:brightness"]),
        ("python:my_rewards.py:brightness:x", {}, ["python:module.path:attribute"]),
        ("python:./my_rewards:brightness", {}, ["no file name"]),
        ("python:my_rewardz:brightness", {}, ["ModuleNotFoundError", "working directory"]),
        ("python:broken_rewards:x", {}, ["ModuleNotFoundError", "not_installed_anywhere"]),
        ("python:my_rewards:brightnes", {}, ["Did you mean 'brightness'?"]),
        ("python:my_rewards:number", {}, ["not callable"]),
        ("python:my_rewards:one_argument", {}, ["reward(images, prompts, metadata)"]),
        ("python:my_rewards:brightness", {"goal": 1}, ["goal", "It takes:", "target"]),
        ("python:my_rewards:Contrast", {}, ["strength", "It takes: strength, floor=0.0"]),
        ("python:my_rewards:Contrast", {"strength": -1}, ["must not be negative"]),
    ],
)
def test_mistakes_in_a_users_name_are_explained(user_module, name, kwargs, words):
    message = message_of(rewards.build, name, **kwargs)
    assert name in message
    for word in words:
        assert word in message, message


def test_a_users_reward_without_gradient_is_left_to_the_probe(user_module, tmp_path):
    (tmp_path / "my_rewards.py").write_text(
        "def counts(images, prompts, metadata):\n"
        "    return (images > 0.5).float().mean(dim=(1, 2, 3))\n"
    )
    with pytest.raises(RewardError, match="DDPO"):
        rewards.probe(rewards.build("python:my_rewards:counts"), 8, 8)
