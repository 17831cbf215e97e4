"""Detection, removal, counting and the classifier's class, against transformers' own forward."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._subclasses import FakeTensorMode
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    Owlv2Config,
    Owlv2ForObjectDetection,
    OwlViTConfig,
    OwlViTForObjectDetection,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil
from transformers.models.owlvit.image_processing_pil_owlvit import OwlViTImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from rewardprop_fast import memory, rewards
from rewardprop_fast.errors import ConfigError, ModelError, RewardError
from rewardprop_fast.memory import policy
from rewardprop_fast.memory.plan import Plan, Policy
from rewardprop_fast.memory.segments import reward_segments
from rewardprop_fast.models.random_init import _byte_tokenizer
from rewardprop_fast.rewards.owl import SquareOnBlack
from rewardprop_fast.rewards.preprocess import CLIP_STD, Preprocess
from tests.rewards import published
from tests.rewards.folders import SIDE, clip_folder, seeded, zeros_file
from tests.rewards.images import (
    PHOTOGRAPHS,
    SHAPES,
    check_slope,
    crops,
    photograph,
    picture,
    to_tensor,
)

QUERIES = ["a sailor", "a flag"]
PROMPTS, EMPTY = ["a", "b"], [{}, {}]
OWLS = {
    "owlvit": (OwlViTConfig, OwlViTForObjectDetection, OwlViTImageProcessorPil),
    "owlv2": (Owlv2Config, Owlv2ForObjectDetection, Owlv2ImageProcessorPil),
}


def owl(kind, folder):
    config_class, model_class, _ = OWLS[kind]
    words = _byte_tokenizer()
    config = config_class(
        text_config={
            "vocab_size": len(words),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 16,
            "pad_token_id": 0,
        },
        vision_config={
            "hidden_size": 40,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": SIDE,
            "patch_size": 7,
        },
        projection_dim=32,
    )
    seeded(lambda: model_class(config)).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {kind: owl(kind, tmp_path_factory.mktemp(kind)) for kind in OWLS}
    vit = tmp_path_factory.mktemp("vit")
    names = {0: "cat", 1: "dog", 2: "hen"}
    shape = {"num_labels": 3, "id2label": names, "label2id": {v: k for k, v in names.items()}}
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=SIDE,
        patch_size=7,
        **shape,
    )
    seeded(lambda: ViTForImageClassification(config)).save_pretrained(vit)
    ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(vit)
    convnext = tmp_path_factory.mktemp("convnext")
    config = ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 2, 1], **shape)
    seeded(lambda: ConvNextForImageClassification(config)).save_pretrained(convnext)
    ConvNextImageProcessorPil(size={"shortest_edge": 64}, crop_pct=0.875).save_pretrained(convnext)
    return found | {"vit": vit, "convnext": convnext}


@pytest.fixture
def make(folders):
    def build(name, kind=None, **arguments):
        if name == "adversarial":
            arguments.setdefault("target", "dog")
            return rewards.build(name, model=str(folders[kind or "vit"]), **arguments)
        arguments.setdefault("query", QUERIES)
        return rewards.build(name, model=str(folders[kind or "owlvit"]), **arguments)

    return build


CASES = [
    ("detection", "owlvit"),
    ("removal", "owlv2"),
    ("adversarial", "vit"),
    ("adversarial", "convnext"),
]


@pytest.mark.parametrize("photo", PHOTOGRAPHS)
@pytest.mark.parametrize("kind", OWLS)
def test_the_scores_are_those_of_transformers_own_detector(folders, make, kind, photo):
    _, model_class, processor = OWLS[kind]
    model = model_class.from_pretrained(folders[kind]).eval()
    image = photograph(photo)
    pixels = processor(size={"height": SIDE, "width": SIDE})(image, return_tensors="pt")
    words = _byte_tokenizer()(QUERIES, padding="max_length", max_length=16, return_tensors="pt")
    images = to_tensor(image)
    detection, removal = make("detection", kind), make("removal", kind)
    torch.testing.assert_close(
        detection.owl.preprocess(images),
        pixels.pixel_values,
        rtol=0,
        # v1 is rounded to grey levels by Pillow; v2 is not
        atol=1.2 / 255 / 0.26 if kind == "owlvit" else 1e-5,
    )
    with torch.no_grad():
        logits = model(pixel_values=detection.owl.preprocess(images), **words).logits
    best = logits.amax(dim=1)
    expected = best.sigmoid().log().mean(dim=1), (1 - best.sigmoid()).log().mean(dim=1)
    for reward, value in zip((detection, removal), expected, strict=True):
        found = reward(images, ["x"], [{}])
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5)
    threshold = logits.amax(dim=2).sigmoid().median().item()
    count = make("object_count", kind, threshold=threshold)
    outputs = type("Outputs", (), {"logits": logits, "pred_boxes": torch.zeros(1, 16, 4)})
    boxes = processor().post_process_object_detection(outputs, threshold=threshold)[0]["scores"]
    assert count(images, ["x"], [{}]).tolist() == [len(boxes)]
    assert 0 < len(boxes) < 16


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("photo", PHOTOGRAPHS)
@pytest.mark.parametrize("side", [28, 960])
def test_owlv2s_picture_is_its_own_processors_up_to_the_border(photo, shape, side):
    """Within 0.02 grey levels of 255 everywhere, shrinking and enlarging: nothing is rounded."""
    image = picture(photo, shape)
    processor = Owlv2ImageProcessorPil(size={"height": side, "width": side})
    expected = processor(image, return_tensors="pt").pixel_values
    found = SquareOnBlack(side)(to_tensor(image))
    level = torch.tensor(CLIP_STD).view(3, 1, 1) * 255
    assert ((found - expected) * level).abs().max() < 0.02


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("photo", PHOTOGRAPHS)
def test_owlvits_picture_is_its_own_processors_at_its_published_size(photo, shape):
    """Pillow rounds between its two passes and after them, a half each; the second pass weighs the
    first half by 1.25 at most, the sum of a cubic's absolute weights."""
    image = picture(photo, shape)
    processor = OwlViTImageProcessorPil(size={"height": 768, "width": 768})
    expected = processor(image, return_tensors="pt").pixel_values
    found = Preprocess((768, 768), "stretch")(to_tensor(image))
    level = torch.tensor(CLIP_STD).view(3, 1, 1) * 255
    assert ((found - expected) * level).abs().max() < 0.5 * 1.25 + 0.5 + 0.01


