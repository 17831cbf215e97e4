"""convert-reward, and the rewards on what it writes, against the authors' computation."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._subclasses import FakeTensorMode
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipTextModel,
    BlipVisionModel,
    CLIPConfig,
    CLIPModel,
)

from rewardprop_fast import memory, rewards
from rewardprop_fast.cli import main
from rewardprop_fast.errors import ModelError, RewardError
from rewardprop_fast.memory import policy
from rewardprop_fast.memory.plan import Plan, Policy
from rewardprop_fast.memory.segments import reward_segments
from rewardprop_fast.models.random_init import _byte_tokenizer
from rewardprop_fast.rewards.convert import KINDS, convert
from rewardprop_fast.rewards.image_reward import fit
from rewardprop_fast.rewards.preprocess import CLIP_MEAN, CLIP_STD
from tests.rewards import published
from tests.rewards.folders import head_tensors
from tests.rewards.images import check_slope, crops

PROMPTS = ["a sailor", "an admiral at sea"]
EMPTY = [{}, {}]
SIDE = published.PATCH * published.GRID
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "an", "sailor", "admiral", "at", "sea"]


def bert_words():
    return BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)})


def pixels_of(images):
    mean, std = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
    return (images - mean) / std


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The three published files as pickles, and the folders made of them by the command."""
    where = tmp_path_factory.mktemp("published")
    words, bert = _byte_tokenizer(), bert_words()
    words.save_pretrained(where / "clip_words")
    bert.save_pretrained(where / "bert_words")
    tensors = {
        "aesthetic": head_tensors(published.FEATURES),
        "hps": published.open_clip(len(words)),
        "image_reward": published.image_reward(len(WORDS))
        | {f"mlp.{key}": value for key, value in head_tensors(published.BLIP_TEXT).items()},
    }
    torch.save(tensors["aesthetic"], where / "aesthetic.pth")
    torch.save({"epoch": 3, "name": "x", "state_dict": tensors["hps"]}, where / "hps.pt")
    torch.save(tensors["image_reward"], where / "image_reward.pt")
    for kind, ending, tokenizer in (
        ("aesthetic", "pth", None),
        ("hps", "pt", "clip_words"),
        ("image_reward", "pt", "bert_words"),
    ):
        extra = [] if tokenizer is None else ["--tokenizer", str(where / tokenizer)]
        source, output = str(where / f"{kind}.{ending}"), str(where / kind)
        assert main(["convert-reward", kind, source, "--output", output, *extra]) == 0
    return where, tensors


def test_hps_scores_as_open_clip_does_on_the_published_layout(files):
    where, tensors = files
    reward = rewards.build("hps", model=str(where / "hps"))
    images = crops(2, SIDE)
    tokens = _byte_tokenizer()(PROMPTS, padding="max_length", return_tensors="pt").input_ids
    expected = published.open_clip_scores(tensors["hps"], pixels_of(images), tokens)
    torch.testing.assert_close(reward(images, PROMPTS, EMPTY), expected, rtol=1e-5, atol=1e-6)
    assert (expected[0] - expected[1]).abs() > 1e-3
    wide = crops(1, 40)[..., :20, :]  # is set on black, which shows in the score
    black = torch.zeros(1, 3, SIDE, SIDE)
    black[..., 7:21, :] = torch.nn.functional.interpolate(
        wide, (14, SIDE), mode="bicubic", antialias=True
    ).clamp(0, 1)
    expected = published.open_clip_scores(tensors["hps"], pixels_of(black), tokens[:1])
    found = reward(wide, PROMPTS[:1], [{}])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_image_reward_scores_as_the_authors_code_does_on_the_published_layout(files):
    where, tensors = files
    reward = rewards.build("image_reward", model=str(where / "image_reward"))
    images = crops(2, SIDE)
    words = bert_words()(PROMPTS, padding="max_length", max_length=35, return_tensors="pt")
    expected = published.image_reward_scores(
        tensors["image_reward"], pixels_of(images), words.input_ids, words.attention_mask
    )
    found = reward(images, PROMPTS, EMPTY)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (expected[0] - expected[1]).abs() > 1e-2
    other = reward(images, PROMPTS[::-1], EMPTY)
    assert (other - found).abs().min() > 1e-3


