"""Curves of several runs in one picture: against steps on the left, against model FLOPs or tokens on the right.

A run has one colour, one line style and one marker in every picture; no two of the first 42 share style and marker, so
that pictures read in black and white.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from cola_megatron.families import FAMILIES, family_of
from cola_megatron.reporting.compared_runs import HEADLINE, LIKELIHOOD, OWN_TIMES, ComparedRun
from cola_megatron.reporting.curves import logarithmic_where_wide, running_median, series, step_axis
from cola_megatron.reporting.figure_style import WIDTH_INCHES, NothingToPlot, styled

Against = Literal["flops", "tokens"]

COLOURS = ("#0072B2", "#D55E00", "#00795A", "#882255", "#000000", "#B07A00", "#3F9FD8")
LINE_STYLES = ("-", "--", ":", "-.", (0, (7, 2, 1, 2, 1, 2)), (0, (1, 4)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MARKS = 7
"""About so many markers on a line of training."""
LABEL_CHARACTERS, ROW_CHARACTERS = 60, 88
"""Longer names lose their middle; so much fits into one row of a legend."""


@dataclass(frozen=True)
class Curve:
    """A quantity that runs are compared by."""

    key: str
    """Of the records."""
    kind: str
    """Of the records: "train" or "evaluation"."""
    title: str
    label: str
    """Of the y axis, with the unit."""
    caption: str
    """One sentence that says what to look for."""
    is_term: bool = False
    """Of a loss: another family may call another thing so."""


_PER_CHANNEL, _PER_TOKEN = "Squared error per channel", "Loss [nats per token]"
CURVES = (
    Curve(
        LIKELIHOOD,
        "evaluation",
        "-log p of held-out texts",
        "Nats per token",
        "What families compare by: exact for an autoregressive model, without the first token of a sequence, and an "
        "upper bound with it for the others.",
    ),
    Curve(
        HEADLINE,
        "evaluation",
        "Flow matching, held-out, equally spaced t",
        _PER_CHANNEL,
        "The headline of the prior: lower is better, and bars are 95% intervals over held-out sequences.",
    ),
    Curve(
        "context_gain",
        "evaluation",
        "Gain from context, held-out",
        _PER_CHANNEL,
        "What the text before a block is worth: above 0, by more than its bar, the prior has learned to read.",
    ),
    Curve(
        OWN_TIMES,
        "evaluation",
        "Flow matching, held-out, each run's own t",
        _PER_CHANNEL,
        "Compares only where objective.flow.time is the same.",
    ),
    Curve(
        "flow_matching",
        "train",
        "Flow matching, training",
        _PER_CHANNEL,
        "At each run's own distribution of t.",
        is_term=True,
    ),
    Curve(
        "reconstruction_accuracy",
        "evaluation",
        "Reconstruction accuracy, held-out",
        "Tokens reconstructed",
        "From clean latents; higher is better.",
    ),
    Curve("reconstruction_nll", "evaluation", "Reconstruction, held-out", _PER_TOKEN, "Lower is better."),
    Curve(
        "reconstruction",
        "train",
        "Reconstruction, training",
        _PER_TOKEN,
        "Running median over the records.",
        is_term=True,
    ),
    Curve(
        "next_token_accuracy", "evaluation", "Next token, held-out", "Share predicted", "Of an autoregressive model."
    ),
    Curve("vae_logsnr", "evaluation", "VAE logSNR, held-out", "logSNR [nats]", "Signal over noise of the posterior."),
    Curve(
        "loss",
        "train",
        "Training loss",
        "Weighted sum of the terms",
        "Compares only where stage and objective are the same.",
    ),
    Curve("gradient_norm", "train", "Gradient norm", "Norm over all parameters", "Before it is scaled down."),
    Curve("tokens_per_second", "train", "Speed", "Tokens/s", "Dips are other work on the machine."),
)


def families_apart(runs: Sequence[ComparedRun], curve: Curve) -> list[str | None]:
    """The families that need a picture each, those whose runs have a term of a loss; else [None], one for all runs."""
    families = dict.fromkeys(run.config.model.family for run in runs)
    if not curve.is_term or len(families) == 1:
        return [None]
    having = dict.fromkeys(run.config.model.family for run in runs if _has(run, curve))
    return list(having) or [None]


@styled
def overlaid(runs: Sequence[ComparedRun], curve: Curve, against: Against, family: str | None = None) -> Figure:
    """One quantity of all runs that have it, with one legend below both panels.

    Args:
        family: only the runs of this one.

    Raises:
        NothingToPlot: none has; or the runs are of both stages and the quantity is the loss, a sum of other terms in
            each.
    """
    if curve.key == "loss" and len({family_of(run.config).describe(run.config) for run in runs}) > 1:
        raise NothingToPlot("losses of different stages or families are sums of different terms")
    having = [
        (number, run)
        for number, run in enumerate(runs)
        if _has(run, curve) and family in (None, run.config.model.family)
    ]
    if not having:
        raise NothingToPlot("no run has it")
    labels = [_label(run, curve) for _, run in having]
    columns = min(len(labels), max(1, ROW_CHARACTERS // (max(map(len, labels)) + 8)))
    rows = -(-len(labels) // columns)
    figure = Figure(figsize=(WIDTH_INCHES, 2.9 + 0.2 * rows))
    left, right = figure.subplots(1, 2, sharey=True)
    found = [(number, run, *series(run.records, curve.kind, curve.key)) for number, run in having]
    cost = [_against(run, steps, against) for _, run, steps, _ in found]
    exponent = math.floor(math.log10(max(1.0, *(each.max() for each in cost))))
    for (number, run, steps, values), cost_of_steps in zip(found, cost, strict=True):
        errors = _standard_errors(run.records, curve, steps)
        for axes, x in ((left, steps), (right, cost_of_steps / 10.0**exponent)):
            _draw(axes, x, values, errors, number, curve.kind == "train")
    logarithmic_where_wide(left)
    if curve.key == "reconstruction_accuracy":
        left.set_ylim(0, 1.03)
        left.yaxis.set_major_formatter(PercentFormatter(1.0))
    figure.suptitle(title_of(curve, family), x=0.01, ha="left", fontsize=10, fontweight="bold")
    left.set_ylabel(curve.label)
    step_axis(left)
    what = "Model FLOPs of the stage" if against == "flops" else "Training tokens"
    right.set_xlabel(f"{what} [$10^{{{exponent}}}$]")
    handles = [line for line in left.lines if not str(line.get_label()).startswith("_")]
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=3.6)
    return figure


def title_of(curve: Curve, family: str | None) -> str:
    """Of the picture of all runs that have the quantity, or of those of a family."""
    return curve.title if family is None else f"{curve.title}, {FAMILIES[family].title}"


def _has(run: ComparedRun, curve: Curve) -> bool:
    return bool(series(run.records, curve.kind, curve.key)[0].size)


def _draw(
    axes: Axes, x: np.ndarray, values: np.ndarray, errors: np.ndarray | None, number: int, is_training: bool
) -> None:
    """One line with markers, labelled with the run's number; the records of training pale behind their median."""
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    every: tuple[int, int] | int = 1
    if is_training:
        median = running_median(values)
        if median.size and not np.array_equal(median, values, equal_nan=True):
            axes.plot(x, values, color=colour, linewidth=0.6, alpha=0.2)
        values, spacing = median, max(1, x.size // MARKS)
        every = (number * spacing // len(MARKERS) % spacing, spacing)  # not all runs at the same places
    if errors is not None:
        axes.errorbar(x, values, 1.96 * errors, fmt="none", ecolor=colour, elinewidth=1.0, capsize=2.5)
    axes.plot(
        x,
        values,
        color=colour,
        linestyle=LINE_STYLES[number % len(LINE_STYLES)],
        marker=marker,
        markevery=every,
        markerfacecolor="white",
        markeredgewidth=1.2,
        linewidth=1.4,
        label=f"run {number}",
    )


def _standard_errors(records: list[dict], curve: Curve, steps: np.ndarray) -> np.ndarray | None:
    """Standard errors at the steps, 0 where a record has none; None where none has."""
    found = dict(zip(*series(records, curve.kind, f"{curve.key}_standard_error"), strict=True))
    return np.array([found.get(step, 0.0) for step in steps], float) if found else None


def _against(run: ComparedRun, steps: np.ndarray, against: Against) -> np.ndarray:
    if against == "tokens":
        return steps * float(run.tokens_per_step)
    return np.array([run.flops_of_step(int(step)) for step in steps], float)


def _label(run: ComparedRun, curve: Curve) -> str:
    """The run's name for a legend: without its middle where it is long, and no mathematics; old losses named so."""
    label = run.label
    if len(label) > LABEL_CHARACTERS:
        half = LABEL_CHARACTERS // 2 - 1
        label = f"{label[:half]}...{label[-half:]}"
    label = f"./{label}" if label.startswith("_") else label  # matplotlib leaves such names out
    return label.replace("$", r"\$") + (" (old records)" if curve.key == OWN_TIMES and run.has_old_measurements else "")
