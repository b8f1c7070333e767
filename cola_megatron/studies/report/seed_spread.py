"""Means over seeds and their differences, where there is no curve: the spread is pooled over what was repeated.

Two seeds alone give an interval of 12.7 standard errors. Runs of one study that differ in seed only are taken to vary
alike, so the variance is pooled over all of them, with as many degrees of freedom as there are repeats.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from cola_megatron.scaling.loss_surface import Estimate
from cola_megatron.scaling.resampling import CONFIDENCE
from cola_megatron.studies.rows import Row


@dataclass(frozen=True)
class Spread:
    """How far runs that differ in seed only lie apart."""

    deviation: float | None
    """Pooled standard deviation; None where nothing was repeated."""
    freedom: int
    """Repeats: runs less configurations, of those with more than one seed."""

    def interval_of(self, rows: Sequence[Row], measure: str) -> Estimate:
        """The mean of runs of one configuration; without repeats the interval is that of the measurement alone."""
        value, error, freedom = self.mean(rows, measure)
        reach = _reach(error, freedom)
        return Estimate(value, value - reach, value + reach)

    def mean(self, rows: Sequence[Row], measure: str) -> tuple[float, float, int | None]:
        """The mean, its standard error (NaN: not known), degrees of freedom (None: the error is that of measuring)."""
        values = [row.measures[measure].value for row in rows]
        value = float(np.mean(values))
        if self.deviation:
            return value, self.deviation / math.sqrt(len(values)), self.freedom
        # Seeds that agree to the last digit, as where every run scores zero, say nothing about how runs differ.
        errors = [row.measures[measure].error for row in rows]
        if not all(errors):
            return value, math.nan, None
        return value, math.sqrt(sum((error or 0.0) ** 2 for error in errors)) / len(errors), None


def spread_of(groups: Mapping[Hashable, Sequence[Row]], measure: str) -> Spread:
    """Pooled over groups of runs that differ in seed only."""
    freedom, squares = 0, 0.0
    for rows in groups.values():
        values = np.array([row.measures[measure].value for row in rows])
        freedom += len(values) - 1
        squares += float(((values - values.mean()) ** 2).sum())
    return Spread(math.sqrt(squares / freedom) if freedom else None, freedom)


def difference(
    first: Sequence[Row], second: Sequence[Row], measure: str, spread_1: Spread, spread_2: Spread
) -> Estimate | None:
    """Mean of the first less mean of the second, by Welch's interval; None where the spread of either is not known."""
    value_1, error_1, freedom_1 = spread_1.mean(first, measure)
    value_2, error_2, freedom_2 = spread_2.mean(second, measure)
    if (freedom_1 is None) != (freedom_2 is None) or not math.isfinite(error_1 + error_2):
        return None
    if spread_1 is spread_2:
        freedom: float | None = freedom_1
    elif freedom_1 is None or freedom_2 is None:
        freedom = None
    else:
        below = error_1**4 / freedom_1 + error_2**4 / freedom_2
        freedom = (error_1**2 + error_2**2) ** 2 / below if below else min(freedom_1, freedom_2)
    reach = _reach(math.hypot(error_1, error_2), freedom)
    value = value_1 - value_2
    return Estimate(value, value - reach, value + reach)


def _reach(error: float, freedom: float | None) -> float:
    quantile = (1 + CONFIDENCE) / 2
    return error * float(stats.norm.ppf(quantile) if freedom is None else stats.t.ppf(quantile, freedom))
