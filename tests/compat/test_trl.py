"""TRL's interface against TRL's rule, written again from its description.

`Naive` calls nothing of this library: its own adapter, its own chain by the DDIM formula, its own
draws from the global generators in TRL's order, one backward pass, AdamW. In fp64, where two right
answers agree to about 1e-12. `python -m benchmarks.peers` holds both against TRL itself.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from peft import LoraConfig
from torch import Tensor
from transformers import HfArgumentParser

from rewardprop_fast.compat.trl import (
    AlignPropConfig,
    AlignPropTrainer,
    DefaultDDPOStableDiffusionPipeline,
)
from rewardprop_fast.compat.trl import config as trl_config
from rewardprop_fast.errors import ConfigError, NonFiniteError, RewardError
from rewardprop_fast.models.random_init import tiny_stable_diffusion, tiny_stable_diffusion_xl

WORDS = ["a red apple", "a dog on the beach", "a boat", "two trees"]
T = 4


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """accelerate keeps one precision for a process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)
    PartialState._reset_state()


@pytest.fixture
def fp64(monkeypatch):
    monkeypatch.setitem(trl_config.PRECISIONS, "no", torch.float64)


class Double(DefaultDDPOStableDiffusionPipeline):
    """Its LoRA stays in the UNet's dtype: how a script of somebody's changes the adapter."""

    def get_trainable_layers(self) -> Any:
        adapt(self.sd_pipeline.unet)
        return self.sd_pipeline.unet


def adapt(unet: Any) -> None:
    unet.requires_grad_(False)
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    unet.add_adapter(
        LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=targets)
    )


def prompt_function() -> tuple[str, dict[str, float]]:
    return np.random.choice(WORDS), {"wave": float(np.random.uniform())}


def waves(images: Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...]) -> Tensor:
    assert isinstance(prompts, tuple)
    assert isinstance(metadata, tuple)
    ramp = torch.linspace(0, 3, images[0].numel(), dtype=images.dtype).view(images[0].shape)
    frequency = images.new_tensor([1 + facts["wave"] for facts in metadata])
    scale = images.new_tensor([1 + len(prompt) / 10 for prompt in prompts])
    return scale * torch.sin(frequency.view(-1, 1, 1, 1) * images * 4 + ramp).flatten(1).mean(1)


def reward_function(images, prompts, metadata):
    return waves(images, prompts, metadata), {}


def config(**changes: Any) -> AlignPropConfig:
    return AlignPropConfig(
        **{
            "mixed_precision": "no",
            "sample_num_steps": T,
            "train_batch_size": 2,
            "truncated_rand_backprop_minmax": (0, T),
            "num_epochs": 2,
            **changes,
        }
    )


def make(settings: AlignPropConfig, reward: Any = reward_function, **more: Any) -> AlignPropTrainer:
    pipe = Double.of(tiny_stable_diffusion())
    return AlignPropTrainer(settings, reward, prompt_function, pipe, **more)


def fill(parameters: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.2 * noise)


