"""FLOPs of training, counted from the config: two per multiply-add, backward twice the forward.

`training_flops` counts the matrices, the attention scores that the masks keep, and nothing elementwise. Recomputation
is not in it: it is a way of running, not of the model. `hardware_flops_by_step` has it, and the pairs that are computed
and dropped.

The parts of its family are the one place where a model's parameters and multiply-adds are written down; `stage_costs`
makes of them the costs by which a pipeline is balanced.
"""

from collections.abc import Callable

from cola_megatron.config import RunConfig
from cola_megatron.families import Mode, family_of
from cola_megatron.planning.hardware import GPUS, Efficiency

# Share of the peak that a whole micro-batch reaches, elementwise work included: what the byte rates compare with.
TYPICAL_MFU = 0.35

__all__ = [
    "hardware_flops_by_step",
    "paper_nominal_flops",
    "parameter_step_cost",
    "stage_costs",
    "training_flops",
    "training_flops_by_step",
    "training_flops_per_sample",
]


def paper_nominal_flops(backbone_parameters: float, tokens: int) -> float:
    """6 N D, the paper's compute axis (N = 1.8e9 for the published model)."""
    return 6.0 * backbone_parameters * tokens


def training_flops_per_sample(config: RunConfig, mode: Mode | None = None) -> float:
    """FLOPs of one sample through one optimiser step of that kind; None: the kind of the first step."""
    return sum(part.flops for part in family_of(config).parts(config, mode))


def training_flops(config: RunConfig, steps: int) -> float:
    """FLOPs of the first `steps` optimiser steps, each counted as what it is (a frozen VAE costs less)."""
    return training_flops_by_step(config)(steps)


def training_flops_by_step(config: RunConfig) -> Callable[[int], float]:
    """`training_flops` of a config as a function of the steps, for many of them: the parts are counted once."""
    return _by_step(config, lambda mode: training_flops_per_sample(config, mode))


def hardware_flops_by_step(config: RunConfig) -> Callable[[int], float]:
    """FLOPs that the devices do in the first steps, recomputation and dropped attention pairs included."""
    parts = family_of(config).parts
    return _by_step(config, lambda mode: sum(part.hardware_flops(config) for part in parts(config, mode)))


def _by_step(config: RunConfig, of_sample: Callable[[Mode], float]) -> Callable[[int], float]:
    family = family_of(config)
    of_kind: dict[tuple[tuple[str, bool], ...], float] = {}

    def per_sample(mode: Mode) -> float:
        key = tuple(sorted(mode.items()))
        if key not in of_kind:
            of_kind[key] = of_sample(mode)
        return of_kind[key]

    def flops(steps: int) -> float:
        kinds = family.kinds(config, steps)
        return config.training.global_batch_size * sum(count * per_sample(mode) for mode, count in kinds)

    return flops


def parameter_step_cost(config: RunConfig, data_parallel_size: int) -> float:
    """What one trained parameter costs in one optimiser step, in FLOP-equivalents.

    Bytes that the step moves, times the FLOPs that the device does meanwhile:

    * memory: read master weight, gradient and two moments and write all but the gradient, all float32 (28 bytes),
      write the compute copy (6 bytes with its reading), read the gradient for its norm and scale it by the clip (12
      bytes): 46 bytes; and in every micro-batch add the gradient to its float32 sum and clear it (12 bytes);
    * links: a ring all-reduce of the gradient and an all-gather of the weight in the compute type (three times its
      size), times (replicas - 1) / replicas, over the network ports of a node.

    The rates are those of an H100 with the assumed efficiencies: a balance asks for ratios only.
    """
    gpu, efficiency = GPUS["h100"], Efficiency()
    flops = gpu.bf16_flops * TYPICAL_MFU
    e, training = 2 if config.training.precision == "bf16" else 4, config.training
    micro_batches = training.global_batch_size / (training.micro_batch_size * data_parallel_size)
    memory = (46 + 12 * micro_batches) * flops / (gpu.memory_bandwidth * efficiency.memory)
    node = min(gpu.node_bandwidth, 8 * gpu.network_bandwidth)
    links = 3 * e * flops / (node * efficiency.link)
    same_weights = data_parallel_size * config.parallel.context_parallel_size
    return memory + links * (same_weights - 1) / same_weights


def stage_costs(config: RunConfig, data_parallel_size: int = 1) -> list[float]:
    """Cost of each part of the chain, in FLOP-equivalents per sample, for `planning.balance.balance`.

    FLOPs, plus `parameter_step_cost` for each trained parameter, divided over the samples that one replica contributes
    to an optimiser step: global_batch_size / data_parallel_size. Of the FLOPs a rank has its share of the sequence.
    Where there are several kinds of steps they are their mean over one period.
    """
    family, samples = family_of(config), config.training.global_batch_size / data_parallel_size
    kinds = family.kinds(config, family.period(config))
    chains = [(family.parts(config, mode), count) for mode, count in kinds]
    period, context = family.period(config), config.parallel.context_parallel_size
    per_parameter = parameter_step_cost(config, data_parallel_size) / samples
    return [
        sum(part.flops * count for part, (_, count) in zip(parts, chains, strict=True)) / (period * context)
        + (parts[0].parameters * per_parameter if parts[0].backward else 0.0)
        for parts in zip(*(chain for chain, _ in chains), strict=True)
    ]