def test_owlv2s_picture_of_one_pixel_and_of_half_precision():
    one = SquareOnBlack(3)(torch.full((2, 3, 1, 1), 0.5))
    assert torch.equal(one, one[..., :1, :1].expand(-1, -1, 3, 3))
    assert one.isfinite().all()
    images = crops(2, 40).bfloat16()
    assert torch.equal(SquareOnBlack(60)(images), SquareOnBlack(60)(images.float()))


@pytest.mark.parametrize("side", [16, 60])
def test_the_slope_of_owlv2s_picture_is_that_of_finite_differences(side):
    weight = torch.randn(3, side, side, generator=torch.Generator().manual_seed(1)).double()
    check_slope(
        lambda images, prompts, metadata: (SquareOnBlack(side)(images) * weight).sum((1, 2, 3)),
        crops(1, 40)[..., :30],
        step=1e-6,
    )


@pytest.mark.parametrize("photo", PHOTOGRAPHS)
@pytest.mark.parametrize("kind", ["vit", "convnext"])
def test_the_classifiers_log_probability(folders, make, kind, photo):
    image = photograph(photo)
    if kind == "vit":
        model = ViTForImageClassification.from_pretrained(folders[kind])
        pixels = ViTImageProcessorPil.from_pretrained(folders[kind])(image, return_tensors="pt")
    else:
        model = ConvNextForImageClassification.from_pretrained(folders[kind])
        processor = ConvNextImageProcessorPil.from_pretrained(folders[kind])
        pixels = processor(image, return_tensors="pt")
    with torch.no_grad():
        expected = model.eval()(**pixels).logits.softmax(-1).log()[0]
    for target, index in (("dog", 1), (2, 2)):
        reward = make("adversarial", kind, target=target)
        assert reward(to_tensor(image), [""], [{}]).item() == pytest.approx(
            expected[index].item(), abs=5e-3
        )


