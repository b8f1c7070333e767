"""All that is fitted to a study: curves and surfaces of each series, arms and settings against each other.

Everything is seeded and follows from the set of rows alone, whatever their order in the file. What cannot be fitted is
named with its reason.
"""

from __future__ import annotations

from dataclasses import dataclass

from cola_megatron.studies.report.arm_differences import (
    ComputeRatio,
    Difference,
    ExponentDifference,
    compute_ratio,
    differences,
    exponent_difference,
    pairs_of,
)
from cola_megatron.studies.report.axis_cells import AxisComparison, compare_axes
from cola_megatron.studies.report.curve_fits import CurveFit, Quantity, fit_curve
from cola_megatron.studies.report.series import Series, series_of
from cola_megatron.studies.report.surface_fits import SurfaceFit, fit_surfaces
from cola_megatron.studies.rows import Results

QUANTITIES: tuple[Quantity, ...] = ("loss", "score")


@dataclass(frozen=True)
class StudyFits:
    """Fits of a study, and what follows from several of them."""

    series: tuple[Series, ...]
    curves: tuple[CurveFit, ...]
    """Loss and score of every series against every column."""
    surfaces: tuple[SurfaceFit, ...]
    differences: tuple[Difference, ...]
    ratios: tuple[ComputeRatio, ...]
    exponents: tuple[ExponentDifference, ...]
    axes: tuple[AxisComparison, ...]

    def of(self, quantity: Quantity, column: str) -> tuple[CurveFit, ...]:
        """Curves of one quantity against one column, in the study's order."""
        return tuple(fit for fit in self.curves if fit.quantity == quantity and fit.column == column)


def fit_study(results: Results, bootstrap: int = 400, seed: int = 0) -> StudyFits:
    """Fits all that the finished rows allow.

    Args:
        bootstrap: samples of the intervals; score curves have half as many, as they cost more.
    """
    series = series_of(results)
    curves = tuple(
        fit
        for quantity in QUANTITIES
        for column in results.columns
        for each in series
        if (fit := fit_curve(results, each, quantity, column, bootstrap, seed)) is not None
    )
    surfaces = tuple(fit for each in series for fit in fit_surfaces(results, each, bootstrap, seed))
    found: list[Difference] = []
    ratios: list[ComputeRatio] = []
    exponents: list[ExponentDifference] = []
    for quantity in QUANTITIES:
        for column in results.columns:
            for first, second in pairs_of(curves, quantity, column):
                found += differences(results, first, second)
                ratios += [each for pair in ((first, second), (second, first)) if (each := compute_ratio(*pair))]
                of_exponents = exponent_difference(first, second)
                exponents += [of_exponents] if of_exponents else []
    axes = (compare_axes(results, arm, quantity) for arm in results.arms for quantity in QUANTITIES)
    return StudyFits(
        series,
        curves,
        surfaces,
        tuple(found),
        tuple(ratios),
        tuple(exponents),
        tuple(each for each in axes if each is not None),
    )
