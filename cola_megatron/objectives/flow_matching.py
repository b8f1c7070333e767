"""Conditional flow matching on latents (paper section 2, stage 2).

    z_t = (1 - t) z0 + t z1,   u = z1 - z0,   L_FM = E || v(z_t, t; sg(z0^(<b))) - sg(u) ||^2

The gradient of L_FM reaches the encoder through z_t, and only through it. Shapes: S latents, B batch, C channels.
"""

import torch

from cola_megatron.objectives.averages import mean_over_counted


def noisy_latents(
    z0_SBC: torch.Tensor, z1_SBC: torch.Tensor, t_SB: torch.Tensor, at_zero_SB: torch.Tensor
) -> torch.Tensor:
    """z_t; positions of a clean prefix are the detached z0, for they are context."""
    t = t_SB[..., None]
    return torch.where(at_zero_SB[..., None], z0_SBC.detach(), (1 - t) * z0_SBC + t * z1_SBC)


def flow_matching_loss(
    velocity_SBC: torch.Tensor,
    z0_SBC: torch.Tensor,
    z1_SBC: torch.Tensor,
    at_zero_SB: torch.Tensor,
    counted_SB: torch.Tensor,
) -> torch.Tensor:
    """Squared error over channels and over the counted positions outside clean prefixes."""
    return mean_over_counted(squared_error(velocity_SBC, z0_SBC, z1_SBC), counted_SB & ~at_zero_SB)


def squared_error(velocity_SBC: torch.Tensor, z0_SBC: torch.Tensor, z1_SBC: torch.Tensor) -> torch.Tensor:
    """|| v - (z1 - z0) ||^2 / C at each position, (S, B); the target is detached."""
    target_SBC = (z1_SBC - z0_SBC).detach()
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