@pytest.mark.parametrize(("name", "kind"), [*CASES, ("detection", "owlv2")])
def test_the_slope_is_that_of_finite_differences(make, name, kind):
    reward = make(name, kind)
    rewards.prepare(reward, "cpu", torch.float64)
    check_slope(reward, 0.1 + 0.8 * crops(2, 70), step=1e-6)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_it_passes_the_probe_frozen_and_in_the_runs_dtype(make, name, kind):
    reward = make(name, kind)
    assert rewards.name_of(reward) == name
    exact = rewards.probe(reward, 64, 64)
    assert (exact <= 0).all()
    rewards.prepare(reward, "cpu", torch.bfloat16)
    assert torch.bfloat16 in {p.dtype for p in reward.parameters()}
    assert not any(p.requires_grad for p in reward.parameters())
    found = rewards.probe(reward, 64, 64)
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() < 0.1


@pytest.mark.parametrize(
    ("name", "kind", "blocks"),
    [
        ("detection", "owlvit", "owl.model.owlvit.vision_model.encoder.layers"),
        ("removal", "owlv2", "owl.model.owlv2.vision_model.encoder.layers"),
        ("adversarial", "vit", None),
    ],
)
def test_the_towers_layers_are_blocks_that_can_be_computed_again(make, name, kind, blocks):
    reward = make(name, kind)
    segments = reward_segments(reward)
    if blocks is not None:
        assert [s.name for s in segments] == [f"reward.{blocks}.{i}" for i in range(3)]
    assert len(segments) == 3
    runs = []
    for segment in segments:
        segment.module.register_forward_pre_hook(lambda *_: runs.append(1))
    images = crops(2, 40)

    def gradient():
        runs.clear()
        leaf = images.clone().requires_grad_(True)
        reward(leaf, PROMPTS, EMPTY).sum().backward()
        return leaf.grad, len(runs)

    expected, _ = gradient()
    plan = Plan(steps=({},), reward={"reward block": Policy.RECOMPUTE})
    inner = segments[1].module.mlp if hasattr(segments[1].module, "mlp") else None
    if inner is not None:
        inner.register_forward_pre_hook(lambda *_: runs.append(10))
    applied = policy.apply(plan, reward=reward)
    found, count = gradient()
    applied.remove()
    assert torch.equal(found, expected)
    if inner is not None:
        assert count == 3 + 2


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_it_runs_on_tensors_without_values(make, name, kind):
    mode = FakeTensorMode()
    fake = memory.make_fake(copy.deepcopy(make(name, kind)), mode)
    with mode:
        images = torch.rand(2, 3, 64, 48, requires_grad=True)
        (gradient,) = torch.autograd.grad(fake(images, PROMPTS, EMPTY).sum(), images)
    assert gradient.shape == images.shape


def test_the_detector_keeps_neither_text_tower_nor_boxes(make):
    reward = make("removal", "owlv2")
    names = {name.split(".")[2] for name, _ in reward.named_parameters()}
    assert names == {"owlv2", "class_head", "layer_norm"}
    assert not any("text" in name for name, _ in reward.named_parameters())


