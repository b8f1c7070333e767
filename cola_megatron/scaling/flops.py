"""FLOPs of training, counted from the config: two per multiply-add, backward twice the forward.

Counted are the matrices, the attention scores that the masks keep, and nothing elementwise. Recomputation is not
counted: it is a way of running, not of the model.

`chain_parts` (in `scaling/parts.py`) is the one place where the model's parameters and multiply-adds are written down;
`stage_costs` makes of it the costs by which a pipeline is balanced.
"""

from collections.abc import Callable

from cola_megatron.config import RunConfig
from cola_megatron.scaling.hardware import GPUS, Efficiency
from cola_megatron.scaling.parts import Part, chain_parts

# Share of the peak that a whole micro-batch reaches, elementwise work included: what the byte rates compare with.
TYPICAL_MFU = 0.35

__all__ = [
    "Part",
    "chain_parts",
    "paper_nominal_flops",
    "parameter_step_cost",
    "stage_costs",
    "training_flops",
    "training_flops_by_step",
    "training_flops_per_sample",
    "vae_step_counts",
]


def paper_nominal_flops(backbone_parameters: float, tokens: int) -> float:
    """6 N D, the paper's compute axis (N = 1.8e9 for the published model)."""
    return 6.0 * backbone_parameters * tokens


def training_flops_per_sample(config: RunConfig, train_vae: bool = True) -> float:
    """FLOPs of one sample through one optimiser step of the config's stage."""
    return sum(part.flops for part in chain_parts(config, train_vae))


def training_flops(config: RunConfig, steps: int) -> float:
    """FLOPs of the first `steps` optimiser steps, frozen steps counted as such."""
    return training_flops_by_step(config)(steps)


def training_flops_by_step(config: RunConfig) -> Callable[[int], float]:
    """`training_flops` of a config as a function of the steps, for many of them: the parts are counted once."""
    joint_flops, frozen_flops = (training_flops_per_sample(config, train_vae) for train_vae in (True, False))

    def flops(steps: int) -> float:
        joint, frozen = vae_step_counts(config, steps)
        return config.training.global_batch_size * (joint * joint_flops + frozen * frozen_flops)

    return flops


def vae_step_counts(config: RunConfig, steps: int) -> tuple[int, int]:
    """How many of the first `steps` steps train the VAE, and how many do not."""
    update = config.training.vae_update
    if config.stage == 1 or update.mode == "joint":
        joint = steps
    elif update.mode == "frozen":
        joint = 0
    else:
        period = update.joint_steps + update.frozen_steps
        joint = steps // period * update.joint_steps + min(steps % period, update.joint_steps)
    return joint, steps - joint


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
    return memory + links * (data_parallel_size - 1) / data_parallel_size


def stage_costs(config: RunConfig, data_parallel_size: int = 1) -> list[float]:
    """Cost of each part of `chain_parts`, in FLOP-equivalents per sample, for `scaling.balance.balance`.

    FLOPs, plus `parameter_step_cost` for each trained parameter, divided over the samples that one replica contributes
    to an optimiser step: global_batch_size / data_parallel_size. With `vae_update.mode=interval` the FLOPs are the mean
    over one period.
    """
    samples = config.training.global_batch_size / data_parallel_size
    update = config.training.vae_update
    joint, frozen = vae_step_counts(config, update.joint_steps + update.frozen_steps)
    trained = chain_parts(config, True) if joint else chain_parts(config, False)
    still = chain_parts(config, False) if frozen else trained
    per_parameter = parameter_step_cost(config, data_parallel_size) / samples
    return [
        (joint * first.flops + frozen * second.flops) / (joint + frozen)
        + (first.parameters * per_parameter if first.backward else 0.0)
        for first, second in zip(trained, still, strict=True)
    ]
