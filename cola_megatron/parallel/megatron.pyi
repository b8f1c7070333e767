"""The types of what the project uses of megatron-core, which has none; it was written beside 0.16.1."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

class ModelParallelConfig:
    def __init__(
        self,
        *,
        tensor_model_parallel_size: int = ...,
        sequence_parallel: bool = ...,
        use_cpu_initialization: bool = ...,
        perform_initialization: bool = ...,
        gradient_accumulation_fusion: bool = ...,
        params_dtype: torch.dtype = ...,
    ) -> None: ...

parallel_state: Any

class _ParallelLinear(nn.Module):
    """`forward` returns the output, and the bias where it was not added."""

    weight: nn.Parameter
    bias: nn.Parameter | None

class ColumnParallelLinear(_ParallelLinear):
    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: ModelParallelConfig,
        init_method: None,
        bias: bool = ...,
        gather_output: bool = ...,
        tp_group: dist.ProcessGroup,
    ) -> None: ...

class RowParallelLinear(_ParallelLinear):
    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: ModelParallelConfig,
        init_method: None,
        bias: bool,
        input_is_parallel: bool,
        skip_bias_add: bool,
        tp_group: dist.ProcessGroup,
    ) -> None: ...

class VocabParallelEmbedding(nn.Module):
    weight: nn.Parameter

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        init_method: None,
        config: ModelParallelConfig,
        tp_group: dist.ProcessGroup,
    ) -> None: ...

def all_to_all(
    group: dist.ProcessGroup,
    input_: torch.Tensor,
    output_split_sizes_: list[int] | None = None,
    input_split_sizes: list[int] | None = None,
) -> torch.Tensor: ...
def copy_to_tensor_model_parallel_region(
    input_: torch.Tensor, group: dist.ProcessGroup | None = None
) -> torch.Tensor: ...
def gather_from_sequence_parallel_region(
    input_: torch.Tensor, *, tensor_parallel_output_grad: bool = True, group: dist.ProcessGroup | None = None
) -> torch.Tensor: ...
def gather_from_tensor_model_parallel_region(
    input_: torch.Tensor, group: dist.ProcessGroup | None = None
) -> torch.Tensor: ...
def reduce_from_tensor_model_parallel_region(
    input_: torch.Tensor, group: dist.ProcessGroup | None = None
) -> torch.Tensor: ...
def scatter_to_sequence_parallel_region(
    input_: torch.Tensor, group: dist.ProcessGroup | None = None
) -> torch.Tensor: ...
def vocab_parallel_cross_entropy(vocab_parallel_logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor: ...