def test_counting_is_for_ddpo(make):
    with pytest.raises(RewardError, match=r"'object_count' has no gradient by nature.*DDPO"):
        rewards.probe(make("object_count"), 32, 32)
    values = rewards.probe(make("object_count"), 32, 32, needs_gradient=False)
    assert values.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("detection", {"query": ""}, "what to look for"),
        ("detection", {"query": []}, "what to look for"),
        ("removal", {"query": [1]}, "'removal': query is"),
        ("object_count", {"threshold": 1.0}, "between 0 and 1"),
        ("object_count", {"threshold": "high"}, "between 0 and 1"),
        ("adversarial", {"target": "dogs"}, "Did you mean 'dog'"),
        ("adversarial", {"target": 3}, "from 0 to 2"),
        ("adversarial", {"target": True}, "from 0 to 2"),
    ],
)
def test_impossible_arguments_are_refused(make, name, arguments, words):
    with pytest.raises(ConfigError, match=words):
        make(name, **arguments)


def test_models_that_are_something_else(folders, tmp_path):
    clip, bare = tmp_path / "clip", tmp_path / "bare"
    clip_folder(clip)
    with pytest.raises(ModelError, match="needs a model of the type 'owlvit' or 'owlv2'"):
        rewards.build("detection", model=str(clip), query="a dog")
    config = ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        image_size=SIDE,
        patch_size=7,
    )
    ViTModel(config).save_pretrained(bare)
    with pytest.raises(ModelError, match=r"are missing, among them classifier"):
        rewards.build("adversarial", model=str(bare), target=0)
    ViTForImageClassification(config).save_pretrained(bare)
    with pytest.raises(ModelError, match=r"no preprocessor_config\.json"):
        rewards.build("adversarial", model=str(bare), target=0)


@pytest.mark.parametrize(
    ("kind", "side", "patch", "count"),
    # google/owlvit-base-patch32 and google/owlv2-base-patch16
    [("owlvit", 768, 32, 153_231_879), ("owlv2", 960, 16, 154_966_792)],
)
def test_full_size_detectors_have_the_parameters_of_their_parts(kind, side, patch, count):
    config_class, model_class, _ = OWLS[kind]
    vision = {"image_size": side, "patch_size": patch}
    with torch.device("meta"):
        model = model_class(config_class(vision_config=vision))
    v, t = 768, 512
    tower = 12 * (12 * v**2 + 13 * v) + 3 * patch**2 * v + ((side // patch) ** 2 + 2) * v + 4 * v
    words = 12 * (12 * t**2 + 13 * t) + (49_408 + 16) * t + 2 * t
    projections = t * t + v * t + 1
    boxes = 2 * (v**2 + v) + 4 * v + 4
    heads = v * t + t + 2 * (v + 1) + boxes + 2 * v
    if kind == "owlv2":
        heads += 2 * (v**2 + v) + v + 1  # objectness
    expected = tower + words + projections + heads
    assert sum(p.numel() for p in model.parameters()) == expected == count


def test_a_full_size_classifier_is_read_by_its_published_keys(tmp_path):
    """google/vit-base-patch16-224, of zeros: every key and shape, through the reward's loader."""
    shapes = published.vit_shapes(width=768, depth=12, patch=16, side=224, classes=1000)
    ViTConfig(num_labels=1000).save_pretrained(tmp_path)
    ViTImageProcessorPil().save_pretrained(tmp_path)
    weights = zeros_file(tmp_path / "model.safetensors", shapes)
    reward = rewards.build("adversarial", model=str(tmp_path), target=1)
    assert sum(p.numel() for p in reward.parameters()) == 86_567_656
    assert reward.preprocess.size == (224, 224)
    assert len(reward_segments(reward)) == 12
    pixels = reward.preprocess(torch.empty(2, 3, 512, 512, device="meta"))
    assert reward.model.to("meta")(pixel_values=pixels).logits.shape == (2, 1000)
    del shapes["vit.encoder.layer.11.attention.attention.key.weight"]
    weights.unlink()
    zeros_file(weights, shapes)
    with pytest.raises(ModelError, match=r"1 are missing, among them vit\..*11\.attention"):
        rewards.build("adversarial", model=str(tmp_path), target=1)
