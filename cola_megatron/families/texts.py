"""Held-out texts as a model writes them: continued, or reconstructed."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from cola_megatron.inference.text_stream import Decode, TextStream, following

PROMPT_TOKENS, NEW_TOKENS = 48, 32
"""Of a continuation: how much is given at most, and written; of every family, so that their texts compare."""

Marked = list[tuple[str, bool]]
"""A text in pieces; True: its tokens are the original's."""


def given_and_end(length: int) -> tuple[int, int]:
    """Of a text of so many tokens: how many are given, and where the continuation ends, which has a truth."""
    given = max(1, min(PROMPT_TOKENS, length // 2))
    return given, min(given + NEW_TOKENS, length)


class HeldOutText(Protocol):
    """One text, in token ids."""

    kind: ClassVar[str]
    """Of its records: what the model did."""

    def readable(self, decode: Decode) -> dict[str, Any]:
        """For a record."""


@dataclass(frozen=True)
class Continuation:
    """How a text goes on, in token ids."""

    kind: ClassVar[str] = "continuations"

    prompt: list[int]
    found: list[int]
    truth: list[int]
    strip: list[tuple[float, list[int]]] = field(default_factory=list)
    """(t, tokens) of the first block: what the decoder reads from the estimate z_t - t v of its clean latents."""

    def readable(self, decode: Decode) -> dict[str, Any]:
        """For a record."""
        after = following(decode, self.prompt)
        return {
            "prompt": decode(self.prompt),
            "continuation": after(self.found),
            "truth": after(self.truth),
            "strip": [{"t": time, "text": after(tokens)} for time, tokens in self.strip],
        }


@dataclass(frozen=True)
class Reconstruction:
    """The beginning of a text and what the decoder makes of its posterior mean, in token ids."""

    kind: ClassVar[str] = "reconstructions"

    original: list[int]
    found: list[int]

    def readable(self, decode: Decode) -> dict[str, Any]:
        """For a record."""
        right = [one == other for one, other in zip(self.original, self.found, strict=True)]
        return {
            "tokens": len(right),
            "wrong": right.count(False),
            "original": marked(decode, self.original, right),
            "reconstruction": marked(decode, self.found, right),
        }


def marked(decode: Decode, tokens: Sequence[int], right: Sequence[bool]) -> Marked:
    """The text in pieces of tokens that are all right or all wrong.

    A character that spans a border belongs to the piece in which it ends.
    """
    stream, pieces = TextStream(decode), []
    for is_right, run in itertools.groupby(zip(tokens, right, strict=True), key=lambda pair: pair[1]):
        pieces.append((stream.add([token for token, _ in run]), is_right))
    if pieces and (rest := stream.end()):
        pieces[-1] = (pieces[-1][0] + rest, pieces[-1][1])
    return pieces
