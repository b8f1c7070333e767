"""The best fit of a loss surface to points: many starts, SciPy's least squares on the two exponents, Huber loss.

Shapes: P points, R starts, K = 3 columns of (E, A, B), as in `separable.py`.
"""

import numpy as np
from scipy import optimize

from cola_megatron.scaling.separable import EXPONENTS, Design, Floats, huber_weights, projected_slopes, search

FITTED = 5
"""E, A, B, alpha, beta."""

_STARTS = np.array([(alpha, beta) for alpha in (0.1, 0.3, 0.6, 1.0, 1.7) for beta in (0.1, 0.3, 0.6, 1.0, 1.7)])
_POLISHED = 3
_SMALLEST_DELTA = 1e-9


def best_fit(design: Design, huber_delta: float | None) -> tuple[Floats, Floats, Floats, float]:
    """Exponents (2,), factors (K,), residuals (P,) and Huber delta of the points.

    25 starts are searched in one batch, and the best of them polished by SciPy.

    Args:
        huber_delta: None: 1.345 robust standard deviations of the residuals of the best least-squares fit.
    """
    targets_P = np.ones_like(design.scale_P)
    targets_RP = np.repeat(targets_P[None], len(_STARTS), axis=0)
    found_R2, _, residuals_RP = search(design, targets_RP, _STARTS, huber_delta or np.inf, iterations=40)
    if huber_delta is None:
        # The scale is that of the best least-squares fit. As many of the smallest residuals as there are parameters are
        # left out, as a fit makes that many small.
        best = int(np.argmin((residuals_RP**2).sum(axis=1)))
        sizes = np.sort(np.abs(residuals_RP[best]))[FITTED:]
        delta = max(1.345 * float(np.median(sizes)) / 0.6745, _SMALLEST_DELTA)
        found_R2, _, residuals_RP = search(design, targets_RP, found_R2, delta)
    else:
        delta = huber_delta
    order = np.argsort(_huber(residuals_RP, delta).sum(axis=1))[:_POLISHED]
    fits = [_polished(design, targets_P, found_R2[index], residuals_RP[index], delta) for index in order]
    exponents_2, factors_K, residuals_P = min(fits, key=lambda fit: float(_huber(fit[2], delta).sum()))
    # A term that is a billionth of the loss is rounding.
    return exponents_2, np.where(factors_K > 1e-9 * factors_K.sum(), factors_K, 0.0), residuals_P, delta


def _huber(residuals: Floats, delta: float) -> Floats:
    sizes = np.abs(residuals)
    return np.where(sizes <= delta, sizes**2 / 2, delta * (sizes - delta / 2))


def _polished(
    design: Design, targets_P: Floats, exponents_2: Floats, residuals_P: Floats, delta: float
) -> tuple[Floats, Floats, Floats]:
    """SciPy's bounded least squares on (alpha, beta), E, A and B projected out, until the Huber weights are still."""
    for _ in range(50):
        weights_P = huber_weights(residuals_P, delta)
        exponents_2 = _least_squares(design, targets_P, exponents_2, weights_P)
        columns_PK = design.columns(exponents_2[None])[0]
        factors_K, residuals_P = _inside(columns_PK, targets_P, weights_P)
        if np.abs(huber_weights(residuals_P, delta) - weights_P).max() < 1e-7:
            break
    return exponents_2, factors_K, residuals_P


def _inside(columns_PK: Floats, targets_P: Floats, weights_P: Floats) -> tuple[Floats, Floats]:
    """E, A, B >= 0 and the residuals at given exponents and weights."""
    roots_P = np.sqrt(weights_P)
    factors_K, _ = optimize.nnls(columns_PK * roots_P[:, None], targets_P * roots_P)
    return factors_K, columns_PK @ factors_K - targets_P


def _least_squares(design: Design, targets_P: Floats, start_2: Floats, weights_P: Floats) -> Floats:
    roots_P = np.sqrt(weights_P)

    def residuals(exponents_2: Floats) -> Floats:
        return roots_P * _inside(design.columns(exponents_2[None])[0], targets_P, weights_P)[1]

    def slopes(exponents_2: Floats) -> Floats:
        columns_RPK = design.columns(exponents_2[None])
        factors_K, _ = _inside(columns_RPK[0], targets_P, weights_P)
        return roots_P[:, None] * projected_slopes(design, columns_RPK, factors_K[None], weights_P[None])[0]

    start_2 = np.clip(start_2, EXPONENTS[0] * 1.0001, EXPONENTS[1] * 0.9999)
    found = optimize.least_squares(residuals, start_2, slopes, EXPONENTS, xtol=1e-13, ftol=1e-13, gtol=1e-13)
    return np.asarray(found.x, dtype=np.float64)
