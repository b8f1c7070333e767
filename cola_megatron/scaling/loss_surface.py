"""Loss as a function of size and data: L(N, D) = E + A / N^alpha + B / D^beta, with intervals.

The form is that of Hoffmann et al. (arXiv:2203.15556, their third approach), the care in fitting it that of Besiroglu
et al. (arXiv:2404.10102): a robust loss, many starts, a bootstrap. Residuals are relative, prediction / loss - 1, which
is the difference of logarithms to first order and keeps the fit linear in E, A and B, so that only (alpha, beta) are
searched for (variable projection, `separable.py`). The Huber loss turns linear at 1.345 robust standard deviations of
the residuals, where it keeps 95% of the efficiency of least squares under Gaussian noise; the published 1e-3 is
`huber_delta=1e-3`, nearly least absolute deviations where seeds differ by a percent.

Any points may be fitted: nothing here knows of run folders, and nothing imports torch.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from cola_megatron.scaling.points import checked_study
from cola_megatron.scaling.resampling import CONFIDENCE, Interval, interval, leverages, numbered_groups, wild_residuals
from cola_megatron.scaling.robust_fit import best_fit
from cola_megatron.scaling.separable import EXPONENTS, Design, Floats, huber_weights, search

NAMES = ("E", "A", "B", "alpha", "beta")
FLOPS_PER_PARAMETER_AND_TOKEN = 6.0
"""C = 6 N D: a forward and a backward pass of a dense network."""


@dataclass(frozen=True)
class Estimate:
    """A number with its interval."""

    value: float
    low: float
    high: float

    @property
    def interval(self) -> Interval:
        """`low` and `high`."""
        return Interval(self.low, self.high)


@dataclass(frozen=True)
class Optimum:
    """The size and the number of tokens that a budget is best spent on, and the loss there."""

    compute: float
    N: Estimate
    D: Estimate
    loss: Estimate


@dataclass(frozen=True)
class LossSurface:
    """L(N, D) = E + A / N^alpha + B / D^beta, fitted."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    intervals: dict[str, Interval]
    """Of `E`, `A`, `B`, `alpha`, `beta`, and of the exponents `a` (N_opt ~ C^a) and `b` (D_opt ~ C^b)."""
    residuals: Floats
    """prediction / loss - 1 of each point, in the order in which the points were given."""
    huber_delta: float
    """Relative residual at which the Huber loss turned from quadratic to linear."""
    at_bound: tuple[str, ...]
    """Of E, A, B those that came out zero, and of alpha, beta those at the end of their range or with a factor of zero:
    the points do not show them, and what follows from them (an optimum, an extrapolation) is not to be believed."""
    replicates: Floats
    """(R, 5) the bootstrap's samples of E, A, B, alpha, beta."""
    noise: Floats
    """(R,) a relative residual drawn for each sample: how far a single run lies from the surface."""
    confidence: float = CONFIDENCE

    @property
    def a(self) -> float:
        """Exponent of the optimal size: N_opt ~ C^a, a = beta / (alpha + beta)."""
        return self.beta / (self.alpha + self.beta)

    @property
    def b(self) -> float:
        """Exponent of the optimal number of tokens: D_opt ~ C^b, b = alpha / (alpha + beta)."""
        return self.alpha / (self.alpha + self.beta)

    def loss(self, N: ArrayLike, D: ArrayLike) -> Floats:
        """The fitted loss at sizes and tokens, which broadcast against each other."""
        return surface((self.E, self.A, self.B, self.alpha, self.beta), N, D)

    def predict(self, N: float, D: float, single_run: bool = False) -> Estimate:
        """The loss at one size and number of tokens, with its interval.

        Args:
            single_run: the interval of one further run, noise included, rather than that of the surface.
        """
        samples_R = surface(self.replicates.T, N, D)
        if single_run:
            samples_R = samples_R * (1 + self.noise)
        return Estimate(float(self.loss(N, D)), *interval(samples_R, self.confidence))

    def band(self, N: ArrayLike, D: ArrayLike) -> tuple[Floats, Floats]:
        """Low and high ends of the surface's interval at each of some sizes and tokens, for a picture."""
        N_X1, D_X1 = np.atleast_1d(N)[:, None], np.atleast_1d(D)[:, None]
        ends = [(1 - self.confidence) / 2, (1 + self.confidence) / 2]
        low_X, high_X = np.quantile(surface(self.replicates.T, N_X1, D_X1), ends, axis=1)
        return low_X, high_X

    def optimal(self, compute: float, flops: float = FLOPS_PER_PARAMETER_AND_TOKEN) -> Optimum:
        """Where the loss is least at a budget, in closed form.

        With C = 6 N D and G = (alpha A / (beta B))^(1 / (alpha + beta)): N = G (C / 6)^a and D = (C / 6)^b / G.

        Args:
            compute: C, in FLOPs.
            flops: FLOPs per parameter and token.

        Raises:
            ValueError: the budget is no positive number, or A or B came out zero, so that there is no optimum.
        """
        if not (np.isfinite(compute) and compute > 0 and np.isfinite(flops) and flops > 0):
            raise ValueError(f"compute: {compute:g} FLOPs at {flops:g} per parameter and token is no budget")
        missing = [name for name in self.at_bound if name in ("A", "B")]
        if missing:
            raise ValueError(
                f"{missing[0]} came out as 0: the points show no optimum; more sizes or budgets are needed"
            )
        values = np.array([[self.E, self.A, self.B, self.alpha, self.beta]])
        best, samples = (_optima(rows, compute / flops) for rows in (values, self.replicates))
        N, D, loss = (
            Estimate(float(value_1[0]), *interval(samples_R, self.confidence))
            for value_1, samples_R in zip(best, samples, strict=True)
        )
        return Optimum(compute, N, D, loss)


