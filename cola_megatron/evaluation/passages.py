"""Passages of held-out text whose last word is to be predicted: LAMBADA's task on a corpus of one's own.

They are a function of the held-out sequences, their tokenizer and `PassageRule` alone, never of a model.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cola_megatron.evaluation.scoring import normalize

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NEW_TOKENS = 8
"""What is generated: a target and the beginning of what follows it, which says that the word has ended."""
_WORD = re.compile(r"\S+")


@dataclass(frozen=True)
class PassageRule:
    """Which passages are taken.

    Raises:
        ValueError: a context of fewer than two tokens.
    """

    context_tokens: int = 96
    """Of the text before the last word, at most; at least half as many."""
    letters: int = 4
    """Of the last word, at least; it consists of letters alone, and takes fewer than `NEW_TOKENS` tokens."""

    def __post_init__(self) -> None:
        if self.context_tokens < 2:
            raise ValueError(f"context_tokens={self.context_tokens} must be at least 2")


@dataclass(frozen=True)
class Passage:
    """One item."""

    sequence: int
    """The held-out sequence that it comes from, by its position in the order of measurements."""
    context: str
    """Ends before the space that the last word follows."""
    target: str
    """The last word, without the punctuation after it."""


class Piece(NamedTuple):
    """The text of a sequence between two ends of documents."""

    text: str
    begins_a_document: bool
    ends_a_document: bool


class Word(NamedTuple):
    """What stands between white space."""

    start: int
    end: int
    text: str
    letters: str | None
    """The word where it is one: letters, with punctuation behind them; None: a number, an abbreviation, a symbol."""
    after_one_space: bool


def passages(
    sequences: Iterable[np.ndarray], tokenizer: "Tokenizer", end: int, padding: int, rule: PassageRule
) -> Iterator[Passage]:
    """All passages of token sequences, (L,) each, in their order; those of one sequence do not overlap.

    Args:
        end, padding: ids of the token that ends a document and of the one that fills a sequence.
    """
    for number, tokens_L in enumerate(sequences):
        for piece in pieces(tokens_L, tokenizer, end, padding):
            for context, target in _of_piece(piece, tokenizer, rule):
                yield Passage(number, context, target)


def pieces(tokens_L: np.ndarray, tokenizer: "Tokenizer", end: int, padding: int) -> list[Piece]:
    """The documents, or parts of documents, of a sequence (L,)."""
    ids = tokens_L.tolist()
    while ids and ids[-1] == padding != end:
        ids.pop()
    padded = len(ids) < len(tokens_L)
    found, begins = [], False
    while ids:
        size = ids.index(end) if end in ids else len(ids)
        if size:
            text = tokenizer.decode(ids[:size], skip_special_tokens=False)
            found.append(Piece(text, begins, size < len(ids) or padded))
        ids, begins = ids[size + 1 :], True
    return found


def words_of(piece: Piece, letters: int) -> list[Word]:
    """The whole words of a piece: what its sequence cuts through is left out."""
    word_of_letters = re.compile(rf"([^\W\d_]{{{letters},}})[.,;:!?)\]\"'\u2019\u201d]*")
    found, before = [], -1
    for match in _WORD.finditer(piece.text):
        plain = word_of_letters.fullmatch(match[0])
        after_one_space = match.start() == before + 1 and piece.text[before] == " "
        found.append(Word(match.start(), match.end(), match[0], plain[1] if plain else None, after_one_space))
        before = match.end()
    first, last = 0 if piece.begins_a_document else 1, len(found) if piece.ends_a_document else len(found) - 1
    return found[first:last]


def pairs(words: Sequence[Word]) -> Iterator[tuple[str, str]]:
    """Each word that could be a target, with the one before it, both normalised."""
    for before, word in pairwise(words):
        if word.letters is not None and word.after_one_space:
            yield normalize(before.text), normalize(word.letters)


def _of_piece(piece: Piece, tokenizer: "Tokenizer", rule: PassageRule) -> Iterator[tuple[str, str]]:
    """Contexts and targets: each time the longest context that a target can have, and on behind it."""
    words, first = words_of(piece, rule.letters), 0
    if not words:
        return
    tokens_before = _tokens_before(piece.text, tokenizer)
    while first < len(words):
        start, beyond = words[first].start, first + 1
        targets = []
        while beyond < len(words):
            tokens = tokens_before[words[beyond - 1].end] - tokens_before[start]
            if tokens > rule.context_tokens:
                break
            if (
                2 * tokens >= rule.context_tokens
                and words[beyond].letters is not None
                and words[beyond].after_one_space
            ):
                targets.append(beyond)
            beyond += 1
        for last in reversed(targets):
            context, target = piece.text[start : words[last - 1].end], words[last].letters or ""
            # Alone, a context may take a token or two more than in its sequence.
            if _tokens(context, tokenizer) <= rule.context_tokens and _tokens(f" {target}", tokenizer) < NEW_TOKENS:
                yield context, target
                beyond = last + 1
                break
        first = beyond


def _tokens(text: str, tokenizer: "Tokenizer") -> int:
    return len(tokenizer.encode(text, add_special_tokens=False).ids)


def _tokens_before(text: str, tokenizer: "Tokenizer") -> np.ndarray:
    """How many tokens end at or before each place of the text, (characters + 1,)."""
    ends = [end for _, end in tokenizer.encode(text, add_special_tokens=False).offsets]
    return np.searchsorted(np.array(ends), np.arange(len(text) + 1), side="right")
