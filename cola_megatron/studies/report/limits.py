"""What a study cannot show, from its own numbers: sentences about bounds, seeds, budgets, and what was not fitted."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from scipy import stats

from cola_megatron.evaluation.statistics import wilson_interval
from cola_megatron.studies.report.curve_fits import CurveFit
from cola_megatron.studies.report.fits import QUANTITIES, StudyFits
from cola_megatron.studies.report.seed_spread import spread_of
from cola_megatron.studies.report.series import budget_steps
from cola_megatron.studies.rows import Results
from cola_megatron.studies.words import flops, listed, name, number, shortened, span


@dataclass(frozen=True)
class Conclusion:
    """A sentence."""

    text: str
    is_shown: bool
    """Whether it says what the study shows; otherwise what it does not show, or what to know before reading it."""


def limits(results: Results, fits: StudyFits) -> Iterator[Conclusion]:
    """Every sentence of this kind."""
    yield from (Conclusion(note, False) for note in results.notes)
    yield from _kinds(results, fits)
    budgets = budget_steps(results, results.finished())
    if len(budgets) == 1:
        budget = results.budget_in_words(budgets[0][0])
        yield Conclusion(f"All points are of one budget, {budget}: how they change with compute is not shown.", False)
    for quantity in QUANTITIES if len(budgets) > 1 else ():
        reasons: dict[str, list[str]] = defaultdict(list)
        bounds: dict[str, list[str]] = defaultdict(list)
        unchecked: dict[str, list[str]] = defaultdict(list)
        for fit in fits.of(quantity, results.main_column):
            if fit.curve is None:
                reasons[fit.cannot].append(fit.series.title)
            elif fit.curve.at_bound:
                bounds[listed(fit.curve.at_bound)].append(fit.series.title)
            if fit.curve is not None and fit.no_check:
                unchecked[fit.no_check].append(fit.series.title)
        what = "loss" if quantity == "loss" else name(results.score or "score")
        for why, titles in reasons.items():
            yield Conclusion(f"No curve of {what} is fitted to {shortened(titles)}: {why}.", False)
        for which, titles in bounds.items():
            yield Conclusion(
                f"The curves of {what} of {shortened(titles)} end at the limit of what is searched in {which}: the "
                "runs do not show it, and nothing beyond them follows.",
                False,
            )
        for why, titles in unchecked.items():
            yield Conclusion(f"No prediction of {what} was made in advance for {shortened(titles)}: {why}.", False)
        yield from _seeds(results, fits.of(quantity, results.main_column), what)
    for surface in fits.surfaces:
        if surface.cannot:
            yield Conclusion(
                f"No surface is fitted to {surface.series.title} (N {surface.definition}): {surface.cannot}.", False
            )
    yield from _chance(results)
    yield from _reach(results)
    lost = results.not_fitted()
    if lost:
        total = len({row.point for row in results.rows} | {each.point for each in lost})
        share = f"{len(lost)} of {total} points ({100 * len(lost) / total:.0f}%)"
        verb = "is" if len(lost) == 1 else "are"
        yield Conclusion(f"{share} {verb} in no fit: {shortened([each.point for each in lost])}.", False)


def _kinds(results: Results, fits: StudyFits) -> Iterator[Conclusion]:
    kinds: dict[str, list[str]] = defaultdict(list)
    for fit in fits.of("loss", results.main_column):
        title = results.arms[fit.series.arm].title
        kind = "bound" if fit.is_bound else fit.rows[0].measures[fit.measure].kind or "unknown"
        if title not in kinds[kind]:
            kinds[kind].append(title)
    if kinds["bound"]:
        exact = f", those of {listed(kinds['exact'])} are exact" if kinds["exact"] else ""
        against = ": that a loss is above another's is not shown by its bound" if len(results.arms) > 1 else ""
        yield Conclusion(f"Losses of {listed(kinds['bound'])} are upper bounds{exact}{against}.", False)


def _seeds(results: Results, curves: tuple[CurveFit, ...], what: str) -> Iterator[Conclusion]:
    """How small a difference the seeds of one budget could show."""
    counts: dict[int, list[str]] = defaultdict(list)
    smallest = {}
    for fit in curves:
        steps = budget_steps(results, fit.rows)
        count = min(len({row.seed for row in rows}) for _, rows in steps)
        counts[count].append(fit.series.title)
        spread = spread_of(dict(steps), fit.measure)
        if spread.deviation is not None:
            reach = spread.deviation * math.sqrt(2 / count) * float(stats.t.ppf(0.975, spread.freedom))
            smallest[fit.series.title] = reach
    for count, titles in sorted(counts.items()):
        if count == 1:
            yield Conclusion(
                f"{shortened(titles)} had one seed at some budget: how far runs differ in {what} there is taken from "
                "the curve's residuals alone.",
                False,
            )
        known = [title for title in titles if title in smallest]
        if count > 1 and known:
            widest = max(known, key=lambda title: smallest[title])
            of_all = "" if len(known) == 1 else f" (the widest of {len(known)} series)"
            yield Conclusion(
                f"{count} seeds cannot show a difference in {what} below {number(smallest[widest])} at one budget of "
                f"{widest}{of_all}; the curves, which use all budgets, show smaller ones only if their form holds.",
                False,
            )


def _chance(results: Results) -> Iterator[Conclusion]:
    """Arms whose score at the largest budget does not leave what a guess scores."""
    if results.score is None:
        return
    for arm in results.arms.values():
        rows = [row for row in results.with_measure(results.score) if row.arm == arm.name]
        if not rows:
            continue
        _, largest = budget_steps(results, rows)[-1]
        measures = [row.measures[results.score] for row in largest]
        mean = sum(each.value for each in measures) / len(measures)
        items = min((each.items or 0) for each in measures)
        if not items:
            continue
        # Seeds answer the same items, which therefore count once.
        known = wilson_interval(round(mean * items), items)
        if known.low <= results.chance:
            yield Conclusion(
                f"At its largest budget {arm.title} does not leave chance ({number(results.chance)}) in "
                f"{name(results.score)}: {number(mean)} {span(known.low, known.high)} of {items} items.",
                False,
            )


def _reach(results: Results) -> Iterator[Conclusion]:
    """How far the budgets reach, and how far it is to the published ones."""
    column = results.main_column
    costs = [cost for row in results.finished() if (cost := row.charged(column))]
    if not costs:
        return
    decades = math.log10(max(costs) / min(costs))
    if 0.05 < decades < 1:
        yield Conclusion(
            f"The points span {number(decades, 2)} decades of {column} FLOPs: curves beyond them are guesses.", False
        )
    nominal = [cost for row in results.finished() if (cost := row.charged("nominal"))]
    published = [each.compute for each in results.published if each.column == "nominal" and each.compute is not None]
    if nominal and published and max(published) > 3 * max(nominal):
        beyond = math.log10(max(published) / max(nominal))
        yield Conclusion(
            f"The largest run has {flops(max(nominal))} (nominal), {number(beyond, 2)} decades below the published "
            f"{flops(max(published))}: whether anything here holds there is not shown.",
            False,
        )
