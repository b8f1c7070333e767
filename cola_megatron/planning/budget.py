"""How long a run is: in steps, tokens, model FLOPs, and on the compute axis of the paper."""

import math
from dataclasses import dataclass

from cola_megatron.config import ConfigError, RunConfig
from cola_megatron.families import family_of
from cola_megatron.planning.flops import paper_nominal_flops, training_flops


@dataclass(frozen=True)
class Budget:
    """A run of one stage."""

    steps: int
    tokens: int
    model_flops: float
    """As `training_flops` counts them: both copies, both views, the VAE; no recomputation."""
    nominal_flops: float | None
    """6 N D with N the parameters of the backbone to two digits, the axis of the paper's figures; None where a stage
    has none."""
    parts: dict[str, float]
    """What the model FLOPs consist of: they add up to them."""


def budget(
    config: RunConfig, tokens: float | None = None, exaflops: float | None = None, nominal: float | None = None
) -> Budget:
    """The config's own steps, or as many as the given tokens, model EFLOPs or nominal EFLOPs (1e18) take, rounded up.

    Raises:
        ConfigError: nominal EFLOPs of a stage 1, which has no place on that axis.
    """
    training = config.training
    step_tokens = training.global_batch_size * config.data.sequence_length
    steps = training.steps
    if tokens is not None:
        steps = math.ceil(tokens / step_tokens)
    elif exaflops is not None:
        steps = _steps_of(config, exaflops * 1e18)
    elif nominal is not None:
        per_step = nominal_flops(config, step_tokens)
        if per_step is None:
            raise ConfigError("the nominal axis counts the prior alone: stage 1 has none; give tokens or model EFLOPs")
        steps = math.ceil(nominal * 1e18 / per_step)
    tokens_seen = steps * step_tokens
    flops, parts = training_flops(config, steps), family_of(config).flops_by_purpose(config, steps)
    return Budget(steps, tokens_seen, flops, nominal_flops(config, tokens_seen), parts)


def nominal_flops(config: RunConfig, tokens: int) -> float | None:
    """6 N D on the axis of the paper's figures, N to two digits as there; None where the stage has no place on it."""
    backbone = family_of(config).backbone_parameters(config)
    return None if backbone is None else paper_nominal_flops(float(f"{backbone:.1e}"), tokens)


def _steps_of(config: RunConfig, flops: float) -> int:
    """The fewest steps that reach that many model FLOPs (frozen steps cost less, so it is searched for)."""
    low, high = 0, 1
    while training_flops(config, high) < flops:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if training_flops(config, middle) >= flops else (middle, high)
    return high
