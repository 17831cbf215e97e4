"""The trainer: a pipeline, a reward and prompts in, a LoRA and a report out."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from rewardprop_fast import lora, nn, randomness
from rewardprop_fast.errors import CheckpointError, ConfigError, NonFiniteError, RewardError
from rewardprop_fast.methods import DDPO
from rewardprop_fast.models import check_pipeline
from rewardprop_fast.randomness import Draws, Stream
from rewardprop_fast.rewards import Reward, evaluate, name_of, prepare, probe
from rewardprop_fast.rewards.base import probe_images
from rewardprop_fast.training import (
    budget,
    capture,
    checkpoint,
    lora_header,
    report,
    run_files,
)
from rewardprop_fast.training.config import RunConfig, TrainConfig
from rewardprop_fast.training.early_stopping import EarlyStopping
from rewardprop_fast.training.engine import Engine, Loss, StepResult, negative_mean, where
from rewardprop_fast.training.evaluation import Evaluation, Evaluator
from rewardprop_fast.training.gauges import diversity
from rewardprop_fast.training.identity import differences, identity
from rewardprop_fast.training.optimization import LoRAOptimizer
from rewardprop_fast.training.placement import place
from rewardprop_fast.training.policy_gradient import PolicyGradient
from rewardprop_fast.training.precision import resolve_device, resolve_dtype
from rewardprop_fast.training.prompts import Prompt, load_prompts, texts
from rewardprop_fast.training.regularisation import Pretraining
from rewardprop_fast.training.run_folder import RunFolder
from rewardprop_fast.training.signals import StopRequest
from rewardprop_fast.training.timing import PhaseTimer

T = TypeVar("T")

#: Prompts, their metadata, draws.
Batch = tuple[list[str], list[dict[str, Any]], Draws]


@dataclass(frozen=True)
class TrainResult:
    """How `train` ended.

    Attributes:
        exit_code: 0, or 130 / 143 after Ctrl-C / SIGTERM (saved, resumable).
        summary: what summary.json holds; empty if the run was interrupted.
    """

    step: int
    directory: Path
    exit_code: int
    summary: dict[str, Any]


class RewardPropTrainer:
    """Fine-tunes a diffusion pipeline's LoRA by back-propagating a reward through its sampler.

    The pipeline is changed in place: moved to the device and dtype of the config, frozen, in eval
    mode, given a LoRA adapter, and put on this library's operators (`accelerate`; `restore` undoes
    it).

    Args:
        pipe: a diffusers StableDiffusionPipeline or StableDiffusionXLPipeline.
        reward: any callable `(images (B,3,H,W) in [0,1], prompts, metadata) -> (B,)`.
        prompts: name of a prompt set, a .txt file, or a list of texts or (text, metadata) pairs.
        config: see `TrainConfig`.
        heldout_reward: another reward, never trained on; where it falls while the reward rises, the
            reward is being cheated.
        loss: rewards (N,) -> scalar to minimise; the default is their negative mean.
        run_config: what config.yaml should hold, where the run came from a file.
        progress: "auto", "bar", "lines" or "silent".

    Raises:
        ConfigError, ModelError, RewardError: before any long work.
    """

    def __init__(
        self,
        pipe: Any,
        reward: Reward,
        prompts: str | Path | Sequence[Prompt] = "bundled",
        config: TrainConfig | None = None,
        *,
        heldout_reward: Reward | None = None,
        loss: Loss | None = None,
        run_config: RunConfig | None = None,
        progress: Literal["auto", "bar", "lines", "silent"] = "auto",
    ) -> None:
        config = config or TrainConfig()
        config.validate()
        check_pipeline(pipe)
        self.config, self.pipe, self.prompts = config, pipe, load_prompts(prompts)
        self.run_config, self.progress = run_config, progress
        self.device = resolve_device(config.device)
        self.dtype = resolve_dtype(config.dtype, self.device)
        place(pipe, self.device, self.dtype, config.accelerate)
        self.engine = Engine(pipe, reward, config, loss or negative_mean)
        self.reward = reward
        self._try(reward, config.method.needs_reward_gradient)
        if heldout_reward is not None:
            self._try(heldout_reward, needs_gradient=False)
        if loss is not None and not config.method.needs_reward_gradient:
            raise ConfigError(
                f"loss is given, but {config.method.name} has an objective of its own and no "
                "gradient of the reward. Put what you want into the reward."
            )
        self._refuse_useless(reward)
        lora.inject(
            pipe.unet,
            config.lora.rank,
            config.lora.alpha,
            config.lora.target_modules,
            seed=randomness.seed_of(config.seed, Stream.INITIALISATION),
        )
        # Last, since it changes classes of what is there; a pipeline may come accelerated already.
        if config.accelerate:
            nn.accelerate(pipe)
        else:
            nn.restore(pipe)
        self.optimizer = LoRAOptimizer(
            lora.lora_parameters(pipe.unet), config.optimizer, config.steps
        )
        self.memory: budget.Memory | None = None
        plan = None
        if config.memory_budget is not None:
            plan = budget.make(config.memory_budget, pipe, reward, config, self.device)
        self.engine.graphs = capture.choose(config.rollout.graphs, self.device, plan)
        if plan is not None:
            self.memory = budget.Memory(plan, pipe, reward, graphs=self.engine.graphs)
            self.engine.watch = self.memory.phase
        if config.regularisation.pretraining_coeff:
            self.engine.pretraining = Pretraining(self.engine, self.prompts.prompts)
        if config.early_stopping.heldout_fall is not None and heldout_reward is None:
            raise ConfigError(
                "early_stopping.heldout_fall is given, but there is no held-out reward to look at. "
                "Give one (heldout_reward), or leave it out."
            )
        self.policy: PolicyGradient | None = None
        if isinstance(config.method, DDPO):
            self.policy = PolicyGradient(self.engine, config.method)
        self.evaluator = Evaluator(self.engine, heldout_reward, self.prompts)
        self.step = 0
        self._seconds = 0.0
        self._owns_folder = False  # whether what the run's folder holds is this run's
        self._saved_at = -1
        self._stopping: dict[str, Any] = {}  # what early stopping knew at the last checkpoint

    def _try(self, reward: Reward, needs_gradient: bool) -> None:
        """Freeze and place a reward, and call it once. Raises RewardError."""
        prepare(reward, self.device, self.dtype)
        probe(
            reward,
            self.engine.height,
            self.engine.width,
            self.prompts.prompts[:2],
            self.prompts.metadata[:2],
            self.device,
            self.engine.dtype,
            needs_gradient,
        )

    def _refuse_useless(self, reward: Reward) -> None:
        """Raises RewardError where the method can learn nothing from this reward."""
        images = probe_images(self.engine.height, self.engine.width)
        texts, facts = self.prompts.prompts[:1] * 2, list(self.prompts.metadata[:1]) * 2
        with torch.no_grad():
            images = images.to(self.device, self.engine.dtype)
            score = functools.partial(evaluate, reward)
            problems = self.config.method.refuses(score, images, list(texts), facts)
        if problems:
            raise RewardError(f"The reward {name_of(reward)!r} {' '.join(problems)}")

    # ------------------------------------------------------------------ one step

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """The trained LoRA parameters by name, float32."""
        return self.optimizer.parameters

    def training_step(
        self,
        prompts: Sequence[str],
        latents: Tensor | None = None,
        seed: int | None = None,
        metadata: Sequence[dict[str, Any]] | None = None,
    ) -> StepResult:
        """Rollout, reward and gradients for given prompts; no update. For tests and other loops.

        Adds to `.grad` of `parameters`, as `loss.backward()` does.

        Args:
            prompts: B texts.
            latents: x_T (B, 4, h, w); None draws them from `seed` and the trainer's step.
            seed: of every random draw; None is the config's.
            metadata: B dicts for the reward.
        """
        prompts = texts(prompts)
        facts = list(metadata) if metadata is not None else [{} for _ in prompts]
        if len(facts) != len(prompts):
            raise ConfigError(
                f"training_step got {len(prompts)} prompts and {len(facts)} metadata; give as "
                "many dicts as prompts."
            )
        draws = Draws(
            self.config.seed if seed is None else seed, self.step, tuple(range(len(prompts)))
        )
        shape = (len(prompts), *self.engine.latent_shape)
        if latents is None:
            latents = self._latents(draws)
        elif tuple(latents.shape) != shape:
            raise ConfigError(f"latents have shape {tuple(latents.shape)}; expected {shape}.")
        return self._batch(prompts, facts, latents, draws)

    def _batch(
        self,
        prompts: list[str],
        metadata: list[dict[str, Any]],
        latents: Tensor,
        draws: Draws,
        weight: float = 1.0,
        reached: tuple[int, Tensor] | None = None,
    ) -> StepResult:
        if self.policy is not None:  # which begins with no step without gradients
            return self._guarded(self.policy.step, prompts, metadata, latents, draws, weight)
        return self._guarded(self.engine.step, prompts, metadata, latents, draws, weight, reached)

    def _guarded(self, work: Callable[..., T], *args: Any) -> T:
        """Its result; what an error leaves behind of moved memory is cleared away."""
        try:
            return work(*args)
        except BaseException:
            if self.memory is not None:
                self.memory.reset()
            raise

    def _latents(self, draws: Draws) -> Tensor:
        return randomness.latents(draws.seed, draws.step, draws.samples, self.engine.latent_shape)

    def update(self) -> dict[str, Any]:
        """One optimizer update over all accumulated batches; the row for metrics.jsonl."""
        started = time.perf_counter()
        config = self.config
        self.optimizer.clear()  # what training_step left is not part of the run
        batches = [self._drawn(batch) for batch in range(config.accumulation_steps)]
        weight = 1 / config.accumulation_steps
        more: dict[str, Any] = {}
        if self.policy is None:
            size = config.rollout.prefix_batches
            groups = [batches[i : i + size] for i in range(0, len(batches), size)]
            results = [result for group in groups for result in self._together(group, weight)]
            update_started = time.perf_counter()
            norm = self._gradient_norm(results)
            rate = self.optimizer.update(self.step)
        else:
            results, norm, rate, more = self._policy_epochs(self.policy, batches, weight)
            update_started = time.perf_counter()
        self.step += 1
        finished = time.perf_counter()
        row = self._row(results, norm, rate) | more
        row |= {"seconds_update": finished - update_started, "seconds": finished - started}
        return row

    def _drawn(self, batch: int) -> Batch:
        """Prompts, metadata and draws of the step's batch `batch`."""
        config = self.config
        first = batch * config.batch_size
        draws = Draws(config.seed, self.step, tuple(range(first, first + config.batch_size)))
        chosen = [
            randomness.integer(
                config.seed, Stream.PROMPTS, self.step, 0, len(self.prompts) - 1, sample
            )
            for sample in draws.samples
        ]
        prompts = [self.prompts.prompts[i] for i in chosen]
        return prompts, [self.prompts.metadata[i] for i in chosen], draws

    def _together(self, group: Sequence[Batch], weight: float) -> list[StepResult]:
        """Each batch's gradients, after the steps without gradients that all of them share."""
        latents = [self._latents(draws) for _, _, draws in group]
        starts: Sequence[tuple[int, Tensor] | None] = [None] * len(group)
        timer = PhaseTimer(self.device, self.engine.watch)
        if len(group) > 1:
            prompts = [prompt for batch, _, _ in group for prompt in batch]
            samples = tuple(sample for _, _, draws in group for sample in draws.samples)
            draws = replace(group[0][2], samples=samples)
            count, reached = self._guarded(
                self.engine.ahead, prompts, torch.cat(latents), draws, timer
            )
            starts = [(count, part) for part in reached.split(self.config.batch_size)]
        results = [
            self._batch(prompts, facts, x, draws, weight, start)
            for (prompts, facts, draws), x, start in zip(group, latents, starts, strict=True)
        ]
        for name, seconds in timer.seconds.items():
            mine = results[0].seconds
            mine[name] = mine.get(name, 0.0) + seconds
        return results

    def _gradient_norm(self, results: Sequence[StepResult]) -> float:
        """Of what was accumulated, which is clipped. Errors: NonFiniteError."""
        norm = self.optimizer.gradient_norm()
        if not torch.isfinite(norm):
            self.optimizer.clear()
            size = self.config.batch_size
            everything = [p for result in results for p in result.prompts[:size]]
            draws = Draws(self.config.seed, self.step, ())
            raise NonFiniteError(f"The gradient's norm is {norm.item()} {where(draws, everything)}")
        return float(norm)

    def _policy_epochs(
        self,
        policy: PolicyGradient,
        batches: Sequence[Batch],
        weight: float,
    ) -> tuple[list[StepResult], float, float, dict[str, Any]]:
        """DDPO: all samples first, then epochs of updates over them.

        Returns:
            The results, the largest gradient norm, the learning rate, and what else is to report.
        """
        try:
            sampled = [
                policy.sample(prompts, facts, self._latents(draws), draws)
                for prompts, facts, draws in batches
            ]
            prompts = [prompt for one in sampled for prompt in one.result.prompts]
            rewards = torch.cat([one.result.rewards for one in sampled])
            parts = policy.history.advantages(prompts, rewards).split(self.config.batch_size)
            norm, rate, updates = 0.0, 0.0, policy.method.minibatches
            size = len(sampled) // updates
            for first in [*range(0, len(sampled), size)] * policy.method.inner_epochs:
                few = slice(first, first + size)
                pairs = zip(sampled[few], parts[few], strict=True)
                sampled[few] = [policy.backward(one, part, updates * weight) for one, part in pairs]
                norm = max(norm, self._gradient_norm([one.result for one in sampled[few]]))
                rate = self.optimizer.update(self.step)
        except BaseException:
            if self.memory is not None:
                self.memory.reset()
            raise
        shares = [float(one.clipped) for one in sampled if one.clipped is not None]
        clipped = sum(shares) / len(shares)
        return [one.result for one in sampled], norm, rate, {"clipped": clipped}

    def _row(self, results: Sequence[StepResult], norm: float, rate: float) -> dict[str, Any]:
        rewards = torch.cat([result.rewards for result in results]).float()
        images = torch.cat([result.images for result in results])
        phases: dict[str, float] = {}
        for result in results:
            for name, seconds in result.seconds.items():
                phases[f"seconds_{name}"] = phases.get(f"seconds_{name}", 0.0) + seconds
        return {
            "step": self.step,
            "reward_mean": float(rewards.mean()),
            "reward_std": float(rewards.std(correction=0)),
            "heldout_mean": self.evaluator.heldout_mean(results),
            "loss": float(sum(result.loss for result in results)) / len(results),
            "grad_norm": norm,
            "learning_rate": rate,
            # among different images: the copies of DRaFT-LV are alike by construction
            "diversity": diversity(images[: self.config.batch_size]),
            "drift": self.evaluator.drift(self.step),
            "k": sum(result.gradient_steps for result in results) / len(results),
            **{
                name: float(sum(result.penalties[name] for result in results)) / len(results)
                for name in results[0].penalties
            },
            **phases,
            "peak_memory_bytes": report.peak_memory_bytes(self.device),
        }

    # ------------------------------------------------------------------ sampling

    def sample(
        self,
        prompts: Sequence[str],
        seed: int = 0,
        *,
        base: bool = False,
        strength: float = 1.0,
        aig: float | None = None,
    ) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] on the CPU, with the run's sampling settings.

        Args:
            prompts: N texts.
            base: without the LoRA.
            strength: factor on the LoRA.
            aig: power of annealed importance guidance (2409.06493), which goes from the base model
                to the tuned one along the chain: 1 or 2, say. None is without.
        """
        prompts = texts(prompts)
        with self.optimizer.averaged():
            return self.evaluator.sample(prompts, seed, base=base, strength=strength, aig=aig)

    def evaluate(self, *, base: bool = False) -> Evaluation:
        """Sample and score the run's fixed evaluation prompts, with the LoRA or without it."""
        with self.optimizer.averaged():
            return self.evaluator.evaluate(base=base)

    # ------------------------------------------------------------------ the run

    def train(self, until: int | None = None) -> TrainResult:
        """Run to the config's number of steps, write everything into the run's folder.

        Ctrl-C and SIGTERM save a checkpoint at the end of the running step and return.

        Args:
            until: stop after this step as if interrupted: saved and resumable.

        Raises:
            ConfigError: the folder already holds another run.
            NonFiniteError: a loss or gradient became NaN or infinite; the last checkpoint stands.
        """
        config = self.config
        last = config.steps if until is None else min(until, config.steps)
        fresh = not self._owns_folder
        folder = RunFolder(Path(config.output.directory), self._owns_folder)
        self._owns_folder = True
        folder.write_config((self.run_config or config).to_dict())
        if self.memory is not None:
            folder.write_plan(self.memory.plan.to_json())
        started = time.perf_counter()
        with (
            StopRequest() as stop,
            report.MetricsWriter(folder.path, config.output.tensorboard) as metrics,
            report.TrainingProgress(config.steps, self.step, self.progress) as progress,
            self._encoded(),
        ):
            metrics.truncate(self.step)
            before = self.evaluate(base=True)
            if fresh:
                folder.write_images(0, before.images, before.prompts)
            stopping = EarlyStopping(config.early_stopping, before)
            stopping.load(self._stopping)
            reached, why = False, None
            while self.step < last and not stop.requested and not reached:
                row = self.update()
                metrics.write(row)
                progress.update(row)
                target = config.target_reward
                reached = target is not None and row["reward_mean"] >= target
                every = config.output.images_every
                pictures = bool(every) and self.step % every == 0 and self.step < config.steps
                if pictures or stopping.wanted(self.step):
                    current = self.evaluate()
                    if pictures:
                        folder.write_images(self.step, current.images, current.prompts)
                    if stopping.wanted(self.step):
                        why = stopping.reason(current)
                        reached = reached or why is not None
                        self._stopping = stopping.state()
                every = config.output.checkpoint_every
                if every and self.step % every == 0:
                    self._seconds, started = (
                        self._seconds + time.perf_counter() - started,
                        time.perf_counter(),
                    )
                    self.save_checkpoint()
            self._seconds += time.perf_counter() - started
            if self._saved_at != self.step:
                self.save_checkpoint()
            finished = reached or self.step >= config.steps
            if stop.requested or not finished:
                progress.message(f"Stopped after step {self.step}; saved in {folder.path}.")
                return TrainResult(self.step, folder.path, stop.exit_code, {})
            if why is not None:
                progress.message(f"Stopped after step {self.step}: {why}.")
            after = self.evaluate()
        summary = self._finish(folder, before, after, why)
        return TrainResult(self.step, folder.path, 0, summary)

    def _encoded(self) -> AbstractContextManager[None]:
        """All prompts encoded, and the encoders off the device, where the config wants that."""
        when = self.config.encoding.when
        ahead = when == "ahead" or (when == "auto" and self.device.type != "cpu")
        return self.engine.encoder.ahead(self.prompts.prompts) if ahead else nullcontext()

    def _finish(
        self, folder: RunFolder, before: Evaluation, after: Evaluation, why: str | None
    ) -> dict[str, Any]:
        """Write what a finished run hands over: LoRA, pictures, summary, report."""
        folder.write_images(self.step, after.images, after.prompts)
        folder.write_before_after(
            before.images, after.images, after.prompts, before.rewards, after.rewards
        )
        self.save_lora(folder.path / run_files.LORA)
        config = self.config
        seconds = [row["seconds"] for row in report.read_metrics(folder.path)]
        summary = {
            "reward_before": float(before.rewards.mean()),
            "reward_after": float(after.rewards.mean()),
            "heldout_before": None if before.heldout is None else float(before.heldout.mean()),
            "heldout_after": None if after.heldout is None else float(after.heldout.mean()),
            "steps": self.step,
            "stopped_early": why,
            "seconds": self._seconds,
            # of the training itself: the pictures and evaluations in between are in "seconds"
            "seconds_per_step": statistics.mean(seconds) if seconds else 0.0,
            "peak_memory_bytes": report.peak_memory_bytes(self.device),
            "device": report.device_name(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "versions": report.versions(),
            "method": config.method.name,
            "reward": name_of(self.reward),
            "seed": config.seed,
            "prompts": list(dict.fromkeys(after.prompts)),
            "diversity_before": diversity(before.images),
            "diversity_after": diversity(after.images),
        }
        folder.finish(summary)
        return summary

    # ------------------------------------------------------------------ saving

    def save_lora(self, folder: str | Path) -> dict[str, Path]:
        """Write the LoRA in diffusers' and in kohya's format; returns format -> file."""
        with self.optimizer.averaged():
            metadata = lora_header.header(self.config.sampling)
            return lora.save_lora(self.pipe, folder, metadata=metadata)

    def save_checkpoint(self) -> Path:
        """Write LoRA, optimizer and counters into the run's folder, whole or not at all."""
        output = self.config.output
        state = {
            "seconds": self._seconds,
            "early_stopping": self._stopping,
            "reward_history": {} if self.policy is None else self.policy.history.rewards,
            **self._identity(),
        }
        path = checkpoint.save(
            Path(output.directory) / run_files.CHECKPOINTS,
            self.step,
            {"lora": lora.lora_state_dict(self.pipe.unet), **self.optimizer.state()},
            state,
            output.keep_checkpoints,
        )
        self._saved_at = self.step
        return path

    def _identity(self) -> dict[str, Any]:
        return identity(self.config, self.prompts, self.reward, self.run_config)

    def resume(self, path: str | Path | None = None) -> int:
        """Continue from a checkpoint: the run that follows is the run that would have been.

        Args:
            path: a checkpoint, or a run's folder for its newest one; None is the config's folder.

        Returns:
            The step it stands at.

        Raises:
            CheckpointError: none there, damaged, or written with other settings.
        """
        found = checkpoint.load(Path(path or self.config.output.directory))
        changed = differences(found.state, self._identity())
        if changed:
            raise CheckpointError(
                f"{found.path} was written by a run with other settings, so going on from it would "
                f"be neither that run nor this one: {'; '.join(changed)}. Use the run's own "
                "config.yaml, or start anew in another folder."
            )
        try:
            lora.load_lora_state_dict(self.pipe.unet, found.tensors["lora"])
            self.optimizer.load(found.tensors)
            self._seconds = float(found.state["seconds"])
            self._stopping = dict(found.state.get("early_stopping", {}))
            if self.policy is not None:
                self.policy.history.rewards = dict(found.state["reward_history"])
        except KeyError as error:
            raise CheckpointError(f"{found.path} lacks {error}; it cannot be resumed.") from error
        self.step = found.step
        # A checkpoint of elsewhere starts a new run folder, which must not hold another run.
        own = Path(self.config.output.directory).resolve()
        self._owns_folder = found.path.resolve().is_relative_to(own)
        self._saved_at = found.step if self._owns_folder else -1
        return self.step
