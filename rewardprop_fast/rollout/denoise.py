"""One denoising step: UNet, classifier-free guidance, DDIM update."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rewardprop_fast.ops import guided_ddim_step

if TYPE_CHECKING:  # reading a config imports this file and should not wait for diffusers
    from rewardprop_fast.nn.hoisted import Context, Moment


def predict(
    unet: Any,
    latents: Tensor,
    timestep: Tensor,
    embeddings: Tensor | Context,
    added: Mapping[str, Tensor],
    guided: bool,
    moment: Moment | None = None,
) -> Tensor:
    """The UNet's output for latents (B, 4, h, w): (2B, 4, h, w) if guided, else (B, 4, h, w)."""
    inputs = torch.cat([latents, latents]) if guided else latents
    told = {} if moment is None else {"timestep_cond": moment}
    output: Tensor = unet(
        inputs.to(unet.dtype if moment is None else moment.dtype),
        timestep,
        encoder_hidden_states=embeddings,
        added_cond_kwargs=dict(added) or None,
        return_dict=False,
        **told,
    )[0]
    return output


def denoise(
    unet: Any,
    latents: Tensor,
    timestep: Tensor,
    coefficients: Tensor,
    embeddings: Tensor | Context,
    added: Mapping[str, Tensor],
    guidance_scale: float | Tensor | None,
    noise: Tensor | None = None,
    *,
    moment: Moment | None = None,
    detach_prediction: bool = False,
    detach_input: bool = False,
) -> Tensor:
    """x_{t-1} from x_t, both (B, 4, h, w) in the latents' dtype (float32: the UNet may be bf16).

    Args:
        unet: diffusers' UNet2DConditionModel, or anything called like it.
        timestep: () int64.
        coefficients: (3,) row of `Schedule.coefficients`.
        embeddings, added: `Conditioning.embeddings()`, or what was made of these, and `.added()`.
        guidance_scale: w of `u + w (c - u)`, a number or (); None where the conditions hold no
            negative rows.
        noise: (B, 4, h, w) standard normal for eta > 0.
        moment: what `hoisting` has made of the timestep, where it has.
        detach_prediction: run the UNet without gradient; x_t keeps its linear path.
        detach_input: no gradient passes through the UNet into x_t; x_t keeps its linear path.
    """
    guided = guidance_scale is not None
    given = latents.detach() if detach_input else latents
    if detach_prediction:
        with torch.no_grad():
            output = predict(unet, given, timestep, embeddings, added, guided, moment)
    else:
        output = predict(unet, given, timestep, embeddings, added, guided, moment)
    return guided_ddim_step(output, latents, coefficients, guidance_scale, noise)
