"""`rewardprop doctor`: what this installation can do here, and what is missing."""

from __future__ import annotations

import dataclasses
import json
from argparse import Namespace
from typing import Any

from rewardprop_fast.cli.parsing import add_verb

_EXAMPLES = """
examples:
  rewardprop doctor
  rewardprop doctor --model sdxl --device sm_86   # kernels on an RTX 3090
"""


def add_to(verbs: Any) -> None:
    """Add the verb."""
    parser = add_verb(
        verbs,
        "doctor",
        "say what works on this machine and why, and what is missing",
        run,
        epilog=_EXAMPLES,
    )
    parser.add_argument("--json", action="store_true", help="the same facts for programs")
    parser.add_argument(
        "--model",
        help="list the operators of a model instead, and the backend that each call gets: bundled, "
        "sd15, sdxl, or a pipeline's folder or hub name",
    )
    parser.add_argument(
        "--device",
        default="cpu",
        help="with --model: cpu, cuda, or a compute capability that need not be there: sm_80, "
        "sm_86, sm_89, sm_90 (default: cpu)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="bfloat16",
        help="with --model: what it computes in (default: bfloat16)",
    )


def run(args: Namespace) -> int:
    """Print the report."""
    if args.model is None:
        from rewardprop_fast import doctor

        facts = doctor.report()
        print(json.dumps(facts, indent=2) if args.json else doctor.render(facts))
        return 0

    import torch

    from rewardprop_fast.doctor import choices

    rows = choices.of_model(args.model, args.device, getattr(torch, args.dtype))
    if args.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
    else:
        print(choices.render(rows))
    return 0
