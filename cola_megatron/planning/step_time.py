"""Seconds of one optimiser step on one layout, from counted work and the assumed efficiencies.

A stage of the pipeline needs t = computation + tensor- and context-parallel traffic + transfers to its neighbours for
each micro-batch; one-forward-one-backward over M micro-batches takes sum(t) + (M - 1) max(t) over the stages. After it
come the part of the data-parallel traffic that nothing hides, and the optimiser step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cola_megatron.config import RunConfig
from cola_megatron.costs.part import ATTENTION_PASSES, MATRIX_PASSES, Part
from cola_megatron.costs.traffic import Traffic
from cola_megatron.families import Mode, family_of
from cola_megatron.planning.communication import (
    context_traffic,
    data_traffic,
    links,
    pipeline_traffic,
    tensor_traffic,
)
from cola_megatron.planning.hardware import GPU, Efficiency
from cola_megatron.planning.memory import micro_batches

BYTE_PASSES = 3.0
"""Bytes moved forward and backward against forward alone."""

# Kernels that one transformer block starts, forward and backward: counted are 134 of the DiT's, and 3,800 of 40 blocks
# that are compiled.
KERNELS_OF_A_BLOCK, KERNELS_OF_A_COMPILED_BLOCK = 130, 95


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimiser step, and what one rank (of the busiest stage) sends in it."""

    computation: float
    """Of the slowest stage, recomputation included."""
    tensor: float
    context: float
    pipeline: float
    """Transfers between stages."""
    bubble: float
    """Waiting for other stages: at the ends of the step, and because stages are not equally long."""
    data: float
    """Data-parallel traffic that nothing hides."""
    optimizer: float
    sent_tensor: float
    """Bytes."""
    sent_context: float
    sent_pipeline: float
    sent_data: float

    @property
    def seconds(self) -> float:
        """The whole step."""
        sent = self.tensor + self.context + self.pipeline + self.data
        return self.computation + sent + self.bubble + self.optimizer

    @property
    def sent(self) -> float:
        """Bytes that one rank sends in the step."""
        return self.sent_tensor + self.sent_context + self.sent_pipeline + self.sent_data


def step_time(
    config: RunConfig,
    replicas: int,
    split: Sequence[int],
    gpu: GPU,
    efficiency: Efficiency,
    gpus_per_node: int,
    mode: Mode | None = None,
) -> StepTime:
    """One optimiser step; `split` as `pipeline_split` gives it, `mode` as in `Family.parts`."""
    parts, count = family_of(config).parts(config, mode), micro_batches(config, replicas)
    link = links(gpu, config, replicas, gpus_per_node)
    stages, first = [], 0
    for held in split:
        own = parts[first : first + held]
        computation = sum(computation_seconds(config, part, gpu, efficiency) for part in own)
        tensor = sum((tensor_traffic(config, part) for part in own), Traffic())
        context = sum((context_traffic(config, part) for part in own), Traffic())
        pipeline = pipeline_traffic(parts, first, first + held)
        data = data_traffic(config, own, replicas, count)
        optimizer = optimizer_seconds(config, own, replicas, gpu, efficiency)
        stages.append((computation, tensor, context, pipeline, data, optimizer))
        first += held
    rates = efficiency.link, efficiency.collective_seconds
    lengths = [
        computation
        + tensor.seconds(link.tensor, *rates)
        + context.seconds(link.context, *rates)
        + pipeline.seconds(link.pipeline, *rates)
        for computation, tensor, context, pipeline, _, _ in stages
    ]
    slowest = lengths.index(max(lengths))
    computation, tensor, context, pipeline, _, _ = stages[slowest]
    data = max((stage[4] for stage in stages), key=lambda traffic: traffic.bytes)
    exposed = data.seconds(link.data, *rates)
    if _overlaps(config):
        backward = count * computation * (1 - 1 / MATRIX_PASSES)
        hides_behind = count * computation if config.parallel.zero_stage == 3 else backward
        exposed = max(0.0, exposed - efficiency.overlap * hides_behind)
    return StepTime(
        computation=count * computation,
        tensor=count * tensor.seconds(link.tensor, *rates),
        context=count * context.seconds(link.context, *rates),
        pipeline=count * pipeline.seconds(link.pipeline, *rates),
        bubble=sum(lengths) - lengths[slowest],
        data=exposed,
        optimizer=max(stage[5] for stage in stages),
        sent_tensor=count * tensor.bytes,
        sent_context=count * context.bytes,
        sent_pipeline=count * pipeline.bytes,
        sent_data=data.bytes,
    )


