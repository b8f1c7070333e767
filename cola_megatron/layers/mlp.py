"""Feed-forwards."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from cola_megatron.layers.calls import OnTensor
from cola_megatron.layers.linear import ColumnLinear, RowLinear
from cola_megatron.layers.roles import Roles
from cola_megatron.parallel import ProcessGroups
from cola_megatron.parallel.parameters import Initializer


class SwiGLU(nn.Module):
    """W_out (silu(gate) * value) with (value, gate) = W_in x; `inner_size` counts both halves.

    Rows of W_in are stored as (groups, {value, gate}, channels); see `layers/linear.py`.

    Args:
        ends_branch: W_out ends the branch of the residual stream; False: a norm or a gate behind it does.
    """

    __call__: OnTensor

    def __init__(
        self,
        hidden_size: int,
        inner_size: int,
        num_groups: int,
        *,
        groups: ProcessGroups,
        bias: bool,
        initializer: Initializer,
        roles: Roles,
        ends_branch: bool = True,
    ):
        super().__init__()
        self.channels = inner_size // 2 // num_groups
        self.input = ColumnLinear(
            hidden_size,
            inner_size,
            groups=groups,
            bias=bias,
            initializer=initializer,
            role=roles.in_branch,
            fused_rows=(self.channels, self.channels),
        )
        self.output = RowLinear(
            inner_size // 2,
            hidden_size,
            groups=groups,
            bias=bias,
            initializer=initializer,
            role=roles.last_of_branch(ends_branch),
        )

    def forward(self, x_SBH: torch.Tensor) -> torch.Tensor:
        """(S, B, H) -> (S, B, H)."""
        value, gate = self.input(x_SBH).unflatten(-1, (-1, 2, self.channels)).unbind(-2)
        return self.output((F.silu(gate) * value).flatten(2))


class GELUFeedForward(nn.Module):
    """W_out gelu_tanh(W_in x), with biases. `ends_branch` as of `SwiGLU`."""

    __call__: OnTensor

    def __init__(
        self,
        hidden_size: int,
        inner_size: int,
        *,
        groups: ProcessGroups,
        initializer: Initializer,
        roles: Roles,
        ends_branch: bool = True,
    ):
        super().__init__()
        self.input = ColumnLinear(
            hidden_size, inner_size, groups=groups, bias=True, initializer=initializer, role=roles.in_branch
        )
        self.output = RowLinear(
            inner_size,
            hidden_size,
            groups=groups,
            bias=True,
            initializer=initializer,
            role=roles.last_of_branch(ends_branch),
        )

    def forward(self, x_SBH: torch.Tensor) -> torch.Tensor:
        """(S, B, H) -> (S, B, H)."""
        return self.output(F.gelu(self.input(x_SBH), approximate="tanh"))


def swiglu_groups(num_heads: int, inner_size: int) -> int:
    """Groups of a SwiGLU's fused rows: as many as there are heads where that divides, else the largest common part."""
    return math.gcd(num_heads, inner_size // 2)
