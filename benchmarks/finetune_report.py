"""The report of `finetune_quality.py`: tables, text and plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from common import table
from finetune_ways import (
    AUC,
    BATCH,
    CASES,
    CIFAR,
    HEAD_RATE,
    HELD_OUT,
    LAYERED,
    ONE,
    OTHER,
    RATES,
    SIZE,
    SOURCE,
    STAGES,
    TARGET,
    TOP,
    XRAY,
)
from studies import (
    METRICS,
    Case,
    Run,
    difference,
    mean_and_spread,
    rate_table,
    score_table,
    spread,
    unique,
    values,
)

XRAYS = [case for case in CASES if case.problem == XRAY]


def decay_table(runs: list[Run]) -> str:
    """Layer decay minus one rate, and whether the goal was reached."""
    rows, good, better = [], 0, 0
    for case in [*CASES, *AUC]:
        one, layered = (values(runs, name, case) for name in (ONE, LAYERED))
        mean, word = difference(runs, LAYERED, ONE, case)
        digits = METRICS[case.metric][2]
        by_seed = ", ".join(f"{change:+.{digits}f}" for change in layered - one)
        rows.append([case.label, case.measure, mean, by_seed, f"{spread(one):.{digits}f}", word])
        if case in CASES:
            good += layered.mean() >= one.mean() - spread(one)
            better += layered.mean() > one.mean()
    header = ["", "measure", "difference", "by seed", "deviation of one rate", "verdict"]
    reached = good == len(CASES) and better > len(CASES) / 2
    return (
        f"{table(header, rows)}\n\n"
        "Goal: layer decay at least as good as one rate in every case within one deviation, and "
        f"better in most, by accuracy and balanced accuracy. At least as good: {good} of "
        f"{len(CASES)}. Better in the mean: {better} of {len(CASES)}. "
        f"{'Reached.' if reached else 'Not reached.'}"
    )


def gentler_table(runs: list[Run]) -> str:
    """The gentler decay minus one rate and minus the stronger decay."""
    rows = []
    for case in XRAYS:
        row = [case.label]
        for other in (ONE, LAYERED):
            mean, word = difference(runs, OTHER, other, case)
            row += [mean, word]
        rows.append(row)
    return table([f"{OTHER} minus", ONE, "verdict", LAYERED, "verdict"], rows)


def tuning_table(runs: list[Run]) -> str:
    """What the rates gave on the validation pictures with the first seed."""
    rows = []
    for case in CASES:
        for name in (ONE, OTHER, LAYERED):
            found = [validated(runs, name, case, rate)[:1] for rate in RATES]
            if all(len(one) for one in found):
                rows.append([case.label, name, *(f"{one[0]:.1f}" for one in found)])
    return table(["validation, first seed, %", "", *(f"{rate:g}" for rate in RATES)], rows)


def lower_table(runs: list[Run]) -> str:
    """All seeds on the validation pictures: one rate at the lowest, and both as chosen."""
    rows = []
    for case in [case for case in CASES if case.problem == CIFAR]:
        rates = {run["rate"] for run in chosen_runs(runs, LAYERED, case)}
        ways = [*((ONE, rate) for rate in RATES), *((LAYERED, rate) for rate in rates)]
        for name, rate in ways:
            found = validated(runs, name, case, rate)
            if len(found) > 1:
                shown = mean_and_spread(found, case.metric)
                rows.append([case.label, name, f"{rate:g}", shown, f"{found.min():.1f}"])
    return table(["validation, %", "", "rate", "mean and deviation", "worst seed"], rows)


def at_an_end(runs: list[Run]) -> str:
    found = []
    for name in unique(runs, "approach"):
        for case in CASES:
            of = [run for run in runs if (run["problem"], run["approach"]) == (case.problem, name)]
            of = [run for run in of if run["examples"] == case.examples]
            rates = [run["rate"] for run in of]
            if chosen_runs(runs, name, case)[0]["rate"] in (min(rates), max(rates)):
                found.append(f"{name} ({case.label})")
    return "; ".join(found) or "none"


def validated(runs: list[Run], name: str, case: Case, rate: float) -> np.ndarray:
    """The scores on the validation pictures, by seed."""
    wanted = (case.problem, name, case.examples, rate)
    found = {
        run["seed"]: 100 * run["val"][case.metric]
        for run in runs
        if (run["problem"], run["approach"], run["examples"], run["rate"]) == wanted
    }
    return np.array([found[seed] for seed in sorted(found)])


def chosen_runs(runs: list[Run], name: str, case: Case) -> list[Run]:
    wanted = (case.problem, name, case.examples, True)
    return [
        run
        for run in runs
        if (run["problem"], run["approach"], run["examples"], run.get("chosen")) == wanted
    ]


def forgotten_table(forgotten: list[Run]) -> str:
    rows = []
    for name, rate in dict.fromkeys((run["approach"], run["rate"]) for run in forgotten):
        of = [run for run in forgotten if (run["approach"], run["rate"]) == (name, rate)]
        before, after = (np.array([100 * run[key] for run in of]) for key in ("before", "after"))
        new = np.array([100 * run["test"]["balanced_accuracy"] for run in of])
        shown = [mean_and_spread(found, "accuracy") for found in (before, after, after - before)]
        rows.append([name, f"{rate:g}", *shown, mean_and_spread(new, "balanced_accuracy")])
    header = ["", "rate", "before", "after", "change", f"{XRAY}: balanced accuracy, %"]
    return table([f"{CIFAR}: accuracy, %", *header[1:]], rows)


def plot(runs: list[Run], path: Path) -> None:
    """Draws a panel for each case: every seed, the mean and the standard deviation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = unique(runs, "approach")
    colours = {ONE: "#e8710a", LAYERED: "#1a73e8"}
    figure, axes = plt.subplots(2, 2, figsize=(9.5, 6.4), sharey=True, layout="constrained")
    for axis, case in zip(axes.flat, CASES, strict=True):
        for i, name in enumerate(names):
            found = values(runs, name, case)
            colour = colours.get(name, "#5f6368")
            axis.plot(found, [i] * len(found), "o", color=colour, alpha=0.35, markersize=4)
            axis.errorbar(found.mean(), i, xerr=spread(found), color=colour, fmt="D", capsize=4)
        axis.set_yticks(range(len(names)), names)
        axis.set(title=f"{case.label} pictures", xlabel=f"test {case.measure}")
        axis.grid(alpha=0.25, axis="x")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].invert_yaxis()
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"Plot: {path}")


