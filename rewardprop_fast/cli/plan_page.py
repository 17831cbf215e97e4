"""What `rewardprop plan` prints for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rewardprop_fast.cli.plan_answer import MODELLED, Answer
from rewardprop_fast.memory.sizes import format_bytes
from rewardprop_fast.training.forecast import RESERVE

_PHASES = {
    "prefix": "steps without gradient",
    "suffix": "steps with gradient",
    "decode": "decoder",
    "reward": "reward",
    "decode_backward": "backward: reward, decoder",
    "backward": "backward: UNet",
    "update": "optimizer",
}

#: Holders that are named; the rest is summed up.
_NAMED = 9


def show(answer: Answer, written: Sequence[Path]) -> None:
    """Print the answer to stdout."""
    console = Console()
    _verdict(console, answer)
    _asked(console, answer)
    _phases(console, answer)
    _holders(console, answer)
    _policies(console, answer)
    _others(console, answer)
    for path in written:
        console.print(f"Wrote {path}", highlight=False, soft_wrap=True)
    console.print(f"[dim]Allocated bytes; {MODELLED}.[/]", highlight=False)


def _verdict(console: Console, answer: Answer) -> None:
    found, planned, question = answer.forecast, answer.forecast.planned, answer.question
    budget = question.limits.budget
    fits = "without a limit" if budget is None else f"within {format_bytes(budget)}"
    how = "run as a whole on fake tensors" if found.exact else "composed from the step's parts"
    console.print(
        f"[bold]{format_bytes(found.peak)}[/] at the peak, {fits} ({question.budget_source})",
        highlight=False,
    )
    console.print(
        f"[bold]{planned.seconds:.3g} s[/] a step, modelled for {question.card.title}: "
        f"{_more(planned.seconds, planned.unlimited_seconds)} unlimited memory "
        f"({planned.unlimited_seconds:.3g} s). The peak is {'exact' if found.exact else 'composed'}"
        f" ({how}).",
        highlight=False,
    )
    console.print()


def _more(seconds: float, unlimited: float) -> str:
    more = seconds / unlimited - 1
    return "as with" if more < 5e-4 else f"{more:.1%} more than with"


def _asked(console: Console, answer: Answer) -> None:
    question, train = answer.question, answer.question.train
    height, width = answer.size
    facts = {
        "model": f"{question.model}, {width} x {height} pixels, {train.dtype}",
        "step": f"{train.method.name}, K = {answer.gradient_steps} of {train.sampling.steps} "
        f"sampling steps, guidance {train.sampling.guidance_scale:g}, batch {train.batch_size}",
        "trained": f"LoRA of rank {train.lora.rank}",
        "reward": question.reward,
    }
    if answer.forecast.planned.plan.residency == "phases":
        facts["weights"] = "on the device in the phases that need them, else in host memory"
    if answer.forecast.planned.offloaded:
        facts["offload"] = f"{format_bytes(answer.forecast.planned.offloaded)} a step to the host"
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for key, text in facts.items():
        table.add_row(key, Text(text))
    console.print(table)
    console.print()


def _table(*titles: str) -> Table:
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
    table.add_column(titles[0])
    for title in titles[1:]:
        table.add_column(title, justify="right")
    return table


def _phases(console: Console, answer: Answer) -> None:
    found = answer.forecast
    table = _table("peak by phase", "allocated")
    for phase, peak in found.by_phase.items():
        ink = "bold" if peak == max(found.by_phase.values()) else ""
        table.add_row(_PHASES.get(phase, phase), format_bytes(peak), style=ink)
    reserved = found.reserved
    for title, nbytes in (
        ("in the allocator's blocks, rounded up", reserved.peak_allocated if reserved else None),
        ("reserved by it, without workspaces", reserved.peak_reserved if reserved else None),
    ):
        note = "asks for --exact" if nbytes is None else format_bytes(nbytes)
        table.add_row(title, note, style="dim")
    table.add_row("largest workspace of an operator", format_bytes(found.workspace), style="dim")
    console.print(table)
    console.print()


def _holders(console: Console, answer: Answer) -> None:
    holders = answer.forecast.holders
    table = _table("who holds it at the peak", "")
    for name, nbytes in holders[:_NAMED]:
        table.add_row(name, format_bytes(nbytes))
    rest = sum(nbytes for _, nbytes in holders[_NAMED:])
    if rest:
        table.add_row("the rest", format_bytes(rest))
    console.print(table)
    console.print()


def _policies(console: Console, answer: Answer) -> None:
    table = Table.grid(padding=(0, 3, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row(Text("the plan", style="dim"), "")
    for where, what in answer.policies().items():
        table.add_row(where, what)
    console.print(table)
    console.print()


def _others(console: Console, answer: Answer) -> None:
    if not answer.forecast.alternatives:
        return
    unlimited = answer.forecast.planned.unlimited_seconds
    table = _table("other cards' memory", "budget", "modelled step", "")
    for each in answer.forecast.alternatives:
        card = f"{(each.budget + RESERVE) // 2**30} GiB"
        if each.seconds is None:
            table.add_row(
                card,
                format_bytes(each.budget),
                "does not fit",
                f"least is {format_bytes(each.peak)}",
            )
            continue
        note = "weights by phase" if each.residency == "phases" else ""
        more = each.seconds / unlimited - 1
        table.add_row(card, format_bytes(each.budget), f"{each.seconds:.3g} s (+{more:.1%})", note)
    console.print(table)
    console.print()
