"""x_hat(z_t, t): the transformer between Plaid's way in and its categorical way out, for training and generation.

Shapes: S positions, B batch (R some of its samples), L tokens, C channels of an embedding, H hidden, V vocabulary on
this rank.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from cola_megatron.families.plaid.categorical import Prediction, predict, with_output_prior
from cola_megatron.families.plaid.network import PlaidParts
from cola_megatron.layers.attention import AttentionContext
from cola_megatron.layers.masks import block_causal_mask
from cola_megatron.layers.packed_documents import Kernel
from cola_megatron.models.transformer import Transformer
from cola_megatron.objectives.plaid import likelihood_scale
from cola_megatron.parallel.megatron import gather_from_tensor_model_parallel_region
from cola_megatron.parallel.sequence_parts import own_part, whole_sequence


class Denoiser:
    """The two networks as one function.

    Args:
        chunk: tokens whose logits exist at once; 0: all.
        kernel: of attention inside documents; None: a mask.
    """

    def __init__(self, transformer: Transformer, plaid: PlaidParts, chunk: int = 0, kernel: Kernel | None = None):
        self.transformer, self.plaid, self.chunk, self.kernel = transformer, plaid, chunk, kernel
        self.groups = transformer.groups

    def context(self, length: int, device: torch.device, documents_BL: torch.Tensor | None = None) -> AttentionContext:
        """Every position sees every other one, or every one of its document."""
        mask = block_causal_mask(length, length, device, documents_BL, self.kernel)
        return self.transformer.context(length, device, mask)

    def hidden(
        self,
        z_SBC: torch.Tensor,
        gamma_B: torch.Tensor,
        estimate_SBC: torch.Tensor | None,
        context: AttentionContext,
    ) -> torch.Tensor:
        """The last block's output, (S, B, H)."""
        return self.transformer.run_blocks(self.plaid.input(z_SBC, gamma_B, estimate_SBC), context)

    def prediction(
        self,
        hidden_SBH: torch.Tensor,
        z_SBC: torch.Tensor,
        gamma_B: torch.Tensor,
        output_prior_B: torch.Tensor,
        embeddings_VC: torch.Tensor,
        tokens_SB: torch.Tensor,
        trained_B: torch.Tensor,
    ) -> Prediction:
        """The last block's output -> x_hat and the cross-entropy of the tokens, of whole sequences on every rank.

        With `chunk` the logits are computed again in the backward pass. A rank of a context computes those of its part
        of the sequence.

        Args:
            output_prior_B: weight of log p(z_t | token) in the logits.
            trained_B: 1 for samples that train the embeddings, else 0.
        """

        def of_chunk(hidden_SBH: torch.Tensor, scaled_z_SBC: torch.Tensor, tokens_SB: torch.Tensor) -> Prediction:
            logits_SBV = self._logits(hidden_SBH, scaled_z_SBC, embeddings_VC, trained_B)
            return predict(logits_SBV, embeddings_VC, tokens_SB, trained_B, self.groups)

        hidden_SBH = self.transformer.to_head(hidden_SBH)
        scaled_z_SBC = _scaled(own_part(z_SBC, self.groups), gamma_B, output_prior_B)
        tokens_SB = own_part(tokens_SB, self.groups)
        chunks = list(self._chunks(len(tokens_SB), tokens_SB.shape[1]))
        run: Callable[..., Any] = of_chunk
        if len(chunks) > 1 and torch.is_grad_enabled():

            def run(*parts: torch.Tensor) -> Any:
                return checkpoint(of_chunk, *parts, use_reentrant=False, preserve_rng_state=False)

        found = [run(hidden_SBH[here], scaled_z_SBC[here], tokens_SB[here]) for here in chunks]
        of_own_part = [torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*found, strict=True)]
        return Prediction(*(whole_sequence(x_SB, self.groups) for x_SB in of_own_part))

    @torch.no_grad()
    def estimate(
        self,
        z_SBC: torch.Tensor,
        gamma_B: torch.Tensor,
        output_prior_B: torch.Tensor,
        embeddings_VC: torch.Tensor,
        estimate_SBC: torch.Tensor | None,
        context: AttentionContext,
    ) -> torch.Tensor:
        """x_hat alone, without gradients."""
        hidden_SBH = self.hidden(z_SBC, gamma_B, estimate_SBC, context)
        nobody_B = torch.zeros_like(output_prior_B)
        no_tokens_SB = torch.zeros(z_SBC.shape[:2], dtype=torch.long, device=z_SBC.device)
        return self.prediction(
            hidden_SBH, z_SBC, gamma_B, output_prior_B, embeddings_VC, no_tokens_SB, nobody_B
        ).estimate_SBC

    @torch.no_grad()
    def first_estimate(
        self,
        z_SBC: torch.Tensor,
        gamma_B: torch.Tensor,
        output_prior_B: torch.Tensor,
        embeddings_VC: torch.Tensor,
        chosen_B: torch.Tensor,
        documents_BL: torch.Tensor | None,
    ) -> torch.Tensor:
        """What the chosen samples are told: x_hat of a pass of their own; 0 for the others."""
        rows_R = chosen_B.nonzero()[:, 0]
        if not len(rows_R):
            # ZeRO 3 gathers parameters on all ranks in step, so every rank runs the pass.
            rows_R = torch.zeros(1, dtype=torch.long, device=z_SBC.device)
        context = self.context(len(z_SBC), z_SBC.device, None if documents_BL is None else documents_BL[rows_R])
        estimate_SRC = self.estimate(
            z_SBC[:, rows_R], gamma_B[rows_R], output_prior_B[rows_R], embeddings_VC, None, context
        )
        told_SBC = torch.zeros_like(z_SBC).index_copy(1, rows_R, estimate_SRC.to(z_SBC.dtype))
        return told_SBC * chosen_B[:, None]

    def to_head(self, hidden_SBH: torch.Tensor) -> torch.Tensor:
        """The last block's output, normed, as `logits` takes it."""
        return self.transformer.to_head(hidden_SBH)

    def logits(
        self, hidden_SBH: torch.Tensor, z_SBC: torch.Tensor, gamma_B: torch.Tensor, embeddings_VC: torch.Tensor
    ) -> torch.Tensor:
        """What `to_head` gave -> logits with the whole output prior of this rank's positions, (S, B, V), float32."""
        nobody_B = torch.zeros(z_SBC.shape[1], device=z_SBC.device)
        scaled_z_SBC = _scaled(own_part(z_SBC, self.groups), gamma_B, torch.ones_like(nobody_B))
        return self._logits(hidden_SBH, scaled_z_SBC, embeddings_VC, nobody_B)

    def whole(self, logits_SBV: torch.Tensor) -> torch.Tensor:
        """Logits over the whole vocabulary, on every rank."""
        gathered = gather_from_tensor_model_parallel_region(logits_SBV, group=self.groups.tensor_group)
        return gathered[..., : self.transformer.vocab_size]

    def _logits(
        self,
        hidden_SBH: torch.Tensor,
        scaled_z_SBC: torch.Tensor,
        embeddings_VC: torch.Tensor,
        trained_B: torch.Tensor,
    ) -> torch.Tensor:
        logits_SBV = self.transformer.head(hidden_SBH)
        return with_output_prior(logits_SBV, scaled_z_SBC, embeddings_VC, trained_B, self.groups)

    def _chunks(self, length: int, batch: int) -> Iterator[slice]:
        """Positions, so that `chunk` tokens of the whole batch are computed at once."""
        size = max(1, self.chunk // batch) if self.chunk else length
        for start in range(0, length, size):
            yield slice(start, start + size)


def _scaled(z_SBC: torch.Tensor, gamma_B: torch.Tensor, output_prior_B: torch.Tensor) -> torch.Tensor:
    return z_SBC * (likelihood_scale(gamma_B) * output_prior_B).to(z_SBC.dtype)[:, None]
