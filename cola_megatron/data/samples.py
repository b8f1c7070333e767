"""The sequence of samples that training or a measurement reads: shards, their order, and what to do about bad ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from cola_megatron.data.manifest import BadShardError, ShardError
from cola_megatron.data.mixture import MixedStream, Mixture, epoch_counts, stream_seed
from cola_megatron.data.order import BlockOrder, GlobalOrder, SampleOrder
from cola_megatron.data.shards import TokenShards, TokenStream

__all__ = ["Sample", "SampleSequence", "held_out_samples", "training_samples"]

REPLACEMENTS = 100

HELD_OUT_SEED = 0
"""Of the order of held-out samples: no run's own."""


class Sample(NamedTuple):
    """One position of the sequence."""

    tokens: np.ndarray
    """int64 (sequence_length,)."""
    skipped: tuple[str, str] | None
    """The shard that the sample should have come from and what is wrong with it; None: it came from there."""


class SampleSequence:
    """An endless sequence of samples, position by position: alike for any number of ranks that share it out.

    A sample that cannot be read is an error, or is replaced by another of its stream: a pure function of seed, position
    and what is damaged, so that processes that see the same files read the same samples.
    """

    def __init__(self, shards: TokenShards, order: Mixture, skip_bad: bool) -> None:
        self.shards, self.order, self.skip_bad = shards, order, skip_bad
        self.padding_id, self.end_of_text_id = shards.padding_id, shards.end_of_text_id

    def read(self, start: int, count: int) -> Iterator[Sample]:
        """The samples at positions start ... start + count.

        Raises:
            BadShardError: a shard is missing or damaged and is not to be skipped.
            ShardError: a shard cannot be fetched, or nothing readable was found in its place.
        """
        for offset, index in enumerate(self.order.sample_ids(start, count).tolist()):
            try:
                yield Sample(self.shards[index], None)
            except BadShardError as error:
                if not self.skip_bad:
                    raise
                yield Sample(self._replacement(start + offset, error), (self.shards.shard_of(index), str(error)))

    def _replacement(self, position: int, error: BadShardError) -> np.ndarray:
        for attempt in range(REPLACEMENTS):
            try:
                return self.shards[self.order.replacement(position, attempt)]
            except BadShardError:
                continue
        stream = self.shards.streams[self.order.stream_of(position)].name
        raise ShardError(
            f"{REPLACEMENTS} samples of {self.shards.split}/{stream} in a row could not be read, the first because "
            f"{error}"
        ) from error


def training_samples(
    shards: TokenShards, seed: int, block_shards: int | None = None, skip_bad: bool = False
) -> SampleSequence:
    """The samples of training: every stream shuffled, mixed as the manifest says.

    Args:
        seed: of the shuffle.
        block_shards: None shuffles all sequences of a stream, a number those of so many of its shards at a time.
        skip_bad: replace samples that cannot be read.
    """
    streams, alone = shards.streams, len(shards.streams) == 1
    counts = epoch_counts(
        [len(stream) for stream in streams],
        [stream.mixture.epochs for stream in streams],
        [stream.mixture.weight for stream in streams],
    )

    def order(stream: TokenStream) -> SampleOrder:
        of_stream = seed if alone else stream_seed(seed, stream.name)
        if block_shards is None:
            return GlobalOrder(len(stream), of_stream)
        return BlockOrder(stream.shard_sizes, block_shards, of_stream)

    mixed = [MixedStream(order(stream), stream.first, count) for stream, count in zip(streams, counts, strict=True)]
    return SampleSequence(shards, Mixture(mixed, seed), skip_bad)


def held_out_samples(shards: TokenShards, skip_bad: bool = False) -> SampleSequence:
    """The samples of a measurement: those of every stream in a fixed random order, mixed by size.

    The first N are spread over the split, the same ones in every run; all come once before any comes again.
    """
    mixed = [
        MixedStream(GlobalOrder(len(stream), stream_seed(HELD_OUT_SEED, stream.name)), stream.first, len(stream))
        for stream in shards.streams
    ]
    return SampleSequence(shards, Mixture(mixed, None), skip_bad)
