"""Flow time: its embedding, and the modulation (AdaLN) that depends on it alone.

A sequence holds few distinct times (one per block, and 0 for the clean copy), so everything here is evaluated on the
table of distinct times (T rows) and then looked up per position: a third of the DiT's parameters is applied T times
instead of S * B times.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from cola_megatron.layers import initializers
from cola_megatron.layers.calls import OnTensor
from cola_megatron.layers.linear import ColumnLinear
from cola_megatron.layers.roles import Roles, of_time
from cola_megatron.parallel import ProcessGroups
from cola_megatron.parallel.megatron import copy_to_tensor_model_parallel_region
from cola_megatron.parallel.parameters import Role


class TimeRows(NamedTuple):
    """The row of a table of distinct times for every position."""

    rows_SB: torch.Tensor
    clean_length: int | None = None
    """Of `[clean copy | noisy copy]`: so many positions stand at row 0; those behind them, in blocks of `block_size`,
    at row 1 + b * blocks + block or, one by one, at row 0. None: nothing is known of the rows."""
    block_size: int = 1


def sinusoid(times_T: torch.Tensor, dim: int) -> torch.Tensor:
    """[sin(t w_i), cos(t w_i)] with w_i = exp(-ln(10000) i / (dim / 2)); (T,) -> (T, dim), float32."""
    half = dim // 2
    exponents = -math.log(10_000.0) * torch.arange(half, device=times_T.device, dtype=torch.float32) / half
    # t reaches 1000, so one unit in the last place of a frequency shows in the angle: round it alike on every device.
    frequencies = exponents.double().exp().float()
    angles = times_T.float()[:, None] * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


class TimeEmbedding(nn.Module):
    """Linear-SiLU-Linear-SiLU-Linear on the sinusoid of 1000 t."""

    __call__: OnTensor

    def __init__(self, sinusoid_dim: int, hidden_size: int, *, groups: ProcessGroups, roles: Roles):
        super().__init__()
        self.sinusoid_dim = sinusoid_dim

        def linear(input_size: int, role: Role) -> ColumnLinear:
            return ColumnLinear(
                input_size,
                hidden_size,
                groups=groups,
                bias=True,
                initializer=initializers.normal(0.02),
                role=role,
                gather_output=True,
                replicated_input=True,
            )

        self.input = linear(sinusoid_dim, roles.embedding)
        hidden = of_time(roles.hidden)
        self.hidden, self.output = linear(hidden_size, hidden), linear(hidden_size, hidden)

    def forward(self, times_T: torch.Tensor) -> torch.Tensor:
        """t in [0, 1], (T,) -> (T, 1, H)."""
        x_T1H = sinusoid(1000.0 * times_T, self.sinusoid_dim)[:, None]
        return self.output(F.silu(self.hidden(F.silu(self.input(x_T1H)))))


class Modulation(nn.Module):
    """Linear(silu(time embedding)), starting at zero, looked up per position.

    `parts` = 2 gives shift and scale, 1 a gate.
    """

    __call__: OnTensor

    def __init__(self, hidden_size: int, parts: int, *, groups: ProcessGroups, role: Role):
        super().__init__()
        self.parts, self.groups = parts, groups
        self.linear = ColumnLinear(
            hidden_size,
            parts * hidden_size,
            groups=groups,
            bias=True,
            initializer=initializers.zeros,
            role=of_time(role),
            gather_output=True,
            replicated_input=True,
        )

    def forward(self, silu_time_T1H: torch.Tensor) -> torch.Tensor:
        """silu of the time embedding (T, 1, H) -> table (T, parts * H), one row for each distinct time."""
        table_TH = self.linear(silu_time_T1H)[:, 0]
        if self.groups.sequence_parallel:
            # Each rank looks up the rows of its own positions: their gradients are summed over the ranks.
            table_TH = copy_to_tensor_model_parallel_region(table_TH, group=self.groups.tensor_group)
        return table_TH

    def look_up(self, table_TH: torch.Tensor, index: TimeRows | None) -> tuple[torch.Tensor, ...]:
        """The rows of each position, as `parts` tensors (S, B, H); without an index the only row, as (1, H)."""
        return look_up(table_TH, index).chunk(self.parts, dim=-1)


def look_up(table_TH: torch.Tensor, index: TimeRows | None) -> torch.Tensor:
    """Rows of a table at each position, (S, B, H); without an index the table."""
    if index is None:
        return table_TH
    if index.clean_length is None:
        return F.embedding(index.rows_SB, table_TH)
    apply: Callable[..., torch.Tensor] = _BlockwiseRows.apply
    return apply(table_TH, index.rows_SB, index.clean_length, index.block_size)


class _BlockwiseRows(torch.autograd.Function):
    """F.embedding for rows that repeat block by block: its gradient is sums over blocks, where that of an embedding
    sorts the positions by row, for every table of every layer anew."""

    @staticmethod
    def forward(
        ctx: Any, table_TH: torch.Tensor, rows_SB: torch.Tensor, clean_length: int, block_size: int
    ) -> torch.Tensor:
        ctx.save_for_backward(rows_SB)
        ctx.clean_length, ctx.block_size = clean_length, block_size
        return F.embedding(rows_SB, table_TH)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient_SBH,) = gradients
        (rows_SB,) = ctx.saved_tensors
        clean_SBH, noisy_SBH = gradient_SBH[: ctx.clean_length], gradient_SBH[ctx.clean_length :]
        at_zero_SB1 = (rows_SB[ctx.clean_length :] == 0)[..., None]
        noisy_NbBH = noisy_SBH.masked_fill(at_zero_SB1, 0.0).unflatten(0, (-1, ctx.block_size))
        of_blocks_TH = noisy_NbBH.sum(1).transpose(0, 1).flatten(0, 1)
        # In float32 over all positions at once: half of them are of this row.
        of_zero_H = clean_SBH.sum((0, 1), dtype=torch.float32)
        of_zero_H = of_zero_H + noisy_SBH.masked_fill(~at_zero_SB1, 0.0).sum((0, 1), dtype=torch.float32)
        return torch.cat((of_zero_H.to(of_blocks_TH.dtype)[None], of_blocks_TH)), None, None, None
