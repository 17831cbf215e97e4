"""`rewardprop mix`: several LoRAs as one, by weights."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewardprop_fast.cli.parsing import add_verb
from rewardprop_fast.errors import ConfigError, ExportError
from rewardprop_fast.training import run_files

if TYPE_CHECKING:
    from rewardprop_fast.training.config import ModelConfig

_MORE = """\
Each LoRA is a file, its folder or a finished run, with its weight behind a
colon (1 if left out; negative and above 1 are allowed). The mix is exact: the
ranks are laid side by side. --rank makes it smaller again by a singular value
decomposition and says what is lost. LoRAs may differ in rank, alpha and layers."""

_EPILOG = """\
examples:
  rewardprop mix runs/style:0.7 runs/compressible:0.3 --out mixed
  rewardprop mix a.safetensors:1 b.safetensors:-0.5 --rank 8 --out c
  rewardprop sample --lora mixed --compare --prompts "a fox" --output fox.png"""


def add_to(verbs: Any) -> None:
    """Add the verb."""
    parser = add_verb(
        verbs, "mix", "make one LoRA of several, by weights", run, more=_MORE, epilog=_EPILOG
    )
    add = parser.add_argument
    add("loras", nargs="+", metavar="LORA:WEIGHT", help="such as runs/style:0.7")
    add("--out", required=True, metavar="FOLDER", help="where the files go; made if missing")
    add("--rank", type=int, metavar="R", help="at most this rank (default: exact)")
    add("--format", choices=("both", "diffusers", "kohya"), default="both", help="default: both")
    add("--model", metavar="MODEL", help="what they were trained on (default: a run's, or bundled)")
    add("--overwrite", action="store_true", help="replace LoRA files that are in FOLDER already")


def run(args: Namespace) -> int:
    """Read, mix, write."""
    parts = [parse(text) for text in args.loras]
    from rewardprop_fast import lora
    from rewardprop_fast.cli.common import enclosing_run, sampling_of
    from rewardprop_fast.lora.export import DIFFUSERS_FILE, KOHYA_FILE
    from rewardprop_fast.training import lora_header

    formats = ("diffusers", "kohya") if args.format == "both" else (args.format,)
    names = {"diffusers": DIFFUSERS_FILE, "kohya": KOHYA_FILE}
    present = [
        str(Path(args.out, names[one])) for one in formats if Path(args.out, names[one]).exists()
    ]
    if present and not args.overwrite:
        raise ExportError(
            f"{', '.join(present)} would be overwritten. Give another --out, or --overwrite."
        )
    runs = [enclosing_run(path) for path, _ in parts]
    model = _skeleton(args.model, [run.model for run in runs if run is not None])
    layers = lora.mix([(lora.read(model, path), weight) for path, weight in parts])
    ranks = {layer.rank for layer in layers.values()}
    lines = [f"{weight:g} x {path}" for path, weight in parts]
    if args.rank is None:
        lines.append(f"exact, of rank {' to '.join(map(str, sorted({min(ranks), max(ranks)})))}")
    else:
        layers, lost = lora.compress(layers, args.rank)
        lines.append(
            f"of rank {args.rank} at most: {lost.error:.2%} of it is lost, "
            f"{lost.worst:.2%} at worst{f' ({lost.worst_layer})' if lost.worst_layer else ''}"
        )
    lora.put(model, layers)
    # as all say that say anything, or the default of whoever draws with it
    known = [sampling_of(path, run) for (path, _), run in zip(parts, runs, strict=True)]
    said = {one for one in known if one is not None}
    metadata = lora_header.header(said.pop()) if len(said) == 1 else None
    if len(said) > 1:
        lines.append("trained with different sampling settings: sample will use its own defaults")
    try:
        written = lora.save_lora(model, args.out, formats, metadata=metadata)
    except OSError as error:
        raise ExportError(f"{args.out} cannot be written: {error.strerror or error}.") from error
    print("\n".join(lines))
    for path in written.values():
        print(f"  {path}  {path.stat().st_size / 2**20:.1f} MiB")
    return 0


def parse(text: str) -> tuple[Path, float]:
    """`a:0.7` -> (path of a's LoRA, 0.7). Errors: ConfigError."""
    name, colon, number = text.rpartition(":")
    weight = 1.0
    if not colon or Path(text).expanduser().exists():
        name = text
    else:
        try:
            weight = float(number)
        except ValueError:
            raise ConfigError(
                f"got {text!r}; a LoRA's weight follows a colon, such as {name or 'a'}:0.7."
            ) from None
    return find(Path(name).expanduser()), weight


def find(path: Path) -> Path:
    """The LoRA of a run's folder, or the path itself. Errors: ConfigError."""
    if not path.exists():
        raise ConfigError(f"There is no {path}. Give a LoRA file, its folder, or a run.")
    return path / run_files.LORA if (path / run_files.LORA).is_dir() else path


def _skeleton(model: str | None, trained: list[ModelConfig]) -> Any:
    """The shapes of the model that is named, or of what the LoRAs' runs trained."""
    from rewardprop_fast.models.skeleton import load_skeleton

    if model is not None:
        return load_skeleton(model)
    models = sorted({one.path for one in trained})
    if len(models) > 1:
        raise ConfigError(
            f"The runs trained different models, {' and '.join(models)}; their LoRAs do not mix. "
            "If these are copies of one model, name it with --model."
        )
    if not trained:
        return load_skeleton("bundled")
    first = trained[0]
    return load_skeleton(
        first.path, revision=first.revision, local_files_only=first.local_files_only
    )
