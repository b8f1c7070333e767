"""What a study shows, in sentences that its intervals allow, and what it does not show, in sentences as well.

Each sentence is made from the numbers; where there is nothing to say there is none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from cola_megatron.studies.report.arm_differences import ComputeRatio, Difference, ExponentDifference
from cola_megatron.studies.report.axis_cells import AxisComparison
from cola_megatron.studies.report.counting import against_counting
from cola_megatron.studies.report.curve_fits import CurveFit
from cola_megatron.studies.report.fits import QUANTITIES, StudyFits
from cola_megatron.studies.report.limits import Conclusion, limits
from cola_megatron.studies.rows import Results
from cola_megatron.studies.words import flops, listed, name, number, sentence, shortened, span, unit


def conclusions(results: Results, fits: StudyFits) -> tuple[Conclusion, ...]:
    """All sentences, what is shown first."""
    found = [
        *_arm_sentences(results, fits),
        *_ratio_sentences(results, fits),
        *_exponent_sentences(results, fits),
        *_surface_sentences(fits),
        *_axis_sentences(results, fits),
        *_prediction_sentences(results, fits),
        *against_counting(results, fits),
        *limits(results, fits),
    ]
    return tuple(sorted(found, key=lambda each: not each.is_shown))


def _arm_sentences(results: Results, fits: StudyFits) -> Iterator[Conclusion]:
    """At the largest compute common to two arms, in the budget column; other columns where they say otherwise."""
    last: dict[tuple, Difference] = {}
    for each in fits.differences:
        last[each.quantity, id(each.first.series), id(each.second.series), each.column] = each
    for (quantity, first, second, column), each in last.items():
        if column != results.main_column:
            continue
        others = [
            last[quantity, first, second, other]
            for other in results.columns
            if other != column and (quantity, first, second, other) in last
        ]
        same = [other.column for other in others if _verdict(other) == _verdict(each)]
        also = f"; the same holds on {listed(same)} FLOPs" if same and each.excludes_zero else ""
        yield Conclusion(_difference_sentence(each) + also + ".", each.excludes_zero)
        for other in others:
            if other.column not in same:
                yield Conclusion(f"{_difference_sentence(other)}, unlike on {column} FLOPs.", other.excludes_zero)


def _verdict(each: Difference) -> tuple[bool, bool, bool]:
    return each.is_shown, each.excludes_zero, each.excludes_zero and each.value.value > 0


def _difference_sentence(each: Difference) -> str:
    first, second = each.first, each.second
    if (each.value.value > 0 and each.quantity == "loss") or (each.value.value < 0 and each.quantity == "score"):
        first, second = second, first
    size, ends = abs(each.value.value), sorted([each.value.low, each.value.high], key=abs)
    where = f"At {flops(each.compute)} ({each.column})"
    by_runs = ", by the runs of this budget" if each.how == "runs" else ""
    if not each.excludes_zero:
        what = "loss" if each.quantity == "loss" else name(first.measure)
        return (
            f"{where} no difference in {what} between {first.series.title} and {second.series.title} is shown: "
            f"{number(each.value.value)} {span(each.value.low, each.value.high)}{by_runs}"
        )
    by = f"{span(abs(ends[0]), abs(ends[1]))}{by_runs}"
    if each.quantity == "score":
        what = name(first.measure)
        return f"{where} {first.series.title} is above {second.series.title} in {what} by {number(size)} {by}"
    said = f"{where} {_measured(first)} is below {_measured(second)} by {number(size)} {unit(first.measure, True)} {by}"
    return f"{said}, so its loss is lower still" if each.is_shown and not each.is_of_one_kind else said


def _measured(fit: CurveFit) -> str:
    """What was measured of a series as a loss."""
    return f"the upper bound of {fit.series.title}" if fit.is_bound else f"the loss of {fit.series.title}"


def _ratio_sentences(results: Results, fits: StudyFits) -> Iterator[Conclusion]:
    chosen = [each for each in fits.ratios if each.first.column == results.main_column]
    having = {(id(each.first), id(each.second)) for each in chosen if each.ratio is not None}
    for each in chosen:
        # What is not reached one way is said by the ratio of the other way, where there is one.
        if each.ratio is not None or (id(each.second), id(each.first)) not in having:
            yield _ratio_sentence(each)


def _ratio_sentence(each: ComputeRatio) -> Conclusion:
    second, target = _measured(each.second), f"{_measured(each.first)} at {flops(each.compute)}, {number(each.loss)}"
    if each.ratio is None and each.why == "not reached":
        return Conclusion(f"{sentence(second)} does not come down to {target}, within its runs.", True)
    if each.ratio is None:
        share = number(min(each.second.compute) / each.compute)
        smallest = f"with its smallest budget already, {share} times that compute"
        return Conclusion(f"{sentence(second)} is below {target}, {smallest}.", True)
    low, high = each.ratio.low, each.ratio.high
    ends = f"({number(low)} to {number(high)})" if math.isfinite(high) else f"({number(low)} to unlimited)"
    if low <= 1 <= high:
        titles = f"{each.second.series.title} needs more or less compute than {each.first.series.title}"
        return Conclusion(f"That {titles} for {target}, is not shown: {number(each.ratio.value)} times {ends}.", False)
    return Conclusion(
        f"{sentence(second)} comes down to {target}, with {number(each.ratio.value)} times the compute {ends}.", True
    )


def _exponent_sentences(results: Results, fits: StudyFits) -> Iterator[Conclusion]:
    """Of each pair on the first column that leaves stage 1 out for both, the budget column before others."""
    chosen: dict[tuple[int, int], ExponentDifference] = {}
    for each in sorted(fits.exponents, key=lambda one: one.first.column != results.main_column):
        chosen.setdefault((id(each.first.series), id(each.second.series)), each)
    for each in chosen.values():
        first, second, value = each.first.series.title, each.second.series.title, each.value
        said = f"alpha {number(value.value)} {span(value.low, value.high)} on {each.first.column} FLOPs"
        if value.low <= 0 <= value.high:
            yield Conclusion(
                f"That the exponents of {first} and {second} against compute differ is not shown: the interval of "
                f"their difference holds zero, {said}.",
                False,
            )
        else:
            faster, slower = (first, second) if value.value > 0 else (second, first)
            yield Conclusion(
                f"The loss of {faster} approaches its limit with a larger exponent than that of {slower}: "
                f"difference of {said}.",
                True,
            )


def _surface_sentences(fits: StudyFits) -> Iterator[Conclusion]:
    for fit in fits.surfaces:
        surface = fit.surface
        if surface is None:
            continue
        where = f"Of {fit.series.title} with N {fit.definition}"
        if {"A", "B"} & set(surface.at_bound):
            yield Conclusion(
                f"{where} the runs do not show {listed(surface.at_bound)}, so no best size follows.", False
            )
            continue
        low, high = surface.intervals["a"]
        grown = f"C^{number(surface.a)} {span(low, high)}"
        if low <= 0.5 <= high:
            yield Conclusion(
                f"{where}, that the best size grows faster or slower than the number of tokens is not shown: it grows "
                f"as {grown}.",
                False,
            )
        else:
            side = "faster" if low > 0.5 else "slower"
            yield Conclusion(f"{where} the best size grows as {grown}, {side} than the number of tokens.", True)


def _axis_sentences(results: Results, fits: StudyFits) -> Iterator[Conclusion]:
    for each in fits.axes:
        yield from _axis_sentence(results, each)


def _axis_sentence(results: Results, each: AxisComparison) -> Iterator[Conclusion]:
    what = name(each.measure)
    extreme = "lowest" if each.quantity == "loss" else "highest"
    arm = f" of {results.arms[each.arm].title}" if len(results.arms) > 1 else ""
    mean = each.best.mean
    ends = f" {span(mean.low, mean.high)}" if math.isfinite(mean.low) else ""
    beaten, others = each.beaten, len(each.against)
    budget = results.budget_in_words(each.budget)
    yield Conclusion(
        f"At {budget} {each.best.title} has the {extreme} {what}{arm}, {number(mean.value)}{ends}; the intervals "
        f"set it apart from {len(beaten)} of the {others} other settings.",
        bool(beaten),
    )
    equal = [cell.title for cell, value in each.against if value is not None and cell not in beaten]
    if equal:
        differing = [value for cell, value in each.against if value is not None and cell not in beaten]
        nearest = min(zip(equal, differing, strict=True), key=lambda pair: abs(pair[1].value))
        yield Conclusion(
            f"That {each.best.title} is better than {shortened(equal)} in {what} is not shown; the nearest, "
            f"{nearest[0]}, differs by {number(nearest[1].value)} "
            f"{span(nearest[1].low, nearest[1].high)}.",
            False,
        )
    if each.spread.deviation is None:
        known = math.isfinite(mean.low)
        yield Conclusion(
            f"No setting was run with two seeds at {budget}: intervals of {what} are "
            + ("those of the measurement alone, and runs differ by more." if known else "not known."),
            False,
        )


def _prediction_sentences(results: Results, fits: StudyFits) -> Iterator[Conclusion]:
    for quantity in QUANTITIES:
        checked = [fit for fit in fits.of(quantity, results.main_column) if fit.check]
        if not checked:
            continue
        what = "loss" if quantity == "loss" else name(checked[0].measure)
        inside = [fit for fit in checked if all(each.inside for each in fit.check)]
        runs = sum(len(fit.check) for fit in checked)
        held = sum(each.inside for fit in checked for each in fit.check)
        counted = f"{len(inside)} of {len(checked)} series ({held} of {runs} runs)"
        yield Conclusion(
            f"The largest budget was predicted within its interval from the smaller ones in {what} for {counted}.",
            len(inside) == len(checked),
        )
        for fit in checked:
            for each in fit.check:
                if not each.inside:
                    yield Conclusion(f"Outside, of {fit.series.title} in {what}: {each}.", False)
    for surface in fits.surfaces:
        if surface.check is not None:
            yield Conclusion(
                f"The surface of {surface.series.title} (N {surface.definition}), from the smaller budgets, predicted "
                f"{surface.check.inside} of {len(surface.check.runs)} runs of the largest within their interval.",
                surface.check.inside == len(surface.check.runs),
            )
