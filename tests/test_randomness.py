"""Draws depend on (seed, stream, step, sample) and on nothing else."""

from __future__ import annotations

import random

import pytest
import torch

from rewardprop_fast.randomness import (
    Stream,
    choice,
    generator,
    integer,
    latents,
    seed_of,
    uniform,
)

SEEDS = [1449066861819169703, 11141667170622586124, 15452983058474809343, 12705336356294224]
INTEGERS = [18, 24, 17, 11, 4, 40]
UNIFORMS = [0.59958063347063, 0.9710775773575211]
NORMALS = [-0.389574, -0.171386, -0.652619, -0.285489, 0.452591, 0.287342]


def test_seeds_are_these_numbers_for_ever() -> None:
    # Changing them changes every published run.
    assert seed_of(0, Stream.LATENTS) == SEEDS[0]
    assert seed_of(42, Stream.LATENTS, step=7, sample=3) == SEEDS[1]
    assert seed_of(42, Stream.METHOD, step=7, sample=3) == SEEDS[2]
    assert seed_of(2**63 - 1, Stream.LV, step=10_000, sample=127) == SEEDS[3]


def test_draws_are_these_numbers_for_ever() -> None:
    # Normals only up to the last bits, where the vector units of CPUs differ.
    assert [integer(1, Stream.METHOD, step, 1, 50) for step in range(6)] == INTEGERS
    assert [uniform(1, Stream.METHOD, step) for step in range(2)] == UNIFORMS
    noise = latents(1, 2, [0, 5], (4, 16, 16))
    assert noise[:, 0, 0, :3].flatten().tolist() == pytest.approx(NORMALS, rel=1e-5)


def test_streams_keep_their_numbers() -> None:
    assert {stream.name: stream.value for stream in Stream} == {
        "LATENTS": 1,
        "PROMPTS": 2,
        "METHOD": 3,
        "NOISE": 4,
        "LV": 5,
        "EVALUATION": 6,
        "INITIALISATION": 7,
        "PRETRAINING": 8,
    }


def test_a_row_does_not_depend_on_its_batch() -> None:
    whole = latents(3, 5, range(6), (4, 8, 8))
    assert torch.equal(latents(3, 5, [4], (4, 8, 8))[0], whole[4])
    assert torch.equal(latents(3, 5, [5, 0], (4, 8, 8)), whole[[5, 0]])
    assert latents(3, 5, [], (4, 8, 8)).shape == (0, 4, 8, 8)


def test_global_generators_neither_matter_nor_move() -> None:
    torch.manual_seed(1)
    random.seed(1)
    first = latents(0, 0, [0], (4,)), uniform(0, Stream.METHOD, 0)
    torch.manual_seed(2)
    before = torch.get_rng_state(), random.getstate()
    second = latents(0, 0, [0], (4,)), uniform(0, Stream.METHOD, 0)
    choice("abc", 0, Stream.PROMPTS, 0)
    assert torch.equal(first[0], second[0])
    assert first[1] == second[1]
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


def test_seed_stream_step_and_sample_each_matter() -> None:
    seeds = [
        seed_of(seed, stream, step, sample)
        for seed in range(4)
        for stream in Stream
        for step in range(20)
        for sample in range(10)
    ]
    assert len(set(seeds)) == len(seeds) == 4 * len(Stream) * 20 * 10
    # torch's engine takes the lower half; it has to do as well.
    assert len({seed & 0xFFFFFFFF for seed in seeds}) == len(seeds)

    base = latents(0, 0, [0], (16,))
    others = [
        latents(1, 0, [0], (16,)),
        latents(0, 1, [0], (16,)),
        latents(0, 0, [1], (16,)),
        latents(0, 0, [0], (16,), stream=Stream.NOISE),
    ]
    assert not any(torch.equal(base, other) for other in others)


def test_neighbours_are_uncorrelated_and_normal() -> None:
    noise = latents(0, 0, range(64), (4, 16, 16)).flatten(1)  # (64, 1024)
    correlation = torch.corrcoef(noise) - torch.eye(64)
    # The largest of 2016 correlations of 1024 normals each lies near 0.11.
    assert correlation.abs().max() < 0.16
    assert noise.mean().abs() < 4 / noise.numel() ** 0.5
    assert abs(float(noise.var()) - 1) < 4 * (2 / noise.numel()) ** 0.5


def test_a_generator_continues_where_it_is() -> None:
    source = generator(0, Stream.NOISE, 1, 2)
    first, second = torch.randn(4, generator=source), torch.randn(4, generator=source)
    again = generator(0, Stream.NOISE, 1, 2)
    assert torch.equal(torch.randn(4, generator=again), first)
    assert torch.equal(torch.randn(4, generator=again), second)
    assert not torch.equal(first, second)


def test_lower_precision_is_a_rounding_of_the_same_noise() -> None:
    exact = latents(0, 0, [0], (64,))
    assert exact.dtype == torch.float32
    assert torch.equal(latents(0, 0, [0], (64,), dtype=torch.bfloat16), exact.to(torch.bfloat16))


def test_integers_reach_both_ends_evenly() -> None:
    draws = [integer(0, Stream.METHOD, step, 3, 7) for step in range(2000)]
    counts = [draws.count(value) for value in range(3, 8)]
    assert sum(counts) == 2000
    # Five standard deviations of a fair draw: sqrt(2000 * 0.2 * 0.8) = 18.
    assert all(abs(count - 400) < 90 for count in counts)
    assert integer(0, Stream.METHOD, 0, 5, 5) == 5


def test_choice_and_uniform_stay_inside() -> None:
    assert {choice(["a", "b", "c"], 0, Stream.PROMPTS, 0, sample) for sample in range(60)} == set(
        "abc"
    )
    draws = [uniform(0, Stream.METHOD, step) for step in range(1000)]
    assert min(draws) >= 0
    assert max(draws) < 1
    assert sum(draws) / 1000 == pytest.approx(0.5, abs=0.05)


def test_impossible_requests_say_so() -> None:
    with pytest.raises(ValueError, match="no whole number from 3 to 2"):
        integer(0, Stream.METHOD, 0, 3, 2)
    with pytest.raises(ValueError, match="nothing to choose from"):
        choice([], 0, Stream.PROMPTS, 0)
    with pytest.raises(ValueError, match=r"seed -1, .* must be whole numbers from 0"):
        generator(-1, Stream.LATENTS)
    with pytest.raises(ValueError, match=r"step 1\.5"):
        seed_of(0, Stream.LATENTS, 1.5)  # type: ignore[arg-type]
