"""Arms against each other: the difference at equal compute, and the compute that reaches the same loss."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from statistics import geometric_mean

import numpy as np

from cola_megatron.scaling.loss_curve import LossCurve
from cola_megatron.scaling.loss_surface import Estimate
from cola_megatron.scaling.prediction_check import SAME_BUDGET
from cola_megatron.scaling.resampling import interval
from cola_megatron.studies.report.curve_fits import CurveFit, Quantity, paired_curves
from cola_megatron.studies.report.seed_spread import Spread, difference, spread_of
from cola_megatron.studies.report.series import budget_steps
from cola_megatron.studies.rows import Results, Row


@dataclass(frozen=True)
class Difference:
    """First less second, at equal compute of one column."""

    first: CurveFit
    second: CurveFit
    compute: float
    value: Estimate
    how: str
    """`curves`: read off both fitted curves, within the runs of both; `curves, paired`: with samples that share the
    noise which runs of one seed have in common; `runs`: means of the runs at this budget."""

    @property
    def quantity(self) -> Quantity:
        """Loss or score."""
        return self.first.quantity

    @property
    def column(self) -> str:
        """Of compute."""
        return self.first.column

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.value.low > 0 or self.value.high < 0

    @property
    def is_of_one_kind(self) -> bool:
        """Whether both measure the same: two exact losses, or two scores. A bound says how large a loss is at most."""
        return not (self.first.is_bound or self.second.is_bound)

    @property
    def is_shown(self) -> bool:
        """Whether the interval and the kind of the losses allow to say which is lower or higher.

        Of an upper bound below an exact loss the loss itself is below as well; above it, nothing is known.
        """
        if not self.excludes_zero or self.is_of_one_kind:
            return self.excludes_zero
        lower, higher = (self.first, self.second) if self.value.high < 0 else (self.second, self.first)
        return lower.is_bound and not higher.is_bound


@dataclass(frozen=True)
class ComputeRatio:
    """FLOPs of `second` over those of `first` for the loss that `first` has at its largest budget."""

    first: CurveFit
    second: CurveFit
    compute: float
    """That budget of `first`."""
    loss: float
    """What `first` has there, by its curve."""
    ratio: Estimate | None
    """None: not within the runs of `second`."""
    why: str
    """Without a ratio: `not reached` by the largest run of second, or `below all`: its smallest is lower already."""


@dataclass(frozen=True)
class ExponentDifference:
    """alpha of the first loss curve less that of the second."""

    first: CurveFit
    second: CurveFit
    value: Estimate


def pairs_of(fits: Sequence[CurveFit], quantity: Quantity, column: str) -> Iterator[tuple[CurveFit, CurveFit]]:
    """Fits of two arms under equal settings."""
    chosen = [fit for fit in fits if fit.quantity == quantity and fit.column == column]
    for first, second in itertools.combinations(chosen, 2):
        if first.series.arm != second.series.arm and first.series.settings == second.series.settings:
            yield first, second


def differences(results: Results, first: CurveFit, second: CurveFit) -> tuple[Difference, ...]:
    """At each budget that lies within the runs of both, ascending; by their curves, else by their runs."""
    if first.curve is None or second.curve is None:
        return tuple(_by_runs(results, first, second))
    low = max(min(first.compute), min(second.compute))
    high = min(max(first.compute), max(second.compute))
    if low > high * (1 + SAME_BUDGET):
        return ()
    found = []
    paired = paired_curves(results, first, second)
    how = "curves, paired" if paired else "curves"
    one, two = paired or (first.curve, second.curve)
    for compute in _common_budgets(results, first, second, low, high):
        at = [float(_value(fit, compute)) for fit in (first, second)]
        samples_R = one.samples(compute)[:, 0] - two.samples(compute)[:, 0]
        found.append(Difference(first, second, compute, Estimate(at[0] - at[1], *interval(samples_R)), how))
    return tuple(found)


def _value(fit: CurveFit, compute: float) -> float:
    assert fit.curve is not None
    return float(fit.curve.loss(compute) if isinstance(fit.curve, LossCurve) else fit.curve.score(compute))


def _common_budgets(results: Results, first: CurveFit, second: CurveFit, low: float, high: float) -> list[float]:
    """Of each budget of both the geometric mean of what it cost them, where within the runs of both."""
    cost: dict[str, list[float]] = defaultdict(list)
    for fit in (first, second):
        for budget, rows in budget_steps(results, fit.rows):
            cost[f"{budget:.4g}"].append(geometric_mean([row.charged(fit.column) or 1.0 for row in rows]))
    found = []
    for costs in cost.values():
        middle = geometric_mean(costs)
        if len(costs) == 2 and low / (1 + SAME_BUDGET) <= middle <= high * (1 + SAME_BUDGET):
            found.append(min(max(middle, low), high))
    # Where no budget of both is within, as where stage 1 costs more than the steps of a budget, the ends are.
    return sorted(found) or ([low, high] if low < high else [low])


def _by_runs(results: Results, first: CurveFit, second: CurveFit) -> Iterator[Difference]:
    spreads = {id(fit): _spread(results, fit) for fit in (first, second)}
    steps_2 = budget_steps(results, second.rows)
    for budget, rows in budget_steps(results, first.rows):
        for other, others in steps_2:
            if not math.isclose(budget, other, rel_tol=SAME_BUDGET):
                continue
            costs = [geometric_mean([row.charged(first.column) or 1.0 for row in each]) for each in (rows, others)]
            if max(costs) > min(costs) * (1 + SAME_BUDGET):
                continue  # a budget of both, at unequal cost in this column
            found = difference(rows, others, first.measure, spreads[id(first)], spreads[id(second)])
            if found is not None:
                yield Difference(first, second, geometric_mean(costs), found, "runs")


def _spread(results: Results, fit: CurveFit) -> Spread:
    groups: dict[Hashable, Sequence[Row]] = dict(budget_steps(results, fit.rows))
    return spread_of(groups, fit.measure)


def compute_ratio(first: CurveFit, second: CurveFit) -> ComputeRatio | None:
    """What `second` spends for the loss of `first` at its largest budget; None without two loss curves."""
    if not isinstance(first.curve, LossCurve) or not isinstance(second.curve, LossCurve):
        return None
    compute = max(first.compute)
    loss = float(first.curve.loss(compute))
    reached, _ = second.curve.compute_to_reach(loss)
    if reached > max(second.compute) * (1 + SAME_BUDGET):
        return ComputeRatio(first, second, compute, loss, None, "not reached")
    if reached < min(second.compute) / (1 + SAME_BUDGET):
        return ComputeRatio(first, second, compute, loss, None, "below all")
    # The loss of `first` there varies with its samples.
    losses_R = first.curve.samples(compute)[:, 0]
    E_R, A_R, alpha_R = second.curve.replicates.T
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        samples_R = np.where(losses_R > E_R, (A_R / (losses_R - E_R)) ** (1 / alpha_R), np.inf) / compute
    return ComputeRatio(first, second, compute, loss, Estimate(reached / compute, *interval(samples_R)), "")


def exponent_difference(first: CurveFit, second: CurveFit) -> ExponentDifference | None:
    """Of two loss curves that show their exponents; None otherwise.

    None as well where stage 1 is charged to one of them in this column: a constant in C changes the exponent.
    """
    if any(row.charged(fit.column) != row.compute[fit.column] for fit in (first, second) for row in fit.rows):
        return None
    curves = [fit.curve for fit in (first, second)]
    if not all(isinstance(each, LossCurve) and "alpha" not in each.at_bound for each in curves):
        return None
    one, two = (each for each in curves if isinstance(each, LossCurve))
    samples_R = one.replicates[:, 2] - two.replicates[:, 2]
    return ExponentDifference(first, second, Estimate(one.alpha - two.alpha, *interval(samples_R)))
