"""megatron-core's process groups in the form that DeepSpeed's `mpu` argument asks for."""

import torch.distributed as dist

from cola_megatron.parallel.megatron import parallel_state


class DeepSpeedGrid:
    """Adapter: DeepSpeed calls "model parallel" all that is not data parallel (tensor times pipeline).

    Data parallel are to it all ranks that hold the same parameters, those of one context too.

    Without it DeepSpeed takes every rank for a data-parallel replica, and the results are wrong.
    """

    get_model_parallel_group = staticmethod(parallel_state.get_model_parallel_group)
    get_tensor_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_tensor_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_tensor_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_tensor_model_parallel_src_rank = staticmethod(parallel_state.get_tensor_model_parallel_src_rank)
    get_pipeline_model_parallel_group = staticmethod(parallel_state.get_pipeline_model_parallel_group)
    get_pipeline_model_parallel_world_size = staticmethod(parallel_state.get_pipeline_model_parallel_world_size)
    get_pipeline_model_parallel_rank = staticmethod(parallel_state.get_pipeline_model_parallel_rank)

    @staticmethod
    def get_model_parallel_world_size() -> int:
        """Ranks that together hold one replica."""
        return dist.get_world_size(parallel_state.get_model_parallel_group())

    @staticmethod
    def get_model_parallel_rank() -> int:
        """Rank within one replica: part of DeepSpeed's checkpoint file names, so it must be unique there."""
        return dist.get_rank(parallel_state.get_model_parallel_group())

    @staticmethod
    def get_data_parallel_group() -> dist.ProcessGroup:
        """Ranks that hold the same parameters."""
        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    @staticmethod
    def get_data_parallel_world_size() -> int:
        """How many ranks hold the same parameters."""
        return parallel_state.get_data_parallel_world_size(with_context_parallel=True)

    @staticmethod
    def get_data_parallel_rank() -> int:
        """Which of them this one is."""
        return parallel_state.get_data_parallel_rank(with_context_parallel=True)

    @staticmethod
    def get_data_parallel_group_ranks() -> list[int]:
        """Global ranks of the data-parallel group."""
        return dist.get_process_group_ranks(DeepSpeedGrid.get_data_parallel_group())
