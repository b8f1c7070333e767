"""Seconds of one optimiser step on one layout, from counted work and the assumed efficiencies.

A stage of the pipeline needs t = computation + tensor-parallel traffic + transfers to its neighbours for each
micro-batch; one-forward-one-backward over M micro-batches takes sum(t) + (M - 1) max(t) over the stages. After it come
the part of the data-parallel traffic that nothing hides, and the optimiser step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cola_megatron.config import RunConfig
from cola_megatron.scaling.activations import part_activations
from cola_megatron.scaling.communication import (
    Traffic,
    data_traffic,
    links,
    pipeline_traffic,
    tensor_traffic,
)
from cola_megatron.scaling.hardware import GPU, Efficiency
from cola_megatron.scaling.memory import micro_batches
from cola_megatron.scaling.parts import Part, chain_parts, two_copy_pairs, two_copy_positions

# Forward and backward against forward alone: matrix products, attention (which computes its scores once more), bytes.
MATRIX_PASSES, ATTENTION_PASSES, BYTE_PASSES = 3.0, 3.5, 3.0

# Kernels that one transformer block starts, forward and backward: counted are 134 of the DiT's, and 3,800 of 40 blocks
# that are compiled.
KERNELS_OF_A_BLOCK, KERNELS_OF_A_COMPILED_BLOCK = 130, 95


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimiser step, and what one rank (of the busiest stage) sends in it."""

    computation: float
    """Of the slowest stage, recomputation included."""
    tensor: float
    pipeline: float
    """Transfers between stages."""
    bubble: float
    """Waiting for other stages: at the ends of the step, and because stages are not equally long."""
    data: float
    """Data-parallel traffic that nothing hides."""
    optimizer: float
    sent_tensor: float
    """Bytes."""
    sent_pipeline: float
    sent_data: float

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.computation + self.tensor + self.pipeline + self.bubble + self.data + self.optimizer

    @property
    def sent(self) -> float:
        """Bytes that one rank sends in the step."""
        return self.sent_tensor + self.sent_pipeline + self.sent_data


