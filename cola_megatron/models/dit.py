"""Block-causal diffusion transformer: the velocity field v(z_t, t; z_0^(<b)) of the prior (paper section 3.2).

Shapes: S positions (clean copy, then noisy copy, in training), B batch, C latent channels, H hidden, T distinct
times, N blocks. Under context parallelism (`parallel/sequence_parts.py`) latents and velocities are whole on every
rank, hidden states of its part of both copies one behind the other.
"""

from typing import NamedTuple, cast

import torch
from torch import nn
from torch.nn import functional as F

from cola_megatron.config import DiTConfig
from cola_megatron.layers import initializers
from cola_megatron.layers.attention import Attention, AttentionContext, KeyValueStore
from cola_megatron.layers.linear import ColumnLinear, RowLinear
from cola_megatron.layers.masks import AttentionMask, two_copies_in_chunks, two_copy_mask
from cola_megatron.layers.mlp import GELUFeedForward
from cola_megatron.layers.norms import LayerNorm
from cola_megatron.layers.roles import Roles
from cola_megatron.layers.rotary import rotary_table, rotate_interleaved
from cola_megatron.layers.time_embedding import Modulation, TimeEmbedding, TimeRows
from cola_megatron.parallel import ProcessGroups
from cola_megatron.parallel.megatron import gather_from_sequence_parallel_region, scatter_to_sequence_parallel_region
from cola_megatron.parallel.sequence_parts import own_part, whole_sequence


class TimeTable(NamedTuple):
    """The distinct times of a batch and where each position finds its own; no index: all share the only one."""

    times_T: torch.Tensor
    rows: TimeRows | None


class Modulations(NamedTuple):
    """What the DiT computes from the distinct times alone."""

    silu_time_T1H: torch.Tensor
    blocks: tuple[tuple[torch.Tensor, ...], ...]
    output: torch.Tensor


