"""Conditional flow matching on latents (paper section 2, stage 2).

    z_t = (1 - t) z0 + t z1,   u = z1 - z0,   L_FM = E || v(z_t, t; z0^(<b)) - u ||^2

Which of these carry gradient is said in `families/cola/loss.py`. Shapes: S latents, B batch, C channels, N blocks.
"""

import torch

from cola_megatron.objectives.averages import mean_over_counted


def times_of_positions(t_BN: torch.Tensor, length: int) -> torch.Tensor:
    """Times of blocks (B, N), or of samples (B, 1), at each of `length` positions: (S, B)."""
    return t_BN.repeat_interleave(length // t_BN.shape[1], dim=1).t()


def noisy_latents(z0_SBC: torch.Tensor, z1_SBC: torch.Tensor, t_SB: torch.Tensor) -> torch.Tensor:
    """z_t = (1 - t) z0 + t z1."""
    t = t_SB[..., None]
    return (1 - t) * z0_SBC + t * z1_SBC


def flow_matching_loss(
    velocity_SBC: torch.Tensor, target_SBC: torch.Tensor, at_zero_SB: torch.Tensor, counted_SB: torch.Tensor
) -> torch.Tensor:
    """Squared error over channels and over the counted positions outside clean prefixes."""
    return mean_over_counted(squared_error(velocity_SBC, target_SBC), counted_SB & ~at_zero_SB)


def squared_error(velocity_SBC: torch.Tensor, target_SBC: torch.Tensor) -> torch.Tensor:
    """|| v - u ||^2 / C at each position, (S, B)."""
    return (velocity_SBC - target_SBC).square().mean(-1)


def constant_predictor_loss(sum_C: torch.Tensor, sum_square: float, count: int) -> float:
    """Loss of the best constant prediction of u = z1 - z0: its variance, averaged over the C channels.

    Args:
        sum_C: sum of u over positions, float64.
        sum_square: sum of u^2 over positions and channels.
        count: number of positions.
    """
    channels = sum_C.numel()
    return float(sum_square / (count * channels) - (sum_C / count).square().mean())
