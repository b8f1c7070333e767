"""Loss and score of a series against one compute column: the curve, and its largest budget predicted in advance."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cola_megatron.scaling.loss_curve import LossCurve, fit_loss_curve
from cola_megatron.scaling.loss_surface import Estimate
from cola_megatron.scaling.resampling import LEAST_GROUPS
from cola_megatron.scaling.score_curve import ScoreCurve, fit_score_curve
from cola_megatron.studies.report.series import Series, best_size_of_each_budget, budget_steps
from cola_megatron.studies.rows import Results, Row
from cola_megatron.studies.words import flops, number, span

Quantity = Literal["loss", "score"]
LEAST_PAIRS = 6
LEAST_BUDGETS = 3
"""Of a curve of three parameters; one more where the largest is held out."""


@dataclass(frozen=True)
class PredictedRun:
    """A run of the largest budget, predicted from the smaller ones and then read."""

    point: str
    compute: float
    predicted: Estimate
    """With the interval of a single run, noise included."""
    seen: float

    @property
    def inside(self) -> bool:
        """Whether what was seen lies in the interval."""
        return self.predicted.low <= self.seen <= self.predicted.high

    def __str__(self) -> str:
        where = "inside" if self.inside else "outside"
        return (
            f"{self.point} at {flops(self.compute)}: predicted {number(self.predicted.value, 4)} "
            f"{span(*self.predicted.interval, 4)}, seen {number(self.seen, 4)}, {where} the interval"
        )


@dataclass(frozen=True)
class CurveFit:
    """One measure of a series against one compute column."""

    series: Series
    quantity: Quantity
    measure: str
    column: str
    rows: tuple[Row, ...]
    """What the curve goes through."""
    curve: LossCurve | ScoreCurve | None
    cannot: str
    """Why there is no curve; empty where there is one."""
    check: tuple[PredictedRun, ...]
    """The largest budget, predicted from the smaller ones; empty where that cannot be."""
    no_check: str
    notes: tuple[str, ...]
    """What a reader of the interval should know."""

    @property
    def compute(self) -> list[float]:
        """FLOPs of the rows, stage 1 charged."""
        return [row.charged(self.column) or 0.0 for row in self.rows]

    @property
    def values(self) -> list[float]:
        """The measure of the rows."""
        return [row.measures[self.measure].value for row in self.rows]

    @property
    def is_bound(self) -> bool:
        """Whether some of the losses are upper bounds."""
        return self.quantity == "loss" and any(row.measures[self.measure].kind == "bound" for row in self.rows)


def fit_curve(
    results: Results, series: Series, quantity: Quantity, column: str, bootstrap: int = 400, seed: int = 0
) -> CurveFit | None:
    """The curve of a series on a column; None where none of its rows has the measure and the column.

    What cannot be fitted is said in words (`cannot`, `no_check`), never raised.
    """
    measure = results.loss if quantity == "loss" else results.score
    rows = tuple(row for row in series.rows if measure in row.measures and row.charged(column))
    if measure is None or not rows:
        return None
    notes = []
    sizes = len({row.size for row in rows})
    if sizes > 1:
        by_budget = [len({row.size for row in of_budget}) for _, of_budget in budget_steps(results, rows)]
        if max(by_budget) > 1:
            rows = best_size_of_each_budget(results, rows, results.loss if _all_have(rows, results.loss) else measure)
            notes.append("through the best of several sizes at each budget")
        else:
            notes.append("over budgets of different sizes")
    groups, note = groups_of(rows)
    notes += [note] if note else []
    notes += _charge(rows, column)
    # Each series has signs of its own: equal ones would correlate the curves of arms that have nothing in common.
    seed += zlib.crc32(f"{series.arm} {sorted(series.settings.items())}".encode())
    curve, cannot = _curve(results, rows, quantity, measure, column, groups, bootstrap, seed)
    check, no_check = _check(results, rows, quantity, measure, column, bootstrap, seed)
    if curve is not None and curve.at_bound:
        notes.append(f"the runs do not show {' or '.join(curve.at_bound)}")
    return CurveFit(series, quantity, measure, column, rows, curve, cannot, check, no_check, tuple(notes))


def paired_curves(results: Results, first: CurveFit, second: CurveFit) -> tuple[LossCurve | ScoreCurve, ...] | None:
    """Both curves anew with paired samples, where runs of one budget and seed lie off their curves alike.

    Signs are paired only where the residuals say so (their correlation is above 0.3 at 95%): shared without need, two
    opposite residuals at an end of the curves are taken to cancel for good, and of 95% intervals 83% hold.
    """
    if first.curve is None or second.curve is None:
        return None
    ids = [[f"{results.budget_of(row):.4g} {row.seed}" for row in fit.rows] for fit in (first, second)]
    residuals = [
        dict(zip(keys, fit.curve.residuals, strict=True))
        for keys, fit in zip(ids, (first, second), strict=True)
        if fit.curve is not None
    ]
    common = [key for key in residuals[0] if key in residuals[1]]
    if len(common) < LEAST_PAIRS or any(len(set(keys)) < len(keys) for keys in ids):
        return None
    one, two = (np.array([each[key] for key in common]) for each in residuals)
    if not one.std() or not two.std():
        return None
    correlation = float(np.clip(np.corrcoef(one, two)[0, 1], -0.9999, 0.9999))
    if np.tanh(np.arctanh(correlation) - 1.96 / math.sqrt(len(common) - 3)) < 0.3:
        return None
    return tuple(
        _fitted(
            results, fit.quantity, fit.compute, fit.values, groups_of(fit.rows)[0], len(fit.curve.replicates), 0, keys
        )
        for fit, keys in zip((first, second), ids, strict=True)
        if fit.curve is not None
    )


def _fitted(
    results: Results,
    quantity: Quantity,
    compute: Sequence[float],
    values: Sequence[float],
    groups: list[str] | None,
    samples: int,
    seed: int,
    pairs: list[str] | None = None,
) -> LossCurve | ScoreCurve:
    if quantity == "loss":
        return fit_loss_curve(compute, values, groups=groups, pairs=pairs, bootstrap=samples, seed=seed)
    return fit_score_curve(
        compute, values, chance=results.chance, groups=groups, pairs=pairs, bootstrap=samples, seed=seed
    )


def _charge(rows: Sequence[Row], column: str) -> list[str]:
    """A constant in C bends a power law of C."""
    shares = [1 - row.compute[column] / (row.charged(column) or 1.0) for row in rows]
    if max(shares) < 0.05:
        return []
    return [f"stage 1 is {100 * min(shares):.0f} to {100 * max(shares):.0f}% of the FLOPs, which bends the curve"]


def _all_have(rows: Sequence[Row], measure: str) -> bool:
    return all(measure in row.measures for row in rows)


def groups_of(rows: Sequence[Row]) -> tuple[list[str] | None, str]:
    """Ids of runs that share a trunk, where there are enough to resample; and what to know where there are not."""
    groups = [row.group for row in rows]
    distinct = len(set(groups))
    if distinct == len(rows):
        return None, ""
    if distinct >= LEAST_GROUPS:
        return groups, ""
    return None, f"{len(rows)} points share {distinct} trunks or runs, and are resampled as if they were their own"


def _curve(
    results: Results,
    rows: Sequence[Row],
    quantity: Quantity,
    measure: str,
    column: str,
    groups: list[str] | None,
    bootstrap: int,
    seed: int,
) -> tuple[LossCurve | ScoreCurve | None, str]:
    budgets = len(budget_steps(results, rows))
    if budgets < LEAST_BUDGETS:
        few = "one budget" if budgets == 1 else f"{budgets} budgets"
        return None, f"{few}, and a curve of three parameters needs at least {LEAST_BUDGETS}"
    compute = [row.charged(column) or 0.0 for row in rows]
    values = [row.measures[measure].value for row in rows]
    # A sample of a score curve costs more.
    samples = bootstrap if quantity == "loss" else bootstrap // 2
    try:
        return _fitted(results, quantity, compute, values, groups, samples, seed), ""
    except ValueError as error:
        return None, str(error)


def _check(
    results: Results,
    rows: Sequence[Row],
    quantity: Quantity,
    measure: str,
    column: str,
    bootstrap: int,
    seed: int,
) -> tuple[tuple[PredictedRun, ...], str]:
    budgets = budget_steps(results, rows)
    if len(budgets) < LEAST_BUDGETS + 1:
        return (), (
            f"{len(budgets)} budget{'s' * (len(budgets) != 1)}, and a prediction of the largest from the smaller ones "
            f"needs at least {LEAST_BUDGETS + 1}"
        )
    held_out = {row.point for row in budgets[-1][1]}
    known = [row for row in rows if row.point not in held_out]
    curve, cannot = _curve(results, known, quantity, measure, column, groups_of(known)[0], bootstrap, seed)
    if curve is None:
        return (), f"of the smaller budgets: {cannot}"
    predicted = [(row, row.charged(column) or 0.0) for row in rows if row.point in held_out]
    return tuple(
        PredictedRun(row.point, compute, curve.predict(compute, single_run=True), row.measures[measure].value)
        for row, compute in predicted
    ), ""
