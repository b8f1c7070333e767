"""megatron-core's parallel linears in the form the layers use: one output, input in the weight's type, own start.

Their weight gradients may go straight into sums (`add_weight_gradients_to`; see `parallel/weight_gradients.py`).

Fused projections (q, k, v; value and gate) store their output rows as (groups, parts, channels), so that a
contiguous cut over tensor-parallel ranks gives every rank all parts of its own groups.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from cola_megatron.layers import initializers
from cola_megatron.layers.calls import OnTensor
from cola_megatron.parallel import ProcessGroups, mark_parameter
from cola_megatron.parallel.megatron import ColumnParallelLinear, RowParallelLinear
from cola_megatron.parallel.parameters import Initializer, Role
from cola_megatron.parallel.weight_gradients import WeightGradientIntoSum

_COLUMN: Any = ColumnParallelLinear  # whose private methods no stub knows
_ROW: Any = RowParallelLinear


class ColumnLinear(ColumnParallelLinear):
    """y = x W^T + b with the output channels cut over the tensor-parallel ranks.

    Args:
        role: the matrix's; the bias follows it.
        gather_output: every rank gets the whole output.
        replicated_input: the input is whole on every rank even under sequence parallelism.
        full_output_size: number of real output channels where `output_size` was padded to divide (vocabulary).
        fused_rows: of a fused projection, the output channels of each part in one group.
    """

    __call__: OnTensor

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        groups: ProcessGroups,
        bias: bool,
        initializer: Initializer,
        role: Role,
        gather_output: bool = False,
        replicated_input: bool = False,
        full_output_size: int | None = None,
        fused_rows: tuple[int, ...] | None = None,
    ):
        super().__init__(
            input_size,
            output_size,
            config=groups.replicated_input_config if replicated_input else groups.layer_config,
            init_method=None,
            bias=bias,
            gather_output=gather_output,
            tp_group=groups.tensor_group,
        )
        mark_parameter(
            self.weight, initializer, role, partition_dim=0, full_size=full_output_size, fused_rows=fused_rows
        )
        if self.bias is not None:
            mark_parameter(self.bias, initializers.zeros, role.bias, partition_dim=0, full_size=full_output_size)
        _keep_extra_state_out_of_the_state_dict(self)
        self.weight_sum: torch.Tensor | None = None

    def add_weight_gradients_to(self, total_OI: torch.Tensor) -> None:
        """From now on backward passes add the weight's gradient there, in float32, and leave none on the weight."""
        _add_to(self, total_OI)

    def _forward_impl(self, **options: Any) -> torch.Tensor:
        if self.weight_sum is not None and torch.is_grad_enabled():
            return _into_sum(self.weight_sum, **options)
        output: torch.Tensor = _COLUMN._forward_impl(self, **options)
        return output

    def forward(self, x_SBH: torch.Tensor) -> torch.Tensor:
        """(S, B, input) -> (S, B, output / ranks), or the whole output when gathered."""
        output: torch.Tensor = super().forward(x_SBH.to(self.weight.dtype))[0]
        return output


class RowLinear(RowParallelLinear):
    """y = x W^T + b with the input channels cut over the tensor-parallel ranks; the output is summed over them.

    Args:
        role: the matrix's; the bias follows it.
        input_is_parallel: the input already holds this rank's channels only; otherwise it is whole and is cut here
            (then it must be whole under sequence parallelism too).
    """

    __call__: OnTensor

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        groups: ProcessGroups,
        bias: bool,
        initializer: Initializer,
        role: Role,
        input_is_parallel: bool = True,
    ):
        super().__init__(
            input_size,
            output_size,
            config=groups.layer_config if input_is_parallel else groups.replicated_input_config,
            init_method=None,
            bias=bias,
            input_is_parallel=input_is_parallel,
            skip_bias_add=False,
            tp_group=groups.tensor_group,
        )
        mark_parameter(self.weight, initializer, role, partition_dim=1)
        if self.bias is not None:
            mark_parameter(
                self.bias,
                initializers.zeros,
                role.bias,
                partial_gradient=input_is_parallel and groups.sequence_parallel,
            )
        _keep_extra_state_out_of_the_state_dict(self)
        self.weight_sum: torch.Tensor | None = None

    def add_weight_gradients_to(self, total_OI: torch.Tensor) -> None:
        """From now on backward passes add the weight's gradient there, in float32, and leave none on the weight."""
        _add_to(self, total_OI)

    def _forward_impl(self, **options: Any) -> torch.Tensor:
        if self.weight_sum is not None and torch.is_grad_enabled():
            return _into_sum(self.weight_sum, **options)
        # megatron-core leaves the group out here and warns of it in every forward pass, which also cuts the graph of a
        # compiled layer in two.
        output: torch.Tensor = _ROW._forward_impl(self, **{**options, "tp_group": self.tp_group})
        return output

    def forward(self, x_SBH: torch.Tensor) -> torch.Tensor:
        """(S, B, input on this rank) -> (S, B, output)."""
        output: torch.Tensor = super().forward(x_SBH.to(self.weight.dtype))[0]
        return output


def _add_to(linear: Any, total_OI: torch.Tensor) -> None:
    if dist.get_world_size(linear.tp_group) == 1:
        linear.weight_sum = total_OI
    else:
        linear.weight.main_grad, linear.gradient_accumulation_fusion = total_OI, True


def _into_sum(
    total_OI: torch.Tensor, *, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, **options: Any
) -> torch.Tensor:
    apply: Callable[..., torch.Tensor] = WeightGradientIntoSum.apply
    return apply(input, weight, bias, total_OI)


def _keep_extra_state_out_of_the_state_dict(module: nn.Module) -> None:
    """megatron-core writes `_extra_state: None` for Transformer Engine's sake; DeepSpeed's tools choke on it."""

    def drop(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
        state.pop(f"{prefix}_extra_state", None)

    module._register_state_dict_hook(drop)
