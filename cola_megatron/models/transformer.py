"""The LLaMA-shaped transformer of the matched baselines: autoregressive, masked diffusion, Plaid (paper RQ4).

Pre-norm blocks of attention (rotary, grouped queries) and SwiGLU behind RMSNorms, without biases; embedding and output
head are two matrices. The mask makes the family: causal, bidirectional, or inside documents.

Shapes: B batch, L tokens, S of them on this rank, H hidden, V vocabulary on this rank. Activations are sequence-first
(S, B, H). Under context parallelism (`parallel/sequence_parts.py`) whole tokens come in and this rank's part of them,
P of L, goes out.
"""

import torch
from torch import nn

from cola_megatron.config.transformer import TransformerConfig
from cola_megatron.layers.attention import Attention, AttentionContext, KeyValueStore
from cola_megatron.layers.embedding import TokenEmbedding, VocabularyHead
from cola_megatron.layers.initializers import truncated_normal
from cola_megatron.layers.masks import AttentionMask
from cola_megatron.layers.mlp import SwiGLU, swiglu_groups
from cola_megatron.layers.norms import RMSNorm
from cola_megatron.layers.roles import Roles
from cola_megatron.layers.rotary import rotary_table, rotate_half_split
from cola_megatron.parallel import ProcessGroups
from cola_megatron.parallel.megatron import gather_from_sequence_parallel_region, scatter_to_sequence_parallel_region
from cola_megatron.parallel.sequence_parts import own_part


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, config: TransformerConfig, groups: ProcessGroups, roles: Roles):
        super().__init__()
        start = truncated_normal(config.init_std, config.init_cutoff_factor)
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps, groups=groups, role=roles.vector_in_branch)
        self.attention = Attention(
            config.hidden_size,
            config.num_attention_heads,
            config.head_dim,
            num_key_value_heads=config.key_value_heads,
            groups=groups,
            qkv_bias=False,
            output_bias=False,
            norm_eps=None,
            norm_whole_width=False,
            rotate=rotate_half_split,
            initializer=start,
            roles=roles,
        )
        self.ffn_norm = RMSNorm(config.hidden_size, config.norm_eps, groups=groups, role=roles.vector_in_branch)
        inner_size = 2 * config.ffn_hidden_size  # value and gate
        self.ffn = SwiGLU(
            config.hidden_size,
            inner_size,
            swiglu_groups(config.num_attention_heads, inner_size),
            groups=groups,
            bias=False,
            initializer=start,
            roles=roles,
        )

    def forward(self, x_SBH: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """(S, B, H) -> (S, B, H)."""
        x_SBH = x_SBH + self.attention(self.attention_norm(x_SBH), context)
        return x_SBH + self.ffn(self.ffn_norm(x_SBH))


class Transformer(nn.Module):
    """Token ids to logits.

    Args:
        extra_rows: rows of the embedding beyond the vocabulary, such as one for [MASK]; the head has none for them.
        has_embedding: False: its input is made elsewhere, and there is no `embed`.
    """

    def __init__(
        self,
        vocab_size: int,
        config: TransformerConfig,
        groups: ProcessGroups,
        *,
        extra_rows: int = 0,
        has_embedding: bool = True,
    ):
        super().__init__()
        self.vocab_size, self.config, self.groups = vocab_size, config, groups
        start = truncated_normal(config.init_std, config.init_cutoff_factor)
        roles = Roles(config.parametrization, config.hidden_size, config.num_layers)
        if has_embedding:
            self.embedding = TokenEmbedding(
                vocab_size + extra_rows, config.hidden_size, groups=groups, initializer=start, role=roles.embedding
            )
        self.blocks = nn.ModuleList(TransformerBlock(config, groups, roles) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, groups=groups, role=roles.vector)
        self.head = VocabularyHead(
            config.hidden_size, vocab_size, groups=groups, bias=False, initializer=start, role=roles.readout
        )

    def embed(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Token ids (B, L) -> (S, B, H)."""
        x_SBH = self.embedding(own_part(tokens_BL, self.groups, dim=1)).transpose(0, 1).contiguous()
        return scatter_to_sequence_parallel_region(x_SBH) if self.groups.sequence_parallel else x_SBH

    def context(self, length: int, device: torch.device, mask: AttentionMask) -> AttentionContext:
        """Attention over whole sequences of `length` tokens, from position 0 on."""
        return self.context_at(torch.arange(length, device=device), mask)

    def context_at(
        self, positions: torch.Tensor, mask: AttentionMask, cache: KeyValueStore | None = None
    ) -> AttentionContext:
        """Attention of queries at the given positions, (L,) or (L, B); through a cache, which has its own mask."""
        positions = own_part(positions, self.groups)
        return AttentionContext(rotary_table(positions, self.config.head_dim, self.config.rotary_base), mask, cache)

    def run_blocks(self, x_SBH: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """All blocks in order."""
        for block in self.blocks:
            x_SBH = block(x_SBH, context)
        return x_SBH

    def to_head(self, x_SBH: torch.Tensor) -> torch.Tensor:
        """The last block's output, normed, as the head takes it: (S, B, H) -> (P, B, H).

        Tensor-parallel ranks hold the same.
        """
        x_SBH = self.norm(x_SBH)
        if self.groups.sequence_parallel:
            x_SBH = gather_from_sequence_parallel_region(x_SBH, tensor_parallel_output_grad=False)
        return x_SBH

    def logits(self, x_SBH: torch.Tensor) -> torch.Tensor:
        """The last block's output (S, B, H) -> logits (P, B, V)."""
        return self.head(self.to_head(x_SBH))

    def weighted_nll(
        self, x_SBH: torch.Tensor, targets_PB: torch.Tensor, weights_PB: torch.Tensor, chunk: int
    ) -> torch.Tensor:
        """sum weights * -log softmax(logits)[target] of the last block's output, a float32 scalar.

        Args:
            chunk: positions whose logits exist at once; see `layers/vocabulary_loss.py`.
        """
        return self.head.weighted_nll(self.to_head(x_SBH), targets_PB, weights_PB, chunk)

    def forward(self, tokens_BL: torch.Tensor, mask: AttentionMask) -> torch.Tensor:
        """Token ids (B, L) -> logits (P, B, V)."""
        context = self.context(tokens_BL.shape[1], tokens_BL.device, mask)
        return self.logits(self.run_blocks(self.embed(tokens_BL), context))
