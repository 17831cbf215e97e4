"""`rewardprop export`: a LoRA for other programs, from a checkpoint or from another format."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewardprop_fast.cli.parsing import add_verb
from rewardprop_fast.errors import CheckpointError, ConfigError, ExportError

if TYPE_CHECKING:
    from rewardprop_fast.training.config import LoRAConfig, RunConfig

_MORE = """\
SOURCE is a run (its newest checkpoint), one checkpoint, a LoRA file or a
LoRA's folder. Only the model's shapes are read, not its weights. A finished
run has its LoRA in lora/ already, in both formats; export is for stopped runs,
earlier checkpoints, other formats and smaller files."""

_EPILOG = """\
examples:
  rewardprop export runs/draft-small --output lora
  rewardprop export runs/draft-small/checkpoints/step_000400 --output early
  rewardprop export style.safetensors --model ./my-model \\
      --format kohya --dtype float16 --output comfyui"""


def add_to(verbs: Any) -> None:
    """Add the verb."""
    parser = add_verb(
        verbs,
        "export",
        "write a LoRA for diffusers, ComfyUI and A1111",
        run,
        more=_MORE,
        epilog=_EPILOG,
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help="a run, a checkpoint, a LoRA file or a LoRA's folder")
    add("--output", required=True, metavar="FOLDER", help="where the files go; made if missing")
    add("--format", choices=("both", "diffusers", "kohya"), default="both", help="default: both")
    add(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="of the files",
    )
    add("--model", metavar="MODEL", help="what it was trained on (default: the run's, or bundled)")
    add("--overwrite", action="store_true", help="replace LoRA files that are in FOLDER already")


def run(args: Namespace) -> int:
    """Read the LoRA onto the model's shapes and write it again."""
    source, output = Path(args.source).expanduser(), Path(args.output).expanduser()
    if not source.exists():
        raise ConfigError(f"There is no {source}. Give a run, a checkpoint or a LoRA.")
    import torch

    from rewardprop_fast import lora
    from rewardprop_fast.cli.common import enclosing_run, sampling_of
    from rewardprop_fast.lora.export import DIFFUSERS_FILE, KOHYA_FILE
    from rewardprop_fast.training import lora_header

    formats = ("diffusers", "kohya") if args.format == "both" else (args.format,)
    names = {"diffusers": DIFFUSERS_FILE, "kohya": KOHYA_FILE}
    _refuse_overwriting([output / names[name] for name in formats], args.overwrite)
    run = enclosing_run(source)
    try:
        model, what = _read(source, args.model, run)
        sampling = sampling_of(source, run)
        metadata = None if sampling is None else lora_header.header(sampling)
        dtype = getattr(torch, args.dtype)
        written = lora.save_lora(model, output, formats, dtype=dtype, metadata=metadata)
    except OSError as error:
        raise ExportError(f"{output} cannot be written: {error.strerror or error}.") from error
    print(f"{what}, as {args.dtype}:")
    for name, path in written.items():
        use = "pipe.load_lora_weights(folder)" if name == "diffusers" else "ComfyUI, A1111"
        print(f"  {path}  {path.stat().st_size / 2**20:.1f} MiB, for {use}")
    return 0


def _refuse_overwriting(files: list[Path], allowed: bool) -> None:
    present = [str(file) for file in files if file.exists()]
    if present and not allowed:
        raise ExportError(
            f"{', '.join(present)} would be overwritten. Give another --output, or --overwrite."
        )


def _read(source: Path, model: str | None, run: RunConfig | None) -> tuple[Any, str]:
    """A model that carries the LoRA of `source`, and what was read, in words."""
    from rewardprop_fast import lora
    from rewardprop_fast.lora.files import check_suffix
    from rewardprop_fast.training import checkpoint
    from rewardprop_fast.training.checkpoint_format import MANIFEST

    is_lora = source.is_file() or (
        not (source / MANIFEST).exists() and any(source.glob("*.safetensors"))
    )
    if is_lora:
        if source.is_file():
            check_suffix(source)  # a pickle is named as one before anything else is looked for
        skeleton = _skeleton(model, run, default="bundled")
        lora.load(skeleton, source)
        return skeleton, f"The LoRA of {source}"

    found = checkpoint.load(source)
    if "lora" not in found.tensors:
        raise CheckpointError(f"{found.path} holds no LoRA.")
    skeleton = _skeleton(model, run, default=None)
    settings = _lora_settings(found)
    lora.inject(skeleton.unet, settings.rank, settings.alpha, settings.target_modules)
    # where a run keeps an average of its weights, that is its result
    weights = found.tensors.get("average", found.tensors["lora"])
    lora.load_lora_state_dict(skeleton.unet, weights)
    return skeleton, f"Step {found.step} of {found.path}"


def _lora_settings(found: Any) -> LoRAConfig:
    from rewardprop_fast.training.config import LoRAConfig
    from rewardprop_fast.training.config_fields import Problems, read_settings

    problems = Problems()
    stored = found.state.get("config", {}).get("lora", {})
    settings: LoRAConfig = read_settings(LoRAConfig, stored, "lora", problems)
    problems.raise_if_any(str(found.path))
    return settings


def _skeleton(model: str | None, run: RunConfig | None, default: str | None) -> Any:
    from rewardprop_fast.models.skeleton import load_skeleton

    if model is None and run is not None:
        stored = run.model
        return load_skeleton(
            stored.path, revision=stored.revision, local_files_only=stored.local_files_only
        )
    chosen = model or default
    if chosen is None:
        raise ConfigError(
            "The checkpoint's run names no model (its config.yaml is missing, or it was started "
            "from Python). Say with --model what it was trained on."
        )
    return load_skeleton(chosen)
