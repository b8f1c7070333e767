"""Rotary position embedding in float32: half-split pairs (Text VAE) and interleaved pairs (DiT)."""

from typing import NamedTuple

import torch


class RotaryTable(NamedTuple):
    """cos and sin of position * frequency, (S, 1 or B, 1, rotary_dim / 2), float32."""

    cos: torch.Tensor
    sin: torch.Tensor


def rotary_table(
    positions: torch.Tensor, rotary_dim: int, base: float, precision: torch.dtype = torch.float32
) -> RotaryTable:
    """Angles position * base^(-2i / rotary_dim) for i < rotary_dim / 2.

    Args:
        positions: (S,) or (S, B) integers.
        precision: what the frequencies are rounded to.
    """
    exponents = torch.arange(0, rotary_dim, 2, device=positions.device, dtype=torch.float32) / rotary_dim
    frequencies = (1.0 / base**exponents).to(precision).float()
    angles = positions.float()[..., None] * frequencies
    angles = angles[:, None, None] if positions.dim() == 1 else angles[:, :, None]
    return RotaryTable(angles.cos(), angles.sin())


def rotate_half_split(x_SBAD: torch.Tensor, table: RotaryTable) -> torch.Tensor:
    """Rotates the pairs (x_i, x_{i + D/2})."""
    first, second = x_SBAD.float().chunk(2, dim=-1)
    rotated = torch.cat((first * table.cos - second * table.sin, second * table.cos + first * table.sin), dim=-1)
    return rotated.to(x_SBAD.dtype)


def rotate_interleaved(x_SBAD: torch.Tensor, table: RotaryTable) -> torch.Tensor:
    """Rotates the pairs (x_2i, x_2i+1) of the first rotary_dim channels and leaves the others."""
    rotary_dim = 2 * table.cos.shape[-1]
    even, odd = x_SBAD[..., :rotary_dim].float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((even * table.cos - odd * table.sin, odd * table.cos + even * table.sin), dim=-1).flatten(-2)
    return torch.cat((rotated.to(x_SBAD.dtype), x_SBAD[..., rotary_dim:]), dim=-1)
