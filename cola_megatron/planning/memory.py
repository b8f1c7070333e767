"""Memory of one rank: what DeepSpeed 0.19 sets aside for the model, and the peak of a step.

The parameters of a rank are T trained ones of W in all, after tensor and pipeline parallelism; D replicas share the
optimiser. `model_states` says which tensors each ZeRO stage holds; `rank_memory` runs the chain of parts backwards and
takes the worst moment.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cola_megatron.config import RunConfig
from cola_megatron.costs.part import FLOAT32, Activations, Part, largest_gathered_input
from cola_megatron.families import family_of

# DeepSpeed's defaults for ZeRO 3: parameters used again within 1e9 elements stay gathered (at the turn from forward to
# backward that is the last half of them, for they are passed twice), and 5e7 more are fetched ahead.
GATHERED_PARAMETERS = 1e9 / 2 + 5e7

# Elements up to which DeepSpeed's engine joins tensors for one all-reduce (no setting reaches this constant).
JOINED_REDUCTION = 500_000_000


@dataclass(frozen=True)
class ModelStates:
    """Bytes on one rank that do not depend on the micro-batch."""

    weights: float
    gradients: float
    """Those that live through the whole step: float32 sums, partitions."""
    parameter_gradients: float
    """Those that autograd leaves on the parameters."""
    parameter_gradients_stay: bool
    """They are the sums over the micro-batches; otherwise they are added to `gradients` after each, and let go."""
    optimizer: float
    buffers: float
    """Buckets of the reductions, gathered parameters, gathered inputs."""
    at_the_step: float
    """On top of the others when the gradients are reduced and the parameters updated; activations are gone then."""
    host: float
    """In the host's memory: what is offloaded, and float32 copies of frozen weights for the checkpoints."""

    @property
    def fixed(self) -> float:
        """Bytes that are there at every moment of a step."""
        return self.weights + self.gradients + self.optimizer + self.buffers


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank of one pipeline stage."""

    states: ModelStates
    activations: float
    """What autograd keeps of all micro-batches in flight, under the config's own recomputation setting."""
    activations_kept: float
    """The same without recomputation."""
    activations_recomputed: float
    """The same with recomputation."""
    peak: float


def rank_memory(config: RunConfig, replicas: int, split: Sequence[int]) -> tuple[RankMemory, ...]:
    """Memory of a rank of each pipeline stage.

    Args:
        replicas: data-parallel size.
        split: parts in each stage, as `pipeline_split` gives them.
    """
    parts = family_of(config).parts(config)
    activations = [part.activations if part.backward else Activations() for part in parts]
    stages, first = [], 0
    for stage, count in enumerate(split):
        own = slice(first, first + count)
        received = activations[first - 1].output if first else 0.0
        in_flight = min(len(split) - stage, micro_batches(config, replicas))
        stages.append(_stage_memory(config, replicas, parts[own], activations[own], received, in_flight))
        first += count
    return tuple(stages)


def micro_batches(config: RunConfig, replicas: int) -> int:
    """Forward passes of one replica in an optimiser step."""
    return config.training.global_batch_size // (config.training.micro_batch_size * replicas)


def _stage_memory(
    config: RunConfig,
    replicas: int,
    parts: Sequence[Part],
    activations: Sequence[Activations],
    received: float,
    in_flight: int,
) -> RankMemory:
    states = model_states(config, parts, replicas * config.parallel.context_parallel_size)
    kept = [each.kept for each in activations]
    recomputed = [each.output if each.recomputable else each.kept for each in activations]
    held = recomputed if config.training.activation_checkpointing else kept
    earlier = (in_flight - 1) * (received + sum(held)) + received
    accumulates = states.parameter_gradients_stay and micro_batches(config, replicas) > 1
    trained = sum(_trained(part, config) for part in parts)
    worst, later = 0.0, 0.0
    for index in reversed(range(len(parts))):
        share = 1.0 if accumulates else later / trained
        moment = earlier + sum(held[:index]) + kept[index] + activations[index].temporary
        worst = max(worst, moment + share * states.parameter_gradients)
        later += _trained(parts[index], config)
    at_the_step = states.at_the_step + (states.parameter_gradients if states.parameter_gradients_stay else 0.0)
    worst = max(worst, states.parameter_gradients, at_the_step)
    return RankMemory(
        states=states,
        activations=earlier + sum(held),
        activations_kept=in_flight * (received + sum(kept)),
        activations_recomputed=in_flight * (received + sum(recomputed)),
        peak=max(states.fixed + worst, _construction(config, parts)),
    )


