"""What the pictures of a run share: colours, series of its records, panels over its steps.

A colour is a quantity everywhere; a line is training, a marker is held-out, black dashes are the constant predictor.
Line styles and markers differ as well, so that the pictures read in black and white.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from cola_megatron.reporting.figure_style import WIDTH_INCHES, NothingToPlot

Records = list[dict]

RECONSTRUCTION, MASK, KL, FLOW_MATCHING, REFERENCE, OTHER = (
    "#0072B2",
    "#D55E00",
    "#00795A",
    "#882255",
    "#B8860B",
    "#444444",
)
MEDIAN_OVER = 25
"""At most this many records go into one point of a running median."""
WIDE = 30
"""An axis is logarithmic where the largest value is more than this many times the smallest."""
CONSTANT_PREDICTOR: dict[str, Any] = {
    "color": "black",
    "linestyle": "--",
    "linewidth": 1.4,
    "label": "constant predictor",
}


def panels_of(records: Records, stage: str, count: int) -> tuple[Figure, Sequence[Axes]]:
    """Panels side by side over the steps of one stage."""
    if not any(record["kind"] == "train" for record in records):
        raise NothingToPlot(f"{stage} has no training records")
    figure = Figure(figsize=(WIDTH_INCHES, 3.7))
    panels = figure.subplots(1, count, squeeze=False)[0]
    for axes in panels:
        step_axis(axes)
    return figure, panels


def stage_panels(
    titles: Sequence[str], stage_one: Records, stage_two: Records, kind: str, *keys: str, shared: bool = True
) -> tuple[Figure, list[tuple[Records, list[Axes]]]]:
    """A column for each stage that has `keys[0]`, a row for each key: [(records, [axes of key 0, ...]), ...].

    Args:
        titles: of the stages; a family with one stage has its records in the place of the second.
        shared: the axes of a row have one scale.
    """
    stages = [
        (title, records)
        for title, records in zip(titles, (stage_one, stage_two)[-len(titles) :], strict=True)
        if series(records, kind, keys[0])[0].size
    ]
    if not stages:
        what = "training" if kind == "train" else "evaluation"
        who = "neither stage has" if len(titles) > 1 else "the run has no"
        raise NothingToPlot(f"{who} {what} records with {' or '.join(keys)}")
    figure = Figure(figsize=(WIDTH_INCHES, (3.1 if shared else 4.7) if len(keys) == 1 else 4.4))
    grid = figure.subplots(len(keys), len(stages), sharex="col", sharey="row" if shared else "none", squeeze=False)
    for (title, _), column in zip(stages, grid.T, strict=True):
        column[0].set_title(title)
        step_axis(column[-1])
    return figure, [(records, list(column)) for (_, records), column in zip(stages, grid.T, strict=True)]


def step_axis(axes: Axes) -> None:
    """Whole steps, few enough to be read."""
    axes.set_xlabel("Training step")
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10], integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def series(records: Records, kind: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the records that have a number under the key."""
    having = [record for record in records if record["kind"] == kind and isinstance(record.get(key), int | float)]
    return np.array([record["step"] for record in having], int), np.array([record[key] for record in having], float)


def training(axes: Axes, records: Records, key: str, label: str, colour: str, line_style: str) -> None:
    """The values as recorded, pale, and their running median over them; nothing where the key is absent."""
    steps, values = series(records, "train", key)
    if not steps.size:
        return
    median = running_median(values)
    if not np.array_equal(median, values, equal_nan=True):
        axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
    axes.plot(steps, median, color=colour, linestyle=line_style, label=label, marker="." if steps.size == 1 else None)


def held_out(axes: Axes, records: Records, key: str, label: str, colour: str) -> None:
    """Markers at the measurements; nothing where the key is absent."""
    steps, values = series(records, "evaluation", key)
    if steps.size:
        axes.plot(steps, values, "o", color=colour, markerfacecolor="white", markeredgewidth=1.4, label=label)


def finish_loss_panel(axes: Axes, label: str, legend: bool = True) -> None:
    """Label and legend; a logarithmic axis where the values span much."""
    logarithmic_where_wide(axes)
    axes.set_ylabel(label)
    if legend:
        legend_below(axes)


def legend_below(axes: Axes, columns: int = 1) -> None:
    """Where no curve can cross it."""
    axes.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.24), borderaxespad=0, handlelength=2.6, ncols=columns)


def legend_of_all(figure: Figure, panels: Sequence[Axes]) -> None:
    """One legend below all panels, with each label once."""
    lines = [line for axes in panels for line in axes.lines if not str(line.get_label()).startswith("_")]
    named = {str(line.get_label()): line for line in lines}
    figure.legend(list(named.values()), list(named), loc="outside lower center", ncols=len(named))


def running_median(values: np.ndarray) -> np.ndarray:
    """As many values, each the median of those around it; the values themselves where they are few."""
    window = min(MEDIAN_OVER, values.size // 20) // 2 * 2 + 1
    padded = np.pad(values, window // 2, mode="edge")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, window), axis=1)


def logarithmic_where_wide(axes: Axes) -> None:
    """A logarithmic y axis where the lines span much and are all above 0."""
    values = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.lines] or [np.array([])])
    values = values[np.isfinite(values)]
    if values.size and values.min() > 0 and values.max() / values.min() > WIDE:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
