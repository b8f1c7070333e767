"""Hashes of many substrings of one text at once."""

from __future__ import annotations

import numpy as np

__all__ = ["SubstringHashes"]

# Odd, so that it has an inverse modulo 2**64; far from powers of two.
_BASE = 0x9E3779B97F4A7C15
_INVERSE = pow(_BASE, -1, 2**64)


class SubstringHashes:
    """64-bit hashes of substrings of a text: equal substrings have equal hashes, on every machine.

    A substring is a polynomial in `_BASE` modulo 2**64 whose coefficients are scrambled code points, taken as the
    difference of two prefix sums and shifted to the text's beginning. Memory: 40 bytes per character.
    """

    def __init__(self, text: str) -> None:
        self.codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        """Code points of the text, shape (characters,)."""
        self._prefix = np.zeros(len(self.codes) + 1, dtype=np.uint64)
        np.cumsum(_scrambled(self.codes) * _powers(_BASE, len(self.codes)), out=self._prefix[1:])
        self._shift = _powers(_INVERSE, len(self.codes) + 1)

    def between(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Hashes of text[start:end] for each pair.

        Args:
            starts: shape (count,), integers.
            ends: shape (count,), none smaller than its start.

        Returns:
            uint64, shape (count,).
        """
        return (self._prefix[ends] - self._prefix[starts]) * self._shift[starts]


def _powers(base: int, count: int) -> np.ndarray:
    """base**0, base**1, ... modulo 2**64, shape (count,)."""
    powers = np.full(count, base, dtype=np.uint64)
    powers[:1] = 1
    return np.cumprod(powers, out=powers)


def _scrambled(values: np.ndarray) -> np.ndarray:
    """Each value spread over 64 bits by the finaliser of SplitMix64."""
    values = (values.astype(np.uint64) + np.uint64(1)) * np.uint64(_BASE)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
