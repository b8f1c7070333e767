"""The process groups of a run, as one object that is handed to every layer."""

import os
import warnings
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from cola_megatron.config import ConfigError
from cola_megatron.cuda_environment import set_queues
from cola_megatron.parallel.megatron import ModelParallelConfig, parallel_state
from cola_megatron.parallel.rendezvous import cannot_join, has_a_gpu_of_its_own, place_from_srun


@dataclass(frozen=True)
class ProcessGroups:
    """Where this process stands in the (tensor, context, data, pipeline) grid.

    `layer_config` is what megatron-core's parallel linears read; `replicated_input_config` is the same without
    sequence parallelism, for inputs that every tensor-parallel rank holds whole (the table of distinct times).
    """

    tensor_parallel_size: int
    tensor_parallel_rank: int
    pipeline_parallel_size: int
    pipeline_parallel_rank: int
    """The stage of the pipeline that this process computes."""
    context_parallel_size: int
    context_parallel_rank: int
    """Which part of every sequence is here; see `parallel/sequence_parts.py`."""
    data_parallel_size: int
    data_parallel_rank: int
    """The replica: all of its ranks, those of its context too, see the same samples."""
    same_weights_size: int
    same_weights_rank: int
    sequence_parallel: bool
    device: torch.device
    tensor_group: dist.ProcessGroup = field(repr=False)
    pipeline_group: dist.ProcessGroup = field(repr=False)
    """The stages of one replica (with the same tensor-parallel rank), in order."""
    replica_group: dist.ProcessGroup = field(repr=False)
    """The ranks that together hold the weights once: stages times their tensor-parallel ranks."""
    context_group: dist.ProcessGroup = field(repr=False)
    """The ranks that share every sequence, in the order of its parts."""
    data_group: dist.ProcessGroup = field(repr=False)
    same_weights_group: dist.ProcessGroup = field(repr=False)
    """The ranks that hold the same parameters, over which ZeRO adds up gradients and shares the optimiser out: replicas
    times their context-parallel ranks."""
    layer_config: ModelParallelConfig = field(repr=False)
    replicated_input_config: ModelParallelConfig = field(repr=False)

    @property
    def rank(self) -> int:
        """Rank in the whole job."""
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        """Processes in the whole job."""
        return dist.get_world_size()

    @property
    def is_main(self) -> bool:
        """True in the one process that writes logs and reports."""
        return self.rank == 0

    def barrier(self) -> None:
        """Waits for every process of the job."""
        if self.world_size > 1:
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def sum_over_stages_and_replicas(self, values_N: torch.Tensor) -> torch.Tensor:
        """Sum of a small tensor over pipeline stages, context- and data-parallel ranks, alike on every rank.

        In float64, so that the order of the terms does not show.
        """
        total_N = values_N.double()
        if self.pipeline_parallel_size > 1:
            dist.all_reduce(total_N, group=self.pipeline_group)
        if self.same_weights_size > 1:
            dist.all_reduce(total_N, group=self.same_weights_group)
        return total_N

    @property
    def sequence_parts(self) -> int:
        """Into how many parts ranks cut a sequence between the layers: its length must divide by it."""
        return self.context_parallel_size * (self.tensor_parallel_size if self.sequence_parallel else 1)