def test_the_aesthetic_head_comes_out_as_it_went_in(files):
    where, tensors = files
    written = load_file(where / "aesthetic" / "model.safetensors")
    assert written.keys() == tensors["aesthetic"].keys()
    assert all(torch.equal(written[key], tensors["aesthetic"][key]) for key in written)
    head = str(where / "aesthetic")
    reward = rewards.build("aesthetic", model=str(where / "hps"), head=head)
    assert rewards.probe(reward, 32, 32).shape == (2,)


# ---------------------------------------------------------------------- ImageReward as a reward


@pytest.fixture
def reward(files):
    return rewards.build("image_reward", model=str(files[0] / "image_reward"))


def test_the_slope_is_that_of_finite_differences(reward):
    rewards.prepare(reward, "cpu", torch.float64)
    check_slope(reward, 0.1 + 0.8 * crops(2, 40), PROMPTS)


def test_it_passes_the_probe_frozen_and_in_the_runs_dtype(reward):
    exact = rewards.probe(reward, 64, 48, PROMPTS)
    rewards.prepare(reward, "cpu", torch.bfloat16)
    assert {p.dtype for p in reward.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in reward.parameters())
    found = rewards.probe(reward, 64, 48, PROMPTS)
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() < 0.05 * exact.abs().max()
    with pytest.raises(RewardError, match="'image_reward' reads the prompts"):
        rewards.probe(reward, 64, 48, [3])


def test_both_encoders_layers_are_blocks_that_can_be_computed_again(reward):
    blocks = [segment.name for segment in reward_segments(reward)]
    assert blocks == [
        *(f"reward.vision.encoder.layers.{i}" for i in range(2)),
        *(f"reward.text.encoder.layer.{i}" for i in range(2)),
    ]
    runs = []
    for layer in (reward.vision.encoder.layers[0].mlp, reward.text.encoder.layer[0].intermediate):
        layer.register_forward_pre_hook(lambda *_: runs.append(1))

    def gradient():
        runs.clear()
        images = crops(2, 40).requires_grad_(True)
        reward(images, PROMPTS, EMPTY).sum().backward()
        return images.grad, len(runs)

    expected, once = gradient()
    plan = Plan(steps=({},), reward={"reward block": Policy.RECOMPUTE})
    applied = policy.apply(plan, reward=reward)
    found, twice = gradient()
    applied.remove()
    assert torch.equal(found, expected)
    assert (once, twice) == (2, 4)


def test_it_runs_on_tensors_without_values(reward):
    mode = FakeTensorMode()
    fake = memory.make_fake(copy.deepcopy(reward), mode)
    with mode:
        images = torch.rand(2, 3, 64, 48, requires_grad=True)
        (gradient,) = torch.autograd.grad(fake(images, PROMPTS, EMPTY).sum(), images)
    assert gradient.shape == images.shape


def test_a_full_size_image_reward_has_the_published_number_of_parameters():
    """BLIP's ViT-L/16 at 224 (303.3 M), BERT with cross attention to 1024 features, no pooler."""
    config = BlipConfig(
        vision_config={
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 224,
        },
        text_config={"encoder_hidden_size": 1024, "num_attention_heads": 12},
    )
    with torch.device("meta"):
        vision = BlipVisionModel(config.vision_config)
        text = BlipTextModel(config.text_config, add_pooling_layer=False)
    patches, width = 14**2, 1024
    block = 12 * width**2 + 13 * width
    expected = 24 * block + (3 * 16**2 + 1) * width + (patches + 2) * width + 2 * width
    assert sum(p.numel() for p in vision.parameters()) == expected == 303_301_632
    w = 768
    own = 4 * (w**2 + w) + 2 * w
    cross = own + 2 * (1024 - w) * w
    layer = own + cross + 8 * w**2 + 5 * w + 2 * w
    expected = 12 * layer + (30_524 + 512) * w + 2 * w
    assert sum(p.numel() for p in text.parameters()) == expected


def on_meta(shapes):
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def test_the_full_size_hpsv2_is_the_clip_h_of_transformers():
    """Every key and shape of open_clip's ViT-H-14 against laion/CLIP-ViT-H-14-laion2B-s32B-b79K."""
    vision, text = published.Encoder(1280, 5120, 32), published.Encoder(1024, 4096, 24)
    shapes = published.open_clip_shapes(49_408, vision, text, patch=14, grid=16, features=1024)
    config, found = KINDS["hps"](on_meta(shapes | {"logit_scale": ()}), "HPS_v2.1_compressed.pt")
    theirs = {
        "projection_dim": 1024,
        "vision_config": {
            "hidden_act": "gelu",
            "hidden_size": 1280,
            "image_size": 224,
            "intermediate_size": 5120,
            "num_attention_heads": 16,
            "num_hidden_layers": 32,
            "patch_size": 14,
        },
        "text_config": {
            "hidden_act": "gelu",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "max_position_embeddings": 77,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "vocab_size": 49_408,
        },
    }
    assert config["projection_dim"] == theirs["projection_dim"]
    for part in ("vision_config", "text_config"):
        assert theirs[part].items() <= config[part].items()
    with torch.device("meta"):
        own = CLIPModel(CLIPConfig(**theirs)).state_dict()
    wanted = {key: value.shape for key, value in own.items() if "position_ids" not in key}
    assert {key: value.shape for key, value in found.items()} == wanted
    assert sum(value.numel() for value in found.values()) == 986_109_441


