"""Integrating dz/dt = v(z, t) from noise (t = 1) to a clean latent (t = 0)."""

from collections.abc import Callable

import torch


def uniform_grid(steps: int, device: torch.device) -> torch.Tensor:
    """steps + 1 times from 1 to 0, float32."""
    return torch.linspace(1000.0, 0.0, steps + 1, device=device) / 1000.0


def euler(
    velocity: Callable[[torch.Tensor, int], torch.Tensor],
    z_SBC: torch.Tensor,
    times: torch.Tensor,
    hold: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """z <- z - (t_i - t_{i+1}) v(z, t_i).

    Args:
        velocity: v at the i-th time of the grid.
        hold: puts back the positions that must not move (a prompt's clean latents); applied before the first and
            after every step.
    """
    z_SBC = hold(z_SBC)
    for step, (now, later) in enumerate(zip(times[:-1].tolist(), times[1:].tolist(), strict=True)):
        z_SBC = hold(z_SBC - velocity(z_SBC, step) * (now - later))
    return z_SBC
