"""The global order of training samples: a pure function of (seed, position), computed where it is asked for."""

from __future__ import annotations

import hashlib
import math

import numpy as np

__all__ = ["GlobalOrder"]

ROUNDS = 8

# Arrays, because numpy converts a Python number anew at each use, which takes longer than the arithmetic.
ONE = np.array(1, dtype=np.uint64)
MIXER = [np.array(value, dtype=np.uint64) for value in (30, 0xBF58476D1CE4E5B9, 27, 0x94D049BB133111EB, 31)]


class GlobalOrder:
    """An endless sequence of sample numbers: epoch after epoch, each a permutation of all samples.

    Position p lies in epoch ``p // num_samples``; the epoch's permutation depends on (seed, epoch) only. Ranks,
    micro-batches and resumed runs cut the sequence differently and still see the same samples at the same positions.

    No permutation is ever stored. A balanced Feistel network of 8 rounds maps the pairs (left, right) of numbers below
    ``side`` one to one onto themselves, where ``side**2`` is the smallest square that covers num_samples; a result
    beyond the last sample goes through the network again until it is a sample ("cycle walking", seldom needed, as at
    most ``2 * (side - 1)`` pairs are none). Each round adds SplitMix64's finaliser of ``right + round key`` to left;
    the keys are a BLAKE2b hash of (seed, epoch).

    It mixes well enough to shuffle, and is not cryptographic. A network reaches a sliver of all permutations of a
    large set, and those of a handful of samples not quite equally often.
    """

    def __init__(self, num_samples: int, seed: int) -> None:
        """
        Args:
            num_samples: samples in one epoch, 1 <= num_samples <= 2**63.
            seed: 0 <= seed < 2**64.

        Raises:
            ValueError: there are no samples or too many, or the seed is out of range.
        """
        if num_samples < 1:
            raise ValueError(f"cannot order {num_samples} samples: the data set is empty")
        if num_samples > 2**63:
            raise ValueError(f"cannot order {num_samples} samples: their numbers do not fit 64-bit integers")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must be in [0, 2**64), not {seed}")
        self.num_samples = num_samples
        self.seed = seed

    def __repr__(self) -> str:
        return f"GlobalOrder(num_samples={self.num_samples}, seed={self.seed})"

    def sample_ids(self, start: int, count: int) -> np.ndarray:
        """Sample numbers at positions start, start + 1, ..., start + count - 1 of the sequence.

        Args:
            start: first position, at least 0; may lie in any epoch.
            count: number of positions, at least 0; the range may cross epochs.

        Returns:
            int64 array of shape (count,), values in [0, num_samples).

        Raises:
            ValueError: start or count is negative.
        """
        if start < 0 or count < 0:
            raise ValueError(f"start and count must not be negative: start={start}, count={count}")
        ids = np.empty(count, dtype=np.int64)
        filled = 0
        while filled < count:
            epoch, offset = divmod(start + filled, self.num_samples)
            size = min(count - filled, self.num_samples - offset)
            ids[filled : filled + size] = self._permuted(epoch, offset, size)
            filled += size
        return ids

    def _permuted(self, epoch: int, offset: int, count: int) -> np.ndarray:
        """Entries offset ... offset + count of an epoch's permutation, uint64 (count,)."""
        side = np.array(math.isqrt(self.num_samples - 1) + 1, dtype=np.uint64)
        keys = _round_keys(self.seed, epoch)
        ids = _feistel(np.arange(offset, offset + count, dtype=np.uint64), side, keys)
        while len(outside := np.flatnonzero(ids >= self.num_samples)):
            ids[outside] = _feistel(ids[outside], side, keys)
        return ids


def _round_keys(seed: int, epoch: int) -> np.ndarray:
    """One key per round, uint64 (ROUNDS, 1)."""
    digest = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=8 * ROUNDS, person=b"sample order")
    return np.frombuffer(digest.digest(), dtype="<u8").reshape(ROUNDS, 1)


def _feistel(values: np.ndarray, side: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """A permutation of [0, side**2), applied to each value. uint64 in and out; side <= 2**32."""
    left, right = np.divmod(values, side)
    for key in keys:
        # Halved, so that the sum stays below 2**64: a wrapped one would not be undone modulo side.
        left, right = right, (left + (_mixed(right + key) >> ONE)) % side
    return left * side + right


def _mixed(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser, in place (Steele, Lea, Flood 2014; constants of Stafford's variant 13)."""
    shift_1, factor_1, shift_2, factor_2, shift_3 = MIXER
    values ^= values >> shift_1
    values *= factor_1
    values ^= values >> shift_2
    values *= factor_2
    values ^= values >> shift_3
    return values
