"""What a rule for a hyperparameter is, and what it may ask about a run."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from cola_megatron.config import RunConfig, Section
from cola_megatron.config.facts import OURS
from cola_megatron.config.types import Float, PositiveFloat
from cola_megatron.families import family_of
from cola_megatron.planning.compute import parameters_of, tokens_of


class Facts(NamedTuple):
    """What a rule may ask about a run."""

    parameters: int
    """Without embeddings."""
    tokens: float
    width: int
    depth: int


def facts_of(config: RunConfig, tokens: float | None = None) -> Facts:
    """Of a config as it stands; `tokens` where its own length is not the one to go by, such as that of a trunk."""
    width, depth = family_of(config).backbone_shape(config)
    length = tokens_of(config, config.training.steps) if tokens is None else tokens
    return Facts(parameters_of(config)["without embeddings"], length, width, depth)


@dataclass(frozen=True)
class Decision:
    """What a rule says about a run."""

    overrides: dict[str, Any]
    """Dotted keys and their values; none where the config stays as it is."""
    wanted: float
    """What the formula gives: a learning rate, or sequences of a batch before they are rounded."""
    words: str
    """One line: what is set, by which rule, and what was rounded."""


class Rule(Section):
    """One way to set a hyperparameter.

    `formula`, `source` and `fitted_on` say in words what it is, who found it, and on which models.
    """

    rule: Annotated[str, OURS]
    """Its name."""
    formula: ClassVar[str]
    source: ClassVar[str]
    fitted_on: ClassVar[str]

    @abstractmethod
    def value(self, facts: Facts, config: RunConfig) -> float:
        """The learning rate, or the tokens of a batch."""

    @abstractmethod
    def decide(self, config: RunConfig, tokens: float | None = None) -> Decision:
        """What the rule says about this run; `tokens` as in `facts_of`.

        Raises:
            ConfigError: it does not fit the config.
        """


class PowerLaw(Section):
    """coefficient (x / reference)^exponent."""

    rule: Annotated[Literal["power_law"], OURS] = "power_law"
    of: Annotated[Literal["parameters", "tokens", "width", "depth"], OURS] = "parameters"
    """What x is."""
    coefficient: Annotated[PositiveFloat, OURS]
    """At x = reference: a learning rate, or tokens of a batch."""
    exponent: Annotated[Float, OURS]
    """Of x."""
    reference: Annotated[PositiveFloat, OURS] = 1.0
    """Where the law is the coefficient."""
    formula: ClassVar[str] = "coefficient (x / reference)^exponent; x: parameters, tokens, width or depth"
    source: ClassVar[str] = "whoever fitted it"
    fitted_on: ClassVar[str] = "your own runs"

    def value(self, facts: Facts, config: RunConfig) -> float:
        """See `Rule`."""
        x: float = getattr(facts, self.of)
        return self.coefficient * (x / self.reference) ** self.exponent
