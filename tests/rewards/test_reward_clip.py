"""CLIP score, PickScore, HPS, the aesthetic score: against transformers' own model and processor.

No published weights are here. What a folder of weights must look like is the same for any size, so
the folders are small and the weights random.
"""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from transformers import CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from rewardprop_fast import memory, rewards
from rewardprop_fast.errors import ConfigError, ModelError, RewardError
from rewardprop_fast.memory import policy
from rewardprop_fast.memory.plan import Plan, Policy
from rewardprop_fast.memory.segments import reward_segments
from rewardprop_fast.models.random_init import _byte_tokenizer
from tests.rewards.folders import SIDE, clip_folder, head_file, head_tensors
from tests.rewards.images import PHOTOGRAPHS, check_slope, crops, photograph, to_tensor

PROMPTS = ["a sailor", "an admiral who wrote a compiler"]
EMPTY = [{}, {}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return clip_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    return head_file(tmp_path_factory.mktemp("head") / "head.safetensors")


@pytest.fixture
def make(folder, head):
    def build(name, **arguments):
        if name == "aesthetic":
            arguments.setdefault("head", str(head))
        return rewards.build(name, model=str(folder), **arguments)

    return build


NAMES = ("clip_score", "pickscore", "hps", "aesthetic")


def of_transformers(folder, pixels, prompts=PROMPTS):
    """(cosines, exp(logit_scale), image features) by transformers' own forward."""
    model = CLIPModel.from_pretrained(folder).eval()
    words = _byte_tokenizer()(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = model(pixel_values=pixels, **words)
    scale = model.logit_scale.exp()
    return out.logits_per_image.diagonal() / scale, scale.item(), out.image_embeds


def test_the_score_is_transformers_own_on_the_same_pixels(folder, make):
    images = crops(2, SIDE)  # of the tower's size, so that nothing is scaled
    pixels = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIDE)(
        list((255 * images).round().byte()), return_tensors="pt"
    ).pixel_values
    cosines, scale, features = of_transformers(folder, pixels)
    images = (255 * images).round() / 255
    close = {"rtol": 1e-5, "atol": 1e-6}
    for name, expected in (
        ("clip_score", cosines),
        ("pickscore", scale * cosines),
        ("hps", cosines),
    ):
        torch.testing.assert_close(make(name)(images, PROMPTS, EMPTY), expected, **close)
    layers = head_tensors(24)
    for number in (0, 2, 4, 6, 7):
        weight, bias = layers[f"layers.{number}.weight"], layers[f"layers.{number}.bias"]
        features = features @ weight.T + bias
    scores = make("aesthetic")(images, PROMPTS, EMPTY)
    torch.testing.assert_close(scores, features[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("photo", PHOTOGRAPHS)
def test_on_a_photograph_it_is_near_what_the_models_own_processor_gives(folder, make, photo):
    image = photograph(photo)
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIDE)
    pixels = processor(image, return_tensors="pt").pixel_values
    expected, _, _ = of_transformers(folder, pixels, PROMPTS[:1])
    found = make("clip_score")(to_tensor(image), PROMPTS[:1], [{}])
    # the difference is Pillow's rounding to grey levels, of 255
    assert abs(found - expected).item() < 2e-3


@pytest.mark.parametrize("name", NAMES)
def test_the_slope_is_that_of_finite_differences(make, name):
    reward = make(name)
    rewards.prepare(reward, "cpu", torch.float64)
    check_slope(reward, 0.1 + 0.8 * crops(2, 48), PROMPTS, step=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_it_passes_the_probe_frozen_and_in_the_runs_dtype(make, name):
    reward = make(name)
    rewards.prepare(reward, "cpu", torch.bfloat16)
    assert rewards.name_of(reward) == name
    assert {p.dtype for p in reward.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in reward.parameters())
    assert not reward.training
    in_half = rewards.probe(reward, 64, 48, PROMPTS)
    assert in_half.dtype == torch.float32
    exact = rewards.probe(make(name), 64, 48, PROMPTS)
    size = {"pickscore": 20.0, "aesthetic": exact.abs().mean().item()}.get(name, 1.0)
    assert (in_half - exact).abs().max() < 0.05 * size


def test_prompts_are_encoded_once_and_each_image_gets_its_own(make, monkeypatch):
    reward = make("clip_score")
    images = crops(2, SIDE)
    calls = []
    encode = reward.prompts.encode
    monkeypatch.setattr(
        reward.prompts, "encode", lambda prompts: calls.append(list(prompts)) or encode(prompts)
    )
    one = reward(images, PROMPTS, EMPTY)
    turned = reward(images.flip(0), PROMPTS[::-1], EMPTY)
    torch.testing.assert_close(turned.flip(0), one)
    same = reward(images, [PROMPTS[0]] * 2, EMPTY)
    assert calls == [PROMPTS]
    assert not torch.isclose(same[1], one[1])
    reward(images, [PROMPTS[0], "a third"], EMPTY)
    assert calls[1:] == [["a third"]]


def test_encoding_under_inference_mode_does_not_spoil_later_gradients(make):
    reward = make("clip_score")
    with torch.inference_mode():
        reward(crops(2, SIDE), PROMPTS, EMPTY)
    images = crops(2, SIDE).requires_grad_(True)
    reward(images, PROMPTS, EMPTY).sum().backward()
    assert images.grad.any()


def test_the_text_tower_is_no_part_of_what_goes_to_the_device(make):
    reward = make("pickscore")
    count = sum(p.numel() for p in reward.parameters())
    vision = reward.images.vision
    assert count == sum(p.numel() for p in vision.parameters()) + 32 * 24
    rewards.prepare(reward, "cpu", torch.bfloat16)
    reward(crops(2, SIDE).bfloat16(), PROMPTS, EMPTY)  # and is still in fp32


@pytest.mark.parametrize("prompts", [[1, 2], [None, "a"], [["a"], ["b"]]])
def test_prompts_that_are_no_texts(make, prompts):
    with pytest.raises(RewardError, match=r"'clip_score' reads the prompts, which must be texts"):
        rewards.probe(make("clip_score"), 32, 32, prompts)


# ---------------------------------------------------------------------- memory


@pytest.mark.parametrize("name", NAMES)
def test_the_towers_layers_are_blocks_that_can_be_computed_again(make, name):
    reward = make(name)
    blocks = [segment.name for segment in reward_segments(reward)]
    assert blocks == [f"reward.images.vision.encoder.layers.{i}" for i in range(3)]
    runs = []
    reward.images.vision.encoder.layers[1].mlp.register_forward_pre_hook(lambda *_: runs.append(1))

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
    assert (once, twice) == (1, 2)


def test_in_an_ensemble_the_blocks_are_the_layers_and_not_the_members(make):
    scaled = rewards.Normalised(make("aesthetic"), 1.0, 2.0)
    ensemble = rewards.Ensemble([(make("clip_score"), 1.0), (scaled, 1.0)])
    names = [segment.name for segment in reward_segments(ensemble)]
    inside = ("member_0.images", "member_1.reward.images")
    assert names == [
        f"reward.{path}.vision.encoder.layers.{i}" for path in inside for i in range(3)
    ]


@pytest.mark.parametrize("name", [*NAMES, "ensemble"])
def test_it_runs_on_tensors_without_values(make, name):
    if name == "ensemble":
        pairs = (("clip_score", 1.0), ("aesthetic", 2.0))
        scaled = [(rewards.Normalised(make(member), 0, 1), weight) for member, weight in pairs]
        reward = rewards.Ensemble(scaled)
    else:
        reward = make(name)
    expected = reward(crops(2, SIDE), PROMPTS, EMPTY).dtype
    mode = FakeTensorMode()
    fake = memory.make_fake(copy.deepcopy(reward), mode)
    with mode:
        images = torch.rand(2, 3, 64, 48, requires_grad=True)
        values = fake(images, ["never seen", "a sailor"], EMPTY)
        (gradient,) = torch.autograd.grad(values.sum(), images)
    assert values.shape == (2,)
    assert values.dtype == expected
    assert gradient.shape == images.shape
    # and the real one has kept nothing of that
    assert rewards.probe(reward, 32, 32, ["never seen", "a sailor"]).isfinite().all()


# ---------------------------------------------------------------------- what can be wrong


def test_a_folder_that_is_not_there():
    for given in ("/nowhere/clip", "./nowhere", "nowhere"):
        with pytest.raises(ModelError, match=rf"'clip_score': there is no folder '{given}'"):
            rewards.build("clip_score", model=given)


def test_a_hub_name_while_the_hub_is_out_of_reach(monkeypatch):
    monkeypatch.setattr("rewardprop_fast.hub.reachable", lambda: False)
    with pytest.raises(ModelError, match=r"'pickscore': 'some/one'.*cannot be reached"):
        rewards.build("pickscore", model="some/one")


@pytest.mark.parametrize("ending", [".pt", ".pth", ".bin", ".safetensors"])
def test_a_file_instead_of_a_folder(tmp_path, ending):
    file = tmp_path / f"HPS_v2{ending}"
    file.write_bytes(b"x")
    with pytest.raises(ModelError, match=r"'hps'.*is a file; .*convert-reward"):
        rewards.build("hps", model=str(file))


def test_a_folder_of_pickles(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"has no \.safetensors file.*can run any code"):
        rewards.build("clip_score", model=str(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json.*can run any code"):
        rewards.build("clip_score", model=str(tmp_path))


def test_a_model_of_another_kind(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "siglip"}))
    with pytest.raises(ModelError, match=r"type 'clip'; .* of the type 'siglip'"):
        rewards.build("clip_score", model=str(tmp_path))


@pytest.mark.parametrize("change", ["fewer layers", "more layers", "other width"])
def test_weights_of_another_architecture_than_the_config(folder, tmp_path, change):
    clip_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    if change == "fewer layers":
        config["vision_config"]["num_hidden_layers"] = 5
    elif change == "more layers":  # which would be left out without a word
        config["vision_config"]["num_hidden_layers"] = 2
    else:
        config["vision_config"]["intermediate_size"] = 64
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=rf"'clip_score'.*{tmp_path}"):
        rewards.build("clip_score", model=str(tmp_path))


def test_no_tokenizer_and_one_from_elsewhere(folder, tmp_path):
    bare, words = tmp_path / "bare", tmp_path / "words"
    clip_folder(bare, tokenizer=False)
    with pytest.raises(ModelError, match=r"finds no tokenizer.*tokenizer=FOLDER"):
        rewards.build("clip_score", model=str(bare))
    _byte_tokenizer().save_pretrained(words)
    reward = rewards.build("clip_score", model=str(bare), tokenizer=str(words))
    expected = rewards.build("clip_score", model=str(folder))(crops(2, SIDE), PROMPTS, EMPTY)
    torch.testing.assert_close(reward(crops(2, SIDE), PROMPTS, EMPTY), expected)
    many = _byte_tokenizer()
    many.add_tokens([f"word{i}" for i in range(9)])
    many.save_pretrained(words)
    with pytest.raises(ModelError, match="they do not belong together"):
        rewards.build("clip_score", model=str(bare), tokenizer=str(words))


def test_a_head_that_does_not_fit(folder, tmp_path, head):
    def refused(tensors, words):
        from safetensors.torch import save_file

        save_file(tensors, tmp_path / "other.safetensors")
        with pytest.raises(ModelError, match=words):
            rewards.build("aesthetic", model=str(folder), head=str(tmp_path / "other.safetensors"))

    good = head_tensors(24)
    refused(head_tensors(768), "takes 768 features, the model gives 24")
    refused({k: v for k, v in good.items() if "4" not in k}, r"missing are layers\.4")
    refused(good | {"layers.9.weight": torch.zeros(1)}, r"unknown layers\.9\.weight")
    refused(good | {"layers.4.weight": torch.zeros(64, 127)}, r"layer 4 .*gets 128 features")
    wide = {"layers.7.weight": torch.zeros(2, 16), "layers.7.bias": torch.zeros(2)}
    refused(good | wide, "gives 2 values")
    for file, words in (("none.safetensors", "no file"), ("sac+logos.pth", "is a pickle")):
        with pytest.raises(ModelError, match=words):
            rewards.build("aesthetic", model=str(folder), head=str(tmp_path / file))


def test_arguments_that_are_missing():
    with pytest.raises(ConfigError, match=r"missing a required argument: 'model'.*It takes: model"):
        rewards.build("clip_score")
    with pytest.raises(ConfigError, match="'head'"):
        rewards.build("aesthetic", model="x/y")


# ---------------------------------------------------------------------- published sizes


@pytest.mark.parametrize(
    ("published", "count"),
    # parameters that the authors' own code counts: openai/CLIP and mlfoundations/open_clip
    [("clip-l", 427_616_513), ("clip-h", 986_109_441)],
)
def test_full_size_models_have_the_published_number_of_parameters(published, count):
    from transformers import CLIPConfig

    from rewardprop_fast.rewards.shapes import _TOWERS

    vision = _TOWERS[published]
    wide = published == "clip-h"
    text = {
        "hidden_size": 1024 if wide else 768,
        "intermediate_size": 4096 if wide else 3072,
        "num_hidden_layers": 24 if wide else 12,
        "num_attention_heads": 16 if wide else 12,
    }
    config = CLIPConfig(
        text_config=text, vision_config=vision, projection_dim=vision["projection_dim"]
    )
    with torch.device("meta"):
        model = CLIPModel(config)
    assert isinstance(model, nn.Module)
    assert sum(p.numel() for p in model.parameters()) == count
