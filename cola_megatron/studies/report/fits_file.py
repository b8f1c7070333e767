"""`fits.json`: everything that was fitted to a study, for a script."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cola_megatron.records.json_files import write_json
from cola_megatron.scaling.loss_curve import LossCurve
from cola_megatron.scaling.loss_surface import Estimate
from cola_megatron.studies.report.arm_differences import ComputeRatio, Difference
from cola_megatron.studies.report.axis_cells import AxisComparison
from cola_megatron.studies.report.conclusions import conclusions
from cola_megatron.studies.report.curve_fits import CurveFit
from cola_megatron.studies.report.fits import StudyFits, fit_study
from cola_megatron.studies.report.series import Series
from cola_megatron.studies.report.surface_fits import SurfaceFit
from cola_megatron.studies.results import read_results
from cola_megatron.studies.rows import Results

FITS = "fits.json"


def write_fits(folder: Path) -> Path:
    """Fits the study of a folder and writes FOLDER/fits.json.

    Returns:
        Its path.

    Raises:
        UserError: the folder has no results that can be read.
    """
    results = read_results(folder)
    return save_fits(folder, results, fit_study(results))


def save_fits(folder: Path, results: Results, fits: StudyFits) -> Path:
    """Writes FOLDER/fits.json from fits that were made; returns its path."""
    path = folder / FITS
    write_json(path, as_json(results, fits))
    return path


def as_json(results: Results, fits: StudyFits) -> dict[str, Any]:
    """Everything that was fitted, for a script: numbers with intervals, residuals by point, reasons."""
    return {
        "study": results.name,
        "scale": results.scale,
        "curves": [_curve_json(fit) for fit in fits.curves],
        "surfaces": [_surface_json(fit) for fit in fits.surfaces],
        "differences": [_difference_json(each) for each in fits.differences],
        "compute_ratios": [_ratio_json(each) for each in fits.ratios],
        "exponent_differences": [
            {
                "first": each.first.series.title,
                "second": each.second.series.title,
                "column": each.first.column,
                "alpha": _estimate(each.value),
            }
            for each in fits.exponents
        ],
        "axes": [_axes_json(each) for each in fits.axes],
        "conclusions": [{"text": each.text, "is_shown": each.is_shown} for each in conclusions(results, fits)],
        "lost": [{"point": each.point, "why": each.why} for each in results.not_fitted()],
    }


def _series_json(series: Series) -> dict[str, Any]:
    return {"series": series.title, "arm": series.arm, "settings": dict(series.settings)}


def _estimate(value: Estimate) -> dict[str, float]:
    return {"value": value.value, "low": value.low, "high": value.high}


def _values(fit: Any, names: Sequence[str]) -> dict[str, Any]:
    return {
        name: {"value": getattr(fit, name), "low": fit.intervals[name].low, "high": fit.intervals[name].high}
        for name in names
    }


def _curve_json(fit: CurveFit) -> dict[str, Any]:
    names = ("E", "A", "alpha") if isinstance(fit.curve, LossCurve) else ("ceiling", "C_half", "rate")
    curve = fit.curve
    return {
        **_series_json(fit.series),
        "quantity": fit.quantity,
        "measure": fit.measure,
        "column": fit.column,
        "is_bound": fit.is_bound,
        "points": [row.point for row in fit.rows],
        "fit": None if curve is None else _values(curve, names),
        "at_bound": [] if curve is None else list(curve.at_bound),
        "residuals": [] if curve is None else [float(each) for each in curve.residuals],
        "cannot": fit.cannot or None,
        "held_out": [
            {
                "point": each.point,
                "compute": each.compute,
                "predicted": _estimate(each.predicted),
                "seen": each.seen,
                "inside": each.inside,
            }
            for each in fit.check
        ],
        "no_held_out": fit.no_check or None,
        "notes": list(fit.notes),
    }


def _surface_json(fit: SurfaceFit) -> dict[str, Any]:
    surface, check = fit.surface, fit.check
    return {
        **_series_json(fit.series),
        "definition": fit.definition,
        "points": [row.point for row in fit.rows],
        "fit": None if surface is None else _values(surface, ("E", "A", "B", "alpha", "beta", "a", "b")),
        "at_bound": [] if surface is None else list(surface.at_bound),
        "residuals": [] if surface is None else [float(each) for each in surface.residuals],
        "cannot": fit.cannot or None,
        "optima": [
            {
                "compute": each.compute,
                "N": _estimate(each.minimum.N),
                "D": _estimate(each.minimum.D),
                "loss": _estimate(each.minimum.loss),
            }
            for each in fit.profiles
        ],
        "held_out": [
            {
                "point": fit.rows[each.index].point,
                "N": each.N,
                "D": each.D,
                "predicted": _estimate(each.predicted),
                "seen": each.seen,
                "inside": each.inside,
            }
            for each in (check.runs if check else ())
        ],
        "no_held_out": fit.no_check or None,
        "notes": list(fit.notes),
    }


def _difference_json(each: Difference) -> dict[str, Any]:
    return {
        "first": each.first.series.title,
        "second": each.second.series.title,
        "quantity": each.quantity,
        "column": each.column,
        "compute": each.compute,
        "difference": _estimate(each.value),
        "by": each.how,
        "excludes_zero": each.excludes_zero,
        "is_of_one_kind": each.is_of_one_kind,
        "is_shown": each.is_shown,
    }


def _ratio_json(each: ComputeRatio) -> dict[str, Any]:
    return {
        "loss_of": each.first.series.title,
        "at": each.compute,
        "loss": each.loss,
        "reached_by": each.second.series.title,
        "column": each.first.column,
        "ratio": None if each.ratio is None else _estimate(each.ratio),
        "why": each.why or None,
    }


def _axes_json(each: AxisComparison) -> dict[str, Any]:
    return {
        "arm": each.arm,
        "quantity": each.quantity,
        "measure": each.measure,
        "budget": each.budget,
        "size": each.size,
        "cells": [
            {"settings": dict(cell.settings), "points": [row.point for row in cell.rows], "mean": _estimate(cell.mean)}
            for cell in each.cells
        ],
        "best": dict(each.best.settings),
        "less_best": [
            {"settings": dict(cell.settings), "difference": None if value is None else _estimate(value)}
            for cell, value in each.against
        ],
    }
