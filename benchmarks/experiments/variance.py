"""(b) The variance of DRaFT-LV's gradient by n, and its price in seconds.

A rollout's endpoints are all of one distribution, so each endpoint's own gradient is computed once,
for the most n, and that of a smaller n is the mean over the first 1 + n of them. The trace of the
covariance of such gradients over many rollouts comes from running sums, in one pass.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import torch
from torch import Tensor

import rewardprop_fast as rpf
from benchmarks.experiments import figures
from benchmarks.experiments.context import Context
from benchmarks.experiments.training import fingerprint, trainer_of
from rewardprop_fast import lora, randomness
from rewardprop_fast.models import decode
from rewardprop_fast.randomness import Draws

COPIES = (0, 1, 2, 4, 8)


class Trace:
    """Trace of the covariance of vectors that come one by one (Welford 1962, summed over entries).

    Attributes:
        mean: of all so far.
    """

    def __init__(self) -> None:
        self.count, self.mean, self._squares = 0, torch.zeros(()), 0.0

    def add(self, vector: Tensor) -> None:
        """One more vector (P,)."""
        self.count += 1
        vector = vector.double()
        away = vector - self.mean
        self.mean = self.mean + away / self.count
        self._squares += float(away @ (vector - self.mean))

    @property
    def value(self) -> float:
        """Unbiased; of two vectors at least."""
        return self._squares / (self.count - 1)


def endpoint_gradients(
    trainer: rpf.RewardPropTrainer, prompt: str, draws: Draws, copies: int
) -> list[Tensor]:
    """Gradients (P,) of the reward for the 1 + `copies` endpoints of one rollout (DRaFT-LV)."""
    engine = trainer.engine
    sampler = engine.sampler([prompt], draws)
    schedule, last = sampler.schedule, len(sampler) - 1
    noise = randomness.latents(draws.seed, draws.step, draws.samples, engine.latent_shape)
    x1 = sampler.run(noise, 0, last, gradients=False)
    x0 = sampler.run(x1, last, last + 1, gradients=False)
    found = []
    for copy in range(1 + copies):
        start = x1
        if copy:
            extra = draws.extra_noise(copy - 1, x0.shape[1:]).to(x0)
            start = schedule.signal[last] * x0 + schedule.noise[last] * extra
        trainer.optimizer.clear()
        end = sampler.run(start, last, last + 1, gradients=True)
        images = decode(engine.pipe.vae, end)
        engine.judge(images, [prompt], [{}], draws).sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in trainer.parameters.values()]))
    return found


def run(context: Context) -> None:
    for seed in context.seeds:
        spread(context, seed)
    for seed in context.seeds:
        seconds(context, seed)


def spread(context: Context, seed: int) -> None:
    """At the weights a short run of DRaFT-1 ended with."""
    size = context.size
    trained = context.short("draft-1", seed)
    store = context.store("variance", "seed", "settings")
    key = {"seed": seed, "settings": fingerprint((trained, size.rollouts))}
    if store.find(**key):
        return
    trainer = trainer_of(trained, size)
    lora.load_lora_state_dict(trainer.pipe.unet, context.adapter(trained))
    prompts = trainer.prompts.prompts
    traces = {n: Trace() for n in COPIES}
    for i in range(size.rollouts):
        draws = Draws(5000 + seed, i, (0,))
        gradients = endpoint_gradients(trainer, prompts[i % len(prompts)], draws, max(COPIES))
        for n, trace in traces.items():
            trace.add(torch.stack(gradients[: 1 + n]).mean(0))
    store.add(
        {
            **key,
            "n": n,
            "rollouts": size.rollouts,
            "trace": trace.value,
            "mean_squared": float(trace.mean.square().sum()),
        }
        for n, trace in traces.items()
    )
    shares = ", ".join(f"{n}: {t.value / traces[0].value:.3f}" for n, t in traces.items())
    print(f"variance, seed {seed}: {shares}", flush=True)


def seconds(context: Context, seed: int, repeats: int = 3) -> None:
    """An update's least time by n, in turns."""
    size = context.size
    store = context.store("variance_seconds", "seed", "settings")
    trained = context.short("draft-1", seed)
    key = {"seed": seed, "settings": fingerprint((trained, repeats))}
    if store.find(**key):
        return
    trainers = {}
    for n in COPIES:
        trainers[n] = trainer_of(trained, size)
        trainers[n].engine.config = _with(trainers[n], n)
    least = dict.fromkeys(COPIES, float("inf"))
    for repeat in range(repeats + 1):  # the first warms up
        for n, trainer in trainers.items():
            then = time.process_time()
            trainer.update()
            if repeat:
                least[n] = min(least[n], time.process_time() - then)
    store.add({**key, "n": n, "cpu_seconds": value} for n, value in least.items())


def _with(trainer: rpf.RewardPropTrainer, n: int) -> rpf.TrainConfig:
    method = rpf.DRaFTLV(n) if n else rpf.DRaFT(1)
    return dataclasses.replace(trainer.config, method=method)


def plot(context: Context, folder: Path) -> None:
    rows = context.store("variance").rows()
    timed = context.store("variance_seconds").rows()
    if not rows or not timed:
        return
    plt = figures.pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(9.5, 2.8), layout="constrained")
    first = {r["seed"]: float(r["trace"]) for r in rows if r["n"] == "0"}
    price = {(r["seed"], r["n"]): float(r["cpu_seconds"]) for r in timed}
    shares = [{**r, "share": str(float(r["trace"]) / first[r["seed"]])} for r in rows]
    both = [
        {**r, "product": str(float(r["share"]) * price[key] / price[r["seed"], "0"])}
        for r in shares
        if (key := (r["seed"], r["n"])) in price
    ]
    figures.curve(axes[0], shares, "n", "share", "", "C0", at="n")
    figures.curve(axes[1], timed, "n", "cpu_seconds", "", "C1", at="n")
    figures.curve(axes[2], both, "n", "product", "", "C2", at="n")
    axes[0].set_ylabel("trace of covariance, n = 0 is 1")
    axes[1].set_ylabel("seconds of one core an update")
    axes[2].set_ylabel("variance × time, n = 0 is 1")
    axes[2].axhline(1, color="0.6", linewidth=0.8, linestyle=":")
    for axis in axes:
        axis.set_xlabel("n, extra endpoints; 0 is DRaFT-1")
        axis.set_ylim(0)
    figures.save(figure, folder / "variance.svg")
