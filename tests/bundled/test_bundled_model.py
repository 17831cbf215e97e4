"""The pipeline and rewards that ship: they load, fit their size, and know what they were taught."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

import rewardprop_fast as rpf
from rewardprop_fast.errors import ConfigError, RewardError
from rewardprop_fast.rewards import scorer
from tests.rewards.images import check_slope, crops

PROMPTS = [
    "a red apple on a pale blue background",
    "a penguin on a pale pink background",
    "a sunflower on a lavender background",
    "a car on a pale yellow background",
    "a pizza on a pale green background",
    "a frog on a peach background",
    "a christmas tree on a pale pink background",
    "a soccer ball on a pale yellow background",
]


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.fixture(scope="module")
def pipe():
    return rpf.models.load_bundled()


@pytest.fixture(scope="module")
def images(pipe):
    rng = torch.Generator().manual_seed(0)
    return pipe(
        PROMPTS, num_inference_steps=20, guidance_scale=5.0, generator=rng, output_type="pt"
    ).images


def test_it_is_small_enough_to_ship():
    assert size(rpf.models.BUNDLED) <= 15_000_000
    for task in ("alignment", "style"):
        for copy in scorer.COPIES:
            assert size(scorer.BUNDLED / f"{task}_{copy}") <= 3_000_000


def test_no_file_names_a_folder_of_the_machine_it_was_made_on():
    files = [*rpf.models.BUNDLED.rglob("*.json"), *scorer.BUNDLED.rglob("*.json")]
    assert len(files) > 10
    named = [file for file in files if "_name_or_path" in json.loads(file.read_text("utf-8"))]
    assert named == []


def test_diffusers_alone_loads_the_same_pipeline(pipe):
    other = StableDiffusionPipeline.from_pretrained(rpf.models.BUNDLED)
    assert pipe.unet.config.cross_attention_dim == other.text_encoder.config.hidden_size
    for name, tensor in pipe.unet.state_dict().items():
        assert torch.equal(tensor, other.unet.state_dict()[name].float())
    ids = [p.tokenizer("a noto style fox")["input_ids"] for p in (pipe, other)]
    assert ids[0] == ids[1]
    assert len(ids[0]) == 6, "each caption word is one token"


def test_only_safe_formats_ship():
    allowed = {".json", ".safetensors", ".txt", ""}
    files = [f for f in rpf.models.BUNDLED.rglob("*") if f.is_file()]
    files += [f for f in scorer.BUNDLED.rglob("*") if f.is_file()]
    assert files
    assert {file.suffix for file in files} <= allowed
    assert (rpf.models.BUNDLED / "NOTICE").read_text().count("MIT License")


@pytest.mark.parametrize("copy", scorer.COPIES)
def test_samples_show_what_was_asked(images, copy):
    reward = rpf.rewards.build("alignment", copy=copy)
    table = torch.stack([reward(images, [prompt] * len(PROMPTS), [{}] * 8) for prompt in PROMPTS])
    hits = table.argmax(0) == torch.arange(len(PROMPTS))
    assert hits.sum() >= 6


def test_style_words_move_the_style(pipe):
    """Of the same subjects, those asked for in a style are scored higher in it by both copies."""
    subjects = ["dog", "red apple", "car", "bell"]

    def sample(style: str) -> torch.Tensor:
        rng = torch.Generator().manual_seed(1)
        prompts = [f"a {style} style {subject} on a pale blue background" for subject in subjects]
        return pipe(
            prompts, num_inference_steps=20, guidance_scale=5.0, generator=rng, output_type="pt"
        ).images

    fluent, noto = sample("fluent"), sample("noto")
    for copy in scorer.COPIES:
        reward = rpf.rewards.build("style", style="fluent", copy=copy)
        assert reward(fluent, [], []).mean() > reward(noto, [], []).mean() + 0.5


@pytest.mark.parametrize(
    ("name", "arguments", "named"),
    [
        ("style", {"style": "cubist"}, "fluent"),
        ("style", {"copy": "third"}, "heldout"),
        ("alignment", {"copy": "x"}, "heldout"),
    ],
)
def test_unknown_styles_and_copies_are_refused(name, arguments, named):
    with pytest.raises(ConfigError, match=named):
        rpf.rewards.build(name, **arguments)


def test_the_two_copies_are_different_networks():
    a, b = (scorer.load_bundled("style", copy).state_dict() for copy in scorer.COPIES)
    assert not torch.equal(a["image.stem.weight"], b["image.stem.weight"])


@pytest.mark.parametrize("copy", scorer.COPIES)
def test_each_scorer_reads_with_the_vocabulary_it_was_trained_with(copy):
    """The two differ in a few words, so the wrong one reads a cat as a car."""
    shipped = scorer.BUNDLED / f"alignment_{copy}" / "tokenizer" / "vocab.json"
    reward = rpf.rewards.build("alignment", copy=copy)
    assert reward.tokenizer.get_vocab() == json.loads(shipped.read_text("utf-8"))


@pytest.mark.parametrize("name", ["style", "alignment"])
def test_rewards_compute_in_float32_whatever_autocast_says(name):
    reward = rpf.rewards.build(name)
    images = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    plain = reward(images, PROMPTS, [{}] * 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = reward(images, PROMPTS, [{}] * 8)
    assert torch.equal(plain, inside)
    precise = rpf.rewards.build(name)
    (precise.classifier if name == "style" else precise.scorer).double()
    if name == "style":
        wanted = torch.log_softmax(precise.classifier(images.double()), -1)[:, precise.index]
    else:
        tokens = scorer.tokenize(precise.tokenizer, PROMPTS, "cpu")
        wanted = precise.scorer(images.double(), tokens)
    # float32 is right to about 1e-6 here, bfloat16 to 1e-2
    torch.testing.assert_close(plain.double(), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["style", "alignment"])
def test_reward_gradients_are_right(name):
    """Finite differences in float64, through the scaling to the towers' size as well."""
    check_slope(rpf.rewards.build(name).double(), crops(2, 80), PROMPTS[:2], step=1e-6, rtol=1e-5)


def test_alignment_reads_texts_alone():
    with pytest.raises(RewardError, match=r"'alignment' reads the prompts.* number 1 is a int: 3"):
        rpf.rewards.probe(rpf.rewards.build("alignment"), 64, 64, ["a fox", 3])
