"""The only place that imports megatron-core: what the project uses of it, after the CPU backend is in place."""

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from cola_megatron.parallel.cpu_backend import use_cpu_where_there_is_no_cuda


@contextlib.contextmanager
def _without_what_nothing_here_uses() -> Iterator[None]:
    """While it is imported megatron-core hands fused functions to torch.compile, which imports the whole compiler, and
    looks for wandb. None of these functions is called here, and both are 2.5 of the 6 seconds in which a process
    starts, of each rank of a job and of each command.
    """

    def as_it_is(function: Any = None, **options: Any) -> Callable[..., Any]:
        return function if callable(function) else lambda decorated: decorated

    compiler, knows_wandb = torch.compile, "wandb" in sys.modules
    vars(torch)["compile"] = as_it_is
    if not knows_wandb:
        sys.modules["wandb"] = None  # an import of it fails, as where it is not installed
    try:
        yield
    finally:
        vars(torch)["compile"] = compiler
        if not knows_wandb:
            del sys.modules["wandb"]


with warnings.catch_warnings(), _without_what_nothing_here_uses():
    # megatron-core remarks on every optional accelerator that is absent; none of them is needed here.
    warnings.simplefilter("ignore")
    use_cpu_where_there_is_no_cuda()
    from megatron.core import ModelParallelConfig, parallel_state
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
        all_to_all,
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
    "all_to_all",
    "copy_to_tensor_model_parallel_region",
    "gather_from_sequence_parallel_region",
    "gather_from_tensor_model_parallel_region",
    "parallel_state",
    "reduce_from_tensor_model_parallel_region",
    "scatter_to_sequence_parallel_region",
    "vocab_parallel_cross_entropy",
]
