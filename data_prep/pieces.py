"""Long documents in pieces, encoded as the whole would be: the library takes 100 bytes for a character."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

__all__ = ["LONGEST_PIECE", "PIECE", "TooLong", "pieces_of"]

PIECE = 2**17
"""Characters of a piece where the text has a place to cut it."""
LONGEST_PIECE = 2**22
"""Characters that are encoded at once at most: half a gigabyte."""
# Where the patterns of tokenizers end a word: before a space and a letter, and between the end of a line and a letter.
_BETWEEN_WORDS = re.compile(r"(?<=\S)(?= [^\W\d_])|(?<=\S\n)(?=[^\W\d_])")
AROUND = 48
TRIED = 8


class TooLong(Exception):
    """A text that would have to be encoded at once, and is too long for that."""


def pieces_of(text: str, encode: Callable[[list[str]], list[list[int]]]) -> Iterator[str]:
    """The text in pieces of about `PIECE` characters, cut where the tokens around the cut are those of the uncut text.

    Args:
        encode: token ids of each of some texts.

    Raises:
        TooLong: no place to cut was found within `LONGEST_PIECE` characters.
    """
    start = 0
    while len(text) - start > PIECE:
        stop = _cut(text, start, encode)
        if stop is None:
            break
        yield text[start:stop]
        start = stop
    if len(text) - start > LONGEST_PIECE:
        raise TooLong(f"no words to cut it between from character {start:,} on, {LONGEST_PIECE:,} is the most at once")
    yield text[start:]


def _cut(text: str, start: int, encode: Callable[[list[str]], list[list[int]]]) -> int | None:
    """A place from `PIECE` characters after `start` on where two pieces have the tokens of the whole."""
    places = _BETWEEN_WORDS.finditer(text, start + PIECE, min(start + LONGEST_PIECE, len(text)))
    for _, place in zip(range(TRIED), places, strict=False):
        left, right = text[place.start() - AROUND : place.start()], text[place.start() : place.start() + AROUND]
        whole, first, second = encode([left + right, left, right])
        if whole == first + second:
            return place.start()
    return None
