"""Several LoRAs as one: exact sums, smaller ranks, formats, and what does not fit."""

from __future__ import annotations

import pytest
import torch

from rewardprop_fast import lora
from rewardprop_fast.errors import ConfigError, ExportError
from rewardprop_fast.lora.files import LayerLoRA
from rewardprop_fast.models.random_init import tiny_stable_diffusion, tiny_stable_diffusion_xl


def correction(layer: LayerLoRA) -> torch.Tensor:
    """What it adds to the layer's weight, in float64, written plainly."""
    up, down = layer.up.double().flatten(1), layer.down.double().flatten(1)
    return layer.alpha / layer.rank * up @ down


@pytest.fixture
def two(build, trained, tmp_path):
    """LoRAs that differ in rank, alpha and layers; the second in kohya's format."""
    first, second = build(), build()
    trained(first, rank=4, alpha=2)
    trained(second, rank=3, alpha=6, target_modules="attention+ff")
    with torch.no_grad():
        for parameter in lora.lora_parameters(second.unet).values():
            parameter.mul_(-0.7)
    a = lora.save_lora(first, tmp_path / "a", ("diffusers",))["diffusers"]
    b = lora.save_lora(second, tmp_path / "b", ("kohya",))["kohya"]
    return a, b


def test_a_mix_is_the_weighted_sum_and_survives_both_formats(build, two, tmp_path):
    model = build()
    a, b = (lora.read(model, path) for path in two)
    assert not getattr(model.unet, "peft_config", {})
    mixed = lora.mix([(a, 0.7), (b, -0.3)])
    assert set(mixed) == set(a) | set(b)
    assert {layer.rank for layer in mixed.values()} == {7, 3}
    for name, layer in mixed.items():
        wanted = torch.zeros_like(correction(layer))
        for part, weight in ((a, 0.7), (b, -0.3)):
            if name in part:
                wanted += weight * correction(part[name])
        torch.testing.assert_close(correction(layer), wanted, rtol=1e-5, atol=1e-8)
    lora.put(model, mixed)
    for path in lora.save_lora(model, tmp_path / "c").values():
        again = lora.read(build(), path)
        for name, layer in mixed.items():
            torch.testing.assert_close(correction(again[name]), correction(layer))


def test_a_lora_alone_at_weight_one_does_what_it_did(build, two, sample):
    alone, mixed = build(), build()
    lora.load(alone, two[0])
    lora.put(mixed, lora.mix([(lora.read(mixed, two[0]), 1.0), (lora.read(mixed, two[1]), 0.0)]))
    torch.testing.assert_close(sample(mixed), sample(alone), rtol=1e-4, atol=1e-4)


def test_weights_change_in_place_where_all_parts_are_kept(build, two):
    model = build()
    parts = [lora.read(model, path) for path in two]
    lora.put(model, lora.mix([(parts[0], 1.0), (parts[1], 0.0)], keep_all=True))
    held = list(lora.lora_parameters(model.unet).values())
    half = lora.mix([(parts[0], 0.5), (parts[1], 0.5)], keep_all=True)
    lora.fill(model, half)
    for name, parameter in lora.lora_parameters(model.unet).items():
        module, _, half_name = name.rpartition(".lora_")
        wanted = half[module].down if half_name.startswith("A") else half[module].up
        assert torch.equal(parameter, wanted)
    assert all(x is y for x, y in zip(held, lora.lora_parameters(model.unet).values(), strict=True))


