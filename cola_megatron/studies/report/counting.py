"""Runs against what needs no model: sentences about each series and the counts of training text."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean

from cola_megatron.studies.report.curve_fits import CurveFit
from cola_megatron.studies.report.fits import QUANTITIES, StudyFits
from cola_megatron.studies.report.limits import Conclusion
from cola_megatron.studies.rows import Results
from cola_megatron.studies.words import name, number, shortened

Z = 1.96


def against_counting(results: Results, fits: StudyFits) -> Iterator[Conclusion]:
    """For each measure and way of counting: which series are better at their largest budget, and which are not.

    By the mean of the seeds and the standard error over held-out texts or items, which all runs share.
    """
    for quantity in QUANTITIES:
        chosen = fits.of(quantity, results.main_column)
        if not chosen:
            continue
        what = "loss" if quantity == "loss" else name(chosen[0].measure)
        for counted, value in results.baselines(chosen[0].measure).items():
            # Of a part of the items nothing was counted.
            alike = [fit for fit in chosen if all(f"{fit.measure}_{counted}" in row.measures for row in fit.rows)]
            better = [fit.series.title for fit in alike if _is_better(results, fit, value)]
            others = [fit.series.title for fit in alike if fit.series.title not in better]
            than = f"counting ({name(counted)}, {number(value)})"
            if better:
                yield Conclusion(
                    f"At its largest budget the {what} of {shortened(better)} is better than {than}.", True
                )
            if others:
                yield Conclusion(f"That the {what} of {shortened(others)} is better than {than} is not shown.", False)


def _is_better(results: Results, fit: CurveFit, baseline: float) -> bool:
    largest = max(results.budget_of(row) for row in fit.rows)
    rows = [row.measures[fit.measure] for row in fit.rows if results.budget_of(row) == largest]
    errors = [row.error for row in rows if row.error is not None]
    if len(errors) < len(rows):
        return False  # nobody knows how far the figure may be off
    mean, error = fmean(row.value for row in rows), fmean(errors)
    return mean + Z * error < baseline if fit.quantity == "loss" else mean - Z * error > baseline
