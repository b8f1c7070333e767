"""The masked second view: L_mask is the cross-entropy at positions whose input was replaced by [MASK]."""

import torch

from cola_megatron.objectives.averages import mean_over_counted


def masked_view(tokens_BL: torch.Tensor, masked_BL: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    """The input with the chosen tokens replaced by [MASK]."""
    return tokens_BL.masked_fill(masked_BL, mask_token_id)


def mask_loss(nll_TB: torch.Tensor, masked_BL: torch.Tensor, counted_TB: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood over the masked positions that count."""
    return mean_over_counted(nll_TB, counted_TB & masked_BL.t())
