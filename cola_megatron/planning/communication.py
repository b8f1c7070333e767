"""Bytes that one rank sends in one optimiser step, by kind, and the links that they take.

Ranks are numbered with tensor parallelism innermost, then context, data and pipeline parallelism, so a tensor-parallel
group lies within a node. Collectives are rings: an all-gather or a reduce-scatter of x bytes over n ranks sends
x (n - 1) / n from each, an all-reduce twice that; so does an all-to-all of x bytes of each rank, once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cola_megatron.config import RunConfig
from cola_megatron.costs.part import FLOAT32, Part, compute_bytes
from cola_megatron.costs.traffic import Traffic
from cola_megatron.planning.hardware import GPU


@dataclass(frozen=True)
class Links:
    """Bandwidth in bytes/s that one rank has in each kind of communication."""

    tensor: float
    context: float
    pipeline: float
    data: float


def links(gpu: GPU, config: RunConfig, replicas: int, gpus_per_node: int) -> Links:
    """The slowest link of each group. A data-parallel group that spans nodes uses the network port of each of its
    members in a node, at most what NVLink carries."""
    ranks, context = config.parallel.tensor_parallel_size, config.parallel.context_parallel_size
    data = gpu.node_bandwidth
    if ranks * context * replicas > gpus_per_node:
        data = min(data, max(1, gpus_per_node // ranks) * gpu.network_bandwidth)
    total = ranks * context * replicas * config.parallel.pipeline_parallel_size

    def over(ranks: int) -> float:
        return gpu.node_bandwidth if ranks <= gpus_per_node else gpu.network_bandwidth

    return Links(gpu.node_bandwidth, over(ranks * context), over(total), data)


def tensor_traffic(config: RunConfig, part: Part) -> Traffic:
    """Of one micro-batch through one part, forward and backward, recomputation included."""
    ranks = config.parallel.tensor_parallel_size
    if ranks == 1 or not part.forward:
        return Traffic()
    forward, backward = part.ring_units.forward, part.ring_units.backward
    if part.is_block and config.training.activation_checkpointing:
        backward = backward + forward
    total = forward + backward if part.backward else forward
    return Traffic(total.bytes * (ranks - 1) / ranks, total.transfers)


def context_traffic(config: RunConfig, part: Part) -> Traffic:
    """Of one micro-batch through one part: what its attention exchanges, recomputation included."""
    ranks = config.parallel.context_parallel_size
    if ranks == 1 or not part.forward:
        return Traffic()
    passes = 1 + part.backward + part.runs_again(config) + part.extra_forwards
    return Traffic(part.exchanged.bytes * (ranks - 1) / ranks, part.exchanged.transfers) * passes


def pipeline_traffic(parts: Sequence[Part], first: int, end: int) -> Traffic:
    """Of one micro-batch through the stage of parts[first:end]: its output, and the gradient of its input."""
    ends = [parts[end - 1].activations.output] if end < len(parts) else []
    ends += [parts[first - 1].activations.output] if first else []
    return Traffic(sum(ends), len(ends))


def data_traffic(config: RunConfig, parts: Sequence[Part], replicas: int, micro_batches: int) -> Traffic:
    """Of one optimiser step: gradients in the type in which they are reduced, and weights in the compute type.

    ZeRO 0 and 1 reduce once a step; ZeRO 2 all-reduces its buckets in every micro-batch; ZeRO 3 gathers the weights
    forward and backward and scatters the gradients in every micro-batch.
    """
    replicas *= config.parallel.context_parallel_size  # these hold the same weights
    if replicas == 1:
        return Traffic()
    parallel, e = config.parallel, compute_bytes(config)
    ranks = parallel.tensor_parallel_size
    elements = sum(part.parameters_on_rank(ranks) for part in parts if part.backward)
    reduced = e if parallel.gradient_reduction == "bf16" else FLOAT32
    trained, gradients, transfers = e * elements, reduced * elements, elements / parallel.reduce_bucket_size
    still = e * sum(part.parameters_on_rank(ranks) for part in parts if part.forward and not part.backward)
    ring = (replicas - 1) / replicas
    if parallel.zero_stage == 3:
        each = 2 * trained + gradients + still
        return Traffic(micro_batches * each * ring, micro_batches * (3 * len(parts) + transfers))
    reductions = micro_batches if parallel.zero_stage == 2 else 1
    gathered = trained if parallel.zero_stage else 0.0
    return Traffic((reductions * 2 * gradients + gathered) * ring, (reductions + 1) * (1 + transfers))
