"""Loss against compute of models of one size, or of the best size of each budget: L(C) = E + A / C^alpha.

The sibling of `score_curve.py` for a loss. Residuals are relative, prediction / loss - 1, as for the loss surface, so
the curve is linear in E and A once alpha is given: their best values >= 0 follow in closed form (variable projection),
and alpha is found on a grid that closes in on its minimum, for the points and all samples of the bootstrap at once.

Shapes: P runs, R samples, S values of alpha.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

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
from cola_megatron.scaling.separable import EXPONENTS, Floats

NAMES = ("E", "A", "alpha")
LEAST_RUNS = 4
"""One more than E, A, alpha."""
LEAST_BUDGETS = 3
_COARSE, _FINE, _TURNS = 161, 11, 9


@dataclass(frozen=True)
class LossCurve:
    """L(C) = E + A / C^alpha, fitted."""

    E: float
    """What the loss tends to, of this size."""
    A: float
    alpha: float
    intervals: dict[str, Interval]
    """Of `E`, `A`, `alpha`."""
    residuals: Floats
    """prediction / loss - 1 of each point, in the order in which the points were given."""
    at_bound: tuple[str, ...]
    """Of E and A those that came out zero, and alpha where it is at the end of its range or A is zero: the points do
    not show them."""
    replicates: Floats
    """(R, 3) the bootstrap's samples of E, A, alpha."""
    noise: Floats
    """(R,) a relative residual drawn for each sample."""
    confidence: float = CONFIDENCE

    def loss(self, compute: ArrayLike) -> Floats:
        """The fitted loss at budgets in FLOPs."""
        return curve((self.E, self.A, self.alpha), compute)

    def samples(self, compute: ArrayLike) -> Floats:
        """The bootstrap's curves at budgets in FLOPs, (R, X)."""
        return curve(self.replicates.T[:, :, None], np.atleast_1d(compute))

    def band(self, compute: ArrayLike) -> tuple[Floats, Floats]:
        """Low and high ends of the curve's interval at each of some budgets, for a picture."""
        return band(self.samples(compute), self.confidence)

    def predict(self, compute: float, single_run: bool = False) -> Estimate:
        """The loss at a budget, with its interval; with `single_run` that of one further run, noise included."""
        samples_R = self.samples(compute)[:, 0]
        if single_run:
            samples_R = samples_R * (1 + self.noise)
        return Estimate(float(self.loss(compute)), *interval(samples_R, self.confidence))

    def compute_to_reach(self, loss: float) -> tuple[float, Floats]:
        """FLOPs at which the curve is at a loss, and those of each sample, (R,): inf where it never is."""
        rows = np.vstack([[self.E, self.A, self.alpha], self.replicates])
        E, A, alpha = rows.T
        with np.errstate(divide="ignore", over="ignore"):
            found = np.where((loss > E) & (A > 0), (A / np.maximum(loss - E, 1e-300)) ** (1 / alpha), np.inf)
        return float(found[0]), found[1:]


def curve(coefficients: Sequence[ArrayLike] | Floats, compute: ArrayLike) -> Floats:
    """E + A / C^alpha for coefficients in the order of `NAMES`."""
    E, A, alpha = (np.asarray(value, dtype=np.float64) for value in coefficients)
    return E + A * np.asarray(compute, dtype=np.float64) ** -alpha


