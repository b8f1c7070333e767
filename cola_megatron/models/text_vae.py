"""Text VAE: encoder q(z|x) and conditional decoder p(x|z) (paper section 3.1).

Shapes: B batch, L tokens, P tokens per latent, S = L / P latents, H hidden, C latent channels, V vocabulary on this
rank. Activations are sequence-first (S, B, H). Under context parallelism (`parallel/sequence_parts.py`) tokens and
latents are whole on every rank, hidden states and logits of this rank's part of the sequence.
"""

import torch
from torch import nn

from cola_megatron.config import VAEConfig
from cola_megatron.layers.attention import Attention, AttentionContext, KeyValueStore
from cola_megatron.layers.embedding import TokenEmbedding, VocabularyHead
from cola_megatron.layers.initializers import truncated_normal
from cola_megatron.layers.linear import ColumnLinear, RowLinear
from cola_megatron.layers.masks import AttentionMask, block_causal_mask
from cola_megatron.layers.mlp import SwiGLU, swiglu_groups
from cola_megatron.layers.norms import LayerNorm
from cola_megatron.layers.packed_documents import Kernel
from cola_megatron.layers.roles import Roles
from cola_megatron.layers.rotary import rotary_table, rotate_half_split
from cola_megatron.objectives.vae import Posterior
from cola_megatron.parallel import ProcessGroups
from cola_megatron.parallel.megatron import gather_from_sequence_parallel_region, scatter_to_sequence_parallel_region
from cola_megatron.parallel.parameters import Role
from cola_megatron.parallel.sequence_parts import own_part, whole_sequence

LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0


