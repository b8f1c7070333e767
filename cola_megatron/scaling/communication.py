"""Bytes that one rank sends in one optimiser step, by kind, and the links that they take.

Ranks are numbered with tensor parallelism innermost, then data, then pipeline parallelism, so a tensor-parallel group
lies within a node. Collectives are rings: an all-gather or a reduce-scatter of x bytes over n ranks sends x (n - 1) / n
from each, an all-reduce twice that.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cola_megatron.config import RunConfig
from cola_megatron.scaling.activations import FLOAT32, part_activations
from cola_megatron.scaling.hardware import GPU, Efficiency
from cola_megatron.scaling.parts import Part, distinct_times, two_copy_positions


@dataclass(frozen=True)
class Traffic:
    """Bytes sent, and the number of transfers."""

    bytes: float = 0.0
    transfers: float = 0.0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.bytes + other.bytes, self.transfers + other.transfers)

    def __mul__(self, times: float) -> "Traffic":
        return Traffic(self.bytes * times, self.transfers * times)

    def seconds(self, bandwidth: float, efficiency: Efficiency) -> float:
        """Time on a link of this peak bandwidth."""
        return self.bytes / (bandwidth * efficiency.link) + self.transfers * efficiency.collective_seconds


@dataclass(frozen=True)
class Links:
    """Bandwidth in bytes/s that one rank has in each kind of communication."""

    tensor: float
    pipeline: float
    data: float


def links(gpu: GPU, config: RunConfig, replicas: int, gpus_per_node: int) -> Links:
    """The slowest link of each group. A data-parallel group that spans nodes uses the network port of each of its
    members in a node, at most what NVLink carries."""
    ranks = config.parallel.tensor_parallel_size
    data = gpu.node_bandwidth
    if ranks * replicas > gpus_per_node:
        data = min(data, max(1, gpus_per_node // ranks) * gpu.network_bandwidth)
    total = ranks * replicas * config.parallel.pipeline_parallel_size
    return Links(gpu.node_bandwidth, gpu.node_bandwidth if total <= gpus_per_node else gpu.network_bandwidth, data)


def tensor_traffic(config: RunConfig, part: Part) -> Traffic:
    """Of one micro-batch through one part, forward and backward, recomputation included."""
    ranks = config.parallel.tensor_parallel_size
    if ranks == 1 or not part.forward:
        return Traffic()
    forward, backward = _ring_units(config, part.label)
    if part.label.endswith("block") and config.training.activation_checkpointing:
        backward = backward + forward
    total = forward + backward if part.backward else forward
    return Traffic(total.bytes * (ranks - 1) / ranks, total.transfers)


def _ring_units(config: RunConfig, label: str) -> tuple[Traffic, Traffic]:
    """Forward and backward: bytes of whole tensors that are gathered or scattered, an all-reduce counted twice."""
    vae, dit, sequence = config.model.vae, config.model.dit, config.parallel.sequence_parallel
    e, samples = 2 if config.training.precision == "bf16" else 4, config.training.micro_batch_size
    views = 2 if config.objective.vae.mask_weight > 0 else 1
    latents = e * samples * views * config.latent_length * vae.hidden_size
    tokens = latents * vae.patch_size
    flow = e * samples * two_copy_positions(config) * dit.hidden_size
    table = e * (1 + samples * distinct_times(config)) * dit.hidden_size  # one row for each distinct time
    # A block has two branches: in each the input is gathered and the output summed. Under sequence parallelism the
    # inputs are gathered once more for the gradients of the weights, and a sum is a gather and a scatter.
    block, transfers = ((4, 6), (4, 6)) if sequence else ((4, 4), (2, 2))
    norms = 4 if vae.query_key_norm else 0
    if label in ("vae.encoder.block", "vae.decoder.block"):
        return Traffic(block[0] * latents, transfers[0] + norms), Traffic(block[1] * latents, transfers[1] + norms)
    if label == "dit.block":
        forward = Traffic(block[0] * flow + 6 * table, transfers[0] + 4)
        backward = Traffic(block[1] * flow + (20 if sequence else 8) * table, transfers[1] + (8 if sequence else 4))
        return forward, backward
    if label == "reference":
        blocks = Traffic(block[0] * latents / views, transfers[0] + norms) * vae.encoder_layers
        return blocks + Traffic(3 * tokens / views, 3), Traffic()
    units = {
        "vae.encoder.embed": (Traffic(2 * tokens + latents, 2), Traffic(2 * tokens + sequence * latents, 2)),
        "vae.encoder.head": (Traffic(sequence * latents, 2), Traffic(latents, 1)),
        "dit.time": (Traffic(3 * table, 3), Traffic(4 * table, 2)),
        "dit.embed": (Traffic(flow, 1), Traffic(sequence * flow, 1)),
        "dit.head": (Traffic(sequence * flow + 2 * table, 3), Traffic(flow + 2 * table, 2)),
        "vae.decoder.embed": (Traffic(latents, 1), Traffic(sequence * latents, 1)),
        "vae.decoder.head": (Traffic(sequence * latents + tokens, 4), Traffic(2 * latents + 2 * tokens, 2)),
    }
    return units[label]


def pipeline_traffic(config: RunConfig, parts: Sequence[Part], first: int, end: int) -> Traffic:
    """Of one micro-batch through the stage of parts[first:end]: its output, and the gradient of its input."""
    ends = [part_activations(config, parts[end - 1].label).output] if end < len(parts) else []
    ends += [part_activations(config, parts[first - 1].label).output] if first else []
    return Traffic(sum(ends), len(ends))


def data_traffic(config: RunConfig, parts: Sequence[Part], replicas: int, micro_batches: int) -> Traffic:
    """Of one optimiser step: gradients in the type in which they are reduced, and weights in the compute type.

    ZeRO 0 and 1 reduce once a step; ZeRO 2 all-reduces its buckets in every micro-batch; ZeRO 3 gathers the weights
    forward and backward and scatters the gradients in every micro-batch.
    """
    if replicas == 1:
        return Traffic()
    parallel, e = config.parallel, 2 if config.training.precision == "bf16" else 4
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
