"""(e) What brief runs are worth on prompts and backgrounds that no run trained on."""

from __future__ import annotations

from pathlib import Path

from benchmarks.experiments import figures
from benchmarks.experiments.context import Context

#: Drawn by the bundled model, in none of the training prompts.
SUBJECTS = (
    "a koala", "a hamster", "a lion", "a monkey", "a chicken", "a mouse", "a pear", "a tomato",
    "a bread", "a cookie", "a truck", "a tractor", "a guitar", "a key", "a crown", "a candle",
)  # fmt: skip
#: Trained on.
KNOWN = (
    "a panda", "a fox", "a mushroom", "a house", "a dog", "a bear", "a cat", "a cow", "a frog",
    "a bee", "a snail", "a turtle", "a crab", "a cactus", "a pizza", "a car",
)  # fmt: skip
GAUGES = ("reward", "heldout", "alignment", "recognised")
NEW = ("white", "grey", "black", "dark blue", "dark green", "purple", "teal", "sky blue")
SEEN = ("pale blue", "pale pink", "pale yellow", "pale green", "lavender", "peach")
VARIANTS = ("draft-1",)


def prompt_sets(images: int) -> dict[str, list[str]]:
    """Prompts by what is new in them; all sets have as many."""

    def on(subjects: tuple[str, ...], backgrounds: tuple[str, ...]) -> list[str]:
        return [
            f"{subjects[i % len(subjects)]} on a {backgrounds[i % len(backgrounds)]} background"
            for i in range(images)
        ]

    return {
        "known subjects": on(KNOWN, SEEN),
        "new backgrounds": on(KNOWN, NEW),
        "new subjects": on(SUBJECTS, SEEN),
        "both new": on(SUBJECTS, NEW),
    }


def run(context: Context) -> None:
    sets = prompt_sets(context.size.images)
    store = context.store("generalisation", "variant", "seed", "settings")
    for seed in context.seeds:
        for variant in ("base", *VARIANTS):
            state, settings = None, "base"
            if variant != "base":
                one = context.brief(variant, seed)
                context.do("brief", one)
                state, settings = context.adapter(one), one.fingerprint
            key = {"variant": variant, "seed": seed, "settings": settings}
            if store.find(**key):
                continue
            judged = {
                name: context.judge.look(state, prompts, seed=30_000 + seed).gauges
                for name, prompts in sets.items()
            }
            store.add({**key, "prompts": name, **gauges} for name, gauges in judged.items())
            print(f"generalisation: {variant}, seed {seed}", flush=True)


def plot(context: Context, folder: Path) -> None:
    rows = context.store("generalisation").rows()
    if not rows:
        return
    plt = figures.pyplot()
    names = [name for name in ("base", *VARIANTS) if any(r["variant"] == name for r in rows)]
    figure, axes = plt.subplots(1, 4, figsize=(10, 2.6), layout="constrained", sharey=True)
    groups = figures.by(rows, "prompts")
    for axis, gauge in zip(axes, GAUGES, strict=True):
        for j, (label, group) in enumerate(groups.items()):
            for i, name in enumerate(names):
                numbers = [float(row[gauge]) for row in group if row["variant"] == name]
                mean, deviation = figures.spread(numbers)
                axis.barh(
                    i + 0.2 * (j - 1.5), mean, 0.2, xerr=deviation, color=f"C{j}",
                    label=label if not i else None, error_kw={"linewidth": 0.7},
                )  # fmt: skip
        axis.set_xlabel(figures.LABELS[gauge])
    axes[0].set_yticks(range(len(names)), [figures.TITLES.get(n, "base model") for n in names])
    axes[0].invert_yaxis()
    axes[3].legend(loc="lower left", framealpha=0.9)
    figures.save(figure, folder / "generalisation.svg")
