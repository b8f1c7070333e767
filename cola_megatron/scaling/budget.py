"""How long a run is: in steps, tokens, model FLOPs, and on the compute axis of the paper."""

import math
from dataclasses import dataclass

from cola_megatron.config import RunConfig
from cola_megatron.scaling.flops import paper_nominal_flops, training_flops
from cola_megatron.scaling.parts import chain_parts


@dataclass(frozen=True)
class Budget:
    """A run of one stage."""

    steps: int
    tokens: int
    model_flops: float
    """As `training_flops` counts them: both copies, both views, the VAE; no recomputation."""
    nominal_flops: float | None
    """6 N D with N the parameters of the DiT to two digits, the axis of the paper's figures; None in stage 1."""


def budget(config: RunConfig, tokens: float | None = None, exaflops: float | None = None) -> Budget:
    """The config's own steps, or as many as the given tokens or model EFLOPs (1e18) take, rounded up."""
    training = config.training
    step_tokens = training.global_batch_size * config.data.sequence_length
    steps = training.steps
    if tokens is not None:
        steps = math.ceil(tokens / step_tokens)
    elif exaflops is not None:
        steps = _steps_of(config, exaflops * 1e18)
    nominal = None
    if config.stage == 2:
        backbone = sum(part.parameters for part in chain_parts(config) if part.label.startswith("dit."))
        nominal = paper_nominal_flops(float(f"{backbone:.1e}"), steps * step_tokens)
    return Budget(steps, steps * step_tokens, training_flops(config, steps), nominal)


def _steps_of(config: RunConfig, flops: float) -> int:
    """The fewest steps that reach that many model FLOPs (frozen steps cost less, so it is searched for)."""
    low, high = 0, 1
    while training_flops(config, high) < flops:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if training_flops(config, middle) >= flops else (middle, high)
    return high
