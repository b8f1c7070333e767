"""What each dimension of the latent holds, and which directions of it hold nothing: from a held-out measurement.

Shapes: S latents, B batch, C channels of a latent.
"""

from collections.abc import Iterator, Mapping

import torch

from cola_megatron.config import ColaConfig
from cola_megatron.models.steps import Step
from cola_megatron.objectives.linear_denoiser import covariance_of_moments

DEAD_BELOW = 1e-3
"""Share of the mean eigenvalue below which a direction without posterior noise counts as dead."""


def posterior_shapes(config: ColaConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the sums below."""
    channels = config.model.vae.latent_dim
    return {"sum_mean_moments": (1 + channels, 1 + channels), "sum_channels": (2, channels)}


def posterior_sums(variational: bool) -> Iterator[Step]:
    """Sums over counted latents: of [1, mu] [1, mu]^T, and per channel of sigma^2 and log sigma^2."""

    def weights(counted_BS: torch.Tensor, weight_B: torch.Tensor) -> torch.Tensor:
        return (counted_BS.t() * weight_B).double().flatten()

    def moments(mean_SBC: torch.Tensor, counted_BS: torch.Tensor, weight_B: torch.Tensor) -> torch.Tensor:
        weight_P = weights(counted_BS, weight_B)
        x_PK = torch.cat((torch.ones_like(weight_P)[:, None], mean_SBC.flatten(0, 1).double()), dim=1)
        return (weight_P[:, None] * x_PK).t() @ x_PK

    def channels(logvar_SBC: torch.Tensor, counted_BS: torch.Tensor, weight_B: torch.Tensor) -> torch.Tensor:
        logvar_PC, weight_P = logvar_SBC.flatten(0, 1).double(), weights(counted_BS, weight_B)
        return torch.stack((weight_P @ logvar_PC.exp(), weight_P @ logvar_PC))

    yield Step("mean, counted_latents, weight -> sum_mean_moments", moments)
    if variational:
        yield Step("logvar, counted_latents, weight -> sum_channels", channels)


def posterior_metrics(sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Statistics of q(z0 given x) over held-out latents, in the coordinates of the encoder.

    Returns:
        for each dimension i, `posterior_mean_square_<i>` (mean of mu^2) and, of a variational encoder,
        `posterior_variance_<i>` (mean of sigma^2) and `posterior_kl_<i>` (KL to N(0, 1) in nats);
        for each eigenvalue k of the covariance of z0 = mu + sigma eps, from the largest, `posterior_eigenvalue_<k>` and
        `posterior_signal_<k>`: the variance of mu along its eigenvector, the rest being posterior noise;
        `posterior_dead_directions`: in how many of these directions mu varies less than the noise (without noise: less
        than a thousandth of the mean eigenvalue). A decoder can read nothing there.
    """
    moments_KK = sums["sum_mean_moments"]
    count, (_, signal_CC) = moments_KK[0, 0], covariance_of_moments(moments_KK)
    mean_square_C = moments_KK.diagonal()[1:] / count
    of_dimensions = {"mean_square": mean_square_C}
    variance_C = torch.zeros_like(mean_square_C)
    if "sum_channels" in sums:
        variance_C, logvar_C = sums["sum_channels"] / count
        kl_C = 0.5 * (mean_square_C + variance_C - 1.0 - logvar_C)
        of_dimensions |= {"variance": variance_C, "kl": kl_C}
    metrics = {}
    covariance_CC = signal_CC + variance_C.diag()
    if covariance_CC.isfinite().all():  # a model that has diverged has no eigenvalues
        rising_C, vectors_CC = torch.linalg.eigh(covariance_CC)
        eigenvalue_C, vectors_CC = rising_C.flip(0), vectors_CC.flip(1)
        signal_C = (vectors_CC * (signal_CC @ vectors_CC)).sum(0).clamp(min=0)
        of_dimensions |= {"eigenvalue": eigenvalue_C, "signal": signal_C}
        noise_C = (
            eigenvalue_C - signal_C if "sum_channels" in sums else DEAD_BELOW * eigenvalue_C.mean().expand_as(signal_C)
        )
        metrics["posterior_dead_directions"] = float((signal_C < noise_C).sum())
    for name, values_C in of_dimensions.items():
        metrics |= {f"posterior_{name}_{index}": value for index, value in enumerate(values_C.tolist())}
    return metrics
