"""The look of every picture that this project draws. Nothing here uses pyplot: no display, no global state."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

__all__ = ["DOTS_PER_INCH", "WIDTH_INCHES", "NothingToPlot", "styled"]

WIDTH_INCHES = 6.4
DOTS_PER_INCH = 200

STYLE: dict[Any, Any] = {  # matplotlib's stubs name every key that there is
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.8,
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
}


class NothingToPlot(Exception):
    """The records lack what a figure shows; the message says what, for the reader of the report."""


def styled(figure_function: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draws in the style above, whatever the process has set."""

    @functools.wraps(figure_function)
    def draw(*arguments: object) -> Figure:
        with mpl.rc_context(STYLE):
            return figure_function(*arguments)

    return draw
