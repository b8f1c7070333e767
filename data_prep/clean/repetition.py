"""The repetition rules of Gopher, with datatrove's verdicts in a fraction of its time.

datatrove builds every n-gram of a document as a string. Here n-grams are hashes, sorted by numpy; the walk through
the document that the rule asks for is done only over n-grams that occur twice, and only if their characters could
reach the threshold at all.
"""

from __future__ import annotations

import re

import numpy as np

from data_prep.clean.hashes import SubstringHashes
from data_prep.clean.settings import GopherRepetitionSettings

__all__ = ["repetition_rule"]

_PARAGRAPH_BREAK = re.compile(r"\n{2,}")
_LINE_BREAK = re.compile(r"\n+")


def repetition_rule(text: str, words: list[str], settings: GopherRepetitionSettings) -> tuple[str, float] | None:
    """The first rule that a document breaks, with the share that breaks it.

    Args:
        text: the document, not empty.
        words: its words, without whitespace in them.
        settings: the thresholds; a share equal to one keeps the document.

    Returns:
        For example ("duplicate_line_fraction", 0.4), or None.
    """
    for unit, parts in (("paragraph", _PARAGRAPH_BREAK.split(text.strip())), ("line", _LINE_BREAK.split(text))):
        count, characters = _repeated(parts)
        shares = {
            f"duplicate_{unit}_fraction": count / len(parts),
            f"duplicate_{unit}_character_fraction": characters / len(text),
        }
        for rule, share in shares.items():
            limit = getattr(settings, rule)
            if limit is not None and share > limit:
                return rule, share
    if settings.top_ngram_character_fractions or settings.duplicate_ngram_character_fractions:
        return _ngram_rule(len(text), words, settings)
    return None


def _repeated(parts: list[str]) -> tuple[int, int]:
    """How many parts have occurred before, and their characters."""
    distinct = set(parts)
    return len(parts) - len(distinct), sum(map(len, parts)) - sum(map(len, distinct))


def _ngram_rule(length: int, words: list[str], settings: GopherRepetitionSettings) -> tuple[str, float] | None:
    hashes = SubstringHashes("".join(words))
    starts = np.zeros(len(words) + 1, dtype=np.int64)
    np.cumsum(np.fromiter(map(len, words), dtype=np.int64, count=len(words)), out=starts[1:])
    word_hashes = hashes.between(starts[:-1], starts[1:])
    for n, limit in sorted(settings.top_ngram_character_fractions.items()):
        if len(words) >= n:
            share = _top_ngram_characters(word_hashes, starts, n, limit * length) / length
            if share > limit:
                return f"top_{n}_gram_character_fraction", share
    for n, limit in sorted(settings.duplicate_ngram_character_fractions.items()):
        if len(words) > n:
            ngrams = hashes.between(starts[:-n], starts[n:])
            share = _duplicate_ngram_characters(ngrams, starts, n, limit * length) / length
            if share > limit:
                return f"duplicate_{n}_gram_character_fraction", share
    return None


def _top_ngram_characters(word_hashes: np.ndarray, starts: np.ndarray, n: int, limit: float) -> int:
    """Characters of the most frequent n-gram (the first of them, if several are), words joined by spaces.

    Returns 0 where they cannot exceed `limit`.
    """
    # Joined by spaces, n-grams are the same exactly if all their words are.
    count = len(word_hashes) - n + 1
    ngrams = np.zeros(count, dtype=np.uint64)
    for place in range(n):
        ngrams = ngrams * np.uint64(0xD1342543DE82EF95) + word_hashes[place : place + count]
    lengths = starts[n:] - starts[:-n] + (n - 1)
    ordered = np.sort(ngrams)
    firsts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
    counts = np.diff(firsts, append=count)
    most = counts.max()
    if most * lengths.max() <= limit:
        return 0
    first = np.argmax(np.isin(ngrams, ordered[firsts[counts == most]]))
    return int(most * lengths[first])


def _duplicate_ngram_characters(ngrams: np.ndarray, starts: np.ndarray, n: int, limit: float) -> int:
    """Characters of n-grams met before on a walk that goes on behind each of them, else by one word.

    Returns 0 where they cannot exceed `limit`.
    """
    ordered = np.sort(ngrams)
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if not len(repeated):
        return 0
    nearest = np.minimum(np.searchsorted(repeated, ngrams), len(repeated) - 1)
    places = np.flatnonzero(repeated[nearest] == ngrams)
    begins, ends = starts[places], starts[places + n]
    covered = (ends - np.maximum(begins, np.concatenate(([0], ends[:-1])))).sum()
    if covered <= limit:
        return 0
    characters, behind = 0, 0
    seen: set[int] = set()
    for place, ngram, size in zip(places.tolist(), ngrams[places].tolist(), (ends - begins).tolist(), strict=True):
        if place < behind:
            continue
        if ngram in seen:
            characters += size
            behind = place + n
        else:
            seen.add(ngram)
    return characters