def test_the_full_size_image_reward_is_the_blip_of_transformers():
    """Every key and shape of BLIP's ViT-L/16 and BERT base, as the reward's loader wants them."""
    vision, text = published.Encoder(1024, 4096, 24), published.Encoder(768, 3072, 12)
    shapes = published.image_reward_shapes(30_524, vision, text, patch=16, grid=14, places=512)
    shapes |= {f"mlp.{key}": value.shape for key, value in head_tensors(768).items()}
    config, found = KINDS["image_reward"](on_meta(shapes), "ImageReward.pt")
    networks, parts = fit(config, found, "folder")
    assert networks["vision"].config.num_attention_heads == 16
    assert networks["text"].config.num_attention_heads == 12
    sizes = {part: sum(t.numel() for t in tensors.values()) for part, tensors in parts.items()}
    assert sizes == {"vision": 303_301_632, "text": 141_977_088, "head": 927_969}


# ---------------------------------------------------------------------- what can be wrong


class Evil:
    def __reduce__(self):
        return (print, ("this must never be printed",))


def test_a_pickle_that_would_run_code_is_refused(tmp_path, capsys):
    file = tmp_path / "HPS.pt"
    torch.save({"state_dict": Evil()}, file)
    assert main(["convert-reward", "hps", str(file), "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert "more than tensors and plain values" in " ".join(said.err.split())
    assert "never be printed" not in said.out
    assert not (tmp_path / "out").exists()
    (tmp_path / "plain.pt").write_bytes(pickle.dumps([1, 2]))
    assert main(["convert-reward", "hps", str(tmp_path / "plain.pt"), "--output", "x"]) == 2


@pytest.mark.parametrize("kind", ["aesthetic", "hps", "image_reward"])
@pytest.mark.parametrize("change", ["one less", "one more", "another shape", "another model"])
def test_another_file_than_the_published_one(files, tmp_path, kind, change):
    tensors = dict(files[1][kind])
    key = {"aesthetic": "layers.4.weight", "hps": "visual.transformer.resblocks.1.mlp.c_fc.weight"}
    key = key.get(kind, "blip.visual_encoder.blocks.1.mlp.fc1.weight")
    if change == "one less":
        del tensors[key]
    elif change == "one more":
        tensors["more.weight"] = torch.zeros(1)
    elif change == "another shape":
        tensors[key] = torch.zeros(3, 3)
    else:
        tensors = {"weight": torch.zeros(2)}
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=kind):
        convert(kind, tmp_path / "x.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_keeps_what_is_there(files, tmp_path, capsys):
    where, _ = files
    source = str(where / "aesthetic.pth")
    command = ["convert-reward", "aesthetic", source, "--output", str(tmp_path / "out")]
    assert main(command) == 0
    assert f"args: {{head: {tmp_path / 'out'}}}" in capsys.readouterr().out
    assert main(command) == 2
    assert "holds a model already" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    assert main([*command, "--overwrite", "--tokenizer", "x"]) == 2
    assert main(["convert-reward", "aesthetic", "none.pth", "--output", "x"]) == 2
    assert main(["convert-reward", "clip", source, "--output", "x"]) == 2


def test_a_folder_of_another_model_and_one_with_other_weights(files, tmp_path):
    where, _ = files
    with pytest.raises(ModelError, match=r"no folder of ImageReward.*convert-reward"):
        rewards.build("image_reward", model=str(where / "hps"))
    with pytest.raises(ModelError, match="no folder"):
        rewards.build("image_reward", model="./nowhere")
    whole = load_file(where / "image_reward" / "model.safetensors")
    config = json.loads((where / "image_reward" / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(whole, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"another architecture.*text\.encoder\.layer\.2"):
        rewards.build("image_reward", model=str(tmp_path))