class Naive:
    """TRL's rule: every step with gradients, predictions detached as the draws say."""

    def __init__(self, settings: AlignPropConfig) -> None:
        self.settings, self.pipe = settings, tiny_stable_diffusion()
        random.seed(settings.seed)
        np.random.seed(settings.seed)
        torch.manual_seed(settings.seed)
        for part in (self.pipe.unet, self.pipe.vae, self.pipe.text_encoder):
            part.requires_grad_(False).double()
        adapt(self.pipe.unet)
        self.parameters = {
            name.replace(".default.", "."): p
            for name, p in self.pipe.unet.named_parameters()
            if p.requires_grad
        }
        self.adamw = torch.optim.AdamW(
            self.parameters.values(),
            lr=settings.train_learning_rate,
            betas=(settings.train_adam_beta1, settings.train_adam_beta2),
            weight_decay=settings.train_adam_weight_decay,
            eps=settings.train_adam_epsilon,
        )

    def encode(self, texts: list[str]) -> Tensor:
        tokenizer = self.pipe.tokenizer
        ids = tokenizer(
            texts, return_tensors="pt", padding="max_length", truncation=True, max_length=77
        ).input_ids
        with torch.no_grad():
            return self.pipe.text_encoder(ids)[0]

    def batch(self) -> Tensor:
        """The loss of one batch, with its graph."""
        s = self.settings
        pairs = [prompt_function() for _ in range(s.train_batch_size)]
        prompts, metadata = zip(*pairs, strict=True)
        guided = s.sample_guidance_scale > 1
        texts = self.encode([str(prompt) for prompt in prompts])
        if guided:
            negative = self.encode([s.negative_prompts or ""] * len(prompts))
            texts = torch.cat([negative, texts])
        x = torch.randn(len(prompts), 4, 8, 8, dtype=torch.float64)
        alphas = self.pipe.scheduler.alphas_cumprod.double()
        stride = 1000 // s.sample_num_steps
        for i in range(s.sample_num_steps):
            t = stride * (s.sample_num_steps - 1 - i) + 1  # "leading", offset 1
            output = self.pipe.unet(torch.cat([x, x]) if guided else x, t, texts).sample
            cut = s.truncated_backprop_timestep
            if s.truncated_backprop_rand:
                cut = random.randint(*s.truncated_rand_backprop_minmax)
            if i < cut:
                output = output.detach()
            if guided:
                uncond, cond = output.chunk(2)
                output = uncond + s.sample_guidance_scale * (cond - uncond)
            alpha, previous = alphas[t], alphas[max(0, t - stride)]
            variance = (1 - previous) / (1 - alpha) * (1 - alpha / previous)
            sigma = s.sample_eta * variance.sqrt()
            x0 = (x - (1 - alpha).sqrt() * output) / alpha.sqrt()
            x = previous.sqrt() * x0 + (1 - previous - sigma**2).sqrt() * output
            x = x + sigma * torch.randn(x.shape, dtype=torch.float64)
        vae = self.pipe.vae
        images = (vae.decode(x / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
        return 10 - waves(images, prompts, metadata).mean()

    def update(self) -> list[float]:
        count = self.settings.train_gradient_accumulation_steps
        losses = []
        for _ in range(count):
            loss = self.batch()
            (loss / count).backward()
            losses.append(float(loss))
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.train_max_grad_norm)
        self.adamw.step()
        self.adamw.zero_grad()
        return losses


def close(found: dict[str, Tensor], wanted: dict[str, Tensor], limit: float) -> None:
    assert found.keys() == wanted.keys()
    scale = max(float(w.detach().norm()) for w in wanted.values())
    assert scale > 0
    for name, value in wanted.items():
        assert float((found[name] - value).detach().norm()) <= limit * scale, name


RULES = [
    {"truncated_backprop_rand": False, "truncated_backprop_timestep": T - 1},
    {"truncated_backprop_rand": False, "truncated_backprop_timestep": 1, "sample_eta": 0.0},
    {"truncated_backprop_rand": False, "truncated_backprop_timestep": 0},
    {"seed": 3},
    {"seed": 5, "truncated_rand_backprop_minmax": (1, 3), "negative_prompts": "grey, dull"},
    {"seed": 6, "sample_guidance_scale": 1.0, "sample_eta": 0.5},
]


def telling_seeds(settings: AlignPropConfig) -> list[int]:
    """Seeds whose draws detach a step behind a gradient, and draw a step's own number."""
    if not settings.truncated_backprop_rand:
        return [0]
    found = []
    for seed in range(500):
        random.seed(seed)
        cuts = [random.randint(*settings.truncated_rand_backprop_minmax) for _ in range(T)]
        mask = [not i < cut for i, cut in enumerate(cuts)]
        if mask != sorted(mask) and any(i == cut for i, cut in enumerate(cuts)):
            found.append(seed)
    return found[:2]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_loss_and_gradients_are_trls(fp64, rule):
    settings = config(**rule)
    naive, trainer = Naive(settings), make(settings)
    close(dict(trainer.parameters), naive.parameters, 0)  # the same LoRA from the same seed
    fill(naive.parameters.values())
    fill(trainer.parameters[name] for name in naive.parameters)
    seeds = telling_seeds(settings)
    assert seeds
    for seed in seeds:
        for generator in (np.random.seed, random.seed, torch.manual_seed):
            generator(seed)
        wanted = naive.batch()
        wanted.backward()
        for generator in (np.random.seed, random.seed, torch.manual_seed):
            generator(seed)
        found = trainer.backward()
        assert float(found.loss) == pytest.approx(float(wanted), rel=1e-12)
        close(
            {name: p.grad for name, p in trainer.parameters.items()},
            {name: p.grad for name, p in naive.parameters.items()},
            1e-10,
        )


def test_a_run_is_trls_run(fp64, tmp_path):
    settings = config(
        seed=11,
        train_gradient_accumulation_steps=2,
        num_epochs=3,
        train_max_grad_norm=0.01,  # clips, and by different factors from update to update
        logdir=str(tmp_path),
    )
    naive = Naive(settings)
    losses = [naive.update() for _ in range(3)]
    seen: list[dict[str, Any]] = []
    trainer = make(settings, image_samples_hook=lambda data, step, tracker: seen.append(data))
    rows = []
    trainer.accelerator.log = lambda row, step: rows.append((step, row))
    trainer.train()
    close(dict(trainer.parameters), naive.parameters, 1e-9)
    assert [row["loss"] for _, row in rows] == pytest.approx(
        [sum(pair) / 2 for pair in losses], rel=1e-10
    )
    assert [(step, row["epoch"]) for step, row in rows] == [(0, 0), (1, 1), (2, 2)]
    assert set(rows[0][1]) == {"reward_mean", "reward_std", "loss", "epoch"}
    assert len(seen) == 3
    data = seen[-1]
    assert set(data) == {"images", "prompts", "prompt_metadata", "rewards"}
    assert data["images"].shape == (2, 3, 16, 16)
    assert not data["rewards"].requires_grad
    assert torch.allclose(waves(data["images"], data["prompts"], data["prompt_metadata"]),
                          data["rewards"])  # fmt: skip


def test_a_resumed_run_is_the_run(tmp_path):
    settings = config(
        seed=2, num_epochs=5, save_freq=2, project_kwargs={"project_dir": str(tmp_path)}
    )
    whole = make(settings)
    whole.train()
    first = make(dataclasses.replace(settings, logdir=str(tmp_path)))
    first.train(3)
    checkpoint = tmp_path / "checkpoints" / "step_000002"
    assert checkpoint.is_dir()
    # the folder gives the one written last, which is not that of the whole run's epoch 4
    resumed = make(dataclasses.replace(settings, resume_from=str(tmp_path / "checkpoints")))
    assert resumed.first_epoch == 3
    resumed.train()
    for name, parameter in whole.parameters.items():
        assert torch.equal(parameter, resumed.parameters[name]), name
    pipe = tiny_stable_diffusion()
    pipe.load_lora_weights(str(checkpoint))  # what scripts do with TRL's checkpoints
    assert pipe.unet.peft_config


def test_checkpoints_of_trl_give_their_lora(tmp_path):
    trained = make(config())
    fill(trained.parameters.values())
    for number in (3, 12):
        trained.save_pretrained(tmp_path / f"checkpoint_{number}")
        (tmp_path / f"checkpoint_{number}" / "optimizer.bin").write_bytes(b"pickle")
    with pytest.warns(UserWarning, match="moments start from zero"):
        resumed = make(config(resume_from=str(tmp_path)))
    assert resumed.first_epoch == 13
    for name, parameter in trained.parameters.items():
        assert torch.equal(parameter, resumed.parameters[name])


#: TRL 0.23.1's fields and defaults; facts of its documentation.
DEFAULTS = {
    "run_name": "",
    "seed": 0,
    "log_with": None,
    "log_image_freq": 1,
    "tracker_kwargs": {},
    "accelerator_kwargs": {},
    "project_kwargs": {},
    "tracker_project_name": "trl",
    "logdir": "logs",
    "num_epochs": 100,
    "save_freq": 1,
    "num_checkpoint_limit": 5,
    "mixed_precision": "fp16",
    "allow_tf32": True,
    "resume_from": "",
    "sample_num_steps": 50,
    "sample_eta": 1.0,
    "sample_guidance_scale": 5.0,
    "train_batch_size": 1,
    "train_use_8bit_adam": False,
    "train_learning_rate": 1e-3,
    "train_adam_beta1": 0.9,
    "train_adam_beta2": 0.999,
    "train_adam_weight_decay": 1e-4,
    "train_adam_epsilon": 1e-8,
    "train_gradient_accumulation_steps": 1,
    "train_max_grad_norm": 1.0,
    "negative_prompts": None,
    "truncated_backprop_rand": True,
    "truncated_backprop_timestep": 49,
    "truncated_rand_backprop_minmax": (0, 50),
    "push_to_hub": False,
}


def test_names_and_defaults():
    settings = dataclasses.asdict(AlignPropConfig())
    settings.pop("exp_name")
    assert settings == DEFAULTS
    flat = AlignPropConfig(tracker_kwargs={"wandb": {"entity": "me"}}).to_dict()
    assert flat["tracker_kwargs/wandb/entity"] == "me"
    assert "tracker_kwargs" not in flat


def test_a_script_parses_its_options():
    (parsed,) = HfArgumentParser(AlignPropConfig).parse_args_into_dataclasses(
        ["--num_epochs", "20", "--mixed_precision", "bf16", "--negative_prompts", "grey"]
    )
    assert (parsed.num_epochs, parsed.mixed_precision, parsed.negative_prompts) == (
        20,
        "bf16",
        "grey",
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mixed_precision": "fp16"}, "needs a GPU"),
        ({"mixed_precision": "fp8"}, "allowed: fp16, bf16, no"),
        ({"truncated_rand_backprop_minmax": (T, T)}, "none could ever"),
        ({"truncated_rand_backprop_minmax": (3, 1)}, "allowed: least, most"),
        ({"truncated_backprop_rand": False}, "below sample_num_steps"),
        ({"negative_prompts": ["a", "b"]}, "one text, or None"),
        ({"train_batch_size": 0}, "at least 1"),
    ],
    ids=str,
)
def test_what_cannot_work_is_said_at_once(changes, words):
    with pytest.raises(ConfigError, match=words):
        make(config(**changes))


