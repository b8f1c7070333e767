"""Variable projection: least squares that is linear in three of its five parameters, for many samples at once.

L(N, D) = E + A / N^alpha + B / D^beta is linear in (E, A, B) once alpha and beta are given, so only the two exponents
are searched for, and the best E, A, B >= 0 of each pair follow in closed form (Golub and Pereyra 1973). The batched
search below serves for the starts of a fit and for its bootstrap; `loss_surface.py` fits the points themselves.

Shapes: P points, R samples (starts or replicates), K = 3 columns of (E, A, B).
"""

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

EXPONENTS = (0.01, 3.0)
"""Where alpha and beta are searched for. Towards 0 a power law is a constant and a logarithm, and E has no meaning."""

_ACTIVE_SETS_K = np.array([mask for mask in itertools.product((0.0, 1.0), repeat=3) if any(mask)])


@dataclass(frozen=True)
class Design:
    """What a fit knows of its points beside the losses, in units in which every column is about 1."""

    log_parameters_P: Floats
    """log(N / N0), N0 the geometric mean."""
    log_tokens_P: Floats
    """log(D / D0), D0 the geometric mean."""
    scale_P: Floats
    """What a residual is divided by: the loss of the point, so that residuals are relative."""

    def columns(self, exponents_R2: Floats) -> Floats:
        """The columns of (E, A / N0^alpha, B / D0^beta) at the given exponents, (R, P, K)."""
        size_RP = np.exp(-exponents_R2[:, :1] * self.log_parameters_P)
        data_RP = np.exp(-exponents_R2[:, 1:] * self.log_tokens_P)
        return np.stack([np.ones_like(size_RP), size_RP, data_RP], axis=2) / self.scale_P[:, None]

    def slopes(self, columns_RPK: Floats, factors_RK: Floats) -> Floats:
        """Derivative of the residuals with respect to alpha and beta at constant factors, (R, P, 2)."""
        logs_P2 = np.stack([self.log_parameters_P, self.log_tokens_P], axis=1)
        return -logs_P2 * columns_RPK[:, :, 1:] * factors_RK[:, None, 1:]


def non_negative_factors(columns_RPK: Floats, targets_RP: Floats, weights_RP: Floats) -> Floats:
    """E, A, B >= 0 that minimise sum w (columns x - target)^2: exactly, by trying which of them are zero, (R, K)."""
    weighted_RKP = np.swapaxes(columns_RPK * weights_RP[:, :, None], 1, 2)
    gram_RKK = weighted_RKP @ columns_RPK
    right_RK = (weighted_RKP @ targets_RP[:, :, None])[:, :, 0]
    factors_RK = _solve(gram_RKK, right_RK)
    wrong = (factors_RK < 0).any(axis=1)
    if wrong.any():
        factors_RK[wrong] = _best_active_set(gram_RKK[wrong], right_RK[wrong])
    return factors_RK


def _best_active_set(gram_RKK: Floats, right_RK: Floats) -> Floats:
    best_RK, lowest_R = np.zeros_like(right_RK), np.full(len(right_RK), np.inf)
    for active_K in _ACTIVE_SETS_K:
        kept_KK = np.outer(active_K, active_K)
        factors_RK = _solve(gram_RKK * kept_KK + np.diag(1 - active_K), right_RK * active_K)
        value_R = -(factors_RK * right_RK).sum(axis=1)
        better_R = (factors_RK >= 0).all(axis=1) & (value_R < lowest_R)
        best_RK[better_R], lowest_R[better_R] = factors_RK[better_R], value_R[better_R]
    return best_RK


def _solve(matrices_Rkk: Floats, right_Rk: Floats) -> Floats:
    """Symmetric systems, with a ridge of rounding size so that no singular one raises."""
    size = matrices_Rkk.shape[-1]
    ridge_R = 1e-14 * np.trace(matrices_Rkk, axis1=1, axis2=2) + 1e-300
    return np.linalg.solve(matrices_Rkk + ridge_R[:, None, None] * np.eye(size), right_Rk[:, :, None])[:, :, 0]


def huber_weights(residuals: Floats, delta: float) -> Floats:
    """Weights of the least squares whose solution minimises the Huber loss: 1 within delta, delta / |r| beyond."""
    return np.minimum(1.0, delta / np.maximum(np.abs(residuals), 1e-300))


