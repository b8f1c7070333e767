"""The only place that imports megatron-core: what the project uses of it, after the CPU backend is in place."""

import warnings

from cola_megatron.parallel.cpu_backend import use_cpu_where_there_is_no_cuda

with warnings.catch_warnings():
    # megatron-core remarks on every optional accelerator that is absent; none of them is needed here.
    warnings.simplefilter("ignore")
    use_cpu_where_there_is_no_cuda()
    from megatron.core import ModelParallelConfig, parallel_state
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
        copy_to_tensor_model_parallel_region,
        gather_from_sequence_parallel_region,
        gather_from_tensor_model_parallel_region,
        reduce_from_tensor_model_parallel_region,
        scatter_to_sequence_parallel_region,
        vocab_parallel_cross_entropy,
    )

# torch 2.13 renames two collectives that megatron-core calls by their old names in every step.
warnings.filterwarnings(
    "ignore", r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated", FutureWarning
)

__all__ = [
    "ColumnParallelLinear",
    "ModelParallelConfig",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "copy_to_tensor_model_parallel_region",
    "gather_from_sequence_parallel_region",
    "gather_from_tensor_model_parallel_region",
    "parallel_state",
    "reduce_from_tensor_model_parallel_region",
    "scatter_to_sequence_parallel_region",
    "vocab_parallel_cross_entropy",
]
