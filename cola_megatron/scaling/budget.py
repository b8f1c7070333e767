"""How long a run is: in steps, tokens, model FLOPs, and on the compute axis of the paper."""

import math
from dataclasses import dataclass

from cola_megatron.config import ConfigError, RunConfig
from cola_megatron.scaling.flops import paper_nominal_flops, training_flops, vae_step_counts
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
    flops, parts = training_flops(config, steps), flops_by_part(config, steps)
    return Budget(steps, tokens_seen, flops, nominal_flops(config, tokens_seen), parts)


def nominal_flops(config: RunConfig, tokens: int) -> float | None:
    """6 N D on the axis of the paper's figures; None in stage 1."""
    if config.stage == 1:
        return None
    backbone = sum(part.parameters for part in chain_parts(config) if part.label.startswith("dit."))
    return paper_nominal_flops(float(f"{backbone:.1e}"), tokens)


def flops_by_part(config: RunConfig, steps: int) -> dict[str, float]:
    """The model FLOPs of so many steps by what they are spent on."""
    without_reference = _without(config, reference_weight=0.0)
    text_alone = _without(without_reference, mask_weight=0.0)
    whole, two_views, one_view = (training_flops(each, steps) for each in (config, without_reference, text_alone))
    joint, frozen = vae_step_counts(text_alone, steps)
    batch = config.training.global_batch_size
    prior = batch * sum(
        count * sum(part.flops for part in chain_parts(text_alone, trained) if part.label.startswith("dit."))
        for count, trained in ((joint, True), (frozen, False))
        if count
    )
    found = {
        "prior, both copies": prior,
        "VAE on the text": one_view - prior,
        "VAE on the masked view": two_views - one_view,
        "reference encoder": whole - two_views,
    }
    return {name: flops for name, flops in found.items() if flops}


def _without(config: RunConfig, reference_weight: float | None = None, mask_weight: float | None = None) -> RunConfig:
    objective = config.objective
    if reference_weight is not None:
        objective = objective.model_copy(update={"reference_weight": reference_weight})
    if mask_weight is not None:
        objective = objective.model_copy(update={"vae": objective.vae.model_copy(update={"mask_weight": mask_weight})})
    return config.model_copy(update={"objective": objective})


def _steps_of(config: RunConfig, flops: float) -> int:
    """The fewest steps that reach that many model FLOPs (frozen steps cost less, so it is searched for)."""
    low, high = 0, 1
    while training_flops(config, high) < flops:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if training_flops(config, middle) >= flops else (middle, high)
    return high
