"""The autoregressive language model in training: the loss of `loss.py` as a chain of steps.

Shapes: B batch, L tokens, P of them in this rank's part of the sequence, S of these on this rank, H hidden, V
vocabulary on this rank.
"""

from collections.abc import Iterator, Sequence

import torch

from cola_megatron.config.autoregressive import AutoregressiveConfig
from cola_megatron.families.autoregressive.loss import LOSS_WEIGHTS, next_tokens
from cola_megatron.layers.embedding import token_cross_entropy
from cola_megatron.models.document_kernel import document_kernel
from cola_megatron.models.pipelined import PipelinedModel
from cola_megatron.models.steps import Step
from cola_megatron.models.transformer import Transformer
from cola_megatron.models.transformer_steps import context_step, transformer_steps
from cola_megatron.objectives.averages import mean_over_counted, weights_of_mean
from cola_megatron.parallel import ProcessGroups
from cola_megatron.parallel.sequence_parts import counted_once, own_part, whole_sequence


class Autoregressive(PipelinedModel):
    """The transformer under a causal mask, and its loss. Called on a batch of `tokens`, `counted` and `documents`.

    Args:
        split: for each stage of the pipeline the number of its steps with parameters; None: all of them are here.
    """

    def __init__(self, config: AutoregressiveConfig, groups: ProcessGroups, split: Sequence[int] | None = None):
        super().__init__(groups, split)
        self.config = config
        with self.under_construction():
            self.transformer = Transformer(config.model.vocab_size, config.model.transformer, groups)
        self.keep_own_stage()

    @property
    def batch_names(self) -> set[str]:
        """What every stage finds in its micro-batch."""
        return {"tokens", "counted", "documents"}

    def steps(self) -> list[Step]:
        """One training pass in order."""
        chunk = self.config.training.loss_chunk_tokens
        if chunk:
            return list(self.network_steps(self._chunked_loss(chunk)))
        return [*self.network_steps(Step("hidden -> logits", self.transformer.logits)), self._loss()]

    def weights(self) -> dict[str, float]:
        """There is one term."""
        return LOSS_WEIGHTS

    def network_steps(self, head: Step) -> Iterator[Step]:
        """tokens -> targets, targets_counted; and to the last hidden states, of which `head` makes something."""
        data, recompute = self.config.data, self.config.training.activation_checkpointing
        by_document = data.document_attention
        yield Step(
            "tokens, counted, documents -> targets, targets_counted",
            lambda tokens_BL, counted_BL, documents_BL: next_tokens(
                tokens_BL, counted_BL, documents_BL if by_document else None
            ),
        )
        kernel = document_kernel(self.config.training, self.groups.device) if by_document else None
        yield context_step(self.transformer, data.sequence_length, causal=True, by_document=by_document, kernel=kernel)
        yield from transformer_steps(self.transformer, head, recompute=recompute)

    def _loss(self) -> Step:
        def loss(logits_PBV: torch.Tensor, targets_LB: torch.Tensor, counted_LB: torch.Tensor) -> torch.Tensor:
            nll_PB = token_cross_entropy(logits_PBV, own_part(targets_LB, self.groups))
            return counted_once(mean_over_counted(whole_sequence(nll_PB, self.groups), counted_LB), self.groups)

        return Step("logits, targets, targets_counted -> loss_next_token", loss)

    def _chunked_loss(self, chunk: int) -> Step:
        """Head and loss in one step, which never holds the logits of all tokens."""

        def loss(hidden_SBH: torch.Tensor, targets_LB: torch.Tensor, counted_LB: torch.Tensor) -> torch.Tensor:
            targets_PB, weights_PB = (own_part(x_LB, self.groups) for x_LB in (targets_LB, weights_of_mean(counted_LB)))
            return self.transformer.weighted_nll(hidden_SBH, targets_PB, weights_PB, chunk)

        return Step("hidden, targets, targets_counted -> loss_next_token", loss)
