"""`rewardprop convert-reward`: published reward checkpoints into folders of safetensors."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from rewardprop_fast.cli.parsing import add_verb
from rewardprop_fast.errors import ConfigError

_KINDS = ("aesthetic", "hps", "image_reward")

_MORE = """\
KIND is aesthetic (sac+logos+ava1-l14-linearMSE.pth and its like, LAION), hps
(HPS_v2_compressed.pt, HPS_v2.1_compressed.pt) or image_reward (ImageReward.pt).
These files are pickles, which can run code when they are read. They are read
here, once, with torch's reader for tensors alone, and written as safetensors;
training reads nothing else."""

_EPILOG = """\
examples:
  rewardprop convert-reward aesthetic sac+logos+ava1-l14-linearMSE.pth \\
      --output rewards/aesthetic
  rewardprop convert-reward hps HPS_v2.1_compressed.pt --output rewards/hps \\
      --tokenizer ./stable-diffusion/tokenizer
  rewardprop convert-reward image_reward ImageReward.pt \\
      --output rewards/image_reward --tokenizer ./bert-base-uncased"""


def add_to(verbs: Any) -> None:
    """Add the verb."""
    parser = add_verb(
        verbs,
        "convert-reward",
        "published reward checkpoints into safetensors",
        run,
        more=_MORE,
        epilog=_EPILOG,
    )
    add = parser.add_argument
    add("kind", metavar="KIND", choices=_KINDS, help=", ".join(_KINDS))
    add("source", metavar="FILE", help="the published .pth or .pt, or a .safetensors of the same")
    add("--output", required=True, metavar="FOLDER", help="where the files go; made if missing")
    add(
        "--tokenizer",
        metavar="FOLDER",
        help="the tokenizer to put beside it: CLIP's for hps, BERT's uncased one for image_reward",
    )
    add("--overwrite", action="store_true", help="replace a model that is in FOLDER already")


def run(args: Namespace) -> int:
    """Read, rename, write."""
    source, output = Path(args.source).expanduser(), Path(args.output).expanduser()
    if not source.is_file():
        raise ConfigError(f"There is no file {source}.")
    if args.tokenizer is not None and args.kind == "aesthetic":
        raise ConfigError("The aesthetic reward reads no prompts; leave --tokenizer out.")
    if (output / "model.safetensors").exists() and not args.overwrite:
        raise ConfigError(f"{output} holds a model already. Give another --output, or --overwrite.")
    from rewardprop_fast.rewards.convert import convert

    try:
        files = convert(args.kind, source, output, args.tokenizer)
    except OSError as error:
        raise ConfigError(f"{output} cannot be written: {error.strerror or error}.") from error
    for file in files:
        print(f"  {file}  {file.stat().st_size / 2**20:.1f} MiB")
    argument = "head" if args.kind == "aesthetic" else "model"
    print(f"In a config: reward: [{{name: {args.kind}, args: {{{argument}: {output}}}}}]")
    if args.kind != "aesthetic" and args.tokenizer is None:
        print("No tokenizer was put there; name one with args: {tokenizer: FOLDER}.")
    return 0
