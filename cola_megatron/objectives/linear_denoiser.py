"""The best linear denoiser: what mean and covariance of one latent alone say of the velocity.

    E[u | z_t] = -mu + A (z_t - (1 - t) mu),   A = (t I - (1 - t) Sigma) ((1 - t)^2 Sigma + t^2 I)^-1

for z_t = (1 - t) z0 + t z1, u = z1 - z0, z1 ~ N(0, I) and z0 of mean mu and covariance Sigma. It knows no word of the
text, and no other latent. Its expected squared error is a sum over the eigenvalues of Sigma:

    L(t) = 1/C sum_c lambda_c / ((1 - t)^2 lambda_c + t^2)

Shapes: C channels; a moment matrix is that of [1, z_t, u], (1 + 2 C, 1 + 2 C), float64.
"""

import torch


def moment_matrix(zt_PC: torch.Tensor, u_PC: torch.Tensor, weight_P: torch.Tensor) -> torch.Tensor:
    """Sum over positions P of w x x^T with x = [1, z_t, u]: all that any linear predictor's error needs to know."""
    x_PK = torch.cat((torch.ones_like(weight_P)[:, None], zt_PC.double(), u_PC.double()), dim=1)
    return (weight_P[:, None] * x_PK).t() @ x_PK


def moments_of_latents(matrices: torch.Tensor, times_M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (C,) and covariance (C, C) of z0 = z_t - t u, from the moment matrices (M, K, K) at M times."""
    channels = (matrices.shape[-1] - 1) // 2
    total = torch.zeros(channels + 1, channels + 1, dtype=torch.float64, device=matrices.device)
    for matrix, t in zip(matrices, times_M.tolist(), strict=True):
        # [1, z0] as a linear map of [1, z_t, u]
        to_z0 = torch.zeros(channels + 1, 2 * channels + 1, dtype=torch.float64, device=matrices.device)
        to_z0[0, 0] = 1
        to_z0[1:, 1 : channels + 1] = torch.eye(channels)
        to_z0[1:, channels + 1 :] = -t * torch.eye(channels)
        total += to_z0 @ matrix @ to_z0.t()
    return covariance_of_moments(total)


def covariance_of_moments(moments_KK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (C,) and covariance (C, C) of z, from the moment matrix of [1, z], (1 + C, 1 + C)."""
    mean_C = moments_KK[0, 1:] / moments_KK[0, 0]
    return mean_C, moments_KK[1:, 1:] / moments_KK[0, 0] - torch.outer(mean_C, mean_C)


def linear_predictor(t: float, mean_C: torch.Tensor, covariance_CC: torch.Tensor) -> torch.Tensor:
    """[b, A]: E[u | z_t] = b + A z_t, (C, 1 + C)."""
    identity = torch.eye(len(mean_C), dtype=mean_C.dtype, device=mean_C.device)
    # A pseudo-inverse, because at t = 0 a direction that never varies has no variance in z_t either.
    of_zt = torch.linalg.pinv((1 - t) ** 2 * covariance_CC + t**2 * identity, hermitian=True)
    slope_CC = (t * identity - (1 - t) * covariance_CC) @ of_zt
    intercept_C = -mean_C - (1 - t) * slope_CC @ mean_C
    return torch.cat((intercept_C[:, None], slope_CC), dim=1)


def linear_error(matrix_KK: torch.Tensor, predictor: torch.Tensor) -> float:
    """Mean over positions of || u - (b + A z_t) ||^2 / C, from their moment matrix."""
    channels = predictor.shape[0]
    residual = torch.cat((-predictor, torch.eye(channels, dtype=torch.float64, device=predictor.device)), dim=1)
    return float((residual @ matrix_KK * residual).sum() / (channels * matrix_KK[0, 0]))


def expected_linear_error(t: float, covariance_CC: torch.Tensor) -> float:
    """L(t) of the best linear predictor in expectation over z1; at t = 0 the channels that never vary count as 1."""
    variance_C = torch.linalg.eigvalsh(covariance_CC).clamp(min=0)
    below_C = (1 - t) ** 2 * variance_C + t**2
    return float(torch.where(below_C > 0, variance_C / below_C, torch.ones_like(below_C)).mean())
