"""Embeddings on disk: a safetensors file each, named after all that decides what is in it.

A cache is a convenience: what cannot be read is computed again, and what cannot be written is not
kept; a warning says so once.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from rewardprop_fast import files
from rewardprop_fast.rollout import Conditioning

#: Their code computes the embeddings.
_PACKAGES = ("torch", "diffusers", "transformers")


class EmbeddingCache:
    """Conditions by key, in a folder that is made when it is first needed.

    Args:
        folder: may be shared by runs and models. Two runs may write to it at the same time: files
            of one name hold the same.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._warned = False

    def get(self, key: str) -> Conditioning | None:
        """What was put under this key, on the CPU; None if it is not there or damaged."""
        path = self._path(key)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn(f"cannot be read ({error})")
            return None
        try:
            return _conditioning(load(data))
        except (SafetensorError, KeyError, ValueError) as error:
            self._warn(f"holds a damaged file, {path.name}, which is written anew ({error})")
            return None

    def put(self, key: str, conditioning: Conditioning) -> None:
        """Write it, whole or not at all."""
        try:
            files.make_folder(self.folder)
            files.atomic_write(self._path(key), save(_tensors(conditioning)))
        except OSError as error:
            self._warn(f"cannot be written ({error})")

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _warn(self, problem: str) -> None:
        if not self._warned:
            warnings.warn(
                f"The cache of embeddings {self.folder} {problem}. Training goes on without it "
                "where it has to.",
                stacklevel=4,
            )
        self._warned = True


def identity_of_encoders(pipe: Any) -> str:
    """A hash of all in a pipeline that turns prompts into embeddings: weights, tokens, versions."""
    digest = hashlib.sha256()
    for name in ("text_encoder", "text_encoder_2"):
        encoder = getattr(pipe, name, None)
        if encoder is None:
            continue
        digest.update(f"{name} {type(encoder).__name__} {encoder.config.to_json_string()}".encode())
        for key, tensor in sorted(encoder.state_dict().items()):
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(_bytes(tensor))
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer = getattr(pipe, name, None)
        if tokenizer is not None:
            digest.update(f"{name} {type(tokenizer).__name__}".encode())
            facts = {
                "vocabulary": tokenizer.get_vocab(),
                "special": tokenizer.special_tokens_map,
                "length": tokenizer.model_max_length,
            }
            digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
            digest.update(_rules(tokenizer).encode())
    facts = {
        "pipeline": type(pipe).__name__,
        "config": {key: str(value) for key, value in pipe.config.items()},
        "versions": {package: version(package) for package in _PACKAGES},
        "device": torch.device(pipe.unet.device).type,
        "dtype": str(pipe.unet.dtype),
    }
    digest.update(json.dumps(facts, sort_keys=True).encode())
    return digest.hexdigest()


def _rules(tokenizer: Any) -> str:
    """How a fast tokenizer splits text; the last call's padding is no part of that."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return ""
    rules = json.loads(backend.to_str())
    return json.dumps({**rules, "padding": None, "truncation": None}, sort_keys=True)


def key_of(identity: str, prompt: str, negative: str | None, size: Any, guided: bool) -> str:
    """The name under which one prompt's conditions are kept."""
    facts = json.dumps([identity, prompt, negative, list(size), guided])
    return hashlib.sha256(facts.encode()).hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().contiguous().cpu().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy().data)


def _tensors(conditioning: Conditioning) -> dict[str, Tensor]:
    found = {"positive": conditioning.positive}
    if conditioning.negative is not None:
        found["negative"] = conditioning.negative
    for part in ("positive_added", "negative_added"):
        for key, tensor in getattr(conditioning, part).items():
            found[f"{part}.{key}"] = tensor
    # copies: safetensors refuses tensors that share memory, as time_ids do
    return {key: tensor.detach().cpu().contiguous().clone() for key, tensor in found.items()}


def _conditioning(tensors: dict[str, Tensor]) -> Conditioning:
    def added(part: str) -> dict[str, Tensor]:
        prefix = f"{part}."
        return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}

    return Conditioning(
        tensors["positive"],
        tensors.get("negative"),
        added("positive_added"),
        added("negative_added"),
    )
