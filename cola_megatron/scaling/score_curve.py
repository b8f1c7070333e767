"""Score of a task against compute: chance + (ceiling - chance) / (1 + (C_half / C)^rate).

A logistic curve in log C between the level of chance and a ceiling of at most 1: bounded where a power law is not, so
it extrapolates to scores that exist. Least squares by SciPy from many starts; intervals by the same wild bootstrap over
runs as the loss surface, scores kept inside [0, 1].
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize

from cola_megatron.scaling.loss_surface import Estimate
from cola_megatron.scaling.points import positive_numbers, same_lengths
from cola_megatron.scaling.resampling import (
    CONFIDENCE,
    Interval,
    band,
    interval,
    leverages,
    numbered_groups,
    paired_signs,
    wild_residuals,
)
from cola_megatron.scaling.separable import Floats

LEAST_RUNS = 4
"""One more than ceiling, C_half, rate."""
LEAST_BUDGETS = 3
RATES = (0.05, 10.0)
"""Where `rate` is searched for: 10% to 90% of the rise takes 38 decades at one end, a fifth of one at the other."""
MARGIN = 8.0
"""ln of how far beyond the runs' budgets C_half is searched for: a factor of 3,000 either way."""


@dataclass(frozen=True)
class ScoreCurve:
    """A task's score against compute, fitted."""

    chance: float
    """Score of a guess, given."""
    ceiling: float
    """Score that is approached, at most 1. Unknown, and its interval wide, until runs come near it."""
    C_half: float
    """FLOPs at which half of the way is done."""
    rate: float
    """Steepness: near chance the gain grows as C^rate."""
    intervals: dict[str, Interval]
    """Of `ceiling`, `C_half`, `rate`."""
    residuals: Floats
    """prediction - score of each point, in the order in which the points were given."""
    at_bound: tuple[str, ...]
    """Of `C_half` and `rate` those at the end of their range, which the points do not show."""
    replicates: Floats
    """(R, 3) the bootstrap's samples of ceiling, C_half, rate."""
    noise: Floats
    """(R,) a residual drawn for each sample."""
    confidence: float = CONFIDENCE

    def score(self, compute: ArrayLike) -> Floats:
        """The fitted score at budgets in FLOPs."""
        log_C = np.log(np.asarray(compute, dtype=np.float64))
        return _curve(log_C, self.chance, np.array([self.ceiling, np.log(self.C_half), self.rate]))

    def samples(self, compute: ArrayLike) -> Floats:
        """The bootstrap's curves at budgets in FLOPs, (R, X)."""
        ceiling_R1, C_half_R1, rate_R1 = self.replicates.T[:, :, None]
        return _curve(np.log(np.atleast_1d(compute)), self.chance, np.array([ceiling_R1, np.log(C_half_R1), rate_R1]))

    def band(self, compute: ArrayLike) -> tuple[Floats, Floats]:
        """Low and high ends of the curve's interval at each of some budgets, for a picture."""
        return band(self.samples(compute), self.confidence)

    def predict(self, compute: float, single_run: bool = False) -> Estimate:
        """The score at a budget, with its interval; with `single_run` that of one further run, noise included."""
        samples_R = self.samples(compute)[:, 0]
        if single_run:
            samples_R = np.clip(samples_R + self.noise, 0, 1)
        return Estimate(float(self.score(compute)), *interval(samples_R, self.confidence))