def fit_loss_curve(
    compute: ArrayLike,
    losses: ArrayLike,
    *,
    groups: Sequence[Hashable] | None = None,
    pairs: Sequence[Hashable] | None = None,
    bootstrap: int = 200,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> LossCurve:
    """Fits L(C) = E + A / C^alpha to runs by least squares, one entry of each sequence per run.

    Args:
        compute: FLOPs, of any column.
        losses: above 0, in any unit.
        groups: an id per run, as for `fit_loss_surface`.
        pairs: an id per run; runs of equal ids in two fits with one seed share their signs, so that the replicates of
            both are paired.
        bootstrap: samples of which the intervals are quantiles.
        confidence: of the intervals.
        seed: of the bootstrap. The result does not depend on the order of the points.

    Raises:
        ValueError: too few runs or budgets, values that are no positive numbers, unequal lengths.
    """
    C_P, L_P = positive_numbers("compute", compute), positive_numbers("losses", losses)
    same_lengths(compute=C_P, losses=L_P, groups=groups, pairs=pairs)
    if bootstrap < 20 or not 0 < confidence < 1:
        raise ValueError("bootstrap needs at least 20 samples, confidence a number in (0, 1)")
    if len(L_P) < LEAST_RUNS or len(np.unique(C_P)) < LEAST_BUDGETS:
        raise ValueError(
            f"{len(L_P)} runs of {len(np.unique(C_P))} budgets are too few for E, A and alpha: "
            f"at least {LEAST_RUNS} of {LEAST_BUDGETS} are needed"
        )
    order_P = np.lexsort((L_P, C_P))
    groups_P = numbered_groups(groups, order_P)
    C_P, L_P = C_P[order_P], L_P[order_P]
    log_C0 = float(np.log(C_P).mean())
    logs_P = np.log(C_P) - log_C0

    best_13 = _fit(logs_P, L_P, np.ones((1, len(L_P))))
    predicted_P = _relative(logs_P, L_P, best_13)[0]
    residuals_P = predicted_P - 1
    generator = np.random.default_rng(seed)
    leverages_P = leverages(_slopes(logs_P, L_P, best_13[0]), np.ones_like(L_P))
    free = int(groups_P.max()) + 1 - len(NAMES)
    signs_RG = None if pairs is None else paired_signs(pairs, order_P, groups_P, bootstrap, seed)
    spread_RP = wild_residuals(residuals_P, leverages_P, groups_P, free, bootstrap, generator, signs_RG)
    found_R3 = _fit(logs_P, L_P, predicted_P + spread_RP)
    picked_R = generator.integers(len(L_P), size=bootstrap)
    replicates_R3, (best_3,) = _in_units(found_R3, log_C0), _in_units(best_13, log_C0)
    E, A, alpha = map(float, best_3)
    low, high = EXPONENTS
    # A term that is a billionth of the loss is rounding.
    zero = [name for name, value in zip(NAMES[:2], best_13[0], strict=False) if value <= 1e-9 * L_P.mean()]
    shown = "A" not in zero and low * 1.001 < alpha < high * 0.999
    return LossCurve(
        E=E,
        A=A,
        alpha=alpha,
        intervals={name: interval(replicates_R3[:, i], confidence) for i, name in enumerate(NAMES)},
        residuals=residuals_P[np.argsort(order_P)],
        at_bound=(*zero, *(() if shown else ("alpha",))),
        replicates=replicates_R3,
        noise=spread_RP[np.arange(bootstrap), picked_R],
        confidence=confidence,
    )


def _fit(logs_P: Floats, scale_P: Floats, targets_RP: Floats) -> Floats:
    """E, A (at the mean log C) and alpha of each sample of relative losses, (R, 3)."""
    grid_RS = np.repeat(np.geomspace(*EXPONENTS, _COARSE)[None], len(targets_RP), axis=0)
    for _ in range(_TURNS):
        factors_RS2, squares_RS = _projected(logs_P, scale_P, targets_RP, grid_RS)
        best_R1 = np.argmin(squares_RS, axis=1)[:, None]
        below_R1 = np.take_along_axis(grid_RS, np.maximum(best_R1 - 1, 0), axis=1)
        above_R1 = np.take_along_axis(grid_RS, np.minimum(best_R1 + 1, grid_RS.shape[1] - 1), axis=1)
        alphas_R1 = np.take_along_axis(grid_RS, best_R1, axis=1)
        best_R2 = np.take_along_axis(factors_RS2, best_R1[:, :, None], axis=1)[:, 0]
        grid_RS = below_R1 + (above_R1 - below_R1) * np.linspace(0, 1, _FINE)
    return np.concatenate([best_R2, alphas_R1], axis=1)


def _projected(logs_P: Floats, scale_P: Floats, targets_RP: Floats, grid_RS: Floats) -> tuple[Floats, Floats]:
    """The best E, A >= 0 at each alpha, (R, S, 2), and the sum of squares that they leave, (R, S)."""
    one_P = 1 / scale_P
    power_RSP = np.exp(-grid_RS[:, :, None] * logs_P) / scale_P
    ee = float(one_P @ one_P)
    ea_RS, aa_RS = power_RSP @ one_P, (power_RSP**2).sum(axis=2)
    e_R1, a_RS = (targets_RP @ one_P)[:, None], (power_RSP @ targets_RP[:, :, None])[:, :, 0]
    determinant_RS = np.maximum(ee * aa_RS - ea_RS**2, 1e-15 * ee * aa_RS)
    E_RS, A_RS = (aa_RS * e_R1 - ea_RS * a_RS) / determinant_RS, (ee * a_RS - ea_RS * e_R1) / determinant_RS
    # One of them zero: where the free optimum has it below zero, it is there.
    flat_RS, steep_RS = A_RS < 0, E_RS < 0
    E_RS, A_RS = (
        np.where(flat_RS, e_R1 / ee, np.where(steep_RS, 0.0, E_RS)),
        np.where(flat_RS, 0.0, np.where(steep_RS, a_RS / aa_RS, A_RS)),
    )
    residuals_RSP = E_RS[:, :, None] * one_P + A_RS[:, :, None] * power_RSP - targets_RP[:, None, :]
    return np.stack([E_RS, A_RS], axis=2), (residuals_RSP**2).sum(axis=2)


def _relative(logs_P: Floats, scale_P: Floats, values_R3: Floats) -> Floats:
    """prediction / loss of each run, (R, P)."""
    E_R1, A_R1, alpha_R1 = values_R3.T[:, :, None]
    return (E_R1 + A_R1 * np.exp(-alpha_R1 * logs_P)) / scale_P


def _slopes(logs_P: Floats, scale_P: Floats, values_3: Floats) -> Floats:
    """Derivatives of the relative predictions with respect to E, A and alpha, (P, 3)."""
    _, A, alpha = values_3
    power_P = np.exp(-alpha * logs_P)
    return np.stack([np.ones_like(logs_P), power_P, -A * logs_P * power_P], axis=1) / scale_P[:, None]


def _in_units(values_R3: Floats, log_C0: float) -> Floats:
    """With A in the units of the points."""
    E_R, A_R, alpha_R = values_R3.T
    return np.column_stack([E_R, A_R * np.exp(alpha_R * log_C0), alpha_R])
