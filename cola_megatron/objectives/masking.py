"""The masked second view: L_mask is the cross-entropy at positions whose input was replaced by [MASK]."""

import torch


def masked_view(tokens_BL: torch.Tensor, masked_BL: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    """The input with the chosen tokens replaced by [MASK]."""
    return tokens_BL.masked_fill(masked_BL, mask_token_id)


def mask_loss(nll_TB: torch.Tensor, masked_BL: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood over the masked positions.

    Every sample masks the same number of positions, so that the mean over a batch is the mean over its micro-batches.
    """
    weight_TB = masked_BL.t().to(nll_TB.dtype)
    return (nll_TB * weight_TB).sum() / weight_TB.sum()
