"""What is asked of a generation, whatever model writes it."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Decoding:
    """The demands of a task or a request. A model that writes whole blocks may write more than `max_new_tokens`."""

    max_new_tokens: int = 32
    temperature: float = 0.0
    stop: tuple[str, ...] = ()
    """The text is cut at the first of these; the published tasks have none."""
    top_k: int = 0
    """Only the k most likely tokens may be drawn; 0: all. Greedy decoding does not ask."""
    top_p: float = 1.0
    """Only the most likely tokens that together reach this probability may be drawn."""
    until_end_of_text: bool = False
    """A text also ends where the model writes the token that ends one; the published tasks go on."""


def cut_at(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    ends = [text.find(string) for string in stop if string]
    return text[: min((end for end in ends if end >= 0), default=len(text))]
