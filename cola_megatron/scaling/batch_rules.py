"""Rules for the global batch; see `rules`."""

from __future__ import annotations

from typing import Annotated, Literal

from cola_megatron.config import ConfigError, RunConfig
from cola_megatron.config.facts import OURS
from cola_megatron.config.types import Float, PositiveFloat, PositiveInt
from cola_megatron.planning.compute import tokens_of
from cola_megatron.scaling.rule import Decision, Facts, PowerLaw, Rule, facts_of

BATCH = "training.global_batch_size"


class BatchRule(Rule):
    """The global batch, rounded to whole micro-batches."""

    divisor: Annotated[PositiveInt | None, OURS] = None
    """What the batch is rounded to a multiple of: micro_batch_size, or that times the replicas; null: the config's
    micro_batch_size."""

    def decide(self, config: RunConfig, tokens: float | None = None) -> Decision:
        """See `Rule`."""
        micro_batch = config.training.micro_batch_size
        divisor = micro_batch if self.divisor is None else self.divisor
        if divisor % micro_batch:
            raise ConfigError(
                f"divisor={divisor} of the batch rule {self.rule} must be a multiple of "
                f"training.micro_batch_size={micro_batch}"
            )
        wanted = self.value(facts_of(config, tokens), config) / config.data.sequence_length
        batch = max(1, round(wanted / divisor)) * divisor
        rounded = (
            f": {wanted:.4g} rounded to a multiple of {divisor}, {batch / wanted - 1:+.1%}" if batch != wanted else ""
        )
        words = f"{BATCH}={batch} by {self.rule} ({self.source}){rounded}"
        return Decision({BATCH: batch}, wanted, words)


class PublishedBatch(BatchRule):
    """The preset's own, at every size and length."""

    rule: Annotated[Literal["published"], OURS] = "published"
    formula = "the config's own"
    source = "arXiv:2605.06548 for paper-2b; ours for the smaller presets"
    fitted_on = "one size"

    def value(self, facts: Facts, config: RunConfig) -> float:
        """See `Rule`."""
        return tokens_of(config, 1)

    def decide(self, config: RunConfig, tokens: float | None = None) -> Decision:
        """The config stays as it is."""
        batch = config.training.global_batch_size
        return Decision({}, batch, f"{BATCH}={batch} as published ({self.source})")


class PowerLawBatch(PowerLaw, BatchRule):
    """A power law of one's own for the tokens of a batch."""


class OLMoLadderBatch(BatchRule):
    """Porian et al., as OLMo's model ladder takes it."""

    rule: Annotated[Literal["olmo_ladder"], OURS] = "olmo_ladder"
    coefficient: Annotated[PositiveFloat, OURS] = 160 * 2048
    """Tokens at `reference` parameters: 160 sequences of 2,048."""
    exponent: Annotated[Float, OURS] = 2 / 3
    """Of the parameters."""
    reference: Annotated[PositiveFloat, OURS] = 108e6
    """Parameters."""
    formula = "160 x 2,048 (N / 108e6)^(2/3) tokens"
    source = "arXiv:2406.19146; OLMo-core's model ladder"
    fitted_on = "autoregressive, about 20 tokens a parameter; N there with the head"

    def value(self, facts: Facts, config: RunConfig) -> float:
        """See `Rule`."""
        return self.coefficient * (facts.parameters / self.reference) ** self.exponent


class PowerLinesBatch(BatchRule):
    """Bergsma et al.: the best batch grows with the tokens, whatever the size.

    The exponent is theirs. The constant depends on data, tokenizer and optimiser, so it is taken from a batch that is
    known to be good at some length, as nanochat does.
    """

    rule: Annotated[Literal["power_lines"], OURS] = "power_lines"
    tokens: Annotated[PositiveFloat, OURS]
    """Of a run whose good batch is known."""
    batch_tokens: Annotated[PositiveFloat | None, OURS] = None
    """Tokens of that batch; null: of the config's own."""
    exponent: Annotated[Float, OURS] = 0.383
    """Of D."""
    formula = "batch_tokens (D / tokens)^0.383 tokens"
    source = "arXiv:2505.13738"
    fitted_on = "autoregressive under muP"

    def value(self, facts: Facts, config: RunConfig) -> float:
        """See `Rule`."""
        known = tokens_of(config, 1) if self.batch_tokens is None else self.batch_tokens
        return known * (facts.tokens / self.tokens) ** self.exponent


class StepLawBatch(BatchRule):
    """Li et al.: of the tokens alone."""

    rule: Annotated[Literal["step_law"], OURS] = "step_law"
    coefficient: Annotated[PositiveFloat, OURS] = 0.58
    """Tokens."""
    exponent: Annotated[Float, OURS] = 0.571
    """Of D."""
    formula = "0.58 D^0.571 tokens"
    source = "arXiv:2503.04715"
    fitted_on = "autoregressive, 3,700 models up to 1e9 parameters and 1e11 tokens"

    def value(self, facts: Facts, config: RunConfig) -> float:
        """See `Rule`."""
        return self.coefficient * facts.tokens**self.exponent
