"""Gradients of `training_step` against a naive loop of diffusers, peft and autograd alone.

Nothing below `class Naive` calls the library: its own chain through DDIMScheduler.step, its own
guidance, the pipelines' own prompt encoding and time ids, one backward pass per endpoint. In fp64,
where two right answers agree to about 1e-12 and every slip shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from peft import LoraConfig
from torch import Tensor

from rewardprop_fast.methods import SRPO, AlignProp, DRaFT, DRaFTLV, DRaFTPlus, DRTune, ReFL
from rewardprop_fast.methods.base import Method, Rollout
from rewardprop_fast.randomness import Draws

T = 4
SEED = 1  # draws TRL's mask as off, on, off, on: no suffix; and K as 2 or 3 of 4
TEXTS = ["a red apple", "a dog on the beach"]
FACTS: list[dict[str, Any]] = [{"wave": 1.0}, {}]


class Naive:
    """A pipeline with a peft adapter, sampled and differentiated as one would without a library.

    Args:
        pipe: fresh; it gets an adapter on the attention projections.
        weights: name -> value of every A and B.
    """

    def __init__(self, pipe: Any, weights: dict[str, Tensor], dtype: torch.dtype, rank: int = 8):
        self.pipe, self.dtype = pipe.to(dtype), dtype
        for part in (pipe.unet, pipe.vae, pipe.text_encoder):
            part.requires_grad_(False)
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        pipe.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
        named = {
            name.replace(".default.", "."): p
            for name, p in pipe.unet.named_parameters()
            if "lora_" in name
        }
        assert named.keys() == weights.keys()
        self.parameters = {name: named[name] for name in weights}
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(weights[name])

    def scheduler(self, steps: int) -> DDIMScheduler:
        scheduler = DDIMScheduler.from_config(self.pipe.scheduler.config)
        # diffusers keeps them in fp32, which would hide everything beyond seven digits
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(self.dtype)
        scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.to(self.dtype)
        scheduler.set_timesteps(steps)
        return scheduler

    def conditions(
        self, prompts: list[str], guided: bool, negative: str | None, height: int, width: int
    ) -> dict[str, Any]:
        """Arguments of the UNet, negative rows first."""
        pipe = self.pipe
        with torch.no_grad():
            encoded = pipe.encode_prompt(
                prompt=prompts,
                device="cpu",
                num_images_per_prompt=1,
                do_classifier_free_guidance=guided,
                negative_prompt=None if negative is None else [negative] * len(prompts),
            )
        if len(encoded) == 2:
            rows = encoded[::-1] if guided else encoded[:1]
            return {"encoder_hidden_states": torch.cat(rows)}
        positive, opposite, pooled, opposite_pooled = encoded
        ids = pipe._get_add_time_ids(
            (height, width),
            (0, 0),
            (height, width),
            dtype=self.dtype,
            text_encoder_projection_dim=pipe.text_encoder_2.config.projection_dim,
        ).repeat((2 if guided else 1) * len(prompts), 1)
        return {
            "encoder_hidden_states": torch.cat([opposite, positive] if guided else [positive]),
            "added_cond_kwargs": {
                "text_embeds": torch.cat([opposite_pooled, pooled] if guided else [pooled]),
                "time_ids": ids,
            },
        }

    def chain(
        self,
        x: Tensor,
        conditions: dict[str, Any],
        *,
        steps: range,
        scheduler: DDIMScheduler,
        guidance: float,
        eta: float,
        noise: Tensor | None,
        cut: int = 0,
        detached: frozenset[int] = frozenset(),
        inputs_detached: bool = False,
        predicted: bool = False,
        distances: list[Tensor] | None = None,
    ) -> Tensor:
        """All of it with gradients; the latents are detached at the input of step `cut`, and the
        prediction at the steps in `detached`. `inputs_detached` is of the UNet's calls; with
        `predicted` the last step's prediction of x_0 comes out. `distances` from the base model's
        predictions are noted from `cut` on."""
        for i in steps:
            t = scheduler.timesteps[i]
            if i == cut:
                x = x.detach()
            given = x.detach() if inputs_detached else x
            output = self.pipe.unet(
                torch.cat([given, given]) if guidance > 1 else given, t, **conditions
            ).sample
            if guidance > 1:
                uncond, cond = output.chunk(2)
                output = uncond + guidance * (cond - uncond)
            if distances is not None and i >= cut:
                distances.append((output - self.base(given, t, conditions, guidance)).pow(2).mean())
            if i in detached:
                output = output.detach()
            step = scheduler.step(
                output, t, x, eta=eta, variance_noise=None if noise is None else noise[i]
            )
            x = step.prev_sample
        return step.pred_original_sample if predicted else x

    def base(self, x: Tensor, t: Tensor, conditions: dict[str, Any], guidance: float) -> Tensor:
        """The guided prediction without the adapter."""
        self.pipe.unet.disable_adapters()
        with torch.no_grad():
            rows = [x, x] if guidance > 1 else [x]
            parts = self.pipe.unet(torch.cat(rows), t, **conditions).sample.chunk(len(rows))
        self.pipe.unet.enable_adapters()
        return parts[0] + guidance * (parts[1] - parts[0]) if guidance > 1 else parts[0]

    def images(self, x0: Tensor) -> Tensor:
        vae = self.pipe.vae
        return (vae.decode(x0 / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad.clone() for name, p in self.parameters.items()}


@dataclass(frozen=True)
class Case:
    """One combination. `cut` and `detached` say what the method should do, in the naive loop."""

    kind: str
    method: Method
    guidance: float
    eta: float
    negative: str | None = None
    size: tuple[int, int] = (16, 24)
    steps: int = T
    sampling: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        height, width = self.size
        object.__setattr__(
            self,
            "sampling",
            {
                "steps": self.steps,
                "guidance_scale": self.guidance,
                "eta": self.eta,
                "height": height,
                "width": width,
                "negative_prompt": self.negative or "",
            },
        )

    def __str__(self) -> str:
        method = self.method
        which = {k: v for k, v in vars(method).items() if v != getattr(type(method), k)}
        settings = "".join(f"-{k}={v}" for k, v in which.items())
        negative = "-negative" if self.negative else ""
        return f"{self.kind}-{method.name}{settings}-w={self.guidance}-eta={self.eta}{negative}"


#: Every method with every kind of model; guidance, eta, negative prompt and shape change along, so
#: that each value meets each method and each kind.
CASES = [
    Case("sd", DRaFT(), 5, 0.0, "blurry"),
    Case("sd", DRaFT(k=1), 1, 0.5),
    Case("sd", DRaFT(k=3), 5, 0.5, size=(24, 16)),
    Case("sd", DRaFTLV(n=2), 5, 0.5),
    Case("sd", DRaFTLV(n=1), 5, 0.0, size=(16, 16)),
    Case("sd", AlignProp(k_max=3), 5, 0.0),
    Case("sd", AlignProp(k_min=0, trl_compat=True), 5, 0.5),
    Case("sd", ReFL(last=0.75), 5, 0.5),
    Case("sd", DRTune(k=2), 5, 0.0, "blurry"),
    Case("sd", DRTune(k=2, early_stop=2), 1, 0.5),
    Case("sd", SRPO(), 5, 0.0),
    Case("sd", SRPO("A photo", "A drawing", jump=2, discount=2.0), 1, 0.5),
    Case("sd", DRaFTPlus(k=2, kl_coeff=0.3), 5, 0.5),
    Case("sd-v", DRaFTPlus(k=1, kl_coeff=9.0), 1, 0.0),
    Case("sd-v", DRaFT(), 1, 0.5),
    Case("sd-v", ReFL(last=0.5), 5, 0.0),
    Case("sd-v", DRTune(k=3, early_stop=1), 5, 0.5),
    Case("sd-v", SRPO("", "A drawing"), 5, 0.0),
    Case("sd-v", DRaFT(k=1), 5, 0.0, "blurry"),
    Case("sd-v", DRaFT(k=3), 1, 0.0),
    Case("sd-v", DRaFTLV(n=2), 1, 0.0),
    Case("sd-v", AlignProp(distribution="geometric"), 5, 0.5),
    Case("sd-v", AlignProp(k_min=0, trl_compat=True), 1, 0.0),
    Case("sdxl", DRaFT(), 5, 0.0, "blurry", steps=3),
    Case("sdxl", DRaFT(k=1), 5, 0.0),
    Case("sdxl", DRaFT(k=3), 1, 0.5),
    Case("sdxl", DRaFTLV(n=2), 5, 0.5, steps=2),
    Case("sdxl", AlignProp(k_min=2, k_max=3), 5, 0.0),
    Case("sdxl", AlignProp(k_min=0, trl_compat=True), 5, 0.0, "blurry"),
    Case("sdxl", DRaFTPlus(k=1), 5, 0.0, steps=2),
    Case("sdxl", ReFL(), 5, 0.0, steps=2),
    Case("sdxl", DRTune(k=2, early_stop=1), 5, 0.0, steps=3),
    Case("sdxl", SRPO("A photo", jump=9), 5, 0.5, steps=2),
]


def naive_step(
    case: Case,
    naive: Naive,
    reward: Callable[..., Tensor],
    latents: Tensor,
    draws: Draws,
    gradient_steps: int,
    loss: Callable[[Tensor], Tensor] = lambda rewards: -rewards.mean(),
) -> tuple[Tensor, Tensor]:
    """(rewards (copies, B), images (copies, B, 3, H, W)); gradients are on `naive.parameters`."""
    height, width = case.size
    conditions = naive.conditions(TEXTS, case.guidance > 1, case.negative, height, width)
    scheduler = naive.scheduler(case.steps)
    noise = None
    if case.eta > 0:
        noise = draws.step_noise(case.steps, latents.shape[1:]).to(naive.dtype)
    rest: dict[str, Any] = {
        "scheduler": scheduler,
        "guidance": case.guidance,
        "eta": case.eta,
        "noise": noise,
    }
    last = case.steps - 1
    method = case.method
    distances: list[Tensor] | None = [] if isinstance(method, DRaFTPlus) else None
    if isinstance(method, DRaFTLV):
        x1 = naive.chain(latents, conditions, steps=range(last), **rest).detach()
        x0 = naive.chain(x1, conditions, steps=range(last, case.steps), **rest).detach()
        starts = [x1]
        for i in range(method.n):
            extra = draws.extra_noise(i, x0.shape[1:]).to(naive.dtype)
            starts.append(scheduler.add_noise(x0, extra, scheduler.timesteps[last : last + 1]))
        ends = (  # each sample by itself, its graph built when it is its turn
            naive.chain(start, conditions, steps=range(last, case.steps), cut=last, **rest)
            for start in starts
        )
        copies = len(starts)
    elif isinstance(method, ReFL):
        count = round(method.last * case.steps) or 1
        at = case.steps - count + int(draws.uniform() * count)
        x_t = naive.chain(latents, conditions, steps=range(at), **rest) if at else latents
        x_0 = naive.chain(x_t, conditions, steps=range(at, at + 1), cut=at, predicted=True, **rest)
        ends, copies = (x for x in [x_0]), 1
    elif isinstance(method, DRTune):
        u, v = draws.uniforms(2)
        run = case.steps - int(u * ((method.early_stop or case.steps // 4) + 1))
        apart = run // method.k
        offset = int(v * (run - (method.k - 1) * apart))
        carried = {offset + i * apart for i in range(method.k)}
        rest |= {"detached": frozenset(set(range(run)) - carried), "inputs_detached": True}
        x_0 = naive.chain(latents, conditions, steps=range(run), predicted=run < case.steps, **rest)
        ends, copies = (x for x in [x_0]), 1
    elif isinstance(method, SRPO):
        return naive_srpo(case, naive, reward, latents, draws, conditions, rest)
    else:
        cut, detached = case.steps - gradient_steps, frozenset[int]()
        if getattr(method, "trl_compat", False):
            # TRL: `if i < random.randint(low, high): noise_pred = noise_pred.detach()`, each step
            cuts = [case.steps - math.floor(u * (case.steps + 1)) for u in draws.uniforms(T)]
            detached = frozenset(i for i, drawn in enumerate(cuts) if i < drawn)
            cut = 0
            assert detached == {0, 2}
            assert gradient_steps == 2
        rest |= {"cut": cut, "detached": detached, "distances": distances}
        ends = (naive.chain(x, conditions, steps=range(case.steps), **rest) for x in [latents])
        copies = 1
    rewards, images = [], []
    for x0 in ends:
        image = naive.images(x0)
        value = reward(image, TEXTS, FACTS)
        total = loss(value) / copies
        if isinstance(method, DRaFTPlus) and distances:
            total = total + method.kl_coeff * torch.stack(distances).mean()
        total.backward()
        rewards.append(value.detach())
        images.append(image.detach())
    return torch.stack(rewards), torch.stack(images)


def naive_srpo(
    case: Case,
    naive: Naive,
    reward: Callable[..., Tensor],
    latents: Tensor,
    draws: Draws,
    conditions: dict[str, Any],
    rest: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Direct-Align in closed form: x_0 + (sigma_i/alpha_i - sigma_j/alpha_j)(eps - eps_theta)."""
    method, steps, scheduler = case.method, case.steps, rest["scheduler"]
    assert isinstance(method, SRPO)
    x_0 = naive.chain(latents, conditions, steps=range(steps), **rest).detach()
    i = int(draws.uniform() * steps)
    j = min(i + method.jump, steps)
    eps = draws.extra_noise(0, x_0.shape[1:]).to(naive.dtype)
    x_i = scheduler.add_noise(x_0, eps, scheduler.timesteps[i : i + 1])
    clean = naive.chain(x_i, conditions, steps=range(i, i + 1), predicted=True, **rest)
    alpha = scheduler.alphas_cumprod[scheduler.timesteps]
    ratio = torch.cat([((1 - alpha) / alpha).sqrt(), alpha.new_zeros(1)])
    guessed = (x_i - alpha[i].sqrt() * clean) / (1 - alpha[i]).sqrt()
    image = naive.images(x_0 + (ratio[i] - ratio[j]) * (eps - guessed))
    words = [f"{method.positive}. {text}" if method.positive else text for text in TEXTS]
    value = reward(image, words, FACTS)
    if method.positive or method.negative:
        words = [f"{method.negative}. {text}" if method.negative else text for text in TEXTS]
        value = value - reward(image, words, FACTS)
    share = (steps - i) / steps
    weight = method.discount * share / (method.discount * share + 1 - share)
    (-weight * value.mean()).backward()
    return value.detach()[None], image.detach()[None]


