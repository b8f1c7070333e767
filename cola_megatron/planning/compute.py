"""What a run costs, in named columns, and how long a run of a given cost is.

    nominal    6 N D, N the parameters of the backbone to two digits: the axis of the paper's figures. It leaves out a
               second copy or view of the text, the VAE, embeddings, head and attention.
    model      the products that the definition of a training step asks for, attention pairs under the masks alone:
               `planning.flops.training_flops`. It does not depend on how a run is run.
    hardware   the products that are really done: `model` with what the backward pass computes again
               (`training.activation_checkpointing`, the scores in every fused attention, Plaid's logits in chunks) and
               the pairs that a kernel with a mask tensor computes and drops.

All three are of training: measurements and texts on the way are not in them. `training.attention_chunk=null` is counted
as on a GPU, in one product.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from cola_megatron.config import ConfigError, RunConfig
from cola_megatron.families import family_of
from cola_megatron.planning.flops import hardware_flops_by_step, paper_nominal_flops, training_flops_by_step

COLUMNS = ("nominal", "model", "hardware")
"""In FLOPs."""
BUDGETS = ("steps", "tokens", *COLUMNS)
"""What a run's length can be given in."""


@dataclass(frozen=True)
class Cost:
    """Of a run of one stage."""

    steps: int
    tokens: int
    compute: dict[str, float]
    """FLOPs by column."""
    parts: dict[str, float]
    """What the model FLOPs are spent on; they add up to them."""


def cost_of(config: RunConfig, steps: int) -> Cost:
    """The whole account of the first `steps` optimiser steps."""
    compute, parts = compute_of(config, steps), family_of(config).flops_by_purpose(config, steps)
    return Cost(steps, tokens_of(config, steps), compute, parts)


def compute_of(config: RunConfig, steps: int) -> dict[str, float]:
    """FLOPs of the first `steps` optimiser steps by column; a stage without a place on the nominal axis has 0 there."""
    return {column: amount_by_step(config, column)(steps) for column in COLUMNS}


def tokens_of(config: RunConfig, steps: int) -> int:
    """Tokens of so many global batches, padding included."""
    return steps * config.training.global_batch_size * config.data.sequence_length


def amount_by_step(config: RunConfig, column: str) -> Callable[[int], float]:
    """What the first steps of a run take in one of `BUDGETS`, as a function of their number: it never falls.

    Raises:
        ConfigError: no such column.
    """
    if column == "steps":
        return float
    if column == "tokens":
        return lambda steps: float(tokens_of(config, steps))
    if column == "nominal":
        backbone = family_of(config).backbone_parameters(config)
        rounded = 0.0 if backbone is None else float(f"{backbone:.1e}")
        return lambda steps: paper_nominal_flops(rounded, tokens_of(config, steps))
    if column == "model":
        return training_flops_by_step(config)
    if column == "hardware":
        return hardware_flops_by_step(config)
    raise ConfigError(f"{column!r} is no budget: give one of {', '.join(BUDGETS)}")


def steps_for(config: RunConfig, column: str, amount: float, tolerance: float = 0.01) -> int:
    """The number of steps whose cost comes nearest to an amount of one of `BUDGETS`.

    Args:
        amount: steps, tokens, or FLOPs.
        tolerance: by how much of it the cost may miss the amount.

    Raises:
        ConfigError: no such column, none for this stage, or no number of steps comes near enough.
    """
    cost = amount_by_step(config, column)
    one, words = cost(1), f"a budget of {amount:.4g} {'FLOPs, ' if column in COLUMNS else ''}{column}"
    if not one:
        raise ConfigError("the nominal axis counts the prior alone: stage 1 has none; give tokens or model FLOPs")
    if not (amount > 0 and math.isfinite(amount)):
        raise ConfigError(f"{words}: must be above 0")
    cure = "take a larger budget or a smaller training.global_batch_size"
    if amount < one * (1 - tolerance):
        raise ConfigError(f"{words}, is below one step of {config.name}, which takes {one:.4g}: {cure}")
    below, above = 0, 1
    while cost(above) < amount:
        below, above = above, 2 * above
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (below, middle) if cost(middle) >= amount else (middle, above)
    steps = max(1, min((above, below), key=lambda each: abs(cost(each) - amount)))
    missed = cost(steps) / amount - 1
    if abs(missed) > tolerance:
        raise ConfigError(
            f"{words}, is {missed:+.1%} from the nearest whole number of steps of {config.name}, {steps}: {cure}, or "
            f"give {cost(steps):.6g}"
        )
    return steps


def parameters_of(config: RunConfig) -> dict[str, int]:
    """The two definitions of N that a fit can take.

    `without embeddings` is the backbone: of Cola DLM the whole prior, of the others the blocks; of Cola's stage 1, that
    has no backbone, the blocks of the VAE. `all` is what a run trains in any of its steps: of Cola's stage 2 prior and
    VAE, or where the VAE is frozen the prior alone; the reference encoder, a frozen copy, is in neither.
    """
    family = family_of(config)
    backbone = family.backbone_parameters(config)
    if backbone is None:
        backbone = sum(part.parameters for part in family.parts(config) if part.is_block)
    kinds = family.kinds(config, family.period(config))
    chains = [family.parts(config, mode) for mode, _ in kinds]
    trained = sum(same[0].parameters for same in zip(*chains, strict=True) if any(part.backward for part in same))
    return {"without embeddings": backbone, "all": trained}
