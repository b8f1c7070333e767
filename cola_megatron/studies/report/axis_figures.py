"""The picture of a study of axes: one axis from left to right, another as lines, the best of all marked."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from cola_megatron.reporting.compare_figures import COLOURS, LINE_STYLES, MARKERS
from cola_megatron.reporting.figure_style import WIDTH_INCHES, NothingToPlot, styled
from cola_megatron.studies.report.axis_cells import AxisComparison, Cell
from cola_megatron.studies.rows import Results
from cola_megatron.studies.words import LOSS_TITLES, name, unit

MOST_LINES, MOST_PANELS = 7, 4


@styled
def over_axes(results: Results, comparison: AxisComparison) -> Figure:
    """Mean over seeds with its 95% interval at each setting, pale points for the seeds, a star at the best.

    The first axis that varies goes from left to right and the second is the colour; of further ones each combination
    has a panel.

    Raises:
        NothingToPlot: more lines or panels than can be read.
    """
    varied = [
        axis for axis in results.axes.values() if len({cell.settings.get(axis.name) for cell in comparison.cells}) > 1
    ]
    if not varied:
        raise NothingToPlot("no axis varies")
    across, lines, rest = varied[0], varied[1] if len(varied) > 1 else None, varied[2:]
    panels: dict[tuple, list[Cell]] = defaultdict(list)
    for cell in comparison.cells:
        panels[tuple(cell.settings.get(axis.name, "") for axis in rest)].append(cell)
    labels = [label for label in across.labels if any(_has(cell, across.name, label) for cell in comparison.cells)]
    if len(panels) > MOST_PANELS or (lines and len(lines.labels) > MOST_LINES) or len(labels) > 12:
        raise NothingToPlot("more settings than one picture can hold; the table has them")
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(WIDTH_INCHES, 1.2 + 3.0 * rows))
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    groups = list(lines.labels) if lines else [""]
    for axes, (key, cells) in zip(grid, panels.items(), strict=False):
        for index, group in enumerate(groups):
            of_line = [cell for cell in cells if lines is None or _has(cell, lines.name, group)]
            _line(axes, comparison, of_line, across.name, labels, index, len(groups))
        axes.set_xticks(range(len(labels)), labels)
        axes.set_xlim(-0.5, len(labels) - 0.5)
        axes.set_xlabel(across.title)
        axes.grid(visible=False, axis="x")
        if rest:
            axes.set_title(", ".join(f"{axis.title} {label}" for axis, label in zip(rest, key, strict=True)))
        if comparison.quantity == "score":
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if np.ptp(axes.get_ylim()) > 0.05 else 1))
    is_loss = comparison.quantity == "loss"
    for axes in grid[::columns]:
        axes.set_ylabel(unit(comparison.measure, True).capitalize() if is_loss else "Share right")
    what = LOSS_TITLES.get(comparison.measure, name(comparison.measure)) if is_loss else name(comparison.measure)
    title = f"{what[0].upper()}{what[1:]} at {results.budget_in_words(comparison.budget)}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
    handles = {
        str(line.get_label()): line for axes in grid for line in axes.lines if not str(line.get_label()).startswith("_")
    }
    if lines:
        named = {f"{lines.title} {groups[int(key)]}" if key.isdigit() else key: each for key, each in handles.items()}
    else:
        named = {"mean over seeds" if key.isdigit() else key: each for key, each in handles.items()}
    figure.legend(
        list(named.values()), list(named), loc="outside lower center", ncols=max(1, 80 // (max(map(len, named)) + 10))
    )
    return figure


def _has(cell: Cell, axis: str, label: str) -> bool:
    settings: Mapping[str, str] = cell.settings
    return settings.get(axis) == label


def _line(
    axes: Axes,
    comparison: AxisComparison,
    cells: list[Cell],
    across: str,
    labels: list[str],
    index: int,
    count: int,
) -> None:
    """One line with its seeds, moved a little aside so that intervals of different lines stand apart."""
    if not cells:
        return
    ordered = sorted(cells, key=lambda cell: labels.index(cell.settings[across]))
    aside = 0.1 * (index - (count - 1) / 2)
    x = np.array([labels.index(cell.settings[across]) + aside for cell in ordered])
    colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
    for at, cell in zip(x, ordered, strict=True):
        seeds = [row.measures[comparison.measure].value for row in cell.rows]
        if len(seeds) > 1:
            beside = [at + 0.045] * len(seeds)
            axes.plot(beside, seeds, "o", color=colour, markerfacecolor="white", markersize=3.5, alpha=0.8, zorder=2)
    means = np.array([cell.mean.value for cell in ordered])
    reach = np.array([cell.mean.high - cell.mean.value for cell in ordered])
    if np.isfinite(reach).all():
        axes.errorbar(x, means, reach, fmt="none", ecolor=colour, elinewidth=1.2, capsize=3, zorder=2)
    axes.plot(
        x,
        means,
        color=colour,
        linestyle=LINE_STYLES[index % len(LINE_STYLES)],
        marker=marker,
        linewidth=1.4,
        label=str(index),
        zorder=3,
    )
    for at, cell in zip(x, ordered, strict=True):
        if cell is comparison.best and math.isfinite(cell.mean.value):
            axes.plot(
                at,
                cell.mean.value,
                "*",
                markersize=15,
                color=colour,
                markeredgecolor="black",
                markeredgewidth=0.8,
                label="best",
                zorder=4,
            )