def markdown(results: dict[str, Any]) -> str:
    runs, forgotten = results["runs"], results["forgotten"]
    seeds, asked = (len(unique(part, "seed")) for part in (runs, forgotten))
    minutes = sum(run["seconds"] for run in [*runs, *forgotten, *results["checks"]]) / 60
    steps = ", ".join(f"{case.label}: {results['steps'][case.label]}" for case in CASES)
    known = [*runs, *results["checks"]]
    names = (ONE, OTHER, LAYERED)
    compared = [run for run in known if run["approach"] in names and "chosen" in run]
    blocks = [
        "# Ways of fine-tuning",
        f"    {results['command']}",
        f"Machine: {results['machine']}, shared with other work. The trainings took {minutes:.0f} "
        f"minutes together, {results['jobs']} at a time.",
        f"MobileNet (alpha 0.25, {SIZE} by {SIZE} pixels) with ImageNet weights. Accuracy on "
        f"{CIFAR} (ten classes, 2,000 test pictures) and balanced accuracy on {XRAY} (normal or "
        "pneumonia, 624 test pictures), by the number of training pictures.",
        score_table(runs, "test, %", CASES),
        score_table(runs, "test AUC", AUC),
        f"Mean and standard deviation over {seeds} seeds, on the whole test split.",
        "![Every seed, mean and standard deviation](finetune_quality.png)",
        "## Layer decay against one rate",
        'Layer decay minus one rate, seed by seed. "Better" and "worse": zero is outside the 95 % '
        "interval (Student's t) of the mean over the seeds. That covers the seeds; all of them "
        "share the test pictures.",
        decay_table(runs),
        "## Why",
        f"A gentler decay on {XRAY}, chosen and tested in the same way:",
        score_table(compared, "test, %", XRAYS),
        gentler_table(compared),
        "What every rate gave on validation pictures:",
        tuning_table(known),
        f"A lower rate on {CIFAR}, with every seed, beside what was chosen:",
        lower_table(known),
        "## What was forgotten",
        f"Networks that learned {CIFAR} (all, one rate; {SOURCE.label} pictures) went on to "
        f"{TARGET.label} pictures in each way, at its rate from above; one rate also at that "
        "of layer decay. Then their old head was asked again: "
        f"{asked} seeds, each with a network of its own. The X-rays come in the size of the "
        "source, 32 by 32, before they are enlarged.",
        forgotten_table(forgotten),
        "## How",
        HOW.format(steps=steps),
        rate_table(runs, "rate", CASES),
        "Seconds: median, of one training, with building the model. Chosen at an end of the rates "
        f"that a way was given, so that one beyond might be better: {at_an_end(runs)}.",
    ]
    return "\n\n".join(blocks)


HOW = (
    f"Every way gets the same pictures, batches of {BATCH} and as many steps ({{steps}}), with "
    "AdamW (weight decay 1e-4), whose rate rises over the first tenth of the steps and falls to "
    "zero along a cosine. Nothing is augmented; in the loss each class counts the same. A seed "
    "changes the training pictures (drawn at random, each class in its share), the head and the "
    f'order. "{TOP}", "{ONE}" and "{LAYERED}" first train the head alone for a fifth of these '
    f"steps, at {HEAD_RATE:g}, and differ only in what learns at which rate afterwards, with a "
    "warm-up and a cosine of its own. Gradual unfreezing is one `fit` at one rate: the head from "
    f"the start, and a block more at each of {STAGES} stages (Keras epochs of a {STAGES}th of the "
    "steps), so that all 14 move from the 15th on. From scratch, BatchNormalization learns too, "
    "with a momentum of 0.9; elsewhere it stays as it is.\n\n"
    "The rate is chosen with the first seed on validation pictures, never on the test split: one "
    f"of four for one rate and for layer decay, one of three for the others. With {CIFAR}, "
    f"{HELD_OUT:,} of the 8,000 training pictures choose the rate, always the same, and the "
    'others are learned from: "8,000" is 7,000 and these. With 1,000 they come on top. With '
    f"{XRAY} the 524 of the split `val` choose."
)
