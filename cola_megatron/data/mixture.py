"""Several streams as one order: which stream a position takes its sample from, and which of its samples."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cola_megatron.data.manifest import Manifest
from cola_megatron.data.order import SampleOrder, permuted

__all__ = ["MixedStream", "Mixture", "epoch_counts", "hashed", "interleave", "passes_and_shares", "stream_seed"]

WINDOW = 256
"""Positions over which the turns of the streams are shuffled."""
NEARBY_ATTEMPTS = 32


@dataclass(frozen=True)
class MixedStream:
    """One stream of a mixture."""

    order: SampleOrder
    first: int
    """Number of its first sample among the samples of all streams."""
    count: int
    """Samples that an epoch of the mixture takes from it."""


class Mixture:
    """An endless sequence of sample numbers over all streams; every epoch takes ``count`` samples from each stream.

    A stream goes through its own endless order, so a count below or above its size is a part of its epoch or more than
    one, and nothing comes again before everything has come. The turns of the streams are spread evenly (`interleave`)
    and, with a seed, shuffled in windows of 256 positions. One stream alone is its order, whatever its count.
    """

    def __init__(self, streams: Sequence[MixedStream], seed: int | None) -> None:
        """
        Args:
            streams: at least one; each count at least 1.
            seed: of the turns; None leaves them evenly spread.
        """
        self.streams, self.seed = list(streams), seed
        self.counts = [stream.count for stream in streams]
        self.epoch_length = sum(self.counts)

    def sample_ids(self, start: int, count: int) -> np.ndarray:
        """Sample numbers at positions start ... start + count, int64 (count,); the range may cross epochs.

        Raises:
            ValueError: start or count is negative.
        """
        if start < 0 or count < 0:
            raise ValueError(f"start and count must not be negative: start={start}, count={count}")
        if len(self.streams) == 1:
            (stream,) = self.streams
            return stream.order.sample_ids(start, count) + stream.first
        ids = np.empty(count, dtype=np.int64)
        filled = 0
        while filled < count:
            epoch, offset = divmod(start + filled, self.epoch_length)
            size = min(count - filled, self.epoch_length - offset, WINDOW - offset % WINDOW)
            ids[filled : filled + size] = self._of_window(epoch, offset, size)
            filled += size
        return ids

    def replacement(self, position: int, attempt: int) -> int:
        """A sample of the same stream instead of the one at a position, chosen by a hash of all that names it.

        The first attempts stay among the samples that the order mixes with this one, whose shards are at hand.
        """
        number, position_in_stream = self._place(position)
        stream = self.streams[number]
        first, size = stream.order.block(position_in_stream)
        if attempt >= NEARBY_ATTEMPTS:
            size = stream.order.num_samples
            first = position_in_stream // size * size
        chosen = hashed(f"{self.seed} {position} {attempt}") % size
        return int(stream.order.sample_ids(first + chosen, 1)[0]) + stream.first

    def stream_of(self, position: int) -> int:
        """Number of the stream that a position takes its sample from."""
        return self._place(position)[0]

    def _of_window(self, epoch: int, offset: int, count: int) -> np.ndarray:
        """Sample numbers at positions of one epoch that lie in one window."""
        numbers, turns = self._turns(epoch, offset, count)
        ids = np.empty(count, dtype=np.int64)
        for number, stream in enumerate(self.streams):
            here = numbers == number
            if not here.any():
                continue
            wanted = turns[here]
            first = int(wanted.min())
            near = stream.order.sample_ids(epoch * stream.count + first, int(wanted.max()) - first + 1)
            ids[here] = near[wanted - first] + stream.first
        return ids

    def _place(self, position: int) -> tuple[int, int]:
        """Stream of a position, and the position in that stream's own sequence."""
        if len(self.streams) == 1:
            return 0, position
        epoch, offset = divmod(position, self.epoch_length)
        numbers, turns = self._turns(epoch, offset, 1)
        return int(numbers[0]), epoch * self.counts[numbers[0]] + int(turns[0])

    def _turns(self, epoch: int, offset: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Streams, and turns of each in this epoch, at positions that lie in one window."""
        if self.seed is None:
            return interleave(self.counts, np.arange(offset, offset + count))
        window, inside = divmod(offset, WINDOW)
        size = min(WINDOW, self.epoch_length - window * WINDOW)
        shuffled = permuted(size, f"{self.seed} {epoch} window {window}", inside, count).astype(np.int64)
        return interleave(self.counts, shuffled + window * WINDOW)


def interleave(counts: Sequence[int], positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Turns of several streams, spread evenly over as many positions as they have samples together.

    The first stream gets every position at which ``position * count // total`` rises; the rest is shared out among the
    others in the same way. So each gets exactly its count, and its turns come in order.

    Args:
        counts: samples of each stream.
        positions: (N,), in [0, sum of counts).

    Returns:
        the stream of each position and its turn there, counted from 0: int64 (N,) each.
    """
    total = sum(counts)
    # The products below reach the square of the total; beyond 64 bits Python's own integers take over.
    left = np.asarray(positions, dtype=np.int64 if total < 2**31 else object)
    streams, turns = np.empty(len(left), dtype=np.int64), np.empty(len(left), dtype=np.int64)
    places = np.arange(len(left))
    for number, count in enumerate(counts):
        before = left * count // total
        taken = ((left + 1) * count // total > before).astype(bool)
        streams[places[taken]], turns[places[taken]] = number, before[taken]
        places, left = places[~taken], (left - before)[~taken]
        total -= count
        if not len(places):
            break
    return streams, turns


def epoch_counts(sizes: Sequence[int], epochs: Sequence[float], weights: Sequence[float | None]) -> list[int]:
    """Samples that an epoch of the mixture takes from each stream, at least 1.

    Args:
        sizes: samples in each stream.
        epochs: how often an epoch of the mixture sees each stream, where there are no weights.
        weights: shares of the streams in as many samples as they have together; all or none are None.
    """
    shares = [weight for weight in weights if weight is not None]
    if len(shares) < len(weights):
        return [max(1, round(size * often)) for size, often in zip(sizes, epochs, strict=True)]
    return [max(1, round(sum(sizes) * share / sum(shares))) for share in shares]


def passes_and_shares(manifest: Manifest) -> dict[str, tuple[float, float]]:
    """How often an epoch sees each sequence of a source, and the source's share of the training samples."""
    records = manifest.splits["train"]
    sizes = [record.sequences for record in records.values()]
    mixture = [manifest.mixture[name] for name in records]
    counts = epoch_counts(sizes, [each.epochs for each in mixture], [each.weight for each in mixture])
    return {name: (count / size, count / sum(counts)) for name, size, count in zip(records, sizes, counts, strict=True)}


def stream_seed(seed: int, name: str) -> int:
    """Seed of the order of one stream among several."""
    return hashed(f"{seed} {name}")


def hashed(text: str) -> int:
    """A number in [0, 2**64)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, person=b"sample mixture").digest(), "little")
