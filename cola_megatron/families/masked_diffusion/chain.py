"""Masked diffusion in training: the loss of `loss.py` as a chain of steps.

Shapes: B batch, W views of it stacked along the batch, L tokens, P of them in this rank's part of the noisy copy, N
blocks, S positions of the network's sequence, H hidden, V vocabulary on this rank.
"""

from collections.abc import Iterator, Sequence

import torch

from cola_megatron.config.masked_diffusion import MaskedDiffusionConfig
from cola_megatron.families.masked_diffusion.copies import Copies, require_no_mask_token, visible_positions
from cola_megatron.families.masked_diffusion.loss import LOSS_WEIGHTS
from cola_megatron.layers.embedding import token_cross_entropy
from cola_megatron.models.attention_chunks import attention_chunk
from cola_megatron.models.document_kernel import document_kernel
from cola_megatron.models.pipelined import PipelinedModel
from cola_megatron.models.steps import Step
from cola_megatron.models.transformer import Transformer
from cola_megatron.models.transformer_steps import transformer_steps
from cola_megatron.objectives.averages import mean_over_counted, weights_of_mean
from cola_megatron.objectives.masked_diffusion import inverse_time_weights, masked_positions
from cola_megatron.parallel import ProcessGroups
from cola_megatron.parallel.sequence_parts import counted_once, even_parts_from, own_part, whole_sequence


class MaskedDiffusion(PipelinedModel):
    """The network, and its loss.

    Called on a batch (the fields of `objectives.samples.positions` and of `draws.sample_draws`, stacked over B) it
    returns the loss and its one term, `bound`.

    Args:
        split: for each stage of the pipeline the number of its steps with parameters; None: all of them are here.
    """

    config: MaskedDiffusionConfig

    def __init__(self, config: MaskedDiffusionConfig, groups: ProcessGroups, split: Sequence[int] | None = None):
        super().__init__(groups, split)
        self.config, model = config, config.model
        length = config.data.sequence_length
        chunk = attention_chunk(config.training, length, groups.device)
        self.copies = Copies(length, config.block_size, chunk, document_kernel(config.training, groups.device))
        with self.under_construction():
            self.transformer = Transformer(model.vocab_size, model.transformer, groups, extra_rows=model.extra_rows)
        self.keep_own_stage()

    @property
    def batch_names(self) -> set[str]:
        """What every stage finds in its micro-batch."""
        names = {"tokens", "counted", "documents", "time", "mask_uniform"}
        return names | {"length"} if self.config.objective.random_length_share > 0 else names

    def steps(self) -> list[Step]:
        """One training pass in order."""
        return [
            *self._visibility(),
            Step("mask_uniform, time, counted_tokens -> masked", masked_positions),
            Step("tokens, masked -> network_tokens", self.noisy_tokens),
            *self.context_steps(of_documents=self._cuts_or_parts),
            *self._loss(),
        ]

    def weights(self) -> dict[str, float]:
        """Weight of each term of `steps()`."""
        return LOSS_WEIGHTS

    # What held-out measurements run as well.

    def noisy_tokens(self, tokens_BL: torch.Tensor, masked_WL: torch.Tensor) -> torch.Tensor:
        """The network's sequence (W, S): the texts as often as there are masks for them, masked."""
        if self.config.model.mask_token_id is not None:
            require_no_mask_token(tokens_BL, self.config.model.mask_token_id)
        clean_WL = tokens_BL.repeat(len(masked_WL) // len(tokens_BL), 1)
        return self.copies.tokens(clean_WL, clean_WL.masked_fill(masked_WL, self.config.model.mask_id))

    def context_steps(self, of_documents: bool, views: int = 1) -> Iterator[Step]:
        """-> context; it reads `token_documents` where attention stays inside of them."""
        copies, transformer, device = self.copies, self.transformer, self.groups.device
        if of_documents:
            yield Step(
                "token_documents -> context",
                lambda documents_BL: copies.context(transformer, device, documents_BL.repeat(views, 1)),
            )
        else:
            context = copies.context(transformer, device)
            yield Step("-> context", lambda: context)

    def network_steps(self, head: Step) -> Iterator[Step]:
        """network_tokens, context -> hidden, and then `head`, which reads it through `of_noisy_copy`."""
        recompute = self.config.training.activation_checkpointing
        return transformer_steps(self.transformer, head, "network_tokens", recompute)

    def of_noisy_copy(self, hidden_SBH: torch.Tensor) -> torch.Tensor:
        """What the head reads of the last block's output: (S, B, H) -> (P, B, H), alike on tensor-parallel ranks."""
        return even_parts_from(self.transformer.to_head(hidden_SBH), self.copies.clean_length, self.groups)

    # What training computes with them.

    @property
    def _cuts_or_parts(self) -> bool:
        return self.config.data.document_attention or self.config.objective.random_length_share > 0

    def _visibility(self) -> Iterator[Step]:
        by_document = self.config.data.document_attention
        if self.config.objective.random_length_share > 0:
            yield Step(
                "counted, documents, length -> counted_tokens, token_documents",
                lambda counted_BL, documents_BL, length_B1: visible_positions(
                    counted_BL, documents_BL, length_B1, by_document
                ),
            )
            return
        yield Step("counted -> counted_tokens", lambda counted_BL: counted_BL)
        if by_document:
            yield Step("documents -> token_documents", lambda documents_BL: documents_BL)

    def _loss(self) -> Iterator[Step]:
        """The network, and the loss of its logits; with `loss_chunk_tokens` one step that never holds all of them."""
        transformer, chunk = self.transformer, self.config.training.loss_chunk_tokens

        def weights_of_bound(masked_BL: torch.Tensor, time_BN: torch.Tensor, counted_BL: torch.Tensor) -> torch.Tensor:
            return inverse_time_weights(masked_BL, time_BN).t() * weights_of_mean(counted_BL.t())

        def chunked_bound(
            hidden_SBH: torch.Tensor,
            tokens_BL: torch.Tensor,
            masked_BL: torch.Tensor,
            time_BN: torch.Tensor,
            counted_BL: torch.Tensor,
        ) -> torch.Tensor:
            targets_PB = own_part(tokens_BL.t(), self.groups)
            weight_PB = own_part(weights_of_bound(masked_BL, time_BN, counted_BL), self.groups)
            return transformer.head.weighted_nll(self.of_noisy_copy(hidden_SBH), targets_PB, weight_PB, chunk)

        def bound(
            logits_PBV: torch.Tensor,
            tokens_BL: torch.Tensor,
            masked_BL: torch.Tensor,
            time_BN: torch.Tensor,
            counted_BL: torch.Tensor,
        ) -> torch.Tensor:
            nll_PB = token_cross_entropy(logits_PBV, own_part(tokens_BL.t(), self.groups))
            nll_LB, weight_LB = whole_sequence(nll_PB, self.groups), inverse_time_weights(masked_BL, time_BN).t()
            return counted_once(mean_over_counted(nll_LB * weight_LB, counted_BL.t()), self.groups)

        if chunk:
            yield from self.network_steps(
                Step("hidden, tokens, masked, time, counted_tokens -> loss_bound", chunked_bound)
            )
            return
        yield from self.network_steps(
            Step("hidden -> logits", lambda hidden_SBH: transformer.head(self.of_noisy_copy(hidden_SBH)))
        )
        yield Step("logits, tokens, masked, time, counted_tokens -> loss_bound", bound)
