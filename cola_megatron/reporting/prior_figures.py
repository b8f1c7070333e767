"""The pictures of the prior: its held-out loss beside what it must be held against, over steps and over flow time."""

from __future__ import annotations

import math
import re

import numpy as np
from matplotlib.figure import Figure

from cola_megatron.reporting.curves import CONSTANT_PREDICTOR, FLOW_MATCHING, Records, legend_below, series, step_axis
from cola_megatron.reporting.figure_style import WIDTH_INCHES, NothingToPlot, styled

COMPARED = (
    # name of the metric, label, colour, line style
    ("flow_matching_loss_without_context", "block alone", "#D55E00", "-"),
    ("linear_predictor_loss", "linear denoiser", "#0072B2", "-."),
)
UNIFORM_TIMES, OWN_TIMES = "flow_matching_loss", "flow_matching_loss_training_times"
_BIN = re.compile(rf"({UNIFORM_TIMES}|{OWN_TIMES})_bin_(\d+)")


@styled
def prior_over_steps(records: Records) -> Figure:
    """Held-out loss at uniform t with context, without, of the linear denoiser and of the best constant.

    Raises:
        NothingToPlot: it was not measured at uniform t.
    """
    steps, losses = series(records, "evaluation", UNIFORM_TIMES)
    if not steps.size:
        raise NothingToPlot(
            "the run has no held-out measurements at uniform t (older versions measured at its own times alone)"
        )
    figure = Figure(figsize=(WIDTH_INCHES, 3.7))
    axes = figure.add_subplot()
    step_axis(axes)
    axes.plot(steps, losses, "o-", color=FLOW_MATCHING, markerfacecolor="white", label="with context")
    errors = [
        record.get(f"{UNIFORM_TIMES}_standard_error", math.nan)
        for record in records
        if record["kind"] == "evaluation" and UNIFORM_TIMES in record
    ]
    if len(errors) == len(losses):
        reach = 1.96 * np.array(errors, float)
        axes.fill_between(steps, losses - reach, losses + reach, color=FLOW_MATCHING, alpha=0.15, linewidth=0)
    for name, label, colour, style in COMPARED:
        axes.plot(*series(records, "evaluation", name), color=colour, linestyle=style, marker=".", label=label)
    axes.plot(*series(records, "evaluation", "constant_predictor_loss"), marker=".", **CONSTANT_PREDICTOR)
    axes.set_ylabel("Squared error per channel")
    legend_below(axes, columns=2)
    return figure


@styled
def flow_matching_by_time(records: Records) -> Figure:
    """Held-out flow-matching loss over equal bins of t, from the last measurement, beside what it must be held against.

    Bars: with context. Lines: every block alone, and the best linear denoiser of one latent, where they were measured.

    Raises:
        NothingToPlot: stage 2 has not measured it.
    """
    measured = [record for record in records if record["kind"] == "evaluation" and any(map(_BIN.fullmatch, record))]
    if not measured:
        raise NothingToPlot("stage 2 has no evaluation records with the loss per bin of t")
    last = measured[-1]
    name = UNIFORM_TIMES if f"{UNIFORM_TIMES}_bin_" in "".join(last) else OWN_TIMES
    # A bin that no draw fell into has no key: the number of bins is what all measurements together show.
    bins = 1 + max(int(match[2]) for record in measured for match in map(_BIN.fullmatch, record) if match)
    losses = [last.get(f"{name}_bin_{index}", math.nan) for index in range(bins)]
    with_context = "with context" if name == UNIFORM_TIMES else "with context, at the run's own times"
    figure = Figure(figsize=(WIDTH_INCHES, 3.1))
    axes = figure.add_subplot()
    axes.set_title(f"Flow matching over time, step {last['step']:,}")
    left_edges = np.arange(bins) / bins
    axes.bar(left_edges, losses, 1 / bins, align="edge", color="#D9B8C9", edgecolor=FLOW_MATCHING, label=with_context)
    highest = [*losses, last.get("constant_predictor_loss", 0.0)]
    for name, label, colour, style in COMPARED:
        compared = [last.get(f"{name}_bin_{index}", math.nan) for index in range(bins)]
        if not all(map(math.isnan, compared)):
            axes.stairs(compared, np.arange(bins + 1) / bins, color=colour, linestyle=style, linewidth=1.8, label=label)
            highest += compared
    if "constant_predictor_loss" in last:
        axes.axhline(last["constant_predictor_loss"], **CONSTANT_PREDICTOR)
    axes.set_xlim(0, 1)
    axes.set_xticks(np.linspace(0, 1, 6))
    axes.set_xlabel("Flow time t (0: data, 1: noise)")
    axes.set_ylabel("Squared error per channel")
    axes.grid(visible=False, axis="x")
    # Room above the bars, or the legend would lie on them.
    tallest = max(loss for loss in highest if math.isfinite(loss))
    if tallest > 0:
        axes.set_ylim(0, 1.4 * tallest)
    axes.legend(loc="upper center", ncols=2)
    return figure
