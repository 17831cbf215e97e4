"""`rewardprop sample`: pictures from a model, with a LoRA, without it, or both side by side."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewardprop_fast.cli.mix import find
from rewardprop_fast.cli.parsing import add_verb
from rewardprop_fast.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from rewardprop_fast.training.config import RunConfig, SamplingConfig, TrainConfig
    from rewardprop_fast.training.engine import Engine

_MORE = """\
A LoRA brings the sampling settings of its run along, and one that lies in its
run's folder the model; options override them. The same seed gives the same
noise, so pictures of several calls can be compared."""

_EPILOG = """\
examples:
  rewardprop sample --prompts "a red apple" "a fox" --output base.png
  rewardprop sample --lora runs/quickstart --compare \\
      --prompts "a red apple" --output apple.png
  rewardprop sample --lora style.safetensors --model ./my-model --strength 0.6 \\
      --prompts-file prompts.txt --steps 30 --seed 7 --output grid.png
  rewardprop sample --interpolate runs/style runs/compressible \\
      --prompts "a fox" --output strip.png"""

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def add_to(verbs: Any) -> None:
    """Add the verb."""
    parser = add_verb(
        verbs,
        "sample",
        "draw pictures with a LoRA, or without one",
        run,
        more=_MORE,
        epilog=_EPILOG,
    )
    add = parser.add_argument
    add("--prompts", nargs="+", metavar="PROMPT", help="what to draw, each in quotes")
    add(
        "--prompts-file",
        metavar="FILE",
        help="a text file, a prompt a line; or a prompt set's name",
    )
    add("--output", required=True, metavar="FILE.png", help="the picture to write")
    add("--lora", metavar="PATH", help="a LoRA file, its folder, or a run's folder")
    add("--strength", type=float, default=1.0, metavar="S", help="of the LoRA (default: 1)")
    add("--aig", type=float, metavar="P", help="from base to LoRA along the chain, by (i/T)^P")
    add("--interpolate", nargs=2, metavar=("A", "B"), help="a strip from one LoRA to another")
    add("--frames", type=int, default=5, metavar="N", help="of the strip (default: 5)")
    add("--compare", action="store_true", help="the base model's picture beside each")
    add("--model", metavar="MODEL", help="bundled, a folder or a hub name")
    add("--steps", type=int, metavar="N", help="sampling steps")
    add("--guidance-scale", type=float, metavar="W", help="guidance; 1 is without")
    add("--negative-prompt", metavar="TEXT", help="what to lead away from")
    add("--height", type=int, metavar="PIXELS", help="default: the model's own size")
    add("--width", type=int, metavar="PIXELS", help="default: the model's own size")
    add("--seed", type=int, default=0, metavar="N", help="of the noise (default: 0)")
    add("--count", type=int, default=1, metavar="N", help="pictures of each prompt (default: 1)")
    add(
        "--batch-size", type=int, default=4, metavar="N", help="pictures drawn at once (default: 4)"
    )
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), help="default: auto")
    add("--device", metavar="DEVICE", help="auto, cpu, cuda or cuda:N (default: auto)")


def run(args: Namespace) -> int:
    """Draw and write the picture."""
    _check(args)
    from rich.console import Console

    from rewardprop_fast.cli.common import enclosing_run, loading, sampling_of
    from rewardprop_fast.training.prompts import load_prompts

    chosen = load_prompts(args.prompts_file or args.prompts).prompts
    prompts = [prompt for prompt in chosen for _ in range(args.count)]
    ends = [find(Path(one).expanduser()) for one in args.interpolate or ()]
    lora = None if args.lora is None else find(Path(args.lora).expanduser())
    known = ends[0] if ends else lora
    run = None if known is None else enclosing_run(known)
    config = _config(args, None if known is None else sampling_of(known, run))
    model = args.model or (run.model.path if run else "bundled")

    console = Console()
    each = args.frames if ends else 1 + args.compare
    what = f" with {lora}" if lora else ""
    if ends:
        what = f" from {ends[0]} (A) to {ends[1]} (B)"
    with loading(console, f"Drawing {len(prompts) * each} pictures ..."):
        if ends:
            pairs = _strip(args, _engine(config, model, run), ends, prompts)
        else:
            pairs = _draw(args, _engine(config, model, run), lora, prompts)
    _write(Path(args.output), pairs, args.frames if ends else None)
    count = f"{len(pairs)} picture{'' if len(pairs) == 1 else 's'}"
    console.print(
        f"{args.output}: {count} by {model}{what}, "
        f"{config.sampling.steps} steps, guidance {config.sampling.guidance_scale:g}, "
        f"seed {args.seed}",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )
    return 0


def _check(args: Namespace) -> None:
    """Everything that is wrong with the command line, in one ConfigError."""
    problems = []
    if (args.prompts is None) == (args.prompts_file is None):
        problems.append("give the prompts with --prompts or with --prompts-file, one of them")
    given = args.lora is not None or args.interpolate is not None
    if not given and (args.compare or args.strength != 1 or args.aig is not None):
        problems.append("--compare, --strength and --aig need --lora")
    if args.interpolate is not None and (args.lora is not None or args.compare):
        problems.append("--interpolate goes without --lora and --compare")
    if args.frames < 2:
        problems.append(f"--frames is {args.frames}; at least 2, both ends")
    if args.aig is not None and not 0 <= args.aig < float("inf"):
        problems.append(f"--aig is {args.aig}; a number from 0")
    if Path(args.output).suffix.lower() not in _SUFFIXES:
        problems.append(f"--output is {args.output}; its ending may be {', '.join(_SUFFIXES)}")
    for name in ("count", "batch_size"):
        if getattr(args, name) < 1:
            problems.append(f"--{name.replace('_', '-')} is {getattr(args, name)}; at least 1")
    if problems:
        raise ConfigError("; ".join(problems) + ". `rewardprop sample --help` has examples.")


def _config(args: Namespace, known: SamplingConfig | None) -> TrainConfig:
    """The LoRA's sampling settings, or the defaults, under those of the command line."""
    from dataclasses import replace

    from rewardprop_fast.training.config import SamplingConfig, TrainConfig

    names = ("steps", "guidance_scale", "negative_prompt", "height", "width")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    sampling = replace(known or SamplingConfig(), **given)
    # k of the default method must not exceed the steps, whatever these are
    from rewardprop_fast.methods import DRaFT

    config = TrainConfig(
        method=DRaFT(k=1),
        sampling=sampling,
        batch_size=args.batch_size,
        seed=args.seed,
        dtype=args.dtype or "auto",
        device=args.device or "auto",
    )
    config.validate()
    return config


