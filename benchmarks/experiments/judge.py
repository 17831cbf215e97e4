"""One judge for all: it samples any adapter from the same noise and asks rewards and gauges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import rewardprop_fast as rpf
from benchmarks.experiments.size import Size
from rewardprop_fast import lora, randomness
from rewardprop_fast.models import random_init
from rewardprop_fast.randomness import Draws, Stream
from rewardprop_fast.rewards import Reward, build, evaluate
from rewardprop_fast.rewards.alignment import AlignmentReward
from rewardprop_fast.rewards.scorer import to_input, tokenize
from rewardprop_fast.training.gauges import diversity
from rewardprop_fast.training.prompts import load_prompts

STYLE = "fluent"
#: Of the evaluation's noise, which no run trains on.
SEED = 20_000


def load_pipe(size: Size) -> Any:
    """A fresh pipeline."""
    if size.model == "tiny":
        return random_init.tiny_stable_diffusion()
    return rpf.models.load_bundled()


def trained_on() -> Reward:
    """What short and long runs are trained on: log P(style | image)."""
    return build("style", style=STYLE)


@dataclass(frozen=True)
class Verdict:
    """Images (N, 3, H, W) in [0, 1], and what was measured on them."""

    images: Tensor
    gauges: dict[str, float]


class Judge:
    """Samples and scores; T, guidance and noise are the same for every adapter.

    Gauges: `reward`, what was trained on; `heldout`, the same question to a classifier of other
    data; `alignment`, how well images show their prompts, by a scorer that no run is trained on;
    `recognised`, the share of images to which another scorer of the kind gives their own prompt,
    out of theirs and all of the bundled ones; `diversity` among the images.
    """

    def __init__(self, size: Size) -> None:
        self.size = size
        self.known = load_prompts("bundled").prompts
        apart = max(1, len(self.known) // size.images)
        self.prompts = self.known[::apart][: size.images]
        self.rewards = {
            "reward": trained_on(),
            "heldout": build("style", style=STYLE, copy="heldout"),
            "alignment": build("alignment", copy="heldout"),
        }
        self._recogniser = AlignmentReward(copy="reward")
        self._trainers: dict[int, rpf.RewardPropTrainer] = {}
        self._base: Verdict | None = None

    def look(
        self,
        state: Mapping[str, Tensor] | None,
        prompts: Sequence[str] | None = None,
        strength: float = 1.0,
        seed: int = SEED,
    ) -> Verdict:
        """Judge an adapter (peft's names, as `lora.lora_state_dict`); None is the base model."""
        plain = state is None and prompts is None and seed == SEED
        if plain and self._base is not None:
            return self._base
        prompts = list(prompts or self.prompts)
        rank = _rank(state) if state else self.size.rank
        trainer = self._trainer(rank)
        unet = trainer.pipe.unet
        if state:
            lora.load_lora_state_dict(unet, state)
        lora.set_strength(unet, strength if state else 0.0)
        draws = Draws(seed, 0, tuple(range(len(prompts))))
        noise = randomness.latents(
            seed, 0, draws.samples, trainer.engine.latent_shape, stream=Stream.EVALUATION
        )
        images = trainer.engine.sample(prompts, noise, draws).float()
        verdict = Verdict(images, self.score(images, prompts))
        if plain:
            self._base = verdict
        return verdict

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[str]) -> dict[str, float]:
        """The gauges of images that are there already."""
        facts: list[dict[str, Any]] = [{} for _ in prompts]
        found = {
            name: float(evaluate(reward, images, list(prompts), facts).mean())
            for name, reward in self.rewards.items()
        }
        recognised = self._recognised(images, prompts)
        return {**found, "recognised": recognised, "diversity": diversity(images) or 0.0}

    def _recognised(self, images: Tensor, prompts: Sequence[str]) -> float:
        asked = list(dict.fromkeys((*prompts, *self.known)))
        by = self._recogniser
        texts = by.scorer.encode_tokens(tokenize(by.tokenizer, asked, images.device))
        best = (by.scorer.encode_images(to_input(images)) @ texts.T).argmax(1).tolist()
        right = [asked[i] == prompt for i, prompt in zip(best, prompts, strict=True)]
        return sum(right) / len(right)

    def _trainer(self, rank: int) -> rpf.RewardPropTrainer:
        if rank not in self._trainers:
            size = self.size
            config = rpf.TrainConfig(
                method=rpf.DRaFT(1),
                sampling=rpf.SamplingConfig(steps=size.steps, guidance_scale=size.guidance),
                lora=rpf.LoRAConfig(rank=rank),
                batch_size=size.images,
                dtype=size.dtype,
                device="cpu",
            )
            self._trainers[rank] = rpf.RewardPropTrainer(
                load_pipe(size), self.rewards["reward"], self.prompts, config, progress="silent"
            )
        return self._trainers[rank]


def _rank(state: Mapping[str, Tensor]) -> int:
    return next(v.shape[0] for k, v in state.items() if k.endswith("lora_A.weight"))
