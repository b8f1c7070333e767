"""LayerNorm and RMSNorm, in float32 whatever the compute type; LayerNorm also over channels cut over ranks."""

import torch
from torch import nn
from torch.nn import functional as F

from cola_megatron.layers import initializers
from cola_megatron.layers.calls import OnTensor
from cola_megatron.parallel import ProcessGroups, mark_parameter
from cola_megatron.parallel.megatron import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from cola_megatron.parallel.parameters import Role


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) over the last dimension, optionally times weight plus bias.

    Args:
        role: of weight and bias; None where there are none.
        partial_gradient: each tensor-parallel rank norms a different part of the input. By default that is so exactly
            under sequence parallelism.
    """

    __call__: OnTensor

    def __init__(
        self,
        size: int,
        eps: float,
        *,
        groups: ProcessGroups,
        role: Role | None,
        affine: bool = True,
        partial_gradient: bool | None = None,
    ):
        super().__init__()
        self.size, self.eps = size, eps
        self.weight = self.bias = None
        if affine:
            partial_gradient = groups.sequence_parallel if partial_gradient is None else partial_gradient
            self.weight = nn.Parameter(torch.empty(size))
            self.bias = nn.Parameter(torch.empty(size))
            mark_parameter(self.weight, initializers.ones, role, partial_gradient=partial_gradient)
            mark_parameter(self.bias, initializers.zeros, role, partial_gradient=partial_gradient)

    def forward(self, x_SBH: torch.Tensor) -> torch.Tensor:
        """Any shape that ends in `size`, unchanged; the kernel computes in float32 and rounds once, at the end."""
        return F.layer_norm(x_SBH, (self.size,), self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) over the last dimension, times weight.

    Args:
        partial_gradient: as of `LayerNorm`.
    """

    __call__: OnTensor

    def __init__(
        self, size: int, eps: float, *, groups: ProcessGroups, role: Role, partial_gradient: bool | None = None
    ):
        super().__init__()
        self.size, self.eps = size, eps
        self.weight = nn.Parameter(torch.empty(size))
        partial_gradient = groups.sequence_parallel if partial_gradient is None else partial_gradient
        mark_parameter(self.weight, initializers.ones, role, partial_gradient=partial_gradient)

    def forward(self, x_SBH: torch.Tensor) -> torch.Tensor:
        """Any shape that ends in `size`, unchanged; torch computes in float32 and rounds once, at the end."""
        return F.rms_norm(x_SBH, (self.size,), self.weight, self.eps)


class ShardedLayerNorm(nn.Module):
    """LayerNorm over channels of which every tensor-parallel rank holds a part: the statistics span the ranks."""

    __call__: OnTensor

    def __init__(self, size: int, eps: float, *, groups: ProcessGroups, role: Role | None, affine: bool = True):
        super().__init__()
        self.size, self.eps, self.groups = size, eps, groups
        self.weight = self.bias = None
        if affine:
            self.weight = nn.Parameter(torch.empty(size // groups.tensor_parallel_size))
            self.bias = nn.Parameter(torch.empty(size // groups.tensor_parallel_size))
            mark_parameter(self.weight, initializers.ones, role, partition_dim=0)
            mark_parameter(self.bias, initializers.zeros, role, partition_dim=0)

    def forward(self, x_SBH: torch.Tensor) -> torch.Tensor:
        """(S, B, size / ranks) -> the same shape."""
        if self.groups.tensor_parallel_size == 1:
            return F.layer_norm(x_SBH, (self.size,), self.weight, self.bias, self.eps)
        x = x_SBH.float()
        centred = x - self._sum_over_ranks(x.sum(-1, keepdim=True)) / self.size
        variance = self._sum_over_ranks(centred.square().sum(-1, keepdim=True)) / self.size
        normed = centred * torch.rsqrt(variance + self.eps)
        if self.weight is not None and self.bias is not None:
            normed = normed * self.weight + self.bias
        return normed.to(x_SBH.dtype)

    def _sum_over_ranks(self, partial: torch.Tensor) -> torch.Tensor:
        # Every rank uses the sum, so its gradient is a sum over the ranks as well.
        group = self.groups.tensor_group
        return copy_to_tensor_model_parallel_region(
            reduce_from_tensor_model_parallel_region(partial, group=group), group=group
        )