def search(
    design: Design, targets_RP: Floats, exponents_R2: Floats, delta: float, iterations: int = 30
) -> tuple[Floats, Floats, Floats]:
    """Exponents (R, 2), factors (R, K) and residuals (R, P) of R fits with the Huber loss, each from its own start.

    Levenberg-Marquardt on the two exponents with the projected (Kaufman) Jacobian; the Huber weights follow the
    residuals after every step, and a step is taken where it lowers the quadratic that lies above the Huber loss.

    Args:
        targets_RP: losses over `design.scale_P`.
        exponents_R2: starts.
        delta: where the Huber loss turns from quadratic to linear, as a relative residual.
    """
    weights_RP = np.ones_like(targets_RP)
    damping_R = np.full(len(targets_RP), 1e-3)
    exponents_R2 = exponents_R2.copy()
    for _ in range(iterations):
        columns_RPK, factors_RK, residuals_RP = _projected(design, targets_RP, exponents_R2, weights_RP)
        steps_R2 = _steps(design, columns_RPK, factors_RK, residuals_RP, weights_RP, damping_R)
        moved_R2 = np.clip(exponents_R2 + steps_R2, *EXPONENTS)
        _, _, tried_RP = _projected(design, targets_RP, moved_R2, weights_RP)
        better_R = (weights_RP * tried_RP**2).sum(axis=1) <= (weights_RP * residuals_RP**2).sum(axis=1)
        largest = np.abs(np.where(better_R[:, None], moved_R2 - exponents_R2, 0)).max()
        exponents_R2[better_R] = moved_R2[better_R]
        damping_R = np.clip(np.where(better_R, damping_R / 5, damping_R * 5), 1e-10, 1e10)
        before_RP = weights_RP
        weights_RP = huber_weights(np.where(better_R[:, None], tried_RP, residuals_RP), delta)
        if better_R.all() and largest < 1e-7 and np.abs(weights_RP - before_RP).max() < 1e-4:
            break
    _, factors_RK, residuals_RP = _projected(design, targets_RP, exponents_R2, weights_RP)
    return exponents_R2, factors_RK, residuals_RP


def _projected(
    design: Design, targets_RP: Floats, exponents_R2: Floats, weights_RP: Floats
) -> tuple[Floats, Floats, Floats]:
    columns_RPK = design.columns(exponents_R2)
    factors_RK = non_negative_factors(columns_RPK, targets_RP, weights_RP)
    return columns_RPK, factors_RK, (columns_RPK @ factors_RK[:, :, None])[:, :, 0] - targets_RP


def projected_slopes(design: Design, columns_RPK: Floats, factors_RK: Floats, weights_RP: Floats) -> Floats:
    """The slopes less what E, A, B (those that are not held at zero) would make good: Kaufman's Jacobian, (R, P, 2)."""
    free_RK = (factors_RK > 0).astype(float)
    columns_RPK = columns_RPK * free_RK[:, None, :]
    slopes_RP2 = design.slopes(columns_RPK, factors_RK)
    weighted_RKP = np.swapaxes(columns_RPK * weights_RP[:, :, None], 1, 2)
    gram_RKK = weighted_RKP @ columns_RPK + np.eye(3) * (1 - free_RK)[:, None, :]
    ridge_R = 1e-14 * np.trace(gram_RKK, axis1=1, axis2=2) + 1e-300
    made_good_RK2 = np.linalg.solve(gram_RKK + ridge_R[:, None, None] * np.eye(3), weighted_RKP @ slopes_RP2)
    return slopes_RP2 - columns_RPK @ made_good_RK2


def _steps(
    design: Design, columns_RPK: Floats, factors_RK: Floats, residuals_RP: Floats, weights_RP: Floats, damping_R: Floats
) -> Floats:
    slopes_RP2 = projected_slopes(design, columns_RPK, factors_RK, weights_RP)
    weighted_R2P = np.swapaxes(slopes_RP2 * weights_RP[:, :, None], 1, 2)
    hessian_R22 = weighted_R2P @ slopes_RP2
    gradient_R2 = (weighted_R2P @ residuals_RP[:, :, None])[:, :, 0]
    diagonal_R2 = np.einsum("rkk->rk", hessian_R22)
    damped_R22 = hessian_R22 + np.eye(2) * (damping_R[:, None] * diagonal_R2 + 1e-300)[:, None, :]
    return np.clip(_solve(damped_R22, -gradient_R2), -0.5, 0.5)
