"""What keeps a model near where it came from: distance to the base model, and what it knew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from PIL import Image, ImageOps
from torch import Tensor

from rewardprop_fast import randomness
from rewardprop_fast.errors import ConfigError
from rewardprop_fast.lora import disabled
from rewardprop_fast.models.decode import encode_images
from rewardprop_fast.randomness import Draws, Stream
from rewardprop_fast.rollout.denoise import predict

if TYPE_CHECKING:
    from rewardprop_fast.training.engine import Engine

_IMAGES = {".png", ".jpg", ".jpeg", ".webp"}


class DistanceToBase:
    """A UNet that notes how far its predictions with gradients are from the base model's.

    The mean of `||eps_theta - eps_base||^2` over calls, images and elements, of guided predictions
    (2409.06493, section 3.2). The base model is the same UNet with the LoRA switched off, called on
    the same inputs without gradients.

    Args:
        guidance_scale: w of `u + w (c - u)`, or None for outputs that are not doubled.
    """

    def __init__(self, unet: Any, guidance_scale: float | None) -> None:
        self.unet, self.scale = unet, guidance_scale
        self._squares: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unet, name)

    @property
    def without_gradients(self) -> Any:
        """What a call without gradients comes to; `Sampler` makes these at once."""
        return self.unet

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.unet(*args, **kwargs)
        # first, while less is held than behind the call with gradients
        with torch.no_grad(), disabled(self.unet):
            base = self.unet(*args, **kwargs)[0]
        output = self.unet(*args, **kwargs)
        difference = _wide(output[0]) - _wide(base)
        if self.scale is not None:
            uncond, cond = difference.chunk(2)
            difference = uncond + self.scale * (cond - uncond)
        self._squares.append(difference.square().mean())
        return output

    def mean(self) -> Tensor:
        """(), with its graph; of the calls so far."""
        return torch.stack(self._squares).mean()


class Pretraining:
    """The loss that the model was trained with, on images that it is to go on knowing.

    `E ||eps - eps_theta(alpha_t x_0 + sigma_t eps, t, c)||^2` over all timesteps (2006.11239,
    equation 14), or v or x_0 for models that predict these; without guidance. ReFL adds it to its
    loss (2304.05977, section 4.2). The images are samples of the base model for the run's own
    prompts, or those of a folder: pictures, each with its caption in a .txt file of the same name.

    They are made once, when they are first asked for, and are the same in a resumed run.
    """

    def __init__(self, engine: Engine, prompts: Sequence[str]) -> None:
        settings = engine.config.regularisation
        self.engine = engine
        folder = settings.pretraining_images
        self._files = None if folder is None else captioned(Path(folder))
        if self._files is not None:
            self.texts = [text for _, text in self._files]
        else:
            count = settings.pretraining_samples
            self.texts = [prompts[i % len(prompts)] for i in range(count)]
        table = DDIMScheduler.from_config(engine.pipe.scheduler.config).alphas_cumprod.double()
        self._signal, self._noise = table.sqrt(), (1 - table).sqrt()
        self._latents: Tensor | None = None

    @property
    def latents(self) -> Tensor:
        """x_0 of all images, (N, 4, h, w), on the CPU."""
        if self._latents is None:
            self._latents = self._samples() if self._files is None else self._encoded()
        return self._latents

    def loss(self, draws: Draws) -> Tensor:
        """The mean loss of as many images as the batch has, (), with its graph."""
        engine, known = self.engine, self.latents
        texts, clean, noise, steps = [], [], [], []
        for sample in draws.samples:
            source = randomness.generator(draws.seed, Stream.PRETRAINING, draws.step, sample)
            index = int(torch.randint(len(known), (), generator=source))
            steps.append(int(torch.randint(len(self._signal), (), generator=source)))
            noise.append(torch.randn(known.shape[1:], generator=source))
            clean.append(known[index])
            texts.append(self.texts[index])
        t = torch.tensor(steps)
        x_0, eps = (torch.stack(one).to(engine.device, engine.dtype) for one in (clean, noise))
        signal, sigma = (
            one[t].view(-1, 1, 1, 1).to(engine.device, engine.dtype)
            for one in (self._signal, self._noise)
        )
        conditions = engine.encoder(texts)
        output = predict(
            engine.pipe.unet,
            signal * x_0 + sigma * eps,
            t.to(engine.device),
            conditions.positive,
            conditions.positive_added,
            guided=False,
        )
        target = {
            "epsilon": eps,
            "v_prediction": signal * eps - sigma * x_0,
            "sample": x_0,
        }[engine.schedule.prediction]
        return (_wide(output) - target).square().mean()

    @torch.no_grad()
    def _samples(self) -> Tensor:
        """Of the base model, each from noise of its own."""
        engine, size, found = self.engine, self.engine.config.batch_size, []
        for start in range(0, len(self.texts), size):
            part = self.texts[start : start + size]
            draws = Draws(engine.config.seed, 0, tuple(range(start, start + len(part))))
            x_t = randomness.latents(
                draws.seed, 0, draws.samples, engine.latent_shape, stream=Stream.PRETRAINING
            ).to(engine.device, engine.dtype)
            sampler = engine.sampler(part, draws).timed(engine.watch)
            with disabled(engine.pipe.unet):
                found.append(sampler.run(x_t, 0, len(sampler), gradients=False).cpu())
        return torch.cat(found)

    @torch.no_grad()
    def _encoded(self) -> Tensor:
        """Of the folder's pictures, one after the other, since an encoder needs much memory."""
        assert self._files is not None
        engine, found = self.engine, []
        with engine.watch("decode"):
            for file, _ in self._files:
                image = read_image(file, engine.height, engine.width).to(engine.device)
                found.append(encode_images(engine.pipe.vae, image[None]).to(engine.dtype).cpu())
        return torch.cat(found)


def captioned(folder: Path) -> list[tuple[Path, str]]:
    """Pictures of a folder with their captions, by name. Errors: ConfigError."""
    if not folder.is_dir():
        raise ConfigError(
            f"train.regularisation.pretraining_images is {folder}, which is no folder. Give one "
            "with pictures and their captions (fox.png, fox.txt), or null for samples of the base "
            "model."
        )
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in _IMAGES)
    without = [file.name for file in files if not file.with_suffix(".txt").is_file()]
    if not files or without:
        what = f"{without[0]} has no {Path(without[0]).stem}.txt" if without else "it holds none"
        raise ConfigError(
            f"train.regularisation.pretraining_images is {folder}: {what}. It needs pictures "
            f"({', '.join(sorted(_IMAGES))}), each with its caption in a .txt file beside it."
        )
    return [(file, file.with_suffix(".txt").read_text("utf-8").strip()) for file in files]


def read_image(file: Path, height: int, width: int) -> Tensor:
    """(3, H, W) in [0, 1], float32: scaled to cover the size, the middle cut out."""
    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
    except OSError as error:
        raise ConfigError(f"{file} cannot be read as a picture: {error}.") from error
    fitted = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 255


def watched(sampler: Any, unet: DistanceToBase) -> Any:
    """The same chain, its predictions compared with the base model's."""
    return replace(sampler, unet=unet)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
