"""Masked diffusion of tokens: LLaDA (arXiv 2502.09992), and its form by blocks, BD3-LM (arXiv 2503.09573).

A token becomes [MASK] with probability t, each by itself, and the network predicts it from what is left:

    -log p(x) <= E_t E_M  1/t sum_{i in M} -log p(x_i | x without M),   t ~ U(0, 1],  i in M with probability t
               = E_l E_M  n/l sum_{i in M} -log p(x_i | x without M),   l ~ U{1 .. n},  M of l out of n tokens

The first is what training draws, the second has less variance: it is what measurements draw. By blocks, each block has
a t or an l of its own, and sees the clean blocks before it: the bounds of the blocks add up to that of the text. Blocks
of one token give the autoregressive factorisation, one block of the whole sequence is LLaDA.

Shapes: B batch, L tokens, N blocks of L / N tokens each.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from cola_megatron.objectives.flow_matching import times_of_positions

_GOLDEN_RATIO = 0x9E3779B97F4A7C15  # its fractional part, in units of 2^-64


def low_discrepancy(offset: float, index: int) -> float:
    """(offset + index * golden ratio) mod 1: uniform for a uniform offset, and any run of indices covers [0, 1) evenly.

    In integers, so that it is exact for an index of any size.
    """
    return (offset + index * _GOLDEN_RATIO % 2**64 / 2**64) % 1.0


def masking_times(levels: NDArray[np.float64], min_time: float) -> NDArray[np.float32]:
    """Levels in [0, 1) -> times t in (min_time, 1], float32."""
    return (1.0 - (1.0 - min_time) * levels).astype(np.float32)


def masked_positions(uniform_BL: torch.Tensor, time_BN: torch.Tensor, counted_BL: torch.Tensor) -> torch.Tensor:
    """Which tokens become [MASK]: those whose uniform draw lies below the time of their block, but for padding."""
    return (uniform_BL < times_of_positions(time_BN, uniform_BL.shape[1]).t()) & counted_BL


def inverse_time_weights(masked_BL: torch.Tensor, time_BN: torch.Tensor) -> torch.Tensor:
    """1/t at masked positions and 0 elsewhere, float32, (B, L)."""
    return masked_BL / times_of_positions(time_BN, masked_BL.shape[1]).t()


def number_to_mask(level_BN: torch.Tensor, candidates_BN: torch.Tensor) -> torch.Tensor:
    """l of n candidates: a level that is uniform on [0, 1) gives each of 1 .. n alike; 0 where there is none."""
    chosen_BN = (level_BN.double() * candidates_BN).long() + 1
    return torch.minimum(chosen_BN, candidates_BN.long())


def mask_in_order(order_BL: torch.Tensor, candidates_BL: torch.Tensor, number_BN: torch.Tensor) -> torch.Tensor:
    """In every block the `number` candidates that come first in order, boolean (B, L)."""
    blocks = number_BN.shape[1]
    last_BL = order_BL.masked_fill(~candidates_BL, torch.inf)
    rank_BNS: torch.Tensor = last_BL.unflatten(1, (blocks, -1)).argsort(stable=True, dim=-1).argsort(dim=-1)
    first_BL: torch.Tensor = (rank_BNS < number_BN[..., None]).flatten(1)
    return first_BL & candidates_BL


def subset_weights(masked_BL: torch.Tensor, candidates_BL: torch.Tensor, blocks: int) -> torch.Tensor:
    """n/l of each block at its masked positions and 0 elsewhere, float64, (B, L)."""
    masked_BNS, candidates_BNS = (x_BL.unflatten(1, (blocks, -1)).double() for x_BL in (masked_BL, candidates_BL))
    share_BN1 = candidates_BNS.sum(-1, keepdim=True) / masked_BNS.sum(-1, keepdim=True).clamp(min=1)
    weight_BL: torch.Tensor = (masked_BNS * share_BN1).flatten(1)
    return weight_BL
