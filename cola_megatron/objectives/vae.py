"""Terms of the Text VAE objective (paper section 2, stages 1 and 2).

    L_VAE = -E log p(x|z0) + beta * posterior term + lambda_mask * L_mask

All terms are in nats per token, averaged over the counted positions: padding is none. Shapes: S latents, B batch, C
latent channels, P tokens per latent; T = S * P tokens.
"""

import math
from typing import NamedTuple

import torch

from cola_megatron.objectives.averages import mean_over_counted


class Posterior(NamedTuple):
    """Diagonal Gaussian q(z|x), float32: mean and log variance (S, B, C); logvar is None for a plain encoder."""

    mean: torch.Tensor
    logvar: torch.Tensor | None

    def of_first(self, count: int) -> "Posterior":
        """That of the first `count` of the batch: the texts, where their masked views stand behind them."""
        return Posterior(self.mean[:, :count], None if self.logvar is None else self.logvar[:, :count])

    def gaussian(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log variance; raises ValueError for a plain encoder, whose q(z|x) is a point."""
        if self.logvar is None:
            raise ValueError("a posterior without variance has no density: model.vae.variational=false")
        return self.mean, self.logvar


def sample_posterior(posterior: Posterior, noise_SBC: torch.Tensor) -> torch.Tensor:
    """z0 = mu + sigma * noise; the mean itself where the encoder is deterministic."""
    if posterior.logvar is None:
        return posterior.mean
    return posterior.mean + torch.exp(0.5 * posterior.logvar) * noise_SBC


def reconstruction_loss(nll_TB: torch.Tensor, counted_TB: torch.Tensor) -> torch.Tensor:
    """-E log p(x|z0), the mean over tokens of their negative log-likelihood."""
    return mean_over_counted(nll_TB, counted_TB)


def kl_to_standard_normal(posterior: Posterior, counted_SB: torch.Tensor, patch_size: int) -> torch.Tensor:
    """KL(q(z0|x) || N(0, I)) = 1/2 sum_C (mu^2 + sigma^2 - 1 - log sigma^2), per token."""
    mean, logvar = posterior.gaussian()
    return mean_over_counted(0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(-1), counted_SB) / patch_size


def negative_entropy(posterior: Posterior, counted_SB: torch.Tensor, patch_size: int) -> torch.Tensor:
    """E log q(z0|x) = -1/2 sum_C (log(2 pi e) + log sigma^2), per token."""
    _, logvar = posterior.gaussian()
    entropy_SB = 0.5 * (math.log(2 * math.pi * math.e) + logvar).sum(-1)
    return -mean_over_counted(entropy_SB, counted_SB) / patch_size


def kl_to_reference(
    posterior: Posterior, reference: Posterior, counted_SB: torch.Tensor, patch_size: int
) -> torch.Tensor:
    """E KL(q(z0|x) || q_ref(z0|x)) between diagonal Gaussians, per token; q_ref is the frozen stage-1 encoder."""
    mean, logvar = posterior.gaussian()
    reference_mean, reference_logvar = reference.gaussian()
    ratio = (logvar - reference_logvar).exp()
    distance = (mean - reference_mean).square() * (-reference_logvar).exp()
    kl_SB = 0.5 * (ratio + distance - 1 + reference_logvar - logvar).sum(-1)
    return mean_over_counted(kl_SB, counted_SB) / patch_size


def measured_logsnr(mean_square: float, mean_variance: float) -> float:
    """log(mean mu^2 / mean sigma^2), natural logarithm: how far the posterior stands above its own noise."""
    return math.log(mean_square / mean_variance)