def fit_score_curve(
    compute: ArrayLike,
    scores: ArrayLike,
    *,
    chance: float = 0.0,
    groups: Sequence[Hashable] | None = None,
    pairs: Sequence[Hashable] | None = None,
    bootstrap: int = 200,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> ScoreCurve:
    """Fits a bounded saturating curve to runs, one entry of each sequence per run.

    Args:
        compute: FLOPs, of any column.
        scores: fractions in [0, 1], such as exact match or accuracy.
        chance: what a guess scores: 0.25 for four choices.
        groups: an id per run, as for `fit_loss_surface`.
        pairs: an id per run; runs of equal ids in two fits with one seed share their signs, so that the replicates of
            both are paired.
        bootstrap: samples of which the intervals are quantiles.
        confidence: of the intervals.
        seed: of the bootstrap.

    Raises:
        ValueError: too few runs or budgets, scores that are no fractions (percent are not), unequal lengths.
    """
    C_P, s_P = _checked(compute, scores, chance, groups)
    same_lengths(scores=s_P, pairs=pairs)
    if bootstrap < 20 or not 0 < confidence < 1:
        raise ValueError("bootstrap needs at least 20 samples, confidence a number in (0, 1)")
    order_P = np.lexsort((s_P, C_P))
    groups_P = numbered_groups(groups, order_P)
    log_P, s_P = np.log(C_P[order_P]), s_P[order_P]
    lows = np.array([chance, log_P[0] - MARGIN, RATES[0]])
    highs = np.array([1.0, log_P[-1] + MARGIN, RATES[1]])

    starts = [
        np.array([ceiling, middle, rate])
        for ceiling in (chance + 0.5 * (1 - chance), min(1.0, max(s_P.max(), chance) * 1.05 + 1e-3))
        for middle in np.linspace(log_P[0], log_P[-1] + 2, 3)
        for rate in (0.3, 1.0)
    ]
    fits = [_fit(log_P, s_P, chance, start, lows, highs) for start in starts]
    best_3 = min(fits, key=lambda found: float(((_curve(log_P, chance, found) - s_P) ** 2).sum()))

    residuals_P = _curve(log_P, chance, best_3) - s_P
    generator = np.random.default_rng(seed)
    leverages_P = leverages(_slopes(log_P, chance, best_3), np.ones_like(s_P))
    free = int(groups_P.max()) + 1 - len(best_3)
    signs_RG = None if pairs is None else paired_signs(pairs, order_P, groups_P, bootstrap, seed)
    spread_RP = wild_residuals(residuals_P, leverages_P, groups_P, free, bootstrap, generator, signs_RG)
    drawn_RP = np.clip(s_P + residuals_P + spread_RP, 0, 1)
    found_R3 = np.array([_fit(log_P, drawn_P, chance, best_3, lows, highs) for drawn_P in drawn_RP])
    picked_R = generator.integers(len(s_P), size=bootstrap)
    replicates_R3 = np.column_stack([found_R3[:, 0], np.exp(found_R3[:, 1]), found_R3[:, 2]])
    names = ("ceiling", "C_half", "rate")
    span = highs - lows
    ends = (best_3 < lows + 1e-3 * span) | (best_3 > highs - 1e-3 * span)
    return ScoreCurve(
        chance=chance,
        ceiling=float(best_3[0]),
        C_half=float(np.exp(best_3[1])),
        rate=float(best_3[2]),
        intervals={name: interval(replicates_R3[:, i], confidence) for i, name in enumerate(names)},
        residuals=residuals_P[np.argsort(order_P)],
        at_bound=tuple(name for name, end in zip(names[1:], ends[1:], strict=True) if end),
        replicates=replicates_R3,
        noise=spread_RP[np.arange(bootstrap), picked_R],
        confidence=confidence,
    )


def _checked(
    compute: ArrayLike, scores: ArrayLike, chance: float, groups: Sequence[Hashable] | None
) -> tuple[Floats, Floats]:
    C_P = positive_numbers("compute", compute)
    s_P = np.asarray(scores, dtype=np.float64)
    same_lengths(compute=C_P, scores=s_P, groups=groups)
    if not 0 <= chance < 1:
        raise ValueError(f"chance: {chance:g} is no level of chance; give a fraction in [0, 1)")
    wrong = np.flatnonzero(~((s_P >= 0) & (s_P <= 1)))
    if len(wrong):
        raise ValueError(f"scores: entry {wrong[0]} is {s_P[wrong[0]]:g}; give fractions in [0, 1], not percent")
    if len(s_P) and s_P.min() == s_P.max():
        raise ValueError(f"scores: every run has {s_P[0]:g}, so there is no curve; fit a task on which runs differ")
    if len(s_P) < LEAST_RUNS or len(np.unique(C_P)) < LEAST_BUDGETS:
        raise ValueError(
            f"{len(s_P)} runs of {len(np.unique(C_P))} budgets are too few for ceiling, C_half and rate: "
            f"at least {LEAST_RUNS} of {LEAST_BUDGETS} are needed"
        )
    return C_P, s_P


def _curve(log_C: ArrayLike, chance: float, values: Floats) -> Floats:
    ceiling, middle, rate = values
    return chance + (ceiling - chance) * _logistic(rate * (log_C - middle))


def _logistic(x: Floats) -> Floats:
    return 0.5 * (1 + np.tanh(x / 2))


def _slopes(log_C: Floats, chance: float, values_3: Floats) -> Floats:
    """Derivatives of the curve with respect to ceiling, ln C_half and rate, (P, 3)."""
    ceiling, middle, rate = values_3
    share = _logistic(rate * (log_C - middle))
    steep = (ceiling - chance) * share * (1 - share)
    return np.stack([share, -rate * steep, (log_C - middle) * steep], axis=1)


def _fit(log_C: Floats, scores: Floats, chance: float, start: Floats, lows: Floats, highs: Floats) -> Floats:
    inside = 1e-4 * (highs - lows)
    found = optimize.least_squares(
        lambda values: _curve(log_C, chance, values) - scores,
        np.clip(start, lows + inside, highs - inside),
        lambda values: _slopes(log_C, chance, values),
        (lows, highs),
        x_scale=np.array([0.2, 2.0, 0.5]),
        max_nfev=60,
    )
    return np.asarray(found.x, dtype=np.float64)