def relative(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[float, float]:
    """Relative error over all parameters together, and the worst of a single one."""
    errors = {name: (got[name].double() - wanted[name].double()).norm() for name in wanted}
    norms = {name: wanted[name].double().norm() for name in wanted}
    whole = torch.stack(list(errors.values())).norm() / torch.stack(list(norms.values())).norm()
    return float(whole), max(float(errors[name] / norms[name]) for name in wanted)


def library_gradients(trainer: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in trainer.parameters.items()}


def weights_of(trainer: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.parameters.items()}


def latents_for(case: Case, seed: int = 3) -> Tensor:
    height, width = case.size
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(
        len(TEXTS), 4, height // 2, width // 2, generator=generator, dtype=torch.float64
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_those_of_the_naive_loop(case, pipeline, make_trainer, reward):
    trainer = make_trainer(
        case.kind, method=case.method, sampling=case.sampling, dtype="float64", trained=True
    )
    naive = Naive(pipeline(case.kind), weights_of(trainer), torch.float64)
    latents = latents_for(case)
    result = trainer.training_step(TEXTS, latents, seed=SEED, metadata=FACTS)
    draws = Draws(SEED, 0, (0, 1))
    rewards, images = naive_step(case, naive, reward, latents, draws, result.gradient_steps)

    assert 0 < images.mean() < 1
    assert images.std() > 0.05
    torch.testing.assert_close(result.images, images.flatten(0, 1), rtol=0, atol=1e-11)
    torch.testing.assert_close(result.rewards, rewards.flatten(), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(result.loss, -rewards.mean(), rtol=1e-11, atol=1e-11)
    assert result.prompts == TEXTS * len(rewards)
    whole, worst = relative(library_gradients(trainer), naive.gradients())
    assert whole < 1e-10
    assert worst < 1e-7
    assert all(p.grad.norm() > 0 for p in naive.parameters.values())


def test_a_target_loss_of_the_users_own(pipeline, make_trainer, reward):
    def loss(rewards: Tensor) -> Tensor:
        return (rewards - 3).square().sum()

    case = Case("sd", DRaFT(k=2), 5, 0.0, steps=2)
    trainer = make_trainer(
        method=case.method,
        sampling=case.sampling,
        dtype="float64",
        trained=True,
        trainer={"loss": loss},
    )
    naive = Naive(pipeline(), weights_of(trainer), torch.float64)
    result = trainer.training_step(TEXTS, latents_for(case), metadata=FACTS)
    rewards, _ = naive_step(case, naive, reward, latents_for(case), Draws(0, 0, (0, 1)), 2, loss)
    torch.testing.assert_close(result.loss, loss(rewards), rtol=1e-11, atol=0)
    assert relative(library_gradients(trainer), naive.gradients())[0] < 1e-10


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_single_precision_loses_no_more_than_the_naive_loop_does(
    kind, pipeline, make_trainer, reward
):
    case = Case(kind, DRaFT(), 5, 0.0, steps=2)
    trainer = make_trainer(kind, method=case.method, sampling=case.sampling, trained=True)
    latents, draws = latents_for(case), Draws(SEED, 0, (0, 1))
    trainer.training_step(TEXTS, latents, seed=SEED, metadata=FACTS)
    gradients = {}
    for dtype in (torch.float32, torch.float64):
        naive = Naive(pipeline(kind), weights_of(trainer), dtype)
        naive_step(case, naive, reward, latents.to(dtype), draws, 2)
        gradients[dtype] = naive.gradients()
    naive_error, _ = relative(gradients[torch.float32], gradients[torch.float64])
    error, _ = relative(library_gradients(trainer), gradients[torch.float64])
    assert error < 2 * naive_error
    assert error < 1e-5


def test_gradients_add_up_until_they_are_cleared(make_trainer):
    trainer = make_trainer(dtype="float64", trained=True)
    trainer.training_step(TEXTS, metadata=FACTS)
    once = library_gradients(trainer)
    trainer.training_step(TEXTS, metadata=FACTS)
    twice = {name: 2 * gradient for name, gradient in once.items()}
    assert relative(library_gradients(trainer), twice)[0] < 1e-14
    assert all(
        parameter.grad is None
        for part in (trainer.pipe.unet, trainer.pipe.vae, trainer.pipe.text_encoder)
        for name, parameter in part.named_parameters()
        if "lora_" not in name
    )


# --- the prefix ---


def _with_gradients_and_detach(method: Method, sampler: Any, latents: Tensor, k: int) -> Rollout:
    """What the no_grad prefix replaces."""
    cut = len(sampler) - k
    prefix = sampler.run(latents, 0, cut, gradients=True)
    assert prefix.requires_grad
    return Rollout(sampler.run(prefix.detach(), cut, len(sampler), gradients=True), 1, k)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_a_prefix_without_gradients_changes_no_bit(k, eta, dtype, make_trainer, monkeypatch):
    trainer = make_trainer(
        method=DRaFT(k), sampling={"steps": 3, "eta": eta}, dtype=dtype, trained=True
    )
    step = trainer.training_step(TEXTS, seed=SEED, metadata=FACTS)
    gradients = library_gradients(trainer)
    trainer.optimizer.clear()
    monkeypatch.setattr(
        DRaFT,
        "rollout",
        lambda self, sampler, x, _: _with_gradients_and_detach(self, sampler, x, k),
    )
    detached = trainer.training_step(TEXTS, seed=SEED, metadata=FACTS)
    assert torch.equal(step.loss, detached.loss)
    assert torch.equal(step.images, detached.images)
    for name, gradient in library_gradients(trainer).items():
        assert torch.equal(gradients[name], gradient), name
        assert gradient.any(), name


# --- finite differences ---


def test_the_full_gradient_is_the_slope_of_the_loss(make_trainer):
    trainer = make_trainer(
        method=DRaFT(), sampling={"steps": 3, "eta": 0.5}, dtype="float64", trained=True
    )
    latents = latents_for(Case("sd", DRaFT(), 3, 0.5, size=(16, 16)))

    def loss() -> float:
        return float(trainer.training_step(TEXTS, latents, seed=SEED, metadata=FACTS).loss)

    loss()
    gradients = library_gradients(trainer)
    names = list(gradients)
    for name in (names[0], names[len(names) // 2], names[-1]):  # down A, mid, up B
        gradient = gradients[name]
        largest = int(gradient.abs().argmax())
        weight = trainer.parameters[name].data.view(-1)
        origin, h = float(weight[largest]), 1e-5
        weight[largest] = origin + h
        above = loss()
        weight[largest] = origin - h
        below = loss()
        weight[largest] = origin
        slope = (above - below) / (2 * h)
        assert slope == pytest.approx(float(gradient.view(-1)[largest]), rel=1e-6), name


def test_the_gradient_of_a_suffix_is_the_slope_behind_its_fixed_prefix(make_trainer, reward):
    trainer = make_trainer(method=DRaFT(k=2), sampling={"steps": 3}, dtype="float64", trained=True)
    latents = latents_for(Case("sd", DRaFT(), 3, 0.0, size=(16, 16)))
    trainer.training_step(TEXTS, latents, metadata=FACTS)
    sampler = trainer.engine.sampler(TEXTS, Draws(0, 0, (0, 1)))
    prefix = sampler.run(latents, 0, 1, gradients=False)
    vae = trainer.pipe.vae

    def loss() -> float:
        x0 = sampler.run(prefix, 1, 3, gradients=False)
        with torch.no_grad():
            images = (vae.decode(x0 / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
            return -float(reward(images, TEXTS, FACTS).mean())

    name, gradient = max(library_gradients(trainer).items(), key=lambda item: item[1].abs().max())
    index = int(gradient.abs().argmax())
    weight = trainer.parameters[name].data.view(-1)
    origin, h = float(weight[index]), 1e-5
    weight[index] = origin + h
    above = loss()
    weight[index] = origin - h
    slope = (above - loss()) / (2 * h)
    assert slope == pytest.approx(float(gradient.view(-1)[index]), rel=1e-6)


# --- bfloat16 ---


def test_bfloat16_points_the_same_way(make_trainer, pipeline):
    directions = []
    for dtype in ("float32", "bfloat16"):
        trainer = make_trainer(method=DRaFT(k=1), sampling={"steps": 3}, dtype=dtype, trained=True)
        result = trainer.training_step(TEXTS, seed=SEED, metadata=FACTS)
        assert result.images.dtype == result.rewards.dtype == torch.float32
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in trainer.parameters.values())
        gradients = torch.cat([g.flatten() for g in library_gradients(trainer).values()])
        assert torch.isfinite(gradients).all()
        directions.append(gradients)
    cosine = torch.nn.functional.cosine_similarity(*directions, dim=0)
    assert cosine > 0.95
