"""What every picture of curves needs: series out of records, their running median, and axes."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

MEDIAN_OVER = 25
"""At most this many records go into one point of a running median."""
WIDE = 30
"""An axis is logarithmic where the largest value is more than this many times the smallest."""

Records = list[dict]


def series(records: Records, kind: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the records that have the key."""
    having = [record for record in records if record["kind"] == kind and key in record]
    return np.array([record["step"] for record in having], int), np.array([record[key] for record in having], float)


def running_median(values: np.ndarray) -> np.ndarray:
    """As many values, each the median of those around it; the values themselves where they are few."""
    window = min(MEDIAN_OVER, values.size // 20) // 2 * 2 + 1
    padded = np.pad(values, window // 2, mode="edge")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, window), axis=1)


def step_axis(axes: Axes) -> None:
    """Whole steps, few enough to be read."""
    axes.set_xlabel("Training step")
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10], integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def logarithmic_where_wide(axes: Axes) -> None:
    """A logarithmic y axis where the lines span much and are all above 0."""
    values = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.lines] or [np.array([])])
    values = values[np.isfinite(values)]
    if values.size and values.min() > 0 and values.max() / values.min() > WIDE:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
