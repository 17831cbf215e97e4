"""Published reward models: found in a folder or on the hub, read from safetensors alone."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rewardprop_fast import hub
from rewardprop_fast.errors import ModelError

#: Endings of files that are pickles: reading one can run anything.
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")

_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt")

_CONVERT = (
    "Training reads safetensors alone, since reading a pickle can run any code in it. "
    "`rewardprop convert-reward` turns the published files of the aesthetic head, HPSv2 and "
    "ImageReward into folders; other models, `model.save_pretrained(folder)` of transformers."
)


def locate(path: str | Path, reward: str, argument: str = "model") -> tuple[str, bool]:
    """(folder or hub name, whether it is a folder) of a reward's model.

    Raises:
        ModelError: neither a folder nor a hub name; a pickle; or a hub name that was never
            downloaded while the hub is out of reach.
    """
    if not isinstance(path, str | Path) or not str(path):
        raise ModelError(
            f"The reward {reward!r}: {argument} is {path!r}; allowed: a folder or a hub name such "
            "as 'owner/model'."
        )
    name, folder = str(path), Path(path).expanduser()
    if folder.is_dir():
        return str(folder), True
    if folder.is_file() or folder.suffix in PICKLES:
        raise ModelError(
            f"The reward {reward!r}: {argument} {name!r} is a file; it must be a folder with "
            f"config.json and model.safetensors. {_CONVERT}"
        )
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1 or os.sep == "\\"
    if looks_local:
        raise ModelError(
            f"The reward {reward!r}: there is no folder {name!r} ({argument}). Give a folder or a "
            "hub name such as 'owner/model'."
        )
    if not isinstance(try_to_load_from_cache(name, "config.json"), str) and not hub.reachable():
        raise ModelError(
            f"The reward {reward!r}: {name!r} ({argument}) is not a local folder, and the model "
            "hub cannot be reached. Download it elsewhere and give its folder."
        )
    return name, False


def load_model(cls: Any, path: str | Path, reward: str, kinds: tuple[str, ...] = ()) -> Any:
    """A transformers model in fp32, frozen, in eval mode, on the CPU.

    Args:
        cls: with ``from_pretrained``.
        kinds: the ``model_type`` that its config.json may have; () for any.

    Raises:
        ModelError: not there, a pickle, of another architecture, or with weights missing.
    """
    location, local = locate(path, reward)
    where: dict[str, Any] = {}
    if local:
        _check_folder(Path(location), reward, kinds)
    else:
        where = {"local_files_only": not hub.reachable()}
    try:
        model, info = cls.from_pretrained(
            location, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **where
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelError(f"The reward {reward!r} cannot load {location}: {error}") from error
    found = model.config.model_type
    if kinds and found not in kinds:
        raise ModelError(_other_kind(reward, location, found, kinds))
    left_over = _of_more_layers(model, info["unexpected_keys"])
    for keys, what in ((info["missing_keys"], "missing"), (left_over, "left over")):
        if keys:
            raise ModelError(
                f"The reward {reward!r}: the weights in {location} are of another architecture "
                f"than its config.json: {len(keys)} are {what}, among them "
                f"{', '.join(sorted(keys)[:3])}."
            )
    return model.eval().requires_grad_(False)


def load_tokenizer(
    model: str | Path, tokenizer: str | Path | None, reward: str, ids: int | None = None
) -> Any:
    """The tokenizer at ``tokenizer``, or else that of the model's own folder.

    Args:
        ids: of how many tokens the model knows the embedding.

    Raises:
        ModelError: there is none, or it has more tokens than the model.
    """
    from transformers import AutoTokenizer

    argument = "model" if tokenizer is None else "tokenizer"
    location, local = locate(model if tokenizer is None else tokenizer, reward, argument)
    where = {} if local else {"local_files_only": not hub.reachable()}
    problem: object = "it has none of tokenizer.json, vocab.json and vocab.txt."
    found = None
    # without those files some versions of transformers make a tokenizer that knows no words
    if not local or any((Path(location) / name).is_file() for name in _TOKENIZER_FILES):
        try:
            found = AutoTokenizer.from_pretrained(location, **where)
        except Exception as error:  # of many kinds, by what is missing
            problem = error
    if found is None or len(found) < 10:
        raise ModelError(
            f"The reward {reward!r} finds no tokenizer in {location}: {problem} Put the model's "
            "tokenizer files there, or name a folder that has them with tokenizer=FOLDER. (For "
            "CLIP models, the tokenizer folder of any Stable Diffusion pipeline will do.)"
        )
    if ids is not None and len(found) > ids:
        raise ModelError(
            f"The reward {reward!r}: the tokenizer in {location} has {len(found)} tokens, the "
            f"model {ids}: they do not belong together."
        )
    return found


def load_tensors(path: str | Path, reward: str, argument: str) -> dict[str, Tensor]:
    """The tensors of one .safetensors file, or of the only one in a folder. Raises ModelError."""
    file = Path(path).expanduser()
    if file.is_dir():
        files = sorted(file.glob("*.safetensors"))
        if len(files) != 1:
            raise ModelError(
                f"The reward {reward!r}: the folder {file} ({argument}) holds {len(files)} "
                f".safetensors files; it must be one. {_CONVERT if not files else ''}".rstrip()
            )
        file = files[0]
    if file.suffix in PICKLES:
        raise ModelError(f"The reward {reward!r}: {argument} {file} is a pickle. {_CONVERT}")
    if not file.is_file():
        raise ModelError(f"The reward {reward!r}: there is no file {file} ({argument}).")
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"The reward {reward!r} cannot read {file}: {error}") from error


def read_json(path: str | Path, name: str) -> dict[str, Any] | None:
    """A JSON file of a model's folder or of a downloaded hub model; None where there is none."""
    folder = Path(path).expanduser()
    found = folder / name if folder.is_dir() else None
    if found is None:
        from transformers.utils.hub import cached_file

        cached = cached_file(
            str(path),
            name,
            local_files_only=not hub.reachable(),
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        found = None if cached is None else Path(cached)
    if found is None or not found.is_file():
        return None
    try:
        data = json.loads(found.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{found} is no JSON: {error}") from error
    return data if isinstance(data, dict) else None


def _of_more_layers(model: Any, unexpected: Iterable[str]) -> list[str]:
    """Those that differ from the model's own keys in a number alone: a layer it does not have.

    Others may be left over: a head or a buffer that the reward does not use.
    """
    number = re.compile(r"\.\d+(?=\.)")
    own = {number.sub(".N", key) for key in model.state_dict()}
    return [key for key in unexpected if number.sub(".N", key) in own]


def _check_folder(folder: Path, reward: str, kinds: tuple[str, ...]) -> None:
    config = read_json(folder, "config.json")
    if config is None:
        loose = [file.name for file in folder.iterdir() if file.suffix in PICKLES]
        raise ModelError(
            f"The reward {reward!r}: the folder {folder} has no config.json, so it is no model of "
            f"transformers. {_CONVERT if loose else ''}".rstrip()
        )
    if kinds and config.get("model_type") not in kinds:
        raise ModelError(_other_kind(reward, str(folder), config.get("model_type"), kinds))
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"The reward {reward!r}: {folder} has no .safetensors file. {_CONVERT}")


def _other_kind(reward: str, location: str, found: object, kinds: tuple[str, ...]) -> str:
    return (
        f"The reward {reward!r} needs a model of the type {' or '.join(map(repr, kinds))}; "
        f"{location} holds one of the type {found!r}."
    )
