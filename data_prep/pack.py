"""Choosing a document's split, and making sequences of one length of documents of all lengths."""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from data_prep.recipe import PackingSettings, Recipe

__all__ = ["HELD_OUT", "TRAIN", "BestFit", "CutAndFill", "Packer", "new_packer", "share_of", "split_of"]

TRAIN = "train"
HELD_OUT = "held_out"


def share_of(text: str, seed: int, purpose: str) -> float:
    """A number in [0, 1) that depends on the text, the seed and the purpose alone.

    Args:
        seed: key of the hash, 0 <= seed < 2**64.
        purpose: what is decided; decisions of different purposes are independent. At most 16 bytes.
    """
    digest = hashlib.blake2b(
        text.encode(), digest_size=8, key=seed.to_bytes(8, "little"), person=purpose.encode()
    ).digest()
    return int.from_bytes(digest, "little") / 2**64


def split_of(text: str, recipe: Recipe) -> str:
    """The split of a document: a function of its text alone, so that it stays when the corpus around it grows.

    A very long one is always trained on: alone it could be most of the held-out split.

    Returns:
        "train" or "held_out".
    """
    if len(text) > recipe.held_out_longest:
        return TRAIN
    return HELD_OUT if share_of(text, recipe.seed, "split") < recipe.held_out_fraction else TRAIN


class Packer(Protocol):
    """Makes sequences of a stream of documents."""

    padding_tokens: int
    """Written so far to fill up sequences."""
    dropped_tokens: int
    """Left over when `finish` was called."""

    def add(self, tokens: np.ndarray) -> Iterator[np.ndarray]:
        """Adds a document, shape (count,), end-of-text included; yields finished sequences, (sequence_length,)."""

    def finish(self) -> Iterator[np.ndarray]:
        """Yields what is left at the end of the stream."""


def new_packer(settings: PackingSettings, token_dtype: str, padding_id: int) -> Packer:
    """The packer that the settings name."""
    if settings.method == "cut_and_fill":
        return CutAndFill(settings.sequence_length, token_dtype)
    return BestFit(settings.sequence_length, token_dtype, padding_id, settings.open_sequences)


class CutAndFill:
    """Cuts the stream every `sequence_length` tokens, across the ends of documents, without padding."""

    padding_tokens = 0

    def __init__(self, sequence_length: int, token_dtype: str) -> None:
        self.dropped_tokens = 0
        self._sequence_length = sequence_length
        self._rest = np.empty(0, dtype=token_dtype)

    def add(self, tokens: np.ndarray) -> Iterator[np.ndarray]:
        """Yields the sequences that this document completes; often none."""
        stream = np.concatenate([self._rest, tokens])
        complete = len(stream) - len(stream) % self._sequence_length
        # A copy: a view of a few tokens would keep a whole document's memory.
        self._rest = stream[complete:].copy()
        yield from stream[:complete].reshape(-1, self._sequence_length)

    def finish(self) -> Iterator[np.ndarray]:
        """Drops the tokens at the end that do not fill a sequence."""
        self.dropped_tokens = len(self._rest)
        yield from ()


class BestFit:
    """Puts each document into the open sequence that it fills best, and cuts only those longer than a sequence.

    Best-fit bin packing in the order of arrival with a bounded number of open sequences (compare "Fewer Truncations
    Improve Language Modeling", arXiv 2404.10830, which sorts by length first and so needs the whole corpus). When one
    more would have to be open, the fullest is padded and closed.
    """

    def __init__(self, sequence_length: int, token_dtype: str, padding_id: int, open_sequences: int) -> None:
        self.padding_tokens = self.dropped_tokens = 0
        self._sequence_length, self._token_dtype = sequence_length, token_dtype
        self._padding_id, self._limit = padding_id, open_sequences
        self._room: list[tuple[int, int]] = []
        """(room, number) of the open sequences, ascending: the first that is large enough fits best."""
        self._open: dict[int, list[np.ndarray]] = {}
        self._opened = 0

    def add(self, tokens: np.ndarray) -> Iterator[np.ndarray]:
        """Yields the sequences that this document fills, and one that had to be closed to open another."""
        for start in range(0, len(tokens), self._sequence_length):
            yield from self._place(tokens[start : start + self._sequence_length])

    def finish(self) -> Iterator[np.ndarray]:
        """Pads and yields the open sequences, the fullest first."""
        while self._room:
            yield self._close(0)

    def _place(self, piece: np.ndarray) -> Iterator[np.ndarray]:
        position = bisect.bisect_left(self._room, (len(piece), -1))
        if position == len(self._room):
            if len(self._room) == self._limit:
                yield self._close(0)
            room, number = self._sequence_length, self._opened
            self._opened += 1
            self._open[number] = []
        else:
            room, number = self._room.pop(position)
        self._open[number].append(piece)
        entry = (room - len(piece), number)
        position = bisect.bisect_left(self._room, entry)
        self._room.insert(position, entry)
        if entry[0] == 0:
            yield self._close(position)

    def _close(self, position: int) -> np.ndarray:
        room, number = self._room.pop(position)
        sequence = np.full(self._sequence_length, self._padding_id, dtype=self._token_dtype)
        pieces = self._open.pop(number)
        sequence[: self._sequence_length - room] = np.concatenate(pieces)
        self.padding_tokens += room
        return sequence
