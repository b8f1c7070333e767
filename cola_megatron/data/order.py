"""The global order of training samples: a pure function of (seed, position)."""

from __future__ import annotations

import numpy as np

__all__ = ["GlobalOrder"]


class GlobalOrder:
    """An endless sequence of sample numbers: epoch after epoch, each a permutation of all samples.

    Position p lies in epoch ``p // num_samples``; the epoch's permutation depends on (seed, epoch) only. Ranks,
    micro-batches and resumed runs cut the sequence differently and still see the same samples at the same positions.
    """

    def __init__(self, num_samples: int, seed: int) -> None:
        """
        Args:
            num_samples: samples in one epoch, at least 1.
            seed: 0 <= seed < 2**64.

        Raises:
            ValueError: there are no samples, or the seed is out of range.
        """
        if num_samples < 1:
            raise ValueError(f"cannot order {num_samples} samples: the data set is empty")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must be in [0, 2**64), not {seed}")
        self.num_samples = num_samples
        self.seed = seed
        self._epoch = -1
        self._permutation = np.empty(0, dtype=np.int64)

    def __repr__(self) -> str:
        return f"GlobalOrder(num_samples={self.num_samples}, seed={self.seed})"

    def __getstate__(self) -> dict[str, int]:
        """Without the cached permutation, which is 8 bytes per sample and cheap to make again."""
        return {"num_samples": self.num_samples, "seed": self.seed}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__init__(**state)

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
            part = self._permutation_of(epoch)[offset : offset + count - filled]
            ids[filled : filled + len(part)] = part
            filled += len(part)
        return ids

    def _permutation_of(self, epoch: int) -> np.ndarray:
        """The permutation of an epoch, int64 (num_samples,); the latest one is kept."""
        if epoch != self._epoch:
            # Sorting the generator's raw output rather than Generator.permutation: numpy promises that the raw
            # stream of a keyed Philox never changes, but not how its distributions use it.
            key = np.array([self.seed, epoch], dtype=np.uint64)
            raw = np.random.Philox(key=key).random_raw(self.num_samples)
            self._permutation = np.argsort(raw, kind="stable")
            self._epoch = epoch
        return self._permutation