def _engine(config: TrainConfig, model: str, run: RunConfig | None) -> Engine:
    """The model, ready to draw."""
    from rewardprop_fast.cli.quiet import without_loading_bars
    from rewardprop_fast.models import load_pipeline
    from rewardprop_fast.training.engine import Engine, negative_mean
    from rewardprop_fast.training.placement import place
    from rewardprop_fast.training.precision import resolve_device, resolve_dtype

    without_loading_bars()
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    details: dict[str, Any] = {}
    if run is not None and model == run.model.path:
        source = run.model
        details = {"revision": source.revision, "variant": source.variant}
        details["local_files_only"] = source.local_files_only
    pipe = load_pipeline(model, dtype=dtype, **details)
    place(pipe, device, dtype)
    return Engine(pipe, _no_reward, config, negative_mean)


def _draw(
    args: Namespace, engine: Engine, path: Path | None, prompts: list[str]
) -> list[tuple[str, Tensor]]:
    """Captions and pictures (3, H, W), those of the base model before those with the LoRA."""
    from rewardprop_fast import lora
    from rewardprop_fast.training.evaluation import sample_in_batches

    pipe = engine.pipe
    if path is not None:
        lora.load(pipe, path)
        lora.set_strength(pipe.unet, args.strength)
    tuned = sample_in_batches(engine, prompts, args.seed, args.aig)
    if not args.compare:
        return list(zip(prompts, tuned, strict=True))
    with lora.disabled(pipe.unet):
        base = sample_in_batches(engine, prompts, args.seed)
    pairs = []
    for prompt, before, after in zip(prompts, base, tuned, strict=True):
        pairs += [(f"base: {prompt}", before), (f"LoRA: {prompt}", after)]
    return pairs


def _strip(
    args: Namespace, engine: Engine, ends: list[Path], prompts: list[str]
) -> list[tuple[str, Tensor]]:
    """A row a prompt, all of the same noise: from the first LoRA alone to the second alone."""
    from rewardprop_fast import lora
    from rewardprop_fast.training.evaluation import sample_in_batches

    pipe, last = engine.pipe, args.frames - 1
    known = [lora.read(pipe, path) for path in ends]
    frames = []
    for i in range(args.frames):
        # all ranks stay where they are, so that one adapter serves the whole strip
        weights = [args.strength * (1 - i / last), args.strength * i / last]
        layers = lora.mix(list(zip(known, weights, strict=True)), keep_all=True)
        if i == 0:
            lora.put(pipe, layers)
        else:
            lora.fill(pipe, layers)
        drawn = sample_in_batches(engine, prompts, args.seed, args.aig)
        share = i / last
        caption = f"{1 - share:.2g} A + {share:.2g} B"
        frames.append([(f"{caption}: {text}", p) for text, p in zip(prompts, drawn, strict=True)])
    return [frame[row] for row in range(len(prompts)) for frame in frames]


def _no_reward(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    raise AssertionError("sampling asks for no reward")


def _write(output: Path, pairs: list[tuple[str, Tensor]], columns: int | None = None) -> None:
    import torch

    from rewardprop_fast.training.report import image_grid

    captions, pictures = zip(*pairs, strict=True)
    compared = captions[0].startswith("base: ")
    if compared:
        columns = 2 if len(pairs) <= 4 else 4
    grid = image_grid(torch.stack(pictures), captions, columns)
    output.parent.mkdir(parents=True, exist_ok=True)
    grid.save(output)
