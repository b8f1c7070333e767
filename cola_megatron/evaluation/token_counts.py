"""What a likelihood is worth without a model: token counts of the training split, for a loss to be held against.

    unigram   p(x) = (n(x) + 1) / (N + V)
    bigram    p(x | y) = (n(y, x) + t(y) p(x)) / (n(y) + t(y)),  t(y) the number of different tokens after y

The second is Witten and Bell's interpolation with the first; the first token of a text has no token before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from cola_megatron.data import TokenShards

TRAINING_TOKENS = 5_000_000
"""Counted at most: the first sequences of every source, by its size."""


@dataclass(frozen=True)
class TokenCounts:
    """Counts over training text."""

    unigram: np.ndarray
    """p(x), (V,)."""
    pairs: np.ndarray
    """y V + x of the pairs that were seen, sorted."""
    times: np.ndarray
    """How often each of them was seen."""
    before: np.ndarray
    """n(y), (V,)."""
    followers: np.ndarray
    """t(y), (V,)."""

    def nats_per_token(self, texts: Iterable[Sequence[int]]) -> dict[str, float]:
        """-log p of texts, over all their tokens, by the name of the count."""
        unigram = bigram = 0.0
        tokens = 0
        for text in texts:
            ids = np.asarray(text, dtype=np.int64)
            alone = self.unigram[ids]
            given = np.concatenate([alone[:1], self._bigram(ids[:-1], ids[1:])])
            unigram -= float(np.log(alone).sum())
            bigram -= float(np.log(given).sum())
            tokens += len(ids)
        return {"unigram": unigram / tokens, "bigram": bigram / tokens}

    def _bigram(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        wanted = before * len(self.unigram) + after
        place = np.minimum(np.searchsorted(self.pairs, wanted), len(self.pairs) - 1)
        seen = np.where(self.pairs[place] == wanted, self.times[place], 0)
        followers = self.followers[before]
        unseen = followers == 0
        total = np.where(unseen, 1, self.before[before] + followers)
        return np.where(unseen, self.unigram[after], (seen + followers * self.unigram[after]) / total)


def count_tokens(training: TokenShards, vocab_size: int, tokens: int = TRAINING_TOKENS) -> TokenCounts:
    """Counts the beginning of a training split; raises ShardError where it cannot be read."""
    single = np.zeros(vocab_size, dtype=np.int64)
    codes: list[np.ndarray] = []
    for ids in beginning(training, tokens):
        ids = ids.astype(np.int64)
        single += np.bincount(ids, minlength=vocab_size)
        codes.append(ids[:-1] * vocab_size + ids[1:])
    pairs, times = np.unique(np.concatenate(codes), return_counts=True)
    before = np.bincount(pairs // vocab_size, weights=times, minlength=vocab_size)
    followers = np.bincount(pairs // vocab_size, minlength=vocab_size)
    return TokenCounts((single + 1) / (single.sum() + vocab_size), pairs, times, before, followers)


def beginning(shards: TokenShards, tokens: int) -> Iterable[np.ndarray]:
    """The first sequences of every source, by its size, so many tokens in all."""
    wanted = min(1.0, tokens / shards.tokens)
    for stream in shards.streams:
        for index in range(stream.first, stream.first + max(1, int(wanted * len(stream)))):
            yield shards[index]
