"""Rules for the peak learning rate; see `rules`."""

from __future__ import annotations

from typing import Annotated, Literal

from cola_megatron.config import RunConfig
from cola_megatron.config.facts import OURS
from cola_megatron.config.types import Float, NonNegativeFloat, PositiveFloat, PositiveInt
from cola_megatron.scaling.rule import Decision, Facts, PowerLaw, Rule, facts_of

RATE, FINAL_RATE = "training.optimizer.learning_rate", "training.schedule.final_learning_rate"


class LearningRateRule(Rule):
    """The peak rate; the final one keeps its proportion to it."""

    def decide(self, config: RunConfig, tokens: float | None = None) -> Decision:
        """See `Rule`."""
        wanted = self.value(facts_of(config, tokens), config)
        rate = float(f"{wanted:.6g}")
        before = config.training.optimizer.learning_rate
        final = float(f"{self.final_rate(rate, config.training.schedule.final_learning_rate / before):.6g}")
        return Decision({RATE: rate, FINAL_RATE: final}, wanted, f"{RATE}={rate:g} by {self.rule} ({self.source})")

    def final_rate(self, rate: float, share: float) -> float:
        """Where the decay ends; `share` is what the config has of its own peak."""
        return rate * share


class PublishedRate(LearningRateRule):
    """The preset's own, at every size."""

    rule: Annotated[Literal["published"], OURS] = "published"
    formula = "the config's own"
    source = "arXiv:2605.06548 for paper-2b; ours for the smaller presets"
    fitted_on = "one size"

    def value(self, facts: Facts, config: RunConfig) -> float:
        """See `Rule`."""
        return config.training.optimizer.learning_rate

    def decide(self, config: RunConfig, tokens: float | None = None) -> Decision:
        """The config stays as it is."""
        rate = self.value(facts_of(config, tokens), config)
        return Decision({}, rate, f"{RATE}={rate:g} as published ({self.source})")


class ConstantRate(LearningRateRule):
    """One rate for all sizes: what a parametrisation that transfers it across width and depth asks for."""

    rule: Annotated[Literal["constant"], OURS] = "constant"
    rate: Annotated[PositiveFloat, OURS]
    """Tuned at the base width of the parametrisation."""
    formula = "rate"
    source = "whoever tuned it; muP (arXiv:2203.03466) and CompleteP (arXiv:2505.01618) transfer it"
    fitted_on = "the base model"

    def value(self, facts: Facts, config: RunConfig) -> float:
        """See `Rule`."""
        return self.rate


class PowerLawRate(PowerLaw, LearningRateRule):
    """A power law of one's own for the rate."""


class OLMoLadderRate(LearningRateRule):
    """Porian et al. on models that were trained to about 20 tokens a parameter, as OLMo's model ladder takes it."""

    rule: Annotated[Literal["olmo_ladder"], OURS] = "olmo_ladder"
    coefficient: Annotated[PositiveFloat, OURS] = 0.0047
    """At `reference` parameters. OLMo-core halves it under a schedule with a stable phase."""
    exponent: Annotated[Float, OURS] = -1 / 3
    """Of the parameters."""
    reference: Annotated[PositiveFloat, OURS] = 108e6
    """Parameters."""
    formula = "0.0047 (N / 108e6)^(-1/3)"
    source = "arXiv:2406.19146; OLMo-core's model ladder"
    fitted_on = "autoregressive, about 20 tokens a parameter; N there with the head"

    def value(self, facts: Facts, config: RunConfig) -> float:
        """See `Rule`."""
        return self.coefficient * (facts.parameters / self.reference) ** self.exponent


class WidthRate(LearningRateRule):
    """The config's own rate at the base width, less at larger widths, as nanochat has it for AdamW's parameters."""

    rule: Annotated[Literal["width"], OURS] = "width"
    rate: Annotated[PositiveFloat | None, OURS] = None
    """At the base width; null: the config's own."""
    base_width: Annotated[PositiveInt, OURS] = 768
    """Where the rate is that."""
    exponent: Annotated[Float, OURS] = -0.5
    """Of the width."""
    formula = "rate (width / 768)^(-1/2)"
    source = "github.com/karpathy/nanochat"
    fitted_on = "autoregressive; there of embeddings and head alone, with Muon for the matrices"

    def value(self, facts: Facts, config: RunConfig) -> float:
        """See `Rule`."""
        rate = config.training.optimizer.learning_rate if self.rate is None else self.rate
        return rate * (facts.width / self.base_width) ** self.exponent


class StepLawRate(LearningRateRule):
    """Li et al., from a grid of rates and batches at each size and length."""

    rule: Annotated[Literal["step_law"], OURS] = "step_law"
    coefficient: Annotated[PositiveFloat, OURS] = 1.79
    """Of both powers."""
    parameters_exponent: Annotated[Float, OURS] = -0.713
    """Of N."""
    tokens_exponent: Annotated[Float, OURS] = 0.307
    """Of D."""
    final_learning_rate: Annotated[NonNegativeFloat, OURS] = 1e-5
    """Where their decay ends at every size: with an end in proportion the optimum is another."""
    formula = "1.79 N^(-0.713) D^0.307, decay to 1e-5"
    source = "arXiv:2503.04715"
    fitted_on = "autoregressive, 3,700 models up to 1e9 parameters and 1e11 tokens"

    def value(self, facts: Facts, config: RunConfig) -> float:
        """See `Rule`."""
        law = facts.parameters**self.parameters_exponent * facts.tokens**self.tokens_exponent
        return self.coefficient * law

    def final_rate(self, rate: float, share: float) -> float:
        """The same at every size, and never above the peak."""
        return min(self.final_learning_rate, rate)