def test_full_fine_tuning_is_refused():
    with pytest.raises(ConfigError, match="LoRA weights alone"):
        DefaultDDPOStableDiffusionPipeline("bundled", use_lora=False)


def test_a_reward_without_gradient_is_refused():
    with pytest.raises(RewardError, match="no gradient"):
        make(config(), lambda i, p, m: (waves(i, p, m).detach(), {})).step(0, 0)


def test_a_gradient_that_is_not_finite_changes_nothing():
    def burst(images, prompts, metadata):
        values = waves(images, prompts, metadata)
        values.register_hook(lambda gradient: gradient * float("inf"))
        return values, {}

    trainer = make(config(), burst)
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    with pytest.raises(NonFiniteError, match="norm"):
        trainer.step(0, 0)
    for name, parameter in trainer.parameters.items():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def test_a_chain_without_any_gradient_gets_one_and_says_so():
    settings = config(truncated_rand_backprop_minmax=(T - 1, 200))
    with pytest.warns(UserWarning, match="detached every step"):
        result = make(settings).backward()
    assert result.gradient_steps == 1


@pytest.mark.parametrize("shape", ["scalar", "column"])
def test_rewards_of_other_shapes_as_in_trl(shape):
    def reward(images, prompts, metadata):
        values = waves(images, prompts, metadata)
        return (values.mean() if shape == "scalar" else values[:, None]), {}

    plain, other = make(config()), make(config(), reward)
    for trainer in (plain, other):
        fill(trainer.parameters.values())
        for generator in (np.random.seed, random.seed, torch.manual_seed):
            generator(0)
        trainer.backward()
    for name, parameter in plain.parameters.items():
        assert torch.allclose(parameter.grad, other.parameters[name].grad, rtol=1e-5, atol=1e-8)


