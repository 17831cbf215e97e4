"""Pipelines from the package, a folder or the model hub."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache

from rewardprop_fast import hub
from rewardprop_fast.errors import ModelError
from rewardprop_fast.models.support import check_pipeline

#: Folder of the trained text-to-image pipeline that ships with the package.
BUNDLED = Path(__file__).parent / "bundled"


def load_bundled(dtype: torch.dtype = torch.float32) -> Any:
    """The bundled StableDiffusionPipeline: 64x64 emoji, 16x16x4 latents; docs/bundled_model.md."""
    return load_pipeline("bundled", dtype=dtype)


def load_pipeline(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    variant: str | None = None,
    local_files_only: bool = False,
) -> Any:
    """An SD 1.x, 2.x or SDXL pipeline, its weights loaded straight into `dtype`.

    Args:
        path: "bundled", a local folder in diffusers format, or a hub name `owner/model`.
        dtype: of all weights.
        revision, variant: of a hub model, as in `DiffusionPipeline.from_pretrained`.
        local_files_only: never ask the network.

    Raises:
        ModelError: no such folder, hub name out of reach, or a pipeline of another kind.
    """
    location, local = locate(path, revision=revision, local_files_only=local_files_only)
    if local and not Path(location, "model_index.json").is_file():
        raise ModelError(
            f"{location} is no diffusers pipeline: it has no model_index.json. Give the folder "
            "that `pipe.save_pretrained` wrote."
        )
    where: dict[str, Any] = {}
    if not local:
        # without network what was downloaded before still loads, and the rest fails at once
        offline = local_files_only or not hub.reachable()
        where = {"revision": revision, "local_files_only": offline}
    # here, not above: whether a model can be found is known without waiting for diffusers
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    try:
        arguments: dict[str, Any] = {"torch_dtype": dtype, "use_safetensors": True, **where}
        if variant is not None:
            arguments["variant"] = variant
        if "safety_checker" in DiffusionPipeline.load_config(location, **where):
            # it only judges finished images; none is needed to train
            arguments |= {"safety_checker": None, "requires_safety_checker": False}
        with warnings.catch_warnings():
            # diffusers renames torch_dtype; the new name is unknown to versions we support
            warnings.simplefilter("ignore", FutureWarning)
            pipe = DiffusionPipeline.from_pretrained(location, **arguments)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(cannot_load(location, local, error)) from error
    check_pipeline(pipe)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def locate(
    path: str | Path, *, revision: str | None = None, local_files_only: bool = False
) -> tuple[str, bool]:
    """(folder or hub name, whether it is a folder) of what a config calls the model.

    Raises:
        ModelError: no such folder, and no hub name either; or a hub name that was never downloaded
            while the hub is out of reach, or while it may not be asked.
    """
    if str(path) == "bundled":
        if not BUNDLED.is_dir():
            raise ModelError(
                f"The bundled model is missing from this installation ({BUNDLED}). Install "
                "rewardprop-fast again."
            )
        return str(BUNDLED), True
    folder, name = Path(path).expanduser(), str(path)
    if folder.is_dir():
        return str(folder), True
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1 or os.sep == "\\"
    if looks_local:
        raise ModelError(
            f"There is no folder {name!r}. Give 'bundled', the folder of a diffusers pipeline, or "
            "a hub name such as 'owner/model'."
        )
    downloaded = isinstance(
        try_to_load_from_cache(name, "model_index.json", revision=revision), str
    )
    if not downloaded and (local_files_only or not hub.reachable()):
        raise ModelError(cannot_load(name, False))
    return name, False


def cannot_load(location: str, local: bool, error: Exception | None = None) -> str:
    """One sentence for a model that is not there or not readable."""
    if local:
        return f"The pipeline in {location} cannot be loaded: {error}"
    return (
        f"{location!r} is not a local folder, and the model hub could not provide it (no network, "
        "no such model, or no access). Download it elsewhere with `pipe.save_pretrained(folder)` "
        "and give that folder, or use 'bundled'."
    )
