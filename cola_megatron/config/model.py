"""What the model section of every family has."""

from typing import Annotated

from cola_megatron.config.base import Section
from cola_megatron.config.facts import OURS, PUBLISHED
from cola_megatron.config.types import PositiveInt


class ModelConfig(Section):
    """The architecture; each family has a section of its own, which names it."""

    family: Annotated[str, OURS] = "cola"
    """Which model this is: the section's keys, the objective and the stages follow from it."""
    vocab_size: Annotated[PositiveInt, PUBLISHED] = 100_278
    """Token ids. Must equal the shards'."""


def require_divisor(small_name: str, small: int, large_name: str, large: int) -> None:
    """Refuses numbers that do not divide; raises ValueError."""
    if large % small:
        raise ValueError(f"{large_name}={large} must be divisible by {small_name} ({small})")