def test_own_loss_sdxl_bf16_and_images_in_that_dtype():
    dtypes = []

    class Squared(AlignPropTrainer):
        def calculate_loss(self, rewards):
            return (1 - rewards).square().mean()

    def reward(images, prompts, metadata):
        dtypes.append(images.dtype)
        return waves(images, prompts, metadata), {}

    trainer = Squared(
        config(mixed_precision="bf16"), reward, prompt_function, tiny_stable_diffusion_xl()
    )
    assert {p.dtype for p in trainer.trainable_layers} == {torch.float32}
    result = trainer.backward()
    assert float(result.loss) == pytest.approx(
        float((1 - result.rewards).square().mean()), rel=1e-2
    )
    assert dtypes == [torch.bfloat16]
    assert any(p.grad.any() for p in trainer.trainable_layers)


def test_the_bundled_model_by_name_and_sampling(tmp_path):
    settings = config(sample_num_steps=2, truncated_rand_backprop_minmax=(0, 1), num_epochs=1)
    pipe = DefaultDDPOStableDiffusionPipeline("bundled")
    trainer = AlignPropTrainer(settings, reward_function, prompt_function, pipe)
    assert len(trainer.parameters) % 2 == 0
    assert {p.shape[0] for name, p in trainer.parameters.items() if "lora_A" in name} == {4}
    before = random.getstate()
    samples = trainer._generate_samples(2, with_grad=False, prompts=["a fox", "a cat"])
    assert random.getstate() == before  # truncation is not drawn where there is none
    assert samples["images"].shape == (2, 3, 64, 64)
    trainer.train()
    trainer.save_model(tmp_path)
    assert (tmp_path / "pytorch_lora_weights.safetensors").is_file()


def test_it_logs_to_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    trackers = []
    settings = config(num_epochs=1, log_with="tensorboard", logdir=str(tmp_path))
    make(
        settings, image_samples_hook=lambda data, step, tracker: trackers.append(tracker.name)
    ).train()
    assert trackers == ["tensorboard"]
    assert list(tmp_path.rglob("events.out*"))
