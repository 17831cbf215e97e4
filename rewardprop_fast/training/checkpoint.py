"""Checkpoints that survive being killed: a folder of safetensors and JSON, complete or not there.

    CHECKPOINTS/step_000100/lora.safetensors   one file per group of tensors
                            state.json         counters and what else JSON holds exactly
                            manifest.json      format, step, sequence, and the size and sha256
                                               of each file; written last

`save` writes into a hidden folder beside it, waits for the disk, and renames; only then do old
checkpoints go. Killed at any moment, the last complete checkpoint is found by `latest` and read
by `load`. This file knows nothing of trainers.

Hashes reveal damage and careless edits. They are no signature: whoever can write the folder can
write its manifest too. Nothing here reads pickle, follows links, or opens a file whose name is
not a plain one in the checkpoint's own folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rewardprop_fast.errors import CheckpointError
from rewardprop_fast.files import make_folder, sync_folder, write_new
from rewardprop_fast.training import run_files
from rewardprop_fast.training.checkpoint_format import (
    FORMAT,
    MANIFEST,
    STATE,
    VERSION,
    checked_group,
    damaged,
    pack_state,
    pack_tensors,
    parse_json,
    read_listed,
    read_manifest,
    size_of,
    unpack_tensors,
)

_FOLDER = re.compile(r"step_(\d{6,})")
_PICKLES = {".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth"}
# Folders on their way in, on their way out, and a step's earlier version while the new one takes
# its place.
_SAVING, _REMOVING, _REPLACED = ".saving-", ".removing-", ".replaced-"


@dataclass(frozen=True)
class Checkpoint:
    """What was saved: `tensors[group][name]` on the CPU, `state` of JSON values, and its folder."""

    step: int
    tensors: dict[str, dict[str, torch.Tensor]]
    state: dict[str, Any]
    path: Path


# ---------------------------------------------------------------------- saving


def save(
    directory: str | Path,
    step: int,
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    state: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Write checkpoint `directory/step_000100`, then drop all but the `keep` last written ones.

    A checkpoint of the same step is replaced. Tensors are copied to the CPU and keep their dtype
    and shape; floats in `state` come back exactly. One process at a time may save into a folder.
    Errors: CheckpointError, for values that cannot be saved exactly or a disk that refuses;
    earlier checkpoints stay.
    """
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise CheckpointError(f"step {step!r} cannot be saved: it must be a whole number from 0.")
    if keep < 1:
        raise CheckpointError(f"keep is {keep}; allowed: at least 1, the checkpoint being saved.")
    files = {
        f"{checked_group(name)}.safetensors": pack_tensors(name, group)
        for name, group in tensors.items()
    }
    files[STATE] = pack_state(state)
    directory = Path(directory)
    try:
        make_folder(directory)
        _clean(directory)
        path = _write(directory, step, files)
    except OSError as error:
        with contextlib.suppress(OSError):
            _clean(directory)
        kept = _latest_or_none(directory)
        rest = f"The checkpoint {kept} is intact." if kept else "There is no earlier checkpoint."
        raise CheckpointError(
            f"The checkpoint of step {step} could not be written to {directory}: "
            f"{error.strerror or error}. {rest}"
        ) from error
    _drop_old(directory, keep)
    return path


def _write(directory: Path, step: int, files: Mapping[str, bytes]) -> Path:
    name = f"step_{step:06d}"
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        # Order of writing: after resuming from an older step, the highest step is not the newest.
        "sequence": max((sequence for sequence, _ in _complete(directory)), default=0) + 1,
        "files": {
            file: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
            for file, data in files.items()
        },
    }
    temporary, final = directory / f"{_SAVING}{name}", directory / name
    os.mkdir(temporary)
    for file, data in files.items():
        write_new(temporary / file, data)
    write_new(temporary / MANIFEST, json.dumps(manifest, indent=1))
    sync_folder(temporary)
    if os.path.lexists(final):
        os.rename(final, directory / f"{_REPLACED}{name}")
    os.rename(temporary, final)
    sync_folder(directory)
    return final


def _clean(directory: Path) -> None:
    """Remove what killed saves left; put back a version whose replacement never arrived."""
    for entry in sorted(directory.iterdir()):
        if entry.name.startswith(_REPLACED):
            original = directory / entry.name.removeprefix(_REPLACED)
            if not os.path.lexists(original):
                os.rename(entry, original)
                continue
        if entry.name.startswith((_SAVING, _REMOVING, _REPLACED)):
            _remove(entry)


