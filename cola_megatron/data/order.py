"""Orders of the samples of one stream: pure functions of (seed, position), computed where they are asked for."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

__all__ = ["BlockOrder", "GlobalOrder", "SampleOrder", "permuted"]

ROUNDS = 8

# Arrays, because numpy converts a Python number anew at each use, which takes longer than the arithmetic.
ONE = np.array(1, dtype=np.uint64)
MIXER = [np.array(value, dtype=np.uint64) for value in (30, 0xBF58476D1CE4E5B9, 27, 0x94D049BB133111EB, 31)]


class SampleOrder(Protocol):
    """An endless sequence of sample numbers, epoch after epoch, each epoch a permutation of all samples."""

    num_samples: int

    def sample_ids(self, start: int, count: int) -> np.ndarray:
        """Sample numbers at positions start ... start + count, int64 (count,); the range may cross epochs."""

    def block(self, position: int) -> tuple[int, int]:
        """First position and length of the range around a position that the shuffle mixes."""


class GlobalOrder:
    """An endless sequence of sample numbers: epoch after epoch, each a permutation of all samples.

    Position p lies in epoch ``p // num_samples``; the epoch's permutation depends on (seed, epoch) only. Ranks,
    micro-batches and resumed runs cut the sequence differently and still see the same samples at the same positions.

    No permutation is ever stored: see `permuted`.
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
            ids[filled : filled + size] = permuted(self.num_samples, f"{self.seed} {epoch}", offset, size)
            filled += size
        return ids

    def block(self, position: int) -> tuple[int, int]:
        """The whole epoch."""
        return position // self.num_samples * self.num_samples, self.num_samples


class BlockOrder:
    """An endless sequence that works through the shards a block at a time, for shards that are fetched when needed.

    In each epoch the shards are permuted and cut into blocks of ``block_shards``; the samples of a block are permuted
    among themselves. A reader that follows the sequence needs the shards of one block, and of the next one where it
    crosses over. Memory: a few numbers for each shard.
    """

    def __init__(self, shard_sizes: Sequence[int], block_shards: int, seed: int) -> None:
        """
        Args:
            shard_sizes: samples in each shard, at least 1; the samples are numbered through them in this order.
            block_shards: shards in a block, at least 1; the last block of an epoch may have fewer.
            seed: 0 <= seed < 2**64.
        """
        self.sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.block_shards, self.seed = block_shards, seed
        self.num_samples = int(self.sizes.sum())
        self._firsts = np.cumsum(self.sizes) - self.sizes
        self._laid_out: tuple[int, np.ndarray, np.ndarray] | None = None

    def sample_ids(self, start: int, count: int) -> np.ndarray:
        """Sample numbers at positions start ... start + count, int64 (count,); the range may cross epochs."""
        ids = np.empty(count, dtype=np.int64)
        filled = 0
        while filled < count:
            epoch, offset = divmod(start + filled, self.num_samples)
            shards, ends, block = self._locate(epoch, offset)
            inside = slice(block * self.block_shards, (block + 1) * self.block_shards)
            shards, ends = shards[inside], ends[inside]
            first, last = int(ends[0] - self.sizes[shards[0]]), int(ends[-1])
            size = min(count - filled, last - offset)
            key = f"{self.seed} {epoch} block {block}"
            chosen = permuted(last - first, key, offset - first, size).astype(np.int64) + first
            places = np.searchsorted(ends, chosen, side="right")
            rows = chosen - (ends - self.sizes[shards])[places]
            ids[filled : filled + size] = self._firsts[shards[places]] + rows
            filled += size
        return ids

    def block(self, position: int) -> tuple[int, int]:
        """The positions that are filled from the same shards."""
        epoch, offset = divmod(position, self.num_samples)
        shards, ends, block = self._locate(epoch, offset)
        inside = slice(block * self.block_shards, (block + 1) * self.block_shards)
        size = int(self.sizes[shards[inside]].sum())
        return epoch * self.num_samples + int(ends[inside][-1]) - size, size

    def _locate(self, epoch: int, offset: int) -> tuple[np.ndarray, np.ndarray, int]:
        """The shards of an epoch in their order, where each of them ends, and the block of an offset."""
        if self._laid_out is None or self._laid_out[0] != epoch:
            shards = permuted(len(self.sizes), f"{self.seed} {epoch} shards", 0, len(self.sizes)).astype(np.int64)
            self._laid_out = epoch, shards, np.cumsum(self.sizes[shards])
        _, shards, ends = self._laid_out
        return shards, ends, int(np.searchsorted(ends, offset, side="right")) // self.block_shards


def permuted(size: int, key: str, offset: int, count: int) -> np.ndarray:
    """Entries offset ... offset + count of the permutation of [0, size) that a key names, uint64 (count,).

    No permutation is ever stored. A balanced Feistel network of 8 rounds maps the pairs (left, right) of numbers below
    ``side`` one to one onto themselves, where ``side**2`` is the smallest square that covers the size; a result beyond
    the last number goes through the network again until it is one ("cycle walking", seldom needed, as at most
    ``2 * (side - 1)`` pairs are none). Each round adds SplitMix64's finaliser of ``right + round key`` to left; the
    round keys are a BLAKE2b hash of the key.

    It mixes well enough to shuffle, and is not cryptographic. A network reaches a sliver of all permutations of a
    large set, and those of a handful of samples not quite equally often.
    """
    side = np.array(math.isqrt(size - 1) + 1, dtype=np.uint64)
    keys = _round_keys(key)
    values = _feistel(np.arange(offset, offset + count, dtype=np.uint64), side, keys)
    while len(outside := np.flatnonzero(values >= size)):
        values[outside] = _feistel(values[outside], side, keys)
    return values


def _round_keys(key: str) -> np.ndarray:
    """One key per round, uint64 (ROUNDS, 1)."""
    digest = hashlib.blake2b(key.encode(), digest_size=8 * ROUNDS, person=b"sample order")
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
