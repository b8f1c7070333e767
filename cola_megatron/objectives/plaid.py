"""Token-aligned continuous diffusion: the variational bound of Plaid (Gulrajani and Hashimoto, arXiv 2305.18619), which
is that of a variational diffusion model (Kingma et al., arXiv 2107.00630) over the embeddings e of the tokens.

    q(z_t | x) = N(alpha_t e(x), sigma_t^2 I),   alpha_t^2 = sigmoid(-gamma_t),   sigma_t^2 = sigmoid(gamma_t)

so gamma_t = -log(alpha_t^2 / sigma_t^2) rises from gamma_0 (nearly clean) to gamma_1 (nearly noise), and

    -log p(x) <= E[-log p(x | z_0)]                                              reconstruction
                 + KL(q(z_1 | x) || N(0, I))                                     prior
                 + 1/2 int_0^1 gamma'_t exp(-gamma_t) E || e(x) - x_hat(z_t, t) ||^2 dt   diffusion

All embeddings have length 1. Shapes: S positions, B batch, C channels of an embedding. A noise level (B,) is float64:
differences of levels and exp(-gamma) are taken in it.
"""

import torch
from torch.nn import functional as F


def alpha_sigma(gamma_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale of the embedding and of the noise at a noise level; alpha^2 + sigma^2 = 1."""
    return torch.sigmoid(-gamma_B).sqrt(), torch.sigmoid(gamma_B).sqrt()


def noisy_embeddings(x_SBC: torch.Tensor, noise_SBC: torch.Tensor, gamma_B: torch.Tensor) -> torch.Tensor:
    """z_t = alpha_t x + sigma_t eps, in the type of x."""
    alpha_B, sigma_B = (level.to(x_SBC.dtype) for level in alpha_sigma(gamma_B))
    return alpha_B[:, None] * x_SBC + sigma_B[:, None] * noise_SBC


def unit_variance(z_SBC: torch.Tensor, gamma_B: torch.Tensor) -> torch.Tensor:
    """z_t over its standard deviation, where an embedding of length 1 has variance 1 / C in each channel."""
    variance_B = torch.sigmoid(-gamma_B) / z_SBC.shape[-1] + torch.sigmoid(gamma_B)
    return z_SBC * variance_B.rsqrt().to(z_SBC.dtype)[:, None]


def likelihood_scale(gamma_B: torch.Tensor) -> torch.Tensor:
    """alpha / sigma^2: log N(z; alpha e, sigma^2 I) = (alpha / sigma^2) <z, e> + what all e of one length share."""
    return torch.sigmoid(-gamma_B).sqrt() / torch.sigmoid(gamma_B)


def prior_kl(x_SBC: torch.Tensor, gamma_end_B: torch.Tensor) -> torch.Tensor:
    """KL(N(alpha_1 x, sigma_1^2 I) || N(0, I)) at each position, (S, B), float64, nats."""
    alpha_squared_B, channels = torch.sigmoid(-gamma_end_B), x_SBC.shape[-1]
    # sigma^2 - 1 = -alpha^2 and log sigma^2 = log sigmoid(gamma): no difference of numbers near 1.
    of_noise_B = channels * (-alpha_squared_B - F.logsigmoid(gamma_end_B))
    return 0.5 * (alpha_squared_B * x_SBC.square().sum(-1).double() + of_noise_B)


def squared_distance(x_SBC: torch.Tensor, estimate_SBC: torch.Tensor) -> torch.Tensor:
    """|| x - x_hat ||^2 at each position, (S, B)."""
    return (x_SBC - estimate_SBC).square().sum(-1)


def diffusion_term(distance_SB: torch.Tensor, gamma_B: torch.Tensor, slope_B: torch.Tensor) -> torch.Tensor:
    """1/2 gamma' exp(-gamma) || x - x_hat ||^2, (S, B), float64: its mean over t uniform in [0, 1] is the third term.

    Args:
        slope_B: d gamma / dt.
    """
    return 0.5 * slope_B * (-gamma_B).exp() * distance_SB.double()


def tempered_estimate(
    z_SBC: torch.Tensor, estimate_SBC: torch.Tensor, gamma_B: torch.Tensor, temperature: float
) -> torch.Tensor:
    """The estimate of x that belongs to eps_hat / temperature, where eps_hat = (z - alpha x_hat) / sigma."""
    alpha_B1, sigma_B1 = (level[:, None] for level in alpha_sigma(gamma_B))
    noise_SBC = (z_SBC - alpha_B1 * estimate_SBC) / sigma_B1
    return (z_SBC - sigma_B1 * noise_SBC / temperature) / alpha_B1


def ancestral_step(
    z_SBC: torch.Tensor,
    estimate_SBC: torch.Tensor,
    noise_SBC: torch.Tensor,
    gamma_from_B: torch.Tensor,
    gamma_to_B: torch.Tensor,
) -> torch.Tensor:
    """One draw of q(z_s | z_t, x) at x = x_hat, for gamma_s < gamma_t.

    With c = 1 - exp(gamma_s - gamma_t):  z_s = alpha_s ((1 - c) z_t / alpha_t + c x_hat) + sigma_s sqrt(c) eps.
    """
    alpha_from_B1, _ = (level[:, None] for level in alpha_sigma(gamma_from_B))
    alpha_to_B1, sigma_to_B1 = (level[:, None] for level in alpha_sigma(gamma_to_B))
    c_B1 = -torch.expm1(gamma_to_B - gamma_from_B)[:, None]
    mean_SBC = alpha_to_B1 * ((1 - c_B1) * z_SBC / alpha_from_B1 + c_B1 * estimate_SBC)
    return mean_SBC + sigma_to_B1 * c_B1.sqrt() * noise_SBC