def surface(coefficients: Iterable[ArrayLike], N: ArrayLike, D: ArrayLike) -> Floats:
    """E + A / N^alpha + B / D^beta for coefficients in the order of `NAMES`."""
    E, A, B, alpha, beta = (np.asarray(value, dtype=np.float64) for value in coefficients)
    return E + A * np.asarray(N, dtype=np.float64) ** -alpha + B * np.asarray(D, dtype=np.float64) ** -beta


def _optima(rows_R5: Floats, product: float) -> tuple[Floats, Floats, Floats]:
    """N, D and loss at the optimum of each row of coefficients, where N D = product; NaN where A or B is zero."""
    E, A, B, alpha, beta = rows_R5.T
    with np.errstate(divide="ignore", invalid="ignore"):
        log_G = np.log(alpha * A / (beta * B)) / (alpha + beta)
        N = np.exp(log_G + beta / (alpha + beta) * np.log(product))
        D = product / N
        return N, D, surface((E, A, B, alpha, beta), N, D)


def fit_loss_surface(
    parameters: ArrayLike,
    tokens: ArrayLike,
    losses: ArrayLike,
    *,
    groups: Sequence[Hashable] | None = None,
    huber_delta: float | None = None,
    bootstrap: int = 400,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> LossSurface:
    """Fits L(N, D) = E + A / N^alpha + B / D^beta to runs, one entry of each sequence per run.

    Args:
        parameters: N, under the definition that suits; only its ratios and unit enter.
        tokens: D.
        losses: above 0, in any unit (nats or bits per token, per byte).
        groups: an id per run; runs with equal ids were drawn together (branches of one trunk) and are resampled
            together. None: each run is its own.
        huber_delta: relative residual at which the loss turns linear; None: 1.345 robust standard deviations.
        bootstrap: samples of which the intervals are quantiles.
        confidence: of the intervals.
        seed: of the bootstrap. The result does not depend on the order of the points.

    Raises:
        ValueError: sequences of unequal lengths, values that are not positive numbers, fewer than six runs, of fewer
            than three sizes or numbers of tokens, tokens that follow from the size; too few groups.
    """
    N_P, D_P, L_P = checked_study(parameters, tokens, losses, groups)
    if bootstrap < 20 or not 0 < confidence < 1 or not (huber_delta is None or huber_delta > 0):
        raise ValueError("bootstrap needs at least 20 samples, confidence a number in (0, 1), huber_delta one above 0")
    order_P = np.lexsort((L_P, D_P, N_P))
    groups_P = numbered_groups(groups, order_P)
    N_P, D_P, L_P = N_P[order_P], D_P[order_P], L_P[order_P]
    log_N0, log_D0 = float(np.log(N_P).mean()), float(np.log(D_P).mean())
    design = Design(np.log(N_P) - log_N0, np.log(D_P) - log_D0, L_P)

    exponents_2, factors_K, residuals_P, delta = best_fit(design, huber_delta)
    spread_RP = wild_residuals(
        residuals_P,
        _leverages(design, exponents_2, factors_K, huber_weights(residuals_P, delta)),
        groups_P,
        int(groups_P.max()) + 1 - len(NAMES),
        bootstrap,
        generator := np.random.default_rng(seed),
    )
    found_R2, found_RK, _ = search(
        design, 1 + residuals_P + spread_RP, np.repeat(exponents_2[None], bootstrap, axis=0), delta
    )
    picked_R = generator.integers(len(L_P), size=bootstrap)
    E, A, B, alpha, beta = (float(v) for v in _coefficients(exponents_2[None], factors_K[None], log_N0, log_D0)[0])
    replicates_R5 = _coefficients(found_R2, found_RK, log_N0, log_D0)
    intervals = {name: interval(replicates_R5[:, i], confidence) for i, name in enumerate(NAMES)}
    a_R = found_R2[:, 1] / found_R2.sum(axis=1)
    intervals |= {"a": interval(a_R, confidence), "b": interval(1 - a_R, confidence)}
    low, high = EXPONENTS
    zero = [name for name, factor in zip("EAB", factors_K, strict=True) if factor <= 0]
    ends = [
        name
        for name, exponent, factor in zip(NAMES[3:], exponents_2, factors_K[1:], strict=True)
        if factor <= 0 or not low * 1.001 < exponent < high * 0.999
    ]
    return LossSurface(
        E=E,
        A=A,
        B=B,
        alpha=alpha,
        beta=beta,
        intervals=intervals,
        residuals=residuals_P[np.argsort(order_P)],
        huber_delta=delta,
        at_bound=(*zero, *ends),
        replicates=replicates_R5,
        noise=spread_RP[np.arange(bootstrap), picked_R],
        confidence=confidence,
    )


def _coefficients(exponents_R2: Floats, factors_RK: Floats, log_N0: float, log_D0: float) -> Floats:
    """E, A, B, alpha, beta in the units of the points, (R, 5)."""
    A_R = factors_RK[:, 1] * np.exp(exponents_R2[:, 0] * log_N0)
    B_R = factors_RK[:, 2] * np.exp(exponents_R2[:, 1] * log_D0)
    return np.column_stack([factors_RK[:, 0], A_R, B_R, exponents_R2])


def _leverages(design: Design, exponents_2: Floats, factors_K: Floats, weights_P: Floats) -> Floats:
    columns_RPK = design.columns(exponents_2[None])
    slopes_RP2 = design.slopes(columns_RPK, factors_K[None])
    return leverages(np.concatenate([columns_RPK[0], slopes_RP2[0]], axis=1), weights_P)