def test_a_smaller_rank_loses_the_smallest_singular_values_and_says_how_much(build, two):
    model = build()
    mixed = lora.mix([(lora.read(model, two[0]), 1.0), (lora.read(model, two[1]), 1.0)])
    small, lost = lora.compress(mixed, 3)
    squares, whole, shares = 0.0, 0.0, {}
    for name, layer in mixed.items():
        full, kept = correction(layer), correction(small[name])
        assert small[name].rank == min(layer.rank, 3)
        values = torch.linalg.svdvals(full)
        rest = float(values[3:].square().sum())
        assert float((full - kept).square().sum()) == pytest.approx(rest, rel=1e-3, abs=1e-10)
        squares, whole = squares + rest, whole + float(values.square().sum())
        shares[name] = (rest / float(values.square().sum())) ** 0.5
    assert lost.error == pytest.approx((squares / whole) ** 0.5, rel=1e-4)
    assert lost.worst == pytest.approx(max(shares.values()), rel=1e-4)
    assert shares[lost.worst_layer] == max(shares.values())
    same, nothing = lora.compress(mixed, 7)
    assert nothing.error == 0
    assert all(same[name] is layer for name, layer in mixed.items())


def test_convolutions_too():
    generator = torch.Generator().manual_seed(1)
    layer = LayerLoRA(
        torch.randn(5, 4, 3, 3, generator=generator),
        torch.randn(6, 5, 1, 1, generator=generator),
        2,
    )
    mixed = lora.mix([({"conv": layer}, 0.5), ({"conv": layer}, 1.5)])["conv"]
    assert (mixed.down.shape, mixed.up.shape) == ((10, 4, 3, 3), (6, 10, 1, 1))
    small, lost = lora.compress({"conv": mixed}, 5)
    assert (small["conv"].down.shape, small["conv"].up.shape) == ((5, 4, 3, 3), (6, 5, 1, 1))
    assert lost.error < 1e-6  # the same matrix twice has its rank still
    torch.testing.assert_close(
        correction(small["conv"]), 2 * correction(layer), rtol=1e-4, atol=1e-5
    )


def test_what_does_not_fit(two):
    layer = LayerLoRA(torch.ones(2, 4), torch.ones(3, 2), 2.0)
    other = LayerLoRA(torch.ones(2, 5), torch.ones(3, 2), 2.0)
    with pytest.raises(ConfigError, match="different widths at x"):
        lora.mix([({"x": layer}, 1.0), ({"x": other}, 1.0)])
    with pytest.raises(ConfigError, match="Every weight is 0"):
        lora.mix([({"x": layer}, 0.0)])
    with pytest.raises(ConfigError, match="weight is nan"):
        lora.mix([({"x": layer}, float("nan"))])
    with pytest.raises(ConfigError, match="at least one"):
        lora.mix([])
    with pytest.raises(ConfigError, match="rank is 0"):
        lora.compress({"x": layer}, 0)


def test_another_models_lora_is_named_as_such(trained, tmp_path):
    sd, sdxl = tiny_stable_diffusion(), tiny_stable_diffusion_xl()
    trained(sdxl)
    path = lora.save_lora(sdxl, tmp_path, ("diffusers",))["diffusers"]
    with pytest.raises(ExportError, match="different model"):
        lora.read(sd, path)


def test_annealing_goes_from_the_base_model_to_the_tuned_one(build, two):
    model = build()
    lora.load(model, two[0])
    unet, x = model.unet, torch.randn(1, 4, 8, 8)
    arguments = {"encoder_hidden_states": torch.randn(1, 7, unet.config.cross_attention_dim)}
    if unet.config.addition_embed_type == "text_time":
        width = unet.config.projection_class_embeddings_input_dim
        pooled = torch.randn(1, width - 6 * unet.config.addition_time_embed_dim)
        arguments["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": torch.ones(1, 6)}
    with torch.no_grad():
        tuned = unet(x, 5, return_dict=False, **arguments)[0]
        with lora.disabled(unet):
            base = unet(x, 5, return_dict=False, **arguments)[0]
    assert not torch.allclose(tuned, base)
    annealed = lora.Annealed(unet, 4, 2.0)
    for _ in range(2):  # the second chain begins anew
        for i in range(1, 5):
            got = annealed(x, 5, return_dict=False, **arguments)[0]
            torch.testing.assert_close(got, base + (i / 4) ** 2 * (tuned - base))
    assert torch.equal(got, tuned)
