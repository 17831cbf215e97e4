"""TRL's AlignPropTrainer on this library's engine."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor, nn

from rewardprop_fast import lora
from rewardprop_fast.compat.trl import saving
from rewardprop_fast.compat.trl.config import PRECISIONS, AlignPropConfig
from rewardprop_fast.compat.trl.pipeline import DefaultDDPOStableDiffusionPipeline
from rewardprop_fast.compat.trl.truncation import (
    PerStepTruncation,
    TRLDraws,
    draw_mask,
    draw_noise,
)
from rewardprop_fast.errors import ConfigError, NonFiniteError, RewardError
from rewardprop_fast.memory import policy
from rewardprop_fast.memory.kinds import STEP
from rewardprop_fast.memory.plan import Plan, Policy
from rewardprop_fast.models import check_pipeline
from rewardprop_fast.nn import accelerate
from rewardprop_fast.rewards import prepare
from rewardprop_fast.training.config import SamplingConfig, TrainConfig
from rewardprop_fast.training.engine import Engine, StepResult, where
from rewardprop_fast.training.placement import place

Prompt = tuple[str, Any]
Hook = Callable[[dict[str, Any], int, Any], Any]


class AlignPropTrainer:
    """Fine-tunes a pipeline's LoRA by AlignProp as TRL 0.23.1 does: same loss, same gradients.

    From one seed it makes the run that TRL makes, up to rounding. Subclasses may override
    `calculate_loss`, `compute_rewards` and `_setup_optimizer`.

    Args:
        config: TRL's settings.
        reward_function: `(images, prompts, metadata) -> (rewards, info)`; images (B, 3, H, W) in
            [0, 1] in the arithmetic's dtype, prompts and metadata tuples, rewards differentiable.
        prompt_function: `() -> (prompt, metadata)`, called once for each image.
        sd_pipeline: the wrapper, or a diffusers pipeline (SD or SDXL) itself.
        image_samples_hook: `(data, global_step, tracker)`, data with images, prompts,
            prompt_metadata and rewards; tracker is accelerate's first, or None without log_with.

    Raises:
        ConfigError: a setting that cannot work, here or on this machine.
    """

    def __init__(
        self,
        config: AlignPropConfig,
        reward_function: Callable[[Tensor, tuple[str, ...], tuple[Any, ...]], tuple[Tensor, Any]],
        prompt_function: Callable[[], Prompt],
        sd_pipeline: Any,
        image_samples_hook: Hook | None = None,
    ) -> None:
        config.check()
        self.config = config
        self.reward_fn, self.prompt_fn = reward_function, prompt_function
        self.image_samples_callback = image_samples_hook
        if not hasattr(sd_pipeline, "sd_pipeline"):
            sd_pipeline = DefaultDDPOStableDiffusionPipeline.of(sd_pipeline)
        self.sd_pipeline, pipe = sd_pipeline, sd_pipeline.sd_pipeline
        check_pipeline(pipe)
        self.accelerator = self._make_accelerator()
        self.dtype = PRECISIONS[config.mixed_precision]
        device = self.accelerator.device
        # as TRL: from here on, the global generators decide the LoRA, the noise and the truncation
        set_seed(config.seed, device_specific=True)
        sd_pipeline.set_progress_bar_config(disable=True)
        place(pipe, device, self.dtype)
        sd_pipeline.get_trainable_layers()
        if config.allow_tf32 and torch.cuda.is_available():
            torch.backends.cuda.matmul.allow_tf32 = True
        # TRL's last step always ends at the noise level of timestep 0, whatever set_alpha_to_one
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=False)
        if isinstance(reward_function, nn.Module):
            prepare(reward_function, device)
        self.engine = Engine(pipe, self._score, self._train_config(device), self._loss)
        accelerate(pipe)
        # TRL checkpoints every UNet call; where one alone carries gradients that saves nothing.
        if config.truncated_backprop_rand or self._fixed_steps > 1:
            policy.apply(Plan(steps=({STEP: Policy.RECOMPUTE},)), pipe.unet)
        self.parameters = lora.lora_parameters(pipe.unet)
        self.trainable_layers = list(self.parameters.values())
        self.optimizer = self.accelerator.prepare(self._setup_optimizer(self.trainable_layers))
        self._pairs: dict[str, Any] = {}
        self._batches = 0
        self.first_epoch, self._global_step = 0, 0
        if config.resume_from:
            self._resume(config.resume_from)
        self._start_trackers()

    # ------------------------------------------------------------------ set-up

    @property
    def _fixed_steps(self) -> int:
        """Steps with gradients where nothing is drawn."""
        config = self.config
        return config.sample_num_steps - max(0, config.truncated_backprop_timestep)

    def _make_accelerator(self) -> Accelerator:
        config = self.config
        project = ProjectConfiguration(**config.project_kwargs)
        if project.logging_dir is None and config.log_with is not None:
            project.logging_dir = config.logdir
        self._checkpoints = Path(project.project_dir or config.logdir, "checkpoints")
        self._keep = project.total_limit or config.num_checkpoint_limit
        precision = "no" if config.mixed_precision == "none" else config.mixed_precision
        cpu = config.accelerator_kwargs.get("cpu", False) or not torch.cuda.is_available()
        if precision == "fp16" and cpu:
            raise ConfigError(
                'mixed_precision is "fp16", the default of TRL, which needs a GPU. On a CPU give '
                '"bf16", where it has bf16 instructions, or "no".'
            )
        accelerator = Accelerator(
            log_with=config.log_with,
            mixed_precision=precision,
            project_config=project,
            **config.accelerator_kwargs,
        )
        if accelerator.num_processes > 1:
            raise ConfigError(
                f"This is one of {accelerator.num_processes} processes; training here runs in one. "
                "Start the script with python, not with accelerate launch or torchrun, and raise "
                "train_gradient_accumulation_steps instead."
            )
        return accelerator

    def _train_config(self, device: torch.device) -> TrainConfig:
        """What the engine reads of this library's settings; the rest is TRL's business here."""
        config = self.config
        return TrainConfig(
            method=PerStepTruncation(),
            sampling=SamplingConfig(
                steps=config.sample_num_steps,
                guidance_scale=config.sample_guidance_scale,
                eta=config.sample_eta,
                negative_prompt=config.negative_prompts or "",
            ),
            batch_size=config.train_batch_size,
            seed=config.seed,
            device=str(device),
        )

    def _start_trackers(self) -> None:
        if self.config.log_with is None:
            return
        shown = self.config.to_dict()
        if self.config.log_with == "tensorboard":  # takes plain values only
            plain = (bool, int, float, str)
            shown = {k: v if isinstance(v, plain) else str(v) for k, v in shown.items()}
        else:
            shown = {"alignprop_trainer_config": shown}
        self.accelerator.init_trackers(
            self.config.tracker_project_name, config=shown, init_kwargs=self.config.tracker_kwargs
        )

    def _setup_optimizer(self, trainable_layers_parameters: Any) -> torch.optim.Optimizer:
        """AdamW by the config, over the LoRA's parameters."""
        config = self.config
        kind: Any = torch.optim.AdamW
        if config.train_use_8bit_adam:
            import bitsandbytes

            kind = bitsandbytes.optim.AdamW8bit
        optimizer: torch.optim.Optimizer = kind(
            trainable_layers_parameters,
            lr=config.train_learning_rate,
            betas=(config.train_adam_beta1, config.train_adam_beta2),
            weight_decay=config.train_adam_weight_decay,
            eps=config.train_adam_epsilon,
        )
        return optimizer

    # ------------------------------------------------------------------ rewards and loss

    def compute_rewards(self, prompt_image_pairs: Mapping[str, Any]) -> Tensor:
        """The rewards of one batch, as `reward_function` has them."""
        rewards, _ = self.reward_fn(
            prompt_image_pairs["images"],
            prompt_image_pairs["prompts"],
            prompt_image_pairs["prompt_metadata"],
        )
        return rewards

    def calculate_loss(self, rewards: Tensor) -> Tensor:
        """10 minus the mean reward, () ."""
        return 10.0 - rewards.mean()

    def _score(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """The engine's view of `compute_rewards`: (B,)."""
        self._pairs = {
            "images": images.to(self.dtype),
            "prompts": tuple(prompts),
            "prompt_metadata": tuple(metadata),
        }
        rewards = self.compute_rewards(self._pairs)
        if torch.is_grad_enabled() and not rewards.requires_grad:
            raise RewardError(
                "The rewards carry no gradient to the images. Between the images and the result "
                "there may be no torch.no_grad(), .detach(), .item(), numpy, rounding or argmax."
            )
        self._pairs["rewards"] = rewards
        if rewards.ndim == 0:
            return rewards.expand(len(prompts))
        return rewards.reshape(len(prompts), -1).mean(1)

    def _loss(self, _rewards: Tensor) -> Tensor:
        return self.calculate_loss(self._pairs["rewards"])  # as they came, in their own shape

    # ------------------------------------------------------------------ one update

    def backward(self, weight: float = 1.0) -> StepResult:
        """One batch: prompts, noise, chain, reward; adds to `.grad` of the LoRA's parameters.

        Args:
            weight: factor on the loss's gradient.
        """
        config, engine = self.config, self.engine
        pairs = [self.prompt_fn() for _ in range(config.train_batch_size)]
        prompts, metadata = [str(p) for p, _ in pairs], [m for _, m in pairs]
        shape = (len(pairs), *engine.latent_shape)
        latents, noise = draw_noise(config, shape, engine.device, self.dtype)
        mask = draw_mask(config)
        if not any(mask):
            # where TRL would stop with an error of autograd's
            mask[-1] = True
            warnings.warn(
                "The draws of truncated_rand_backprop_minmax detached every step of a chain; its "
                "last step carries the gradient instead. Lower the second number to "
                f"{config.sample_num_steps - 1} to avoid it.",
                stacklevel=3,
            )
        draws = TRLDraws(config.seed, self._batches, tuple(range(len(pairs))), noise, tuple(mask))
        self._batches += 1
        return engine.step(prompts, metadata, latents, draws, weight)

    def step(self, epoch: int, global_step: int) -> int:
        """One update of the LoRA, logged, shown and saved as the config says.

        Returns:
            global_step + 1.

        Raises:
            NonFiniteError: a reward, the loss or the gradient is NaN or infinite; the weights are
                as they were.
        """
        config, accelerator = self.config, self.accelerator
        scaler = accelerator.scaler  # of fp16 on a GPU
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        results, rewards = [], []
        for _ in range(config.train_gradient_accumulation_steps):
            results.append(self.backward(scale / config.train_gradient_accumulation_steps))
            self._pairs = {k: _detached(v) for k, v in self._pairs.items()}
            rewards.append(self._pairs["rewards"].float())
        norm = accelerator.clip_grad_norm_(self.trainable_layers, config.train_max_grad_norm)
        if scaler is None and not torch.isfinite(norm):
            self.optimizer.zero_grad()
            draws = TRLDraws(config.seed, global_step, (), torch.empty(0), ())
            names = [prompt for result in results for prompt in result.prompts]
            raise NonFiniteError(f"The gradient's norm is {norm.item()} {where(draws, names)}")
        self.optimizer.step()
        self.optimizer.zero_grad()
        accelerator.log(
            {
                "reward_mean": _mean(batch.mean() for batch in rewards),
                "reward_std": _mean(batch.std(correction=0) for batch in rewards),
                "loss": _mean(result.loss for result in results),
                "epoch": epoch,
            },
            step=global_step,
        )
        global_step += 1
        self._global_step = global_step
        if self.image_samples_callback is not None and global_step % config.log_image_freq == 0:
            trackers = accelerator.trackers
            self.image_samples_callback(self._pairs, global_step, trackers[0] if trackers else None)
        if epoch != 0 and epoch % config.save_freq == 0:
            saving.save(self, self._checkpoints, epoch, self._keep)
        return global_step

    def train(self, epochs: int | None = None) -> None:
        """All updates from the first, or the resumed one, to ``epochs`` or the config's."""
        last = self.config.num_epochs if epochs is None else epochs
        global_step = self._global_step
        for epoch in range(self.first_epoch, last):
            global_step = self.step(epoch, global_step)

    def _resume(self, path: str) -> None:
        self.first_epoch, self._global_step, self._batches = saving.load(
            self, Path(os.path.expanduser(path))
        )

    # ------------------------------------------------------------------ sampling and saving

    @torch.no_grad()
    def _generate_samples(
        self, batch_size: int, with_grad: bool = False, prompts: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """Images of these prompts, or of ``batch_size`` drawn ones, by the run's settings."""
        if with_grad:
            raise NotImplementedError(
                "Samples with gradients are made in `backward`, which runs the reward too."
            )
        if prompts is None:
            pairs = [self.prompt_fn() for _ in range(batch_size)]
        else:
            pairs = [(prompt, {}) for prompt in prompts]
        names = [str(prompt) for prompt, _ in pairs]
        shape = (len(pairs), *self.engine.latent_shape)
        latents, noise = draw_noise(self.config, shape, self.engine.device, self.dtype)
        draws = TRLDraws(self.config.seed, 0, tuple(range(len(pairs))), noise, ())
        images = self.engine.sample(names, latents, draws)
        return {
            "images": images.to(self.dtype),
            "prompts": tuple(names),
            "prompt_metadata": tuple(metadata for _, metadata in pairs),
        }

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write the LoRA for diffusers, and for ComfyUI and A1111."""
        self.sd_pipeline.save_pretrained(save_directory)

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """`save_pretrained`, by default into the config's logdir."""
        self.save_pretrained(output_dir or self.config.output_dir)

    def push_to_hub(
        self,
        repo_id: str | None = None,
        *,
        commit_message: str = "LoRA of AlignProp",
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
        **unused: Any,
    ) -> str:
        """Upload the LoRA to the hub; returns the commit's address.

        Args:
            repo_id: `owner/name`; None takes the config's run_name or exp_name.
            unused: further arguments of TRL's; a warning names them.
        """
        from huggingface_hub import HfApi

        if unused:
            warnings.warn(f"push_to_hub ignores {', '.join(sorted(unused))}.", stacklevel=2)
        name = repo_id or self.config.run_name or self.config.exp_name
        if not name:
            raise ConfigError("push_to_hub needs a repo_id, such as 'owner/name'.")
        api = HfApi(token=token)
        repository = api.create_repo(name, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            info = api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                commit_message=commit_message,
                revision=branch,
                create_pr=create_pr,
            )
        return str(info)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _mean(values: Any) -> float:
    found = [float(value) for value in values]
    return sum(found) / len(found)