class DiTBlock(nn.Module):
    """One layer: attention, then the feed-forward, both modulated by the flow time (AdaLN).

        x <- x + gate * branch(norm(x) (1 + scale) + shift),   (shift, scale), gate = Linear(silu(e(t)))

    Norms have no weight and bias. Attention norms queries and keys head by head and rotates interleaved pairs; the
    feed-forward is W_out gelu_tanh(W_in x). Modulations are computed once for each distinct time, as `tables`, and
    looked up at each position. A gate is the last factor of its branch and starts at zero, so it carries what the depth
    asks of a branch.
    """

    def __init__(self, config: DiTConfig, groups: ProcessGroups, roles: Roles):
        super().__init__()
        start = initializers.xavier_uniform(roles.width_ratio, roles.width_ratio)

        def norm() -> LayerNorm:
            return LayerNorm(config.hidden_size, config.norm_eps, groups=groups, role=None, affine=False)

        self.attention_norm, self.ffn_norm = norm(), norm()
        self.attention = Attention(
            config.hidden_size,
            config.num_attention_heads,
            config.head_dim,
            groups=groups,
            qkv_bias=config.qkv_bias,
            output_bias=config.qkv_bias,
            norm_eps=config.norm_eps,
            norm_whole_width=False,
            rotate=rotate_interleaved,
            initializer=start,
            roles=roles,
            ends_branch=False,
        )
        self.ffn = GELUFeedForward(
            config.hidden_size,
            config.ffn_hidden_size,
            groups=groups,
            initializer=start,
            roles=roles,
            ends_branch=False,
        )
        self.attention_shift_scale = Modulation(config.hidden_size, 2, groups=groups, role=roles.in_branch)
        self.attention_gate = Modulation(config.hidden_size, 1, groups=groups, role=roles.ends_branch)
        self.ffn_shift_scale = Modulation(config.hidden_size, 2, groups=groups, role=roles.in_branch)
        self.ffn_gate = Modulation(config.hidden_size, 1, groups=groups, role=roles.ends_branch)

    def tables(self, silu_time_T1H: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The four modulations of every distinct time; they depend on nothing else."""
        return (
            self.attention_shift_scale(silu_time_T1H),
            self.attention_gate(silu_time_T1H),
            self.ffn_shift_scale(silu_time_T1H),
            self.ffn_gate(silu_time_T1H),
        )

    def forward(
        self,
        x_SBH: torch.Tensor,
        silu_time_T1H: torch.Tensor,
        index: TimeRows | None,
        context: AttentionContext,
        tables: tuple[torch.Tensor, ...] | None = None,
    ) -> torch.Tensor:
        """(S, B, H) -> (S, B, H); `tables`: the modulations where the caller holds them already."""
        tables = self.tables(silu_time_T1H) if tables is None else tables
        attention_shift_scale, attention_gate, ffn_shift_scale, ffn_gate = tables

        shift, scale = self.attention_shift_scale.look_up(attention_shift_scale, index)
        (gate,) = self.attention_gate.look_up(attention_gate, index)
        branch = self.attention(modulate(self.attention_norm(x_SBH), shift, scale), context)
        x_SBH = gated_sum(x_SBH, gate, branch)

        shift, scale = self.ffn_shift_scale.look_up(ffn_shift_scale, index)
        (gate,) = self.ffn_gate.look_up(ffn_gate, index)
        branch = self.ffn(modulate(self.ffn_norm(x_SBH), shift, scale))
        return gated_sum(x_SBH, gate, branch)


def modulate(normed_SBH: torch.Tensor, shift_SBH: torch.Tensor, scale_SBH: torch.Tensor) -> torch.Tensor:
    """x (1 + scale) + shift."""
    return torch.addcmul(shift_SBH, normed_SBH, 1 + scale_SBH)


def gated_sum(x_SBH: torch.Tensor, gate_SBH: torch.Tensor, branch_SBH: torch.Tensor) -> torch.Tensor:
    """x + gate * branch."""
    return torch.addcmul(x_SBH, gate_SBH, branch_SBH)


class DiT(nn.Module):
    """Linear in, blocks, norm and modulation, linear out."""

    def __init__(self, config: DiTConfig, groups: ProcessGroups):
        super().__init__()
        self.config, self.groups = config, groups
        self.attention_chunk = 0
        """Queries of one attention product over both copies (`two_copies_in_chunks`); 0: all of them."""
        roles = Roles(config.parametrization, config.hidden_size, config.num_layers)
        self.input = ColumnLinear(
            config.latent_dim,
            config.hidden_size,
            groups=groups,
            bias=True,
            initializer=initializers.xavier_uniform(outputs_over=roles.width_ratio),
            role=roles.embedding,
            gather_output=True,
            replicated_input=True,
        )
        self.time_embedding = TimeEmbedding(config.time_embedding_dim, config.hidden_size, groups=groups, roles=roles)
        self.blocks = nn.ModuleList(DiTBlock(config, groups, roles) for _ in range(config.num_layers))
        self.output_norm = LayerNorm(config.hidden_size, config.norm_eps, groups=groups, role=roles.vector)
        self.output_shift_scale = Modulation(config.hidden_size, 2, groups=groups, role=roles.hidden)
        self.output = RowLinear(
            config.hidden_size,
            config.latent_dim,
            groups=groups,
            bias=True,
            initializer=initializers.zeros,
            role=roles.readout,
            input_is_parallel=False,
        )

    def embed(self, z_SBC: torch.Tensor) -> torch.Tensor:
        """Latents (S, B, C) -> (S, B, H)."""
        x_SBH = self.input(own_part(z_SBC, self.groups))
        return scatter_to_sequence_parallel_region(x_SBH) if self.groups.sequence_parallel else x_SBH

    def embed_time(self, times_T: torch.Tensor) -> torch.Tensor:
        """silu of the time embedding, (T,) -> (T, 1, H): every modulation reads it."""
        return F.silu(self.time_embedding(times_T))

    def local_index(self, index: TimeRows | None) -> TimeRows | None:
        """That of this rank's part of the sequence, which begins and ends inside a block."""
        if index is None or self.groups.sequence_parts == 1:
            return index
        rows_SB = own_part(index.rows_SB, self.groups)
        if self.groups.sequence_parallel:
            rows_SB = rows_SB.chunk(self.groups.tensor_parallel_size)[self.groups.tensor_parallel_rank]
        return TimeRows(rows_SB)

    def context_at(
        self, positions: torch.Tensor, mask: AttentionMask, cache: KeyValueStore | None = None
    ) -> AttentionContext:
        """Attention of queries at the given positions, (S,) or (S, B)."""
        config, positions = self.config, own_part(positions, self.groups)
        precision = getattr(torch, config.rotary_precision)
        rotary = rotary_table(positions, config.rotary_dim, config.rotary_base, precision)
        return AttentionContext(rotary, mask, cache)

    def two_copy_context(
        self,
        length: int,
        clean_length: int,
        context_dropped_BN: torch.Tensor | None,
        device: torch.device,
        documents_BL: torch.Tensor | None = None,
    ) -> AttentionContext:
        """`[clean copy | noisy copy]`, both at positions 0, 1, ...; see `two_copy_mask`."""
        positions = torch.arange(length, device=device)
        block_size = self.config.block_size
        mask = two_copy_mask(length, block_size, clean_length, context_dropped_BN, device, documents_BL)
        if self.attention_chunk:
            mask = two_copies_in_chunks(mask, length, clean_length, block_size, self.attention_chunk)
        return self.context_at(torch.cat((positions[:clean_length], positions)), mask)

    def head(
        self,
        x_SBH: torch.Tensor,
        silu_time_T1H: torch.Tensor,
        index: TimeRows | None,
        table_TH: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(S, B, H) -> v (S, B, C), float32."""
        table_TH = self.output_shift_scale(silu_time_T1H) if table_TH is None else table_TH
        shift, scale = self.output_shift_scale.look_up(table_TH, index)
        x_SBH = modulate(self.output_norm(x_SBH), shift, scale)
        if self.groups.sequence_parallel:
            x_SBH = gather_from_sequence_parallel_region(x_SBH, tensor_parallel_output_grad=False)
        return whole_sequence(self.output(x_SBH).float(), self.groups)

    def modulations(self, times_T: torch.Tensor) -> Modulations:
        """Everything that depends on the time alone, for a solver that meets the same times again and again."""
        silu_time_T1H = self.embed_time(times_T)
        blocks = tuple(cast(DiTBlock, block).tables(silu_time_T1H) for block in self.blocks)
        return Modulations(silu_time_T1H, blocks, self.output_shift_scale(silu_time_T1H))

    def forward(
        self,
        z_SBC: torch.Tensor,
        times: TimeTable,
        context: AttentionContext,
        modulations: Modulations | None = None,
    ) -> torch.Tensor:
        """Velocity at every position: (S, B, C) -> (S, B, C).

        `modulations`: those of `times.times_T` where the caller holds them already.
        """
        modulations = self.modulations(times.times_T) if modulations is None else modulations
        index = self.local_index(times.rows)
        x_SBH = self.embed(z_SBC)
        for block, tables in zip(self.blocks, modulations.blocks, strict=True):
            x_SBH = block(x_SBH, modulations.silu_time_T1H, index, context, tables)
        return self.head(x_SBH, modulations.silu_time_T1H, index, modulations.output)

    def two_copy_velocity(
        self,
        clean_SBC: torch.Tensor,
        noisy_SBC: torch.Tensor,
        times_BN: torch.Tensor,
        at_zero_BS: torch.Tensor | None = None,
        context_dropped_BN: torch.Tensor | None = None,
        documents_BS: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """v(z_t, t; z0^(<b)) of every block b in one pass over `[clean copy | noisy copy]`: that of the noisy copy.

        Args:
            clean_SBC: z0; its last block may be left out, for nobody sees it.
            others: see `two_copy_times` and `two_copy_mask`.
        """
        clean_length, length = len(clean_SBC), len(noisy_SBC)
        times = two_copy_times(times_BN, length, clean_length, at_zero_BS)
        context = self.two_copy_context(length, clean_length, context_dropped_BN, noisy_SBC.device, documents_BS)
        velocity_SBC: torch.Tensor = self(torch.cat((clean_SBC, noisy_SBC)), times, context)
        return velocity_SBC[clean_length:]


def two_copy_times(
    times_BN: torch.Tensor, length: int, clean_length: int, at_zero_BS: torch.Tensor | None
) -> TimeTable:
    """Distinct times of `[clean copy | noisy copy]`: 0, then one per sample or per block.

    Args:
        times_BN: t in [0, 1], (B, blocks), or (B, 1) for one time per sample.
        at_zero_BS: boolean (B, length): positions of the noisy copy that stay clean at t = 0.
    """
    batch, blocks = times_BN.shape
    times_T = torch.cat((times_BN.new_zeros(1), times_BN.flatten()))
    rows_BN = 1 + torch.arange(batch * blocks, device=times_BN.device).view(batch, blocks)
    rows_BS = rows_BN.repeat_interleave(length // blocks, dim=1)
    if at_zero_BS is not None:
        rows_BS = rows_BS.masked_fill(at_zero_BS, 0)
    rows_SB = torch.cat((rows_BS.new_zeros(batch, clean_length), rows_BS), dim=1).t()
    return TimeTable(times_T, TimeRows(rows_SB, clean_length, length // blocks))