def initialize_parallel(
    tensor_parallel_size: int = 1,
    sequence_parallel: bool = False,
    timeout_minutes: float = 30.0,
    pipeline_parallel_size: int = 1,
    context_parallel_size: int = 1,
) -> ProcessGroups:
    """Joins the job and builds its groups.

    Under torchrun (RANK, WORLD_SIZE, ... in the environment), or as one of several tasks of srun with MASTER_ADDR and
    MASTER_PORT, it joins that job over nccl or gloo; in a plain Python process it makes a job of one, without a network
    port. A second call in one process must ask for the same sizes and returns an equal object.

    Raises:
        ConfigError: the world size is not divisible by the tensor- times the pipeline- times the context-parallel
            size, or the groups exist with other sizes.
        RendezvousFailed: the processes do not find each other.
    """
    set_queues(tensor_parallel_size)  # `cola train` has done so before torch was imported
    os.environ.update(place_from_srun(os.environ))
    device = _local_device()
    if not dist.is_initialized():
        _join_job(device, timedelta(minutes=timeout_minutes))
    world_size = dist.get_world_size()
    replica_size = tensor_parallel_size * pipeline_parallel_size * context_parallel_size
    if world_size % replica_size:
        context = f" times parallel.context_parallel_size={context_parallel_size}" if context_parallel_size > 1 else ""
        raise ConfigError(
            f"parallel.tensor_parallel_size={tensor_parallel_size} times parallel.pipeline_parallel_size="
            f"{pipeline_parallel_size}{context} does not divide the {world_size} processes of this job; start a "
            f"multiple of {replica_size} processes"
        )
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor_parallel_size,
            pipeline_model_parallel_size=pipeline_parallel_size,
            context_parallel_size=context_parallel_size,
            distributed_timeout_minutes=timeout_minutes,
            # Nobody asks for the gloo twins of its groups, each of which would connect all its ranks at once.
            create_gloo_process_groups=False,
        )
    sizes = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_context_parallel_world_size(),
    )
    if sizes != (tensor_parallel_size, pipeline_parallel_size, context_parallel_size):
        raise ConfigError(
            f"this process already runs with tensor_parallel_size={sizes[0]}, pipeline_parallel_size={sizes[1]} and "
            f"context_parallel_size={sizes[2]}, not {tensor_parallel_size}, {pipeline_parallel_size} and "
            f"{context_parallel_size}"
        )
    sequence_parallel = sequence_parallel and tensor_parallel_size > 1

    def layer_config(sequence_parallel: bool) -> ModelParallelConfig:
        return ModelParallelConfig(
            tensor_model_parallel_size=tensor_parallel_size,
            sequence_parallel=sequence_parallel,
            use_cpu_initialization=True,
            perform_initialization=False,  # `initialize_parameters` does it, alike for every layout
            gradient_accumulation_fusion=False,
            params_dtype=torch.float32,
        )

    return ProcessGroups(
        tensor_parallel_size=tensor_parallel_size,
        tensor_parallel_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline_parallel_size=pipeline_parallel_size,
        pipeline_parallel_rank=parallel_state.get_pipeline_model_parallel_rank(),
        context_parallel_size=context_parallel_size,
        context_parallel_rank=parallel_state.get_context_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        same_weights_size=parallel_state.get_data_parallel_world_size(with_context_parallel=True),
        same_weights_rank=parallel_state.get_data_parallel_rank(with_context_parallel=True),
        sequence_parallel=sequence_parallel,
        device=device,
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
        pipeline_group=parallel_state.get_pipeline_model_parallel_group(),
        replica_group=parallel_state.get_model_parallel_group(),
        context_group=parallel_state.get_context_parallel_group(),
        data_group=parallel_state.get_data_parallel_group(),
        same_weights_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        layer_config=layer_config(sequence_parallel),
        replicated_input_config=layer_config(False),
    )


def _local_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if has_a_gpu_of_its_own(gpus):
        local_rank = 0
    if local_rank >= gpus:
        raise ConfigError(
            f"process {local_rank} of this machine has no GPU: there are {gpus}; start at most {gpus} processes here "
            "(torchrun --nproc-per-node)"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _join_job(device: torch.device, timeout: timedelta) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    # DeepSpeed's barriers name no device; `_connect` has told nccl which one it is.
    warnings.filterwarnings("ignore", r"barrier\(\): using the device|No device id is provided", UserWarning)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # gloo and nccl both remark on the device they were not given
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            try:
                # Without `device_id`: nccl would connect at once, and split off a communicator for every group that is
                # made later, members or not: minutes for the thousands of groups of a thousand ranks.
                dist.init_process_group(backend, timeout=timeout)
                if backend == "nccl":
                    _connect(device)
            except (dist.DistError, TimeoutError) as error:
                raise cannot_join(error) from error
        else:
            os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists, even in a job of one
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def _connect(device: torch.device) -> None:
    """The first collective of the job: who cannot be reached is known here, and barriers know this rank's device.

    DeepSpeed's barriers name none. nccl then takes the device of an earlier collective; where there was none it
    guesses it from the global rank, which is another one where a scheduler deals ranks out in turns.
    """
    number = torch.ones(1, device=device)
    dist.all_reduce(number)
    number.item()
