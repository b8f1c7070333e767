"""The loss of masked diffusion, from a batch to its terms: the definition.

    L = E_t E_M  1/n sum_{i in M} 1/t -log p(x_i | x_t),   t ~ U(min_time, 1],  M: each of n tokens with probability t

By blocks, t is the block's and the network sees the clean blocks before it (`copies.py`). Training runs the same as a
chain of steps (`chain.py`); `tests/test_masked_diffusion.py` holds both equal, bit for bit. A batch has the fields of
`objectives.samples.positions` and of `draws.sample_draws`, stacked over B.

Shapes: B batch, L tokens, S positions of the network's sequence, H hidden, V vocabulary on this rank.
"""

from collections.abc import Mapping

import torch

from cola_megatron.config.masked_diffusion import MaskedDiffusionConfig
from cola_megatron.families.masked_diffusion.copies import Copies, visible_positions
from cola_megatron.layers.embedding import token_cross_entropy
from cola_megatron.models.transformer import Transformer
from cola_megatron.objectives.averages import mean_over_counted
from cola_megatron.objectives.masked_diffusion import inverse_time_weights, masked_positions

LOSS_WEIGHTS = {"bound": 1.0}
"""Of each term."""


def masked_diffusion_loss(
    transformer: Transformer, batch: Mapping[str, torch.Tensor], config: MaskedDiffusionConfig
) -> dict[str, torch.Tensor]:
    """`bound`, float32: an upper bound of -log p(x) in nats per token; it is the `loss`."""
    tokens_BL, time_BN = batch["tokens"], batch["time"]
    counted_BL, documents_BL = visible_positions(
        batch["counted"], batch["documents"], batch.get("length"), config.data.document_attention
    )
    masked_BL = masked_positions(batch["mask_uniform"], time_BN, counted_BL)
    noisy_BL = tokens_BL.masked_fill(masked_BL, config.model.mask_id)

    copies = Copies(config.data.sequence_length, config.block_size)
    x_SBH = transformer.embed(copies.tokens(tokens_BL, noisy_BL))
    x_SBH = transformer.run_blocks(x_SBH, copies.context(transformer, tokens_BL.device, documents_BL))
    of_noisy_LBH = transformer.to_head(x_SBH)[copies.clean_length :]

    nll_LB = token_cross_entropy(transformer.head(of_noisy_LBH), tokens_BL.t())
    weight_LB = inverse_time_weights(masked_BL, time_BN).t()
    bound = mean_over_counted(nll_LB * weight_LB, counted_BL.t())
    return {"loss": bound, "bound": bound}
