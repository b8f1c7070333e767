"""Choosing a document's split, and cutting tokens into sequences of one length."""

from __future__ import annotations

import hashlib

import numpy as np

__all__ = ["HELD_OUT", "TRAIN", "SequencePacker", "split_of"]

TRAIN = "train"
HELD_OUT = "held_out"


def split_of(text: str, held_out_fraction: float, seed: int) -> str:
    """The split of a document: a function of its text alone, so that it stays when the corpus around it grows.

    Args:
        text: the document.
        held_out_fraction: share of documents to hold out, in [0, 1).
        seed: key of the hash, 0 <= seed < 2**64.

    Returns:
        "train" or "held_out".
    """
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=seed.to_bytes(8, "little")).digest()
    return HELD_OUT if int.from_bytes(digest, "little") < held_out_fraction * 2**64 else TRAIN


class SequencePacker:
    """Cuts a stream of tokens into sequences, across the ends of documents, without padding."""

    def __init__(self, sequence_length: int, token_dtype: str) -> None:
        self._sequence_length = sequence_length
        self._rest = np.empty(0, dtype=token_dtype)

    def add(self, tokens: np.ndarray) -> np.ndarray:
        """Append tokens to the stream.

        Args:
            tokens: shape (count,), of the packer's type.

        Returns:
            The sequences that this completes, shape (sequences, sequence_length); often none.
        """
        stream = np.concatenate([self._rest, tokens])
        complete = len(stream) - len(stream) % self._sequence_length
        # A copy: a view of a few tokens would keep a whole document's memory.
        self._rest = stream[complete:].copy()
        return stream[:complete].reshape(-1, self._sequence_length)

    @property
    def remaining(self) -> int:
        """Tokens at the end of the stream that do not fill a sequence."""
        return len(self._rest)
