"""Pictures of fits: isoFLOP profiles of a surface, residuals."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from cola_megatron.reporting.figure_style import WIDTH_INCHES, NothingToPlot, styled
from cola_megatron.scaling.loss_surface import FLOPS_PER_PARAMETER_AND_TOKEN
from cola_megatron.studies.report.axes import (
    compute_axis,
    handle,
    legend,
    look,
    marker_size,
    not_too_many,
    placed,
    plain,
    size_axis,
)
from cola_megatron.studies.report.curve_fits import Quantity
from cola_megatron.studies.report.fits import StudyFits
from cola_megatron.studies.report.series import budget_steps
from cola_megatron.studies.report.surface_fits import SurfaceFit
from cola_megatron.studies.rows import Results
from cola_megatron.studies.words import number, unit

EDGE: dict[str, Any] = {"markeredgecolor": "white", "markeredgewidth": 0.7}
"""So that points that lie on each other are seen to be several."""


@styled
def isoflop(results: Results, fit: SurfaceFit) -> Figure:
    """Loss against size at each budget: runs, the surface's profile with its 95% band, the minimum with its interval.

    Raises:
        NothingToPlot: there is no surface, or it has no optimum.
    """
    if fit.surface is None:
        raise NothingToPlot(fit.cannot)
    if not fit.profiles:
        raise NothingToPlot("the surface has no optimum")
    figure = Figure(figsize=(WIDTH_INCHES, 4.2))
    axes = figure.subplots()
    handles = []
    losses: list[float] = []
    for place, (profile, (_, rows)) in enumerate(zip(fit.profiles, budget_steps(results, fit.rows), strict=True)):
        colour, marker, style = look(place)
        N = np.array([row.parameters[fit.definition] for row in rows])
        # Runs of one budget differ in 6 N D where N is counted otherwise than it was planned by: each is moved to the
        # profile's 6 N D along the surface, so that its distance from the line is its residual.
        moved = fit.surface.loss(N, profile.compute / (FLOPS_PER_PARAMETER_AND_TOKEN * N))
        fitted = fit.surface.loss(N, np.array([row.tokens or 1.0 for row in rows]))
        seen = np.array([row.measures[results.loss].value for row in rows]) * moved / fitted
        losses += seen.tolist()
        axes.plot(N, seen, marker, color=colour, zorder=3)
        axes.fill_between(profile.N, profile.low, profile.high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(profile.N, profile.loss, color=colour, linestyle=style)
        best = profile.minimum
        if profile.N[0] <= best.N.value <= profile.N[-1]:
            ends = [[best.N.value - max(best.N.low, profile.N[0])], [min(best.N.high, profile.N[-1]) - best.N.value]]
            axes.errorbar(
                best.N.value,
                best.loss.value,
                xerr=np.maximum(ends, 0),
                marker="*",
                markersize=12,
                color=colour,
                markeredgecolor="white",
                capsize=3,
                zorder=4,
            )
        handles.append(handle(f"{number(profile.compute)} FLOPs", colour, style, marker))
    handles.append(handle("minimum", "#444444", "", "*"))
    margin = 0.35 * (max(losses) - min(losses))
    axes.set_ylim(min(losses) - margin, max(losses) + margin)
    size_axis(axes, fit.definition)
    axes.set_ylabel(unit(results.loss, True).capitalize())
    axes.set_title(f"{plain(fit.series.title)}: loss at C = 6 N D")
    legend(figure, handles)
    return figure


@styled
def residuals(results: Results, fits: StudyFits, quantity: Quantity) -> Figure:
    """How far the curve, and where there is one the surface, lies from each run, in the budget column.

    Raises:
        NothingToPlot: nothing is fitted.
    """
    column = results.main_column
    curves = [
        (place, fit)
        for place, fit in placed(fits)
        if fit.quantity == quantity and fit.column == column and fit.curve is not None
    ]
    surfaces = [fit for fit in fits.surfaces if fit.surface is not None] if quantity == "loss" else []
    if not curves and not surfaces:
        raise NothingToPlot("nothing is fitted")
    not_too_many(len(curves))
    definition = surfaces[0].definition if surfaces else ""
    panels = bool(curves) + bool(surfaces)
    figure = Figure(figsize=(WIDTH_INCHES, 3.4))
    every = figure.subplots(1, panels, squeeze=False, sharey=True)[0]
    scale = 100.0
    handles: dict[str, Line2D] = {}
    if curves:
        for place, fit in curves:
            assert fit.curve is not None
            colour, marker, _ = look(place)
            axes = every[0]
            axes.plot(
                fit.compute, scale * fit.curve.residuals, marker, color=colour, markersize=marker_size(place), **EDGE
            )
            handles[fit.series.title] = handle(plain(fit.series.title), colour, "", marker)
        every[0].set_title("Curve of compute")
        compute_axis(every[0], column)
        every[0].set_xlabel(f"Compute, {column} [FLOPs]")
    if surfaces:
        axes = every[-1]
        places = {id(series): place for place, series in enumerate(fits.series)}
        for surface_fit in surfaces:
            if surface_fit.definition != definition or surface_fit.surface is None:
                continue
            place = places[id(surface_fit.series)]
            colour, marker, _ = look(place)
            N = [row.parameters[definition] for row in surface_fit.rows]
            axes.plot(
                N, scale * surface_fit.surface.residuals, marker, color=colour, markersize=marker_size(place), **EDGE
            )
            handles[surface_fit.series.title] = handle(plain(surface_fit.series.title), colour, "", marker)
        axes.set_title("Surface of size and data")
        size_axis(axes, definition)
    for axes in every:
        axes.axhline(0, color="#777777", linewidth=0.9)
    what = "[% of the loss]" if quantity == "loss" else "[percentage points]"
    every[0].set_ylabel(f"Prediction less seen\n{what}")
    every[0].yaxis.set_major_locator(MaxNLocator(6))
    legend(figure, list(handles.values()))
    return figure