def _drop_old(directory: Path, keep: int) -> None:
    """The new checkpoint is safe by now, so what will not go is worth a warning, not the run."""
    try:
        for _, path in _complete(directory)[:-keep]:
            # Renamed first: a folder called step_... is complete at every moment.
            doomed = directory / f"{_REMOVING}{path.name}"
            os.rename(path, doomed)
        _clean(directory)
    except OSError as error:
        warnings.warn(f"An old checkpoint in {directory} cannot be removed: {error}", stacklevel=3)


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        os.unlink(entry)


# --------------------------------------------------------------------- finding


def latest(directory: str | Path) -> Path | None:
    """The complete checkpoint that was written last, or None; what killed saves left is ignored.

    Complete means: a readable manifest and every file there with its size. `load` checks the
    contents.
    """
    return _latest_or_none(Path(directory))


def resolve(path: str | Path) -> Path:
    """A checkpoint's folder from itself, from the folder of checkpoints, or from the run's folder.

    Errors: CheckpointError if there is none, or if a file was given.
    """
    path = Path(path)
    _refuse_file(path)
    if not path.is_dir():
        raise CheckpointError(
            f"There is no folder {path}. Give a run, its checkpoints, or one of them."
        )
    if os.path.lexists(path / MANIFEST) or _FOLDER.fullmatch(path.name):
        return path
    for folder in (path / run_files.CHECKPOINTS, path):
        found = _latest_or_none(folder)
        if found:
            return found
    raise CheckpointError(
        f"There is no complete checkpoint in {path}. A run saves its first one after "
        "train.output.checkpoint_every steps."
    )


def _latest_or_none(directory: Path) -> Path | None:
    found = _complete(directory)
    return found[-1][1] if found else None


def _complete(directory: Path) -> list[tuple[int, Path]]:
    """(sequence, path) of the complete checkpoints, in the order of writing."""
    found = {}
    for entry in directory.iterdir() if directory.is_dir() else ():
        # A version being replaced counts until the new one is in its place.
        name = entry.name.removeprefix(_REPLACED)
        replaced = name != entry.name and os.path.lexists(directory / name)
        if not _FOLDER.fullmatch(name) or replaced:
            continue
        try:
            manifest = read_manifest(entry)
            sizes = {file: size_of(entry / file) for file in manifest["files"]}
        except (CheckpointError, OSError):
            continue
        if all(sizes[file] == facts["bytes"] for file, facts in manifest["files"].items()):
            found[name] = (manifest["sequence"], entry)
    return sorted(found.values(), key=lambda pair: (pair[0], pair[1].name))


# --------------------------------------------------------------------- loading


def load(path: str | Path) -> Checkpoint:
    """Read a checkpoint and verify every byte of it against the manifest.

    `path` is the checkpoint's folder, or whatever `resolve` understands. Errors: CheckpointError,
    naming the file, for pickle, damage, a missing manifest, links, names that lead out of the
    folder, and formats of other versions.
    """
    folder = resolve(path)
    if folder.is_symlink():
        raise CheckpointError(f"{folder} is a link; give the folder it points to.")
    for entry in sorted(folder.iterdir()):
        if entry.suffix.lower() in _PICKLES:
            raise _pickle_error(entry)
    try:
        manifest = read_manifest(folder)
        contents = {
            file: read_listed(folder, file, facts) for file, facts in manifest["files"].items()
        }
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror or error}.") from error
    if STATE not in contents:
        raise damaged(folder / MANIFEST, f"it does not list {STATE}")
    state = parse_json(contents.pop(STATE), folder / STATE)
    if not isinstance(state, dict):
        raise damaged(folder / STATE, "it is not a mapping")
    tensors = dict(unpack_tensors(folder, contents))
    return Checkpoint(step=manifest["step"], tensors=tensors, state=state, path=folder)


def _refuse_file(path: Path) -> None:
    if path.suffix.lower() in _PICKLES and not path.is_dir():
        raise _pickle_error(path)
    if path.is_file():
        raise CheckpointError(f"{path} is a file; a checkpoint is a folder. Give {path.parent}.")


def _pickle_error(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is a pickle file by its name; reading pickle can run any code, so it is refused. "
        "Checkpoints here are folders of .safetensors and .json files."
    )
