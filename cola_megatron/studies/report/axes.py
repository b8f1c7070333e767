"""What the pictures of a study share: looks of series, axes of compute and size, legends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from cola_megatron.reporting.compare_figures import COLOURS, LINE_STYLES, MARKERS
from cola_megatron.reporting.figure_style import NothingToPlot
from cola_megatron.studies.report.curve_fits import CurveFit
from cola_megatron.studies.report.fits import StudyFits
from cola_megatron.studies.words import count, number

MOST_SERIES = 8
"""More lines in one picture cannot be told apart."""
LEGEND_CHARACTERS = 84
"""So much fits into one row of a legend."""


def plain(text: str) -> str:
    """No mathematics in a legend."""
    return text.replace("$", r"\$")


def look(place: int) -> tuple[str, str, Any]:
    """Colour, marker and line style of a series by its place in the study."""
    return COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)], LINE_STYLES[place % len(LINE_STYLES)]


def marker_size(place: int) -> float:
    """No two series at exactly one place hide each other: the later one is smaller."""
    return max(4.0, 6.5 - 0.7 * place)


def handle(label: str, colour: str, style: Any, marker: str, filled: bool = True) -> Line2D:
    """An entry of a legend."""
    face = colour if filled else "white"
    return Line2D([], [], color=colour, linestyle=style, marker=marker, markerfacecolor=face, label=label)


def compute_axis(axes: Axes, column: str) -> None:
    """FLOPs of a column, logarithmic, after everything is drawn."""
    axes.set_xscale("log")
    stage_one = "stage 1 not counted" if column == "nominal" else "stage 1 charged"
    axes.set_xlabel(f"Training compute, {column} [FLOPs], {stage_one}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    _numbered(axes)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value, 2)))


def size_axis(axes: Axes, definition: str) -> None:
    """Parameters under a definition, logarithmic, after everything is drawn."""
    axes.set_xscale("log")
    axes.set_xlabel(f"Parameters, {definition}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    _numbered(axes)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))


def _numbered(axes: Axes) -> None:
    """Of less than two decades, the decades alone would leave one number or none."""
    low, high = axes.get_xlim()
    if math.log10(high / low) < 2:
        axes.xaxis.set_major_locator(LogLocator(10, (1.0, 2.0, 5.0)))


def legend(figure: Figure, handles: Sequence[Line2D]) -> None:
    """Below the picture, where no curve can cross it."""
    longest = max(len(str(each.get_label())) for each in handles)
    columns = min(len(handles), max(1, LEGEND_CHARACTERS // (longest + 10)))
    figure.legend(handles=list(handles), loc="outside lower center", ncols=columns, handlelength=3.2)


def not_too_many(lines: int) -> None:
    """Raises NothingToPlot where there are more lines than can be told apart."""
    if lines > MOST_SERIES:
        raise NothingToPlot(f"{lines} lines cannot be told apart; the table and the pictures of the axes have them")


def placed(fits: StudyFits) -> list[tuple[int, CurveFit]]:
    """Each curve with the place of its series."""
    places = {id(series): place for place, series in enumerate(fits.series)}
    return [(places[id(fit.series)], fit) for fit in fits.curves]
