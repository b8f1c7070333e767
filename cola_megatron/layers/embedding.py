"""Token embedding and output head, cut over the vocabulary."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from cola_megatron.layers.calls import OnTensor
from cola_megatron.layers.linear import ColumnLinear
from cola_megatron.layers.vocabulary_loss import HeadShard, weighted_nll
from cola_megatron.parallel import ProcessGroups, mark_parameter
from cola_megatron.parallel.megatron import VocabParallelEmbedding, vocab_parallel_cross_entropy
from cola_megatron.parallel.parameters import Initializer, Role


def padded_vocab_size(vocab_size: int, groups: ProcessGroups) -> int:
    """The vocabulary rounded up so that every tensor-parallel rank holds the same number of rows."""
    ranks = groups.tensor_parallel_size
    return -(-vocab_size // ranks) * ranks


class TokenEmbedding(VocabParallelEmbedding):
    """Rows of an embedding table, cut over the vocabulary."""

    __call__: OnTensor

    def __init__(
        self, num_embeddings: int, hidden_size: int, *, groups: ProcessGroups, initializer: Initializer, role: Role
    ):
        super().__init__(
            padded_vocab_size(num_embeddings, groups),
            hidden_size,
            init_method=None,
            config=groups.layer_config,
            tp_group=groups.tensor_group,
        )
        mark_parameter(self.weight, initializer, role, partition_dim=0, full_size=num_embeddings)


class _HeadLinear(ColumnLinear):
    """A linear layer whose weights others may use while its forward runs: ZeRO 3 has them only there."""

    __call__: Callable[..., torch.Tensor]

    def forward(self, x: torch.Tensor, use: Callable[..., torch.Tensor] | None = None, *arguments: Any) -> torch.Tensor:
        """x W^T + b; with `use` what it makes of x, W, b and the arguments."""
        if use is None:
            return super().forward(x)
        return use(x.to(self.weight.dtype), self.weight, self.bias, *arguments)


class VocabularyHead(nn.Module):
    """Linear(H, V) whose rows are cut over the vocabulary; padded rows never win."""

    __call__: OnTensor

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        *,
        groups: ProcessGroups,
        bias: bool,
        initializer: Initializer,
        role: Role,
    ):
        super().__init__()
        self.groups = groups
        padded = padded_vocab_size(vocab_size, groups)
        self.linear = _HeadLinear(
            hidden_size,
            padded,
            groups=groups,
            bias=bias,
            initializer=initializer,
            role=role,
            replicated_input=True,
            full_output_size=vocab_size,
        )
        part = padded // groups.tensor_parallel_size
        self.padded_rows = max(0, min(part, (groups.tensor_parallel_rank + 1) * part - vocab_size))

    def forward(self, x_SBH: torch.Tensor) -> torch.Tensor:
        """(S, B, H) -> logits (S, B, V on this rank)."""
        logits_SBV = self.linear(x_SBH)
        if self.padded_rows:
            logits_SBV = logits_SBV.clone()
            logits_SBV[..., -self.padded_rows :] = torch.finfo(logits_SBV.dtype).min
        return logits_SBV

    def weighted_nll(
        self, x_SBH: torch.Tensor, targets_SB: torch.Tensor, weights_SB: torch.Tensor, chunk: int
    ) -> torch.Tensor:
        """sum weights * -log softmax(logits)[target], `chunk` positions at a time; a float32 scalar.

        The same as of `token_cross_entropy(self(x_SBH), targets_SB)`, without ever holding all logits.
        """
        shard = HeadShard(self.groups, self.padded_rows, chunk)
        return self.linear(x_SBH.flatten(0, 1), weighted_nll, targets_SB.flatten(), weights_SB.flatten().float(), shard)


def token_cross_entropy(logits_SBV: torch.Tensor, targets_SB: torch.Tensor) -> torch.Tensor:
    """-log softmax(logits)[target] in float32, over a vocabulary cut over the ranks; (S, B), nats."""
    # megatron-core computes in place, so it gets its own copy; `.float()` is that copy except from float32.
    logits = logits_SBV.clone() if logits_SBV.dtype == torch.float32 else logits_SBV.float()
    return vocab_parallel_cross_entropy(logits, targets_SB.contiguous())