def _overlaps(config: RunConfig) -> bool:
    """bf16 with ZeRO 1 reduces after the last backward pass, and so does ZeRO 0; a pipeline has no other choice."""
    return config.parallel.overlap_communication and config.parallel.zero_stage >= 2


def computation_seconds(config: RunConfig, part: Part, gpu: GPU, efficiency: Efficiency) -> float:
    """One micro-batch through one part, forward and (where it is trained) backward."""
    if not part.forward:
        return 0.0
    peak = gpu.bf16_flops if config.training.precision == "bf16" else gpu.fp32_flops
    samples = config.training.micro_batch_size
    ranks = config.parallel.tensor_parallel_size * config.parallel.context_parallel_size

    def passes(forward_and_backward: float) -> float:
        return (forward_and_backward if part.backward else 1.0) + part.runs_again(config) + part.extra_forwards

    if efficiency.mfu is not None:
        return 2 * samples / ranks * part.macs * passes(MATRIX_PASSES) / (peak * efficiency.mfu)
    matrix = 2 * samples / ranks * part.matrix_macs / (peak * efficiency.matrix)
    attention = 2 * samples / ranks * part.attention_macs * part.computed_pairs / (peak * efficiency.attention)
    compiled = config.training.compile_blocks != "never" and config.parallel.can_compile_blocks
    crossings = efficiency.elementwise_passes if compiled else efficiency.plain_elementwise_passes
    work = part.activations.kept if part.activations.elementwise is None else part.activations.elementwise
    forward_bytes = work * crossings / BYTE_PASSES
    elementwise = forward_bytes / (gpu.memory_bandwidth * efficiency.memory)
    seconds = matrix * passes(MATRIX_PASSES) + attention * passes(ATTENTION_PASSES) + elementwise * passes(BYTE_PASSES)
    if not part.is_block:
        return seconds
    kernels = KERNELS_OF_A_COMPILED_BLOCK if compiled else KERNELS_OF_A_BLOCK
    started = kernels * efficiency.kernel_seconds * passes(MATRIX_PASSES) / MATRIX_PASSES
    return max(seconds, started)


def optimizer_seconds(
    config: RunConfig, parts: Sequence[Part], replicas: int, gpu: GPU, efficiency: Efficiency
) -> float:
    """Accumulating, measuring, clipping and clearing gradients, and AdamW, all bound by memory.

    Bytes for each parameter; AdamW: 28 (read weight, gradient, two moments, write all but the gradient) and 6 to write
    the compute copy; an average of the weights: 12; norm and clip: 12. Under bf16 a gradient is added to its float32
    sum in every micro-batch (12 with the clearing), and the reduction goes through a bf16 copy (12). Of what Muon
    updates 20 and 6, and the products of its iteration, which replicas share out and tensor-parallel ranks do not.
    """
    parallel, count = config.parallel, micro_batches(config, replicas)
    trained = sum(part.parameters_on_rank(parallel.tensor_parallel_size) for part in parts if part.backward)
    bf16 = config.training.precision == "bf16"
    partition = trained / (replicas * parallel.context_parallel_size)
    averaging = 0 if config.training.ema_decay is None else 12
    muon = config.training.optimizer.name == "muon"
    matrices = sum(part.layer_parameters for part in parts if part.backward and muon) / parallel.tensor_parallel_size
    update = (34 + averaging) * partition - 8 * matrices / replicas
    if parallel.zero_stage == 0:
        moved = (28 + averaging + 12) * trained - 8 * matrices
    elif parallel.zero_stage == 1:
        moved = update + (12 + 4) * trained + ((12 * count + 12) if bf16 else 8 * count) * trained
    else:
        moved = update + 12 * partition + count * (8 * trained + 10 * partition)
    seconds = moved / (gpu.memory_bandwidth * efficiency.memory)
    if muon:
        peak = gpu.bf16_flops if bf16 else gpu.fp32_flops
        flops = sum(part.newton_schulz_flops for part in parts if part.backward)
        seconds += flops / (replicas if parallel.zero_stage else 1) / (peak * efficiency.matrix)
    if parallel.offload_optimizer:
        e = 2 if bf16 else 4
        seconds += update / efficiency.host_bandwidth
        seconds += (4 + e) * partition / (gpu.host_bandwidth * efficiency.link)
    return seconds
