"""What generation means for a model of any family, in tokens below and in text above.

A family writes one class with `start`, and one `Session` that it returns: Cola DLM answers with blocks of latents'
tokens (`generate.py`), an autoregressive model would answer with one token at a time, a masked-diffusion model with its
blocks as they are unmasked. Everything that is text (tokenizer, stop texts, streaming) is written once, above them
(`text_generation.py`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class Request:
    """One prompt to be continued."""

    token_ids: Sequence[int]
    sample_id: int
    """All draws of this sample depend on this and on the seed alone."""
    max_new_tokens: int | None = None
    """Its own length; None: that of the settings."""


@dataclass(frozen=True)
class TokenBlock:
    """What a session has settled of one sample since the last time."""

    sample: int
    """Index of its request."""
    token_ids: list[int]
    repeated: int
    """How many of the ids, at the front, repeat the end of the prompt."""
    last: bool
    """The sample has its length; the session has dropped it."""
    latents: torch.Tensor | None = None
    """(block_size, C), float32 on the CPU, for a family that has them."""
    steps: int | None = None
    """Of the solver, that it took; None for a family without one."""


@dataclass(frozen=True)
class TokenPreview:
    """What a sample's next block would be if it ended here; nothing of it is settled."""

    sample: int
    step: int
    time: float
    token_ids: list[int]
    repeated: int


class Session(Protocol):
    """A batch under way."""

    @property
    def running(self) -> Sequence[int]:
        """Samples that are not finished, as indices of their requests."""

    def advance(self, preview_steps: Sequence[int] = ()) -> Iterator[TokenPreview | TokenBlock]:
        """Generates the next block of every running sample: previews first, where wanted, then one block each."""

    def drop(self, samples: Sequence[int]) -> None:
        """Ends these samples before their length; later blocks cost nothing for them."""

    def admit(self, requests: Sequence[Request]) -> None:
        """Further samples, which begin with the next block. Their indices follow those of all requests so far."""


@dataclass(frozen=True)
class Generation:
    """One continuation. `token_ids` and `latents` cover whole blocks as generated, `text` starts after the prompt."""

    text: str
    """Ends before a stop text or an end-of-text token."""
    token_ids: torch.Tensor = field(repr=False)
    """(blocks * block_size * patch_size,), int64; begins with the prompt's part of the first block."""
    latents: torch.Tensor | None = field(repr=False)
    """(blocks, block_size, d), float32, in the prior's coordinates; None for a family without latents."""
    prompt_tokens: int
    """How many of `token_ids` repeat the end of the prompt; `text` starts after them."""
    finish_reason: str = "length"
    """`length`, `stop` (a stop text) or `end_of_text` (an end-of-text token)."""


@dataclass(frozen=True)
class Piece:
    """A settled part of one sample's text, in the order of generation."""

    sample: int
    """Index of the prompt."""
    text: str
    """What follows the pieces before it; all pieces of a sample, joined, are its text. May be empty while a character
    or the beginning of a stop text is incomplete."""
    token_ids: list[int]
    latents: torch.Tensor | None
    repeated: int
    finish_reason: str | None
    """None: more follows."""


@dataclass(frozen=True)
class Preview:
    """What would follow the settled text if the solver ended at this step."""

    sample: int
    step: int
    time: float
    text: str


class Generator(Protocol):
    """A model of any family, for whoever wants text of it. `options` are the fields of the family's settings."""

    def generate(
        self, prompts: Sequence[str | Sequence[int]], ids: Sequence[int] | None = None, **options: Any
    ) -> list[Generation]:
        """Continues each prompt; results in the order of the prompts."""

    def stream(
        self, prompts: Sequence[str | Sequence[int]], ids: Sequence[int] | None = None, **options: Any
    ) -> Iterator[Piece | Preview]:
        """The same piece by piece."""
