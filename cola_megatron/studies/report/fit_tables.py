"""The tables of what was fitted: curves, held-out predictions, arms and settings against each other."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from statistics import fmean

from cola_megatron.scaling.loss_curve import LossCurve
from cola_megatron.scaling.loss_surface import Estimate
from cola_megatron.scaling.separable import Floats
from cola_megatron.studies.report.arm_differences import Difference
from cola_megatron.studies.report.curve_fits import CurveFit
from cola_megatron.studies.report.fits import StudyFits
from cola_megatron.studies.report.tables import Grid
from cola_megatron.studies.rows import Results
from cola_megatron.studies.words import listed, name, number, shortened, span


def fits_table(fits: StudyFits) -> Grid:
    """Every curve and surface: numbers with intervals, the held-out check, and why there is none."""
    lines = [tuple(_fit_line(fit)) for fit in fits.curves if fit.curve is not None]
    # One line for all series that have no curve for one reason.
    without: dict[tuple[str, str, str], list[CurveFit]] = defaultdict(list)
    for fit in fits.curves:
        if fit.curve is None:
            without[fit.quantity, fit.column, fit.cannot].append(fit)
    for (quantity, column, cannot), group in without.items():
        titles, runs = shortened([fit.series.title for fit in group]), sum(len(fit.rows) for fit in group)
        lines.append((titles, quantity, f"{column} FLOPs", str(runs), cannot, "-", "-", "-"))
    for of_surface in fits.surfaces:
        surface = of_surface.surface
        numbers = of_surface.cannot
        if surface is not None:
            named = (("E", surface.E), ("alpha", surface.alpha), ("beta", surface.beta), ("a", surface.a))
            numbers = "; ".join(f"{key} {number(value)} {span(*surface.intervals[key])}" for key, value in named)
        held = (
            f"{of_surface.check.inside} of {len(of_surface.check.runs)} inside"
            if of_surface.check
            else of_surface.no_check
        )
        deviation = "-" if surface is None else _percent(surface.residuals)
        lines.append(
            (
                of_surface.series.title,
                "surface",
                f"N {of_surface.definition}",
                str(len(of_surface.rows)),
                numbers,
                deviation,
                held,
                "; ".join(of_surface.notes) or "-",
            )
        )
    header = ("series", "fit", "against", "runs", "numbers with 95% intervals", "residuals", "largest budget", "notes")
    caption = (
        "Loss curves are E + A / C^alpha, score curves a logistic in log C, surfaces E + A / N^alpha + B / D^beta. "
        "Residuals are root mean squares. Largest budget: predicted from the smaller ones, then read"
    )
    return Grid(caption, header, tuple(lines))


def _fit_line(fit: CurveFit) -> Iterator[str]:
    yield fit.series.title
    yield fit.quantity
    yield f"{fit.column} FLOPs"
    yield str(len(fit.rows))
    curve = fit.curve
    if curve is not None:
        names = ("E", "alpha") if isinstance(curve, LossCurve) else ("ceiling", "C_half", "rate")
        yield "; ".join(f"{key} {number(getattr(curve, key))} {span(*curve.intervals[key])}" for key in names)
        is_loss = isinstance(curve, LossCurve)
        yield _percent(curve.residuals) if is_loss else f"{_percent(curve.residuals)} points"
    inside = sum(each.inside for each in fit.check)
    yield f"{inside} of {len(fit.check)} inside" if fit.check else fit.no_check
    yield "; ".join(fit.notes) or "-"


def _percent(residuals: Floats) -> str:
    return f"{number(100 * math.sqrt(fmean(float(each) ** 2 for each in residuals)), 2)}%"


def predictions_table(fits: StudyFits) -> Grid:
    """Each held-out run: predicted with its interval, seen, inside or not."""
    lines = []
    for fit in fits.curves:
        for each in fit.check:
            where = f"{fit.column} FLOPs"
            lines.append((each.point, fit.quantity, where, *_prediction(each.predicted, each.seen, each.inside)))
    for surface in fits.surfaces:
        for run in surface.check.runs if surface.check else ():
            point = surface.rows[run.index].point
            lines.append(
                (point, "surface", f"N {surface.definition}", *_prediction(run.predicted, run.seen, run.inside))
            )
    header = ("point", "fit", "against", "predicted", "95% interval", "seen", "inside")
    return Grid(
        "Runs of the largest budget, predicted from the smaller ones before they were read", header, tuple(lines)
    )


def _prediction(predicted: Estimate, seen: float, inside: bool) -> tuple[str, ...]:
    return number(predicted.value, 4), span(*predicted.interval, 4), number(seen, 4), "yes" if inside else "no"


def differences_table(fits: StudyFits) -> Grid:
    """Arms at equal compute."""
    lines = [
        (
            f"{each.first.series.title} less {each.second.series.title}",
            each.quantity,
            f"{number(each.compute)} ({each.column})",
            number(each.value.value),
            span(each.value.low, each.value.high),
            _verdict(each),
            each.how,
        )
        for each in fits.differences
    ]
    header = ("", "of", "at FLOPs", "difference", "95% interval", "shown", "by")
    caption = (
        "At compute within the runs of both arms: read off both curves (paired: runs of one budget and seed lie off "
        "their curves alike, and what they share is gone), or where there is no curve off the runs. Of an upper bound "
        "above another loss nothing is shown about the losses"
    )
    return Grid(caption, header, tuple(lines))


def _verdict(each: Difference) -> str:
    if each.is_shown:
        return "yes"
    return "no: holds zero" if not each.excludes_zero else "no: an upper bound"


def ratios_table(fits: StudyFits) -> Grid:
    """Compute to reach the same loss."""
    lines = []
    for each in fits.ratios:
        kinds = [fit.series.title for fit in (each.first, each.second) if fit.is_bound]
        ratio = each.ratio
        if ratio is None:
            smallest = f"below {number(min(each.second.compute) / each.compute)}, lower at its smallest budget already"
            said, ends = ("not reached" if each.why == "not reached" else smallest), "-"
        else:
            high = number(ratio.high) if math.isfinite(ratio.high) else "unlimited"
            said, ends = number(ratio.value), f"({number(ratio.low)} to {high})"
        lines.append(
            (
                f"{each.second.series.title} for the loss of {each.first.series.title}",
                f"{number(each.compute)} ({each.first.column})",
                number(each.loss),
                said,
                ends,
                listed(kinds),
            )
        )
    header = ("", "at FLOPs", "loss", "times the compute", "95% interval", "upper bounds")
    return Grid("Compute to reach the loss that another arm has at its largest budget", header, tuple(lines))


def axes_table(results: Results, fits: StudyFits) -> Grid:
    """Every setting with its interval and its difference from the best."""
    lines = []
    for each in fits.axes:
        differences = {id(cell): value for cell, value in each.against}
        for cell in each.cells:
            value = differences.get(id(cell))
            mean = cell.mean
            lines.append(
                (
                    f"{results.arms[each.arm].title}: {cell.title}",
                    name(each.measure),
                    str(len(cell.rows)),
                    number(mean.value, 4),
                    span(mean.low, mean.high, 4) if math.isfinite(mean.low) else "not known",
                    "best" if cell is each.best else "-" if value is None else number(value.value),
                    "" if value is None else span(value.low, value.high),
                )
            )
    header = ("setting", "measure", "runs", "mean", "95% interval", "less best", "95% interval of that")
    caption = (
        "Intervals take runs that differ in seed only to vary alike at every setting; the best of several settings is "
        "a little flattered by having been chosen"
    )
    return Grid(caption, header, tuple(lines))