class TextBlock(nn.Module):
    """Transformer block of encoder and decoder.

    In the post-norm form the norm of the attention stands on the residual stream itself, and that of the feed-forward
    ends its branch.
    """

    def __init__(self, config: VAEConfig, groups: ProcessGroups, roles: Roles):
        super().__init__()
        self.post_norm = config.post_norm
        start = truncated_normal(config.init_std, config.init_cutoff_factor)
        self.attention_norm = LayerNorm(
            config.hidden_size,
            config.norm_eps,
            groups=groups,
            role=roles.vector_on_stream if config.post_norm else roles.vector_in_branch,
            affine=config.norm_affine,
        )
        self.attention = Attention(
            config.hidden_size,
            config.num_attention_heads,
            config.head_dim,
            groups=groups,
            qkv_bias=config.qkv_bias,
            output_bias=config.bias,
            norm_eps=config.norm_eps if config.query_key_norm else None,
            norm_affine=config.query_key_norm_affine,
            norm_whole_width=True,
            rotate=rotate_half_split,
            initializer=start,
            roles=roles,
        )
        self.ffn_norm = LayerNorm(
            config.hidden_size,
            config.norm_eps,
            groups=groups,
            role=roles.vector_ends_branch if config.post_norm else roles.vector_in_branch,
        )
        self.ffn = SwiGLU(
            config.hidden_size,
            config.ffn_hidden_size,
            swiglu_groups(config.num_attention_heads, config.ffn_hidden_size),
            groups=groups,
            bias=config.bias,
            initializer=start,
            roles=roles,
            ends_branch=not config.post_norm,
        )

    def forward(self, x_SBH: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """(S, B, H) -> (S, B, H). In the post-norm form the residual that is kept is the normed input."""
        if self.post_norm:
            x_SBH = self.attention_norm(x_SBH) + self.attention(x_SBH, context)
            return x_SBH + self.ffn_norm(self.ffn(x_SBH))
        x_SBH = x_SBH + self.attention(self.attention_norm(x_SBH), context)
        return x_SBH + self.ffn(self.ffn_norm(x_SBH))


class TextStack(nn.Module):
    """What encoder and decoder share: blocks, and the positions and mask that all of them use."""

    def __init__(self, num_layers: int, config: VAEConfig, groups: ProcessGroups):
        super().__init__()
        self.config, self.groups = config, groups
        self.roles = Roles(config.parametrization, config.hidden_size, num_layers)
        self.blocks = nn.ModuleList(TextBlock(config, groups, self.roles) for _ in range(num_layers))

    def context(
        self,
        length: int,
        device: torch.device,
        documents_BS: torch.Tensor | None = None,
        kernel: Kernel | None = None,
    ) -> AttentionContext:
        """Self-attention over whole sequences of `length` latents, or inside each of their documents."""
        mask = block_causal_mask(length, self.config.block_size, device, documents_BS, kernel)
        return self.context_at(torch.arange(length, device=device), mask)

    def context_at(
        self, positions: torch.Tensor, mask: AttentionMask, cache: KeyValueStore | None = None
    ) -> AttentionContext:
        """Attention of queries at the given positions, (S,) or (S, B), through a cache."""
        positions = own_part(positions, self.groups)
        return AttentionContext(rotary_table(positions, self.config.head_dim, self.config.rotary_base), mask, cache)

    def run_blocks(self, x_SBH: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """All blocks in order."""
        for block in self.blocks:
            x_SBH = block(x_SBH, context)
        return x_SBH


class TextEncoder(TextStack):
    """q(z|x): embedding, convolution with kernel = stride = patch, blocks, posterior head."""

    def __init__(self, vocab_size: int, config: VAEConfig, groups: ProcessGroups):
        super().__init__(config.encoder_layers, config, groups)
        start = truncated_normal(config.init_std, config.init_cutoff_factor)
        self.mask_token_id = vocab_size  # the extra row of the embedding
        self.embedding = TokenEmbedding(
            vocab_size + 1, config.hidden_size, groups=groups, initializer=start, role=self.roles.embedding
        )
        self.patch = ColumnLinear(
            config.patch_size * config.hidden_size,
            config.hidden_size,
            groups=groups,
            bias=True,
            initializer=start,
            role=self.roles.hidden,
            gather_output=True,
            replicated_input=True,
        )
        outputs = 2 * config.latent_dim if config.variational else config.latent_dim
        self.head = RowLinear(
            config.hidden_size,
            outputs,
            groups=groups,
            bias=config.bias,
            initializer=start,
            role=self.roles.readout,
            input_is_parallel=False,
        )
        has_norm = config.mean_norm or not config.variational
        self.mean_norm = (
            LayerNorm(config.latent_dim, config.norm_eps, groups=groups, role=None, affine=False) if has_norm else None
        )

    def embed(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Token ids (B, L) -> (S, B, H)."""
        x_BLH = self.embedding(own_part(tokens_BL, self.groups, dim=1))
        # A convolution whose stride is its kernel is a linear map of each patch.
        x_SBH = self.patch(x_BLH.unflatten(1, (-1, self.config.patch_size)).flatten(2).transpose(0, 1))
        return scatter_to_sequence_parallel_region(x_SBH) if self.groups.sequence_parallel else x_SBH

    def posterior(self, x_SBH: torch.Tensor) -> Posterior:
        """Head: mean (normed over channels) and log variance, clamped or fixed by a signal-to-noise ratio."""
        if self.groups.sequence_parallel:
            x_SBH = gather_from_sequence_parallel_region(x_SBH, tensor_parallel_output_grad=False)
        out = whole_sequence(self.head(x_SBH).float(), self.groups)
        mean, logvar = out.chunk(2, dim=-1) if self.config.variational else (out, None)
        if self.mean_norm is not None:
            mean = self.mean_norm(mean)
        if logvar is None:
            return Posterior(mean, None)
        if self.config.fixed_logsnr is not None:
            # log(mean_C mu^2 / sigma^2) = fixed_logsnr; the noise level is a setting, so no gradient flows through it.
            power = mean.detach().square().mean(-1, keepdim=True)
            logvar = (power.log() - self.config.fixed_logsnr).expand_as(mean)
        return Posterior(mean, logvar.clamp(LOGVAR_MIN, LOGVAR_MAX))

    def forward(self, tokens_BL: torch.Tensor, documents_BS: torch.Tensor | None = None) -> Posterior:
        """Token ids (B, L) -> posterior over (S, B, C)."""
        x_SBH = self.embed(tokens_BL)
        context = self.context(tokens_BL.shape[1] // self.config.patch_size, tokens_BL.device, documents_BS)
        return self.posterior(self.run_blocks(x_SBH, context))


class TextDecoder(TextStack):
    """p(x|z): Linear, blocks, unpatch, norm, vocabulary head."""

    def __init__(self, vocab_size: int, config: VAEConfig, groups: ProcessGroups):
        super().__init__(config.decoder_layers, config, groups)
        start = truncated_normal(config.init_std, config.init_cutoff_factor)

        def linear(input_size: int, output_size: int, bias: bool, role: Role) -> ColumnLinear:
            return ColumnLinear(
                input_size,
                output_size,
                groups=groups,
                bias=bias,
                initializer=start,
                role=role,
                gather_output=True,
                replicated_input=True,
            )

        self.input = linear(config.latent_dim, config.hidden_size, config.bias, self.roles.embedding)
        self.unpatch = linear(config.hidden_size, config.patch_size * config.hidden_size, True, self.roles.hidden)
        self.norm = LayerNorm(
            config.hidden_size, config.norm_eps, groups=groups, role=self.roles.vector, partial_gradient=False
        )
        self.head = VocabularyHead(
            config.hidden_size,
            vocab_size,
            groups=groups,
            bias=config.bias,
            initializer=start,
            role=self.roles.readout,
        )

    def embed(self, z_SBC: torch.Tensor) -> torch.Tensor:
        """Latents (S, B, C) -> (S, B, H)."""
        x_SBH = self.input(own_part(z_SBC, self.groups))
        return scatter_to_sequence_parallel_region(x_SBH) if self.groups.sequence_parallel else x_SBH

    def to_tokens(self, x_SBH: torch.Tensor) -> torch.Tensor:
        """(S, B, H) -> (S * P, B, H), alike on tensor-parallel ranks.

        A latent's tokens are (channel, patch), patch fastest.
        """
        if self.groups.sequence_parallel:
            x_SBH = gather_from_sequence_parallel_region(x_SBH, tensor_parallel_output_grad=False)
        x_SBHP = self.unpatch(x_SBH).unflatten(-1, (-1, self.config.patch_size))
        return self.norm(x_SBHP.permute(0, 3, 1, 2).flatten(0, 1))

    def logits(self, x_SBH: torch.Tensor) -> torch.Tensor:
        """(S, B, H) -> (S * P, B, V)."""
        return self.head(self.to_tokens(x_SBH))

    def forward(self, z_SBC: torch.Tensor, documents_BS: torch.Tensor | None = None) -> torch.Tensor:
        """Latents in the prior's coordinates (S, B, C) -> logits (S * P, B, V)."""
        context = self.context(z_SBC.shape[0], z_SBC.device, documents_BS)
        return self.logits(self.run_blocks(self.embed(z_SBC), context))


class TextVAE(nn.Module):
    """Encoder, decoder, and the coordinates in which prior and decoder see a latent."""

    def __init__(self, vocab_size: int, config: VAEConfig, groups: ProcessGroups):
        super().__init__()
        self.config = config
        self.encoder = TextEncoder(vocab_size, config, groups)
        self.decoder = TextDecoder(vocab_size, config, groups)

    def to_prior(self, z_SBC: torch.Tensor) -> torch.Tensor:
        """(z - shifting_factor) * scaling_factor."""
        return (z_SBC - self.config.shifting_factor) * self.config.scaling_factor
