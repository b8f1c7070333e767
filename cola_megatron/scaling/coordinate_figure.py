"""The picture of a coordinate check: one panel for each axis and stack of blocks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from cola_megatron.families.sizes import Coordinate
from cola_megatron.reporting.compare_figures import COLOURS, LINE_STYLES, MARKERS
from cola_megatron.reporting.figure_style import WIDTH_INCHES, NothingToPlot, styled
from cola_megatron.scaling.coordinate_trace import Axis, Trace
from cola_megatron.scaling.coordinates import BOUND, RANDOM_PART, CoordinateCheck

BAND = "#E9E9E9"
MARKS_OF_CHANGE = (0.01, 0.1, 0.25, 0.5, 0.7, 1, 1.4, 2, 4, 10, 100, 1000, 10_000)
LEGEND_INCHES, ROW_INCHES = 2.2, 2.5


@styled
def coordinate_figure(check: CoordinateCheck, title: str) -> Figure:
    """Changes since step 0 relative to the smallest size, in log-log; grey is where the check wants them.

    Raises:
        NothingToPlot: no axis has two sizes.
    """
    axes_of_check: list[Axis] = [axis for axis, traces in check.traces.items() if len(traces) > 1]
    if not axes_of_check:
        raise NothingToPlot("one width and one depth show no slope")
    stacks = list(dict.fromkeys(coordinate.stack for coordinate in check.coordinates))
    size = (WIDTH_INCHES + LEGEND_INCHES, 0.5 + ROW_INCHES * len(stacks))
    figure = Figure(figsize=size)
    panels = figure.subplots(len(stacks), len(axes_of_check), squeeze=False, sharey="row")
    for row, stack in zip(panels, stacks, strict=True):
        of_stack = [coordinate for coordinate in check.coordinates if coordinate.stack == stack]
        for panel, axis in zip(row, axes_of_check, strict=True):
            _draw(panel, check.traces[axis], axis, of_stack)
        row[0].set_title(stack)
        row[0].set_ylabel("Change [x that of the\nsmallest size]")
        row[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), handlelength=3.2)
    for panel, axis in zip(panels[-1], axes_of_check, strict=True):
        panel.set_xlabel("Width [channels]" if axis == "width" else "Depth [blocks]")
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
    return figure


def _draw(panel: Axes, traces: Sequence[Trace], axis: Axis, coordinates: Sequence[Coordinate]) -> None:
    ticks: set[int] = set()
    for number, coordinate in enumerate(coordinates):
        name = coordinate.name
        having = [trace for trace in traces if trace.last_change(coordinate) > 0]
        sizes = [trace.size_along(axis, coordinate) for trace in having]
        values = np.array([trace.last_change(coordinate) for trace in having])
        ticks |= set(sizes)
        if len(set(sizes)) < 2:
            continue
        scaled = axis == "depth" and coordinate.of_branch
        values = values * np.array(sizes) if scaled else values
        panel.plot(
            sizes,
            values / values[0],
            color=COLOURS[number % len(COLOURS)],
            linestyle=LINE_STYLES[number % len(LINE_STYLES)],
            marker=MARKERS[number % len(MARKERS)],
            markerfacecolor="white",
            linewidth=1.4,
            label=f"{name} x depth" if scaled else name,
        )
    if not ticks:
        return
    low, high = min(ticks), max(ticks)
    span = np.array([low, high]) / low
    panel.fill_between([low, high], span**-RANDOM_PART, span**BOUND, color=BAND, zorder=0)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.xaxis.set_major_locator(FixedLocator(sorted(ticks)))
    panel.xaxis.set_major_formatter(ScalarFormatter())
    panel.xaxis.set_minor_locator(NullLocator())
    lowest, highest = panel.get_ylim()
    marks = [mark for mark in MARKS_OF_CHANGE if lowest <= mark <= highest]
    panel.yaxis.set_major_locator(FixedLocator(marks))
    panel.yaxis.set_major_formatter(ScalarFormatter())
    panel.yaxis.set_minor_locator(NullLocator())
