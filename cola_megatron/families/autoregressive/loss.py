"""The loss of the autoregressive language model, from a batch to its terms: the definition.

    L = - mean over samples, mean over their counted targets, of log p(x_(l+1) | x_1 .. x_l)

Position l predicts token l+1; the last position predicts nothing. A target counts where the token does: padding never.
Where documents share a sequence and attention reaches across them (as published), the first token of a document is
predicted like any other, from the document before it and its end-of-text token: that is how a model learns to begin.
Where attention stays inside documents (`data.document_attention`) it is left out: nothing that the position sees is of
the target's document.

Training runs the same as a chain of steps that a pipeline can cut (`chain.py`); `tests/test_autoregressive.py` holds
both equal, bit for bit. A batch has `tokens`, `counted` and `documents` (B, L) of `objectives.samples.positions`.

Shapes: B batch, L tokens, V vocabulary on this rank.
"""

from collections.abc import Mapping

import torch

from cola_megatron.config.autoregressive import AutoregressiveConfig
from cola_megatron.layers.embedding import token_cross_entropy
from cola_megatron.layers.masks import block_causal_mask
from cola_megatron.models.transformer import Transformer
from cola_megatron.objectives.averages import mean_over_counted

LOSS_WEIGHTS = {"next_token": 1.0}
"""Of each term."""


def autoregressive_loss(
    transformer: Transformer, batch: Mapping[str, torch.Tensor], config: AutoregressiveConfig
) -> dict[str, torch.Tensor]:
    """`next_token`, nats per token, float32; as the only term it is `loss` as well."""
    tokens_BL, by_document = batch["tokens"], config.data.document_attention
    documents_BL = batch["documents"] if by_document else None
    mask = block_causal_mask(tokens_BL.shape[1], 1, tokens_BL.device, documents_BL)
    logits_LBV = transformer(tokens_BL, mask)
    targets_LB, counted_LB = next_tokens(tokens_BL, batch["counted"], documents_BL)
    loss = mean_over_counted(token_cross_entropy(logits_LBV, targets_LB), counted_LB)
    return {"loss": loss, "next_token": loss}


def next_tokens(
    tokens_BL: torch.Tensor, counted_BL: torch.Tensor, documents_BL: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each position predicts, and whether that counts; (L, B) both. The last position's target is any token.

    Args:
        documents_BL: given where no position may predict a token of another document.
    """
    targets_BL, counts_BL = tokens_BL.roll(-1, dims=1), counted_BL.roll(-1, dims=1)
    counts_BL[:, -1] = False
    if documents_BL is not None:
        counts_BL = counts_BL & (documents_BL.roll(-1, dims=1) == documents_BL)
    return targets_BL.t().contiguous(), counts_BL.t().contiguous()
