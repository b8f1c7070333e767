"""What the page about a run says of its family."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Words(NamedTuple):
    """A name, and what it is in words."""

    name: str
    what: str
    meaning: str
    """One line for a reader who does not know it."""


@dataclass(frozen=True)
class Page:
    """What of a run is shown, and in which words."""

    networks: tuple[Words, ...]
    """What it trains: the beginning of the labels of their parts."""
    figures: tuple[Words, ...]
    """Held-out metrics, in order."""
    stages: tuple[str, ...] = ("Training",)
    """Titles of its stages."""
    pictures: tuple[str, ...] = ("token_losses", "weighted_terms", "gradient_norm", "speed_and_learning_rate")
    """Names of those pictures of `reporting.pictures` that are of this family."""
    sampling: Mapping[str, Any] = field(default_factory=lambda: {"repetition_penalty": 1.0})
    """How the texts on the page are continued, where that is not the family's default."""