def model_states(config: RunConfig, parts: Sequence[Part], replicas: int) -> ModelStates:
    """What DeepSpeed holds for these parts on one rank; e is the size of the compute type.

    `replicas` are all ranks that hold the same weights, those of a context too.

    * ZeRO 0 (float32): weights, gradients, two moments; of what Muon updates, here and below, one. An average of the
      weights is one tensor more of the size of a moment.
    * ZeRO 1, bf16 (`BF16_Optimizer`): bf16 weights, a float32 sum of the gradients at full size, the bf16 gradients of
      the running micro-batch beside it until its end; master weights and moments / D. Before it reduces the sums it
      joins and rounds them in copies (`_reduction_copies`).
    * ZeRO 1, float32, or with the optimiser in host memory: gradients at full size in float32, reduced in buckets.
    * ZeRO 2: float32 gradients / D, buckets in the compute type, and a copy of one where they are reduced in another.
    * ZeRO 3: as ZeRO 2 with weights / D, and a working set of gathered weights.
    """
    bf16, parallel = config.training.precision == "bf16", config.parallel
    stage, offload, e = parallel.zero_stage, parallel.offload_optimizer, 2 if bf16 else 4
    trained = sum(_trained(part, config) for part in parts)
    everything = sum(part.parameters_on_rank(parallel.tensor_parallel_size) for part in parts)
    partition = trained / replicas
    gathered_inputs = largest_gathered_input(parts)
    bucket_buffers = 2 if parallel.overlap_communication and stage < 3 else 1
    bucket = parallel.reduce_bucket_size * bucket_buffers
    largest = max((part.largest_matrix for part in parts if part.backward), default=0.0)

    second_moments, averages = _second_moments(config, parts), int(config.training.ema_decay is not None)
    weights = e * everything
    optimizer = (2 + averages) * FLOAT32 * partition + FLOAT32 * second_moments / replicas
    gradients = parameter_gradients = buffers = at_the_step = 0.0
    stay = True
    if stage == 0:
        optimizer = FLOAT32 * ((1 + averages) * trained + second_moments)
        parameter_gradients = FLOAT32 * trained
        at_the_step = FLOAT32 * min(trained, JOINED_REDUCTION) if replicas > 1 else 0.0
    elif stage == 1 and bf16 and not offload:
        stay = False
        gradients, parameter_gradients = FLOAT32 * trained, e * trained
        at_the_step = _reduction_copies(config, parts) if replicas > 1 else 0.0
    elif stage == 1:
        parameter_gradients, buffers = FLOAT32 * trained, FLOAT32 * bucket
        at_the_step = 0.0 if offload else 2 * FLOAT32 * partition
    else:
        gradients = FLOAT32 * partition
        buffers = e * (bucket + (largest if stage == 2 else 0.0))
        if bf16 and parallel.gradient_reduction == "fp32" and replicas > 1:
            buffers += FLOAT32 * min(parallel.reduce_bucket_size, trained)
        at_the_step = 0.0 if bf16 or offload else FLOAT32 * partition
    if stage == 3:
        weights = e * everything / replicas
        buffers += e * min(everything, GATHERED_PARAMETERS + largest)
        if not bf16:
            optimizer -= FLOAT32 * partition  # the float32 weights are the master weights
        if offload:
            gradients = 0.0
    host = FLOAT32 * (everything - trained)
    if offload:
        host += optimizer + (FLOAT32 + e) * partition  # and gradients, and the way back in the compute type
        optimizer, buffers = 0.0, buffers + (e * largest if stage < 3 else 0.0)
    return ModelStates(
        weights, gradients, parameter_gradients, stay, optimizer, buffers + gathered_inputs, at_the_step, host
    )


def _reduction_copies(config: RunConfig, parts: Sequence[Part]) -> float:
    """Bytes of the largest joined copy of the float32 sums, and of its rounding to the type of the reduction.

    The sums are two tensors for each network, its matrices and its vectors. They are joined in the order of the
    model's parameters until they exceed `JOINED_REDUCTION`; one that does so alone is not joined, only rounded.
    """
    family, vectors = family_of(config), 1.0  # next to the matrices they have no size, but they are there
    rounded = 2 if config.parallel.gradient_reduction == "bf16" else 0
    tensors: list[float] = []
    for network in dict.fromkeys(part.network for part in family.parts(config)):
        matrices = sum(_trained(part, config) for part in parts if part.network == network)
        pair = [vectors, matrices] if network in family.vectors_first else [matrices, vectors]
        tensors += pair if matrices else []
    largest = 0.0
    joined: list[float] = []
    for size in [*tensors, float("inf")]:
        if sum(joined) > JOINED_REDUCTION or size == float("inf"):
            largest = max(largest, sum(joined) * (rounded + (FLOAT32 if len(joined) > 1 else 0)))
            joined = []
        joined.append(size)
    return largest


def _trained(part: Part, config: RunConfig) -> float:
    return part.parameters_on_rank(config.parallel.tensor_parallel_size) if part.backward else 0.0


def _second_moments(config: RunConfig, parts: Sequence[Part]) -> float:
    """Trained parameters on a rank that AdamW updates."""
    if config.training.optimizer.name == "adamw":
        return sum(_trained(part, config) for part in parts)
    matrices = sum(part.layer_parameters for part in parts if part.backward)
    return sum(_trained(part, config) for part in parts) - matrices / config.parallel.tensor_parallel_size


def _construction(config: RunConfig, parts: Sequence[Part]) -> float:
    """Every rank builds its part in float32 on the device before DeepSpeed makes its own copies."""
    return FLOAT32 * sum(part.parameters_on_rank(config.parallel.tensor_parallel_size) for part in parts)
