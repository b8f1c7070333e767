"""Rules by which a study sets the learning rate and the batch of a run from its size and length.

    learning_rate: {rule: olmo_ladder}
    batch: {rule: power_law, of: tokens, coefficient: 2.5, exponent: 0.383, divisor: 64}

A rule is a section of a study file with its source; `decide(config)` says which keys it sets. All of them were fitted
on autoregressive decoders of text, within the sizes that `fitted_on` names: nothing says that they hold for a diffusion
model, for which they are a guess to be checked by a sweep, nor for another tokenizer, optimiser or parametrisation.

N are parameters without embeddings, D tokens, of the config as it stands. A rule for the batch changes how many steps
D is, so a length is given in tokens or compute first, then the rules are applied, and then the steps counted anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, get_args

from pydantic import Field

from cola_megatron.scaling.batch_rules import (
    OLMoLadderBatch,
    PowerLawBatch,
    PowerLinesBatch,
    PublishedBatch,
    StepLawBatch,
)
from cola_megatron.scaling.learning_rate_rules import (
    ConstantRate,
    OLMoLadderRate,
    PowerLawRate,
    PublishedRate,
    StepLawRate,
    WidthRate,
)
from cola_megatron.scaling.rule import Rule

LearningRate = Annotated[
    PublishedRate | ConstantRate | PowerLawRate | OLMoLadderRate | WidthRate | StepLawRate, Field(discriminator="rule")
]
"""`learning_rate` of a study."""
Batch = Annotated[
    PublishedBatch | PowerLawBatch | OLMoLadderBatch | PowerLinesBatch | StepLawBatch, Field(discriminator="rule")
]
"""`batch` of a study."""


def rules() -> Iterator[tuple[str, str, type[Rule]]]:
    """(key of a study, name, class) of every rule, for tables."""
    for key, union in (("learning_rate", LearningRate), ("batch", Batch)):
        for kind in get_args(get_args(union)[0]):
            yield key, kind.model_fields["rule"].default, kind
