"""The pictures of a study over compute: curves of arms with intervals, published points, learning curves.

An arm or setting has one colour, line style and marker in every picture (those of `reporting.compare_figures`).
Nothing here uses pyplot.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from cola_megatron.reporting.compare_figures import Curve
from cola_megatron.reporting.figure_style import WIDTH_INCHES, NothingToPlot, styled
from cola_megatron.scaling.loss_curve import LossCurve
from cola_megatron.studies.report.axes import (
    compute_axis,
    handle,
    legend,
    look,
    marker_size,
    not_too_many,
    placed,
    plain,
)
from cola_megatron.studies.report.curve_fits import CurveFit, Quantity
from cola_megatron.studies.report.fits import StudyFits
from cola_megatron.studies.report.series import budget_steps
from cola_megatron.studies.rows import Published, Results, Row
from cola_megatron.studies.words import LOSS_TITLES, name, unit

BASELINE = "#666666"
WIDE = 3.0
"""Losses that differ by more than this factor stand on a logarithmic axis."""
NEAR_DECADES = 1.5
"""A published point farther from ours than this is named below the picture, as it would press ours into a corner."""


@styled
def over_compute(results: Results, fits: StudyFits, quantity: Quantity, column: str) -> Figure:
    """A measure against one column: every run, the curve of each series and its 95% band, published points.

    Open markers stand where a run would without the stage 1 that is charged to it.

    Raises:
        NothingToPlot: no series has it on more than one budget, or too many series have.
    """
    chosen = [(place, fit) for place, fit in placed(fits) if fit.quantity == quantity and fit.column == column]
    if not chosen:
        raise NothingToPlot("no finished run has it")
    if all(len(budget_steps(results, fit.rows)) < 2 for _, fit in chosen):
        raise NothingToPlot("all runs are of one budget")
    not_too_many(len(chosen))
    figure = Figure(figsize=(WIDTH_INCHES, 4.2))
    axes = figure.subplots()
    handles = [_series(axes, place, fit) for place, fit in chosen]
    handles += _published(axes, results, chosen, quantity, column)
    if any(row.charged(column) != row.compute[column] for _, fit in chosen for row in fit.rows):
        handles.append(handle("stage 1 left out", "#555555", "", "o", filled=False))
    compute_axis(axes, column)
    handles += _baselines(axes, results, chosen[0][1].measure)
    _value_axis(axes, results, quantity, chosen[0][1].measure)
    legend(figure, handles)
    return figure


def _baselines(axes: Axes, results: Results, measure: str) -> list[Line2D]:
    """What needs no model, as lines."""
    handles = []
    styles = itertools.cycle(((0, (1, 2)), (0, (5, 2, 1, 2)), (0, (6, 2))))
    for (known, value), style in zip(results.baselines(measure).items(), styles, strict=False):
        axes.axhline(value, color=BASELINE, linestyle=style, linewidth=1.1, zorder=1)
        handles.append(Line2D([], [], color=BASELINE, linestyle=style, linewidth=1.1, label=f"counting: {name(known)}"))
    return handles


def published_near(
    results: Results, quantity: Quantity, column: str
) -> tuple[list[tuple[float, Published]], list[tuple[float, Published]]]:
    """Published points of a picture with their compute, where it was said, and those too far from our runs for it."""
    costs = [cost for row in results.finished() if (cost := row.charged(column))]
    points = [
        (each.compute, each)
        for each in results.published
        if each.compute is not None
        and each.column == column
        and (each.loss if quantity == "loss" else each.score) is not None
    ]
    if not costs:
        return [], points
    low, high = min(costs) / 10**NEAR_DECADES, max(costs) * 10**NEAR_DECADES
    near = [low <= compute <= high for compute, _ in points]
    return [*itertools.compress(points, near)], [*itertools.compress(points, (not each for each in near))]


def _series(axes: Axes, place: int, fit: CurveFit) -> Line2D:
    colour, marker, style = look(place)
    compute, values = np.array(fit.compute), np.array(fit.values)
    own = np.array([row.compute[fit.column] for row in fit.rows])
    if (own < 0.99 * compute).any():
        axes.plot(own, values, linestyle="", marker=marker, color=colour, markerfacecolor="white", alpha=0.75, zorder=2)
    axes.plot(compute, values, linestyle="", marker=marker, color=colour, markersize=marker_size(place), zorder=3)
    if fit.curve is None:
        steps = [[row.charged(fit.column) or 0.0 for row in rows] for _, rows in _steps(fit)]
        means = [np.mean([row.measures[fit.measure].value for row in rows]) for _, rows in _steps(fit)]
        axes.plot([float(np.mean(each)) for each in steps], means, color=colour, linestyle=style, linewidth=1.0)
        return handle(_label(fit) + " (no fit)", colour, style, marker)
    x = np.geomspace(compute.min(), compute.max(), 121)
    low, high = fit.curve.band(x)
    axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0, zorder=1)
    y = fit.curve.loss(x) if isinstance(fit.curve, LossCurve) else fit.curve.score(x)
    axes.plot(x, y, color=colour, linestyle=style, zorder=2)
    return handle(_label(fit), colour, style, marker)


def _steps(fit: CurveFit) -> list[tuple[float, list[Row]]]:
    by_budget: dict[float, list[Row]] = {}
    for row in fit.rows:
        by_budget.setdefault(row.budget or row.charged(fit.column) or 0.0, []).append(row)
    return sorted(by_budget.items())


def _label(fit: CurveFit) -> str:
    return f"{plain(fit.series.title)} (upper bound)" if fit.is_bound else plain(fit.series.title)


def _published(
    axes: Axes, results: Results, chosen: Sequence[tuple[int, CurveFit]], quantity: Quantity, column: str
) -> list[Line2D]:
    near, _ = published_near(results, quantity, column)
    colours = {fit.series.arm: look(place)[0] for place, fit in reversed(chosen)}
    for compute, each in near:
        value = (each.loss if quantity == "loss" else each.score) or 0.0
        axes.plot(compute, value, marker="*", markersize=11, color=colours.get(each.arm, "#444444"), linestyle="")
    return [handle("published", "#444444", "", "*")] if near else []


def _value_axis(axes: Axes, results: Results, quantity: Quantity, measure: str) -> None:
    if quantity == "loss":
        shown = [value for line in axes.get_lines() for value in np.asarray(line.get_ydata(), float) if value > 0]
        if shown and max(shown) > WIDE * min(shown):  # a loose bound would press the others together
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_title(LOSS_TITLES.get(measure, name(measure).capitalize()))
        axes.set_ylabel(unit(measure, True).capitalize())
        return
    axes.set_title(name(measure).capitalize())
    axes.set_ylabel("Share right")
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]) if axes.get_ylim()[0] < 0.05 else None)
    decimals = 0 if np.ptp(axes.get_ylim()) > 0.05 else 1
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=decimals))
    if results.chance > 0:
        axes.axhline(results.chance, color="#777777", linestyle=(0, (4, 3)), linewidth=1.0)
        axes.annotate(
            "chance", (1, results.chance), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8
        )


@styled
def learning_curves(results: Results, fits: StudyFits, curve: Curve) -> Figure:
    """A held-out measurement of every run against what the run had cost by then.

    Raises:
        NothingToPlot: no run has two measurements of it, or too many series have.
    """
    column = results.main_column
    drawn: list[tuple[int, np.ndarray, np.ndarray]] = []
    for place, series in enumerate(fits.series):
        longest: dict[str, Row] = {}
        for row in series.rows:
            if row.step and row.compute.get(column) and row.step >= (longest.get(row.run, row).step or 0):
                longest[row.run] = row
        for row in longest.values():
            points = [(step, value) for step, key, value in row.curve if key == curve.key and math.isfinite(value)]
            if len(points) > 1:
                steps, values = np.array(points, float).T
                drawn.append((place, steps / float(row.step or 1) * row.compute[column], values))
    if not drawn:
        raise NothingToPlot("no run has measured it twice")
    places = sorted({place for place, _, _ in drawn})
    not_too_many(len(places))
    figure = Figure(figsize=(WIDTH_INCHES, 4.2))
    axes = figure.subplots()
    for place, compute, values in drawn:
        colour, marker, style = look(place)
        above = compute > 0
        axes.plot(
            compute[above],
            values[above],
            color=colour,
            linestyle=style,
            linewidth=1.1,
            alpha=0.85,
            marker=marker,
            markevery=[int(above.sum()) - 1],
            markersize=4.5,
        )
    handles = []
    for place in places:
        colour, marker, style = look(place)
        handles.append(handle(plain(fits.series[place].title), colour, style, marker))
    compute_axis(axes, column)
    axes.set_xlabel(f"Compute so far, {column} [FLOPs], stage 1 not counted")
    axes.set_title(curve.title)
    axes.set_ylabel(curve.label)
    legend(figure, handles)
    return figure