def step_time(
    config: RunConfig,
    replicas: int,
    split: Sequence[int],
    gpu: GPU,
    efficiency: Efficiency,
    gpus_per_node: int,
    train_vae: bool | None = None,
) -> StepTime:
    """One optimiser step; `split` as `pipeline_split` gives it, `train_vae` as in `chain_parts`."""
    parts, count = chain_parts(config, train_vae), micro_batches(config, replicas)
    link = links(gpu, config, replicas, gpus_per_node)
    stages, first = [], 0
    for held in split:
        own = parts[first : first + held]
        computation = sum(computation_seconds(config, part, gpu, efficiency) for part in own)
        tensor = sum((tensor_traffic(config, part) for part in own), Traffic())
        pipeline = pipeline_traffic(config, parts, first, first + held)
        data = data_traffic(config, own, replicas, count)
        stages.append((computation, tensor, pipeline, data, optimizer_seconds(config, own, replicas, gpu, efficiency)))
        first += held
    lengths = [
        computation + tensor.seconds(link.tensor, efficiency) + pipeline.seconds(link.pipeline, efficiency)
        for computation, tensor, pipeline, _, _ in stages
    ]
    slowest = lengths.index(max(lengths))
    computation, tensor, pipeline, _, _ = stages[slowest]
    data = max((stage[3] for stage in stages), key=lambda traffic: traffic.bytes)
    exposed = data.seconds(link.data, efficiency)
    if _overlaps(config):
        backward = count * computation * (1 - 1 / MATRIX_PASSES)
        hides_behind = count * computation if config.parallel.zero_stage == 3 else backward
        exposed = max(0.0, exposed - efficiency.overlap * hides_behind)
    return StepTime(
        computation=count * computation,
        tensor=count * tensor.seconds(link.tensor, efficiency),
        pipeline=count * pipeline.seconds(link.pipeline, efficiency),
        bubble=sum(lengths) - lengths[slowest],
        data=exposed,
        optimizer=max(stage[4] for stage in stages),
        sent_tensor=count * tensor.bytes,
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
    recomputes = config.training.activation_checkpointing and part.label.endswith("block")
    samples, ranks = config.training.micro_batch_size, config.parallel.tensor_parallel_size

    def passes(forward_and_backward: float) -> float:
        return (forward_and_backward if part.backward else 1.0) + (1.0 if recomputes and part.backward else 0.0)

    if efficiency.mfu is not None:
        return 2 * samples / ranks * part.macs * passes(MATRIX_PASSES) / (peak * efficiency.mfu)
    matrix = 2 * samples / ranks * part.matrix_macs / (peak * efficiency.matrix)
    attention = 2 * samples / ranks * part.attention_macs * computed_pairs(config, part) / (peak * efficiency.attention)
    compiled = config.training.compile_blocks != "never" and config.parallel.can_compile_blocks
    crossings = efficiency.elementwise_passes if compiled else efficiency.plain_elementwise_passes
    forward_bytes = _kept_bytes(config, part) * crossings / BYTE_PASSES
    elementwise = forward_bytes / (gpu.memory_bandwidth * efficiency.memory)
    seconds = matrix * passes(MATRIX_PASSES) + attention * passes(ATTENTION_PASSES) + elementwise * passes(BYTE_PASSES)
    if not part.label.endswith("block"):
        return seconds
    kernels = KERNELS_OF_A_COMPILED_BLOCK if compiled else KERNELS_OF_A_BLOCK
    started = kernels * efficiency.kernel_seconds * passes(MATRIX_PASSES) / MATRIX_PASSES
    return max(seconds, started)


def computed_pairs(config: RunConfig, part: Part) -> float:
    """Pairs that the kernel computes over pairs that the mask keeps: with a mask tensor it skips none."""
    if part.label == "dit.block":
        return _pairs_of_the_prior(config) / two_copy_pairs(config.latent_length, config.model.dit.block_size)
    length, block = config.latent_length, config.model.vae.block_size
    return 1.0 if block == 1 else 2 * length / (length + block)


def _pairs_of_the_prior(config: RunConfig) -> int:
    """Pairs in the products of one sample: of all positions, or of the chunks of `two_copies_in_chunks`."""
    positions, length, block = two_copy_positions(config), config.latent_length, config.model.dit.block_size
    chosen = config.training.attention_chunk
    if not chosen:
        return positions**2
    size, clean_length = -(-chosen // block) * block, positions - length
    of_clean = [(min(start + size, clean_length), start) for start in range(0, clean_length, size)]
    of_noisy = [(min(start + size, length), start) for start in range(0, length, size)]
    return sum((end - start) * end for end, start in of_clean) + sum(
        (end - start) * (min(end, clean_length) + end - start) for end, start in of_noisy
    )


def _kept_bytes(config: RunConfig, part: Part) -> float:
    """A measure of elementwise work: what the part keeps, or would keep if it were trained."""
    if part.label != "reference":
        return part_activations(config, part.label).kept
    views = 2 if config.objective.vae.mask_weight > 0 else 1
    blocks = config.model.vae.encoder_layers * part_activations(config, "vae.encoder.block").kept
    return (blocks + part_activations(config, "vae.encoder.embed").kept) / views


def optimizer_seconds(
    config: RunConfig, parts: Sequence[Part], replicas: int, gpu: GPU, efficiency: Efficiency
) -> float:
    """Accumulating, measuring, clipping and clearing gradients, and AdamW, all bound by memory.

    Bytes for each parameter; AdamW: 28 (read weight, gradient, two moments, write all but the gradient) and 6 to write
    the compute copy; norm and clip: 12. Under bf16 a gradient is added to its float32 sum in every micro-batch (12 with
    the clearing), and the reduction goes through a bf16 copy (12).
    """
    parallel, count = config.parallel, micro_batches(config, replicas)
    trained = sum(part.parameters_on_rank(parallel.tensor_parallel_size) for part in parts if part.backward)
    partition, bf16 = trained / replicas, config.training.precision == "bf16"
    update = 34 * partition
    if parallel.zero_stage == 0:
        moved = (28 + 12) * trained
    elif parallel.zero_stage == 1:
        moved = update + (12 + 4) * trained + ((12 * count + 12) if bf16 else 8 * count) * trained
    else:
        moved = update + 12 * partition + count * (8 * trained + 10 * partition)
    seconds = moved / (gpu.memory_bandwidth * efficiency.memory)
    if parallel.offload_optimizer:
        e = 2 if bf16 else 4
        seconds += update / efficiency.host_bandwidth
        seconds += (4 + e) * partition / (gpu.host_bandwidth * efficiency.link)
    return seconds
