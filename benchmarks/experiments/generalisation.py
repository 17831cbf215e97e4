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
VARIANTS = ("draft-1", "draft-lv", "alignprop", "refl", "drtune", "srpo")


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
            one = None if variant == "base" else context.brief(variant, seed)
            settings = one.fingerprint if one else "base"
            key = {"variant": variant, "seed": seed, "settings": settings}
            if store.find(**key):
                continue
            state = None
            if one:
                context.do("brief", one)
                state = context.adapter(one)
            judged = {
                name: context.judge.look(state, prompts, seed=30_000 + seed).gauges
                for name, prompts in sets.items()
            }
            store.add({**key, "prompts": name, **gauges} for name, gauges in judged.items())
            print(f"generalisation: {variant}, seed {seed}", flush=True)


def gains(rows: figures.Rows, variant: str, gauge: str) -> list[float]:
    """What training did on one set of prompts, seed by seed: the noise is the base model's."""
    base = {row["seed"]: float(row[gauge]) for row in rows if row["variant"] == "base"}
    tuned = [row for row in rows if row["variant"] == variant]
    return [float(row[gauge]) - base[row["seed"]] for row in tuned]


def plot(context: Context, folder: Path) -> None:
    rows = context.store("generalisation").rows()
    if not rows:
        return
    plt = figures.pyplot()
    figure, axes = plt.subplots(1, 4, figsize=(10, 3.4), layout="constrained", sharey=True)
    groups = figures.by(rows, "prompts")
    shown = [name for name in VARIANTS if any(row["variant"] == name for row in rows)]
    for axis, gauge in zip(axes, GAUGES, strict=True):
        for k, variant in enumerate(shown):
            means, deviations = zip(
                *(figures.spread(gains(group, variant, gauge)) for group in groups.values()),
                strict=True,
            )
            places = [i + 0.12 * (k - (len(shown) - 1) / 2) for i in range(len(groups))]
            axis.errorbar(
                means, places, xerr=deviations, fmt="o", markersize=3, linewidth=0.8,
                color=figures.COLOURS[variant], label=figures.TITLES[variant],
            )  # fmt: skip
        axis.axvline(0, color="0.6", linewidth=0.8)
        axis.set_xlabel(f"change of {figures.LABELS[gauge]}")
    axes[0].set_yticks(range(len(groups)), list(groups))
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figures.save(figure, folder / "generalisation.svg")
