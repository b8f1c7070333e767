"""Orders of samples: shuffled, in blocks of shards, and mixed from several streams."""

import math
import pickle
import tracemalloc
from collections import Counter

import numpy as np
import pytest

from cola_megatron.data import GlobalOrder
from cola_megatron.data.mixture import WINDOW, MixedStream, Mixture, epoch_counts, interleave
from cola_megatron.data.order import BlockOrder


def test_the_order_does_not_depend_on_how_it_is_cut() -> None:
    whole = GlobalOrder(17, seed=5).sample_ids(0, 100)
    for size in (1, 3, 17, 40):
        order = GlobalOrder(17, seed=5)
        pieces = [order.sample_ids(start, min(size, 100 - start)) for start in range(0, 100, size)]
        np.testing.assert_array_equal(np.concatenate(pieces), whole)
    np.testing.assert_array_equal(GlobalOrder(17, seed=5).sample_ids(63, 37), whole[63:])  # resumed
    ranks = np.stack([GlobalOrder(17, seed=5).sample_ids(0, 100)[rank::4] for rank in range(4)], axis=1)
    np.testing.assert_array_equal(ranks.reshape(-1), whole)
    assert whole.dtype == np.int64
    assert len(GlobalOrder(17, seed=5).sample_ids(9, 0)) == 0


@pytest.mark.parametrize("size", [*range(1, 40), 63, 64, 65, 1000, 4095, 4096, 4097, 2**16, 99_991])
def test_every_epoch_holds_every_sample_once(size: int) -> None:
    for epoch in (0, 1, 2**70):
        ids = GlobalOrder(size, seed=4).sample_ids(epoch * size, size)
        np.testing.assert_array_equal(np.sort(ids), np.arange(size))


def test_every_epoch_and_every_seed_has_its_own_order() -> None:
    size = 10_000
    orders = [*GlobalOrder(size, seed=0).sample_ids(0, 3 * size).reshape(3, size)]
    orders += [GlobalOrder(size, seed).sample_ids(0, size) for seed in (1, 2**32, 2**64 - 1)]
    between = np.corrcoef(orders)[np.triu_indices(len(orders), k=1)]
    assert np.abs(between).max() < 4 / np.sqrt(size), "four standard errors of unrelated orders"


@pytest.mark.parametrize("size", [2, 3, 4, 10, 64, 101])
def test_a_sample_may_come_at_any_position_and_after_any_other(size: int) -> None:
    """Chi-square over seeds below its mean plus five standard deviations."""
    seeds = 4000
    orders = np.stack([GlobalOrder(size, seed).sample_ids(0, size) for seed in range(seeds)])
    for counts in (
        np.bincount(np.argmax(orders == 0, axis=1), minlength=size),
        np.bincount(orders[:, 0], minlength=size),
        np.bincount((orders[:, 1] - orders[:, 0]) % size, minlength=size)[1:],
    ):
        expected, freedom = seeds / len(counts), len(counts) - 1
        assert ((counts - expected) ** 2 / expected).sum() <= freedom + 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("size", [4096, 50_000])
@pytest.mark.parametrize("seed", range(5))
def test_neighbours_in_the_order_are_unrelated(size: int, seed: int) -> None:
    """Within four standard errors of random permutations."""
    ids = GlobalOrder(size, seed).sample_ids(0, size)
    assert abs(np.corrcoef(ids[:-1], ids[1:])[0, 1]) < 4 / np.sqrt(size)
    # The sum of |differences| has the mean (size**2 - 1) / 3 and, to leading order, the variance 2 * size**3 / 45.
    assert abs(np.abs(np.diff(ids)).mean() - (size + 1) / 3) < 4 * np.sqrt(2 * size / 45)


def test_the_order_never_changes_between_releases() -> None:
    """A run resumed with another numpy or another release of this project must go on with the same samples."""
    assert GlobalOrder(10, seed=66).sample_ids(5, 15).tolist() == [8, 9, 6, 4, 5, 5, 7, 4, 9, 3, 1, 8, 2, 6, 0]
    assert GlobalOrder(352_000_000, seed=1).sample_ids(10**6, 4).tolist() == [298011387, 85977106, 114365343, 246937647]
    assert GlobalOrder(2**40, seed=2**64 - 1).sample_ids(3 * 2**40 - 2, 4).tolist() == [
        770252288688,
        4492303722,
        781167706257,
        97161092695,
    ]


@pytest.mark.parametrize("size", [2**40, 2**62 + 1, 2**63])
def test_a_huge_order_takes_no_memory_and_little_to_send(size: int) -> None:
    order = GlobalOrder(size, seed=3)
    start = 2 * size - 500
    expected = order.sample_ids(start, 1000)
    assert 0 <= expected.min() < size // 50
    assert size - size // 50 < expected.max() < size
    assert len(np.unique(expected)) == 1000
    data = pickle.dumps(order)
    assert len(data) < 1000
    tracemalloc.start()
    try:
        received = pickle.loads(data)
        pieces = [received.sample_ids(start + offset, 50) for offset in range(0, 1000, 50)]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(np.concatenate(pieces), expected)
    assert peak < 50_000


@pytest.mark.parametrize("arguments", [(0, 1), (-3, 1), (2**63 + 1, 1), (5, -1), (5, 2**64)])
def test_impossible_orders_are_refused(arguments: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"empty|do not fit|seed"):
        GlobalOrder(*arguments)
    with pytest.raises(ValueError, match="negative"):
        GlobalOrder(5, 1).sample_ids(-1, 2)


# ---- blocks of shards -----------------------------------------------------------------------------------------------

SIZES = [7, 10, 10, 3, 10, 1, 10, 10, 9, 10, 10]


def shards_of(ids: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.cumsum(SIZES), ids, side="right")


@pytest.mark.parametrize("block", [1, 2, 4, 11, 50])
def test_an_epoch_of_blocks_holds_every_sample_once_and_cuts_alike(block: int) -> None:
    order, size = BlockOrder(SIZES, block, seed=3), sum(SIZES)
    whole = order.sample_ids(0, 3 * size)
    for epoch in whole.reshape(3, size):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(size))
    assert (whole[:size] != whole[size : 2 * size]).any()
    pieces = [BlockOrder(SIZES, block, seed=3).sample_ids(start, 7) for start in range(0, 3 * size - 6, 7)]
    np.testing.assert_array_equal(np.concatenate(pieces), whole[: 7 * len(pieces)])
    later = pickle.loads(pickle.dumps(order)).sample_ids(2**70 * size, size)
    np.testing.assert_array_equal(np.sort(later), np.arange(size))


@pytest.mark.parametrize("block", [1, 2, 4])
def test_a_window_of_the_sequence_touches_few_shards(block: int) -> None:
    order, size, window = BlockOrder(SIZES, block, seed=5), sum(SIZES), 12
    ids = order.sample_ids(0, 4 * size)
    for start in range(len(ids) - window):
        position = start
        blocks = []  # that the window reaches into: two where it is no longer than a block
        while position < start + window:
            first, length = order.block(position)
            assert first <= position < first + length
            blocks.append((first, length))
            position = first + length
        touched = set(shards_of(ids[start : start + window]).tolist())
        assert len(touched) <= block * len(blocks)
    for first, length in {order.block(position) for position in range(size)}:
        assert len(set(shards_of(ids[first : first + length]).tolist())) <= block
    assert len(set(shards_of(ids[:size]).tolist())) == len(SIZES)


def test_blocks_are_shuffled_inside() -> None:
    order = BlockOrder([5000] * 40, 4, seed=1)
    ids = order.sample_ids(0, 20_000)
    assert len(np.unique(ids // 5000)) == 4
    assert abs(np.corrcoef(ids[:-1], ids[1:])[0, 1]) < 4 / np.sqrt(20_000)
    first = Counter(int(BlockOrder([5] * 10, 2, seed).sample_ids(0, 1)[0]) for seed in range(2000))
    assert len(first) == 50 and max(first.values()) < 40 + 5 * math.sqrt(40)


# ---- mixtures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [[1], [1, 1], [3, 5], [1, 1000, 10], [7, 1, 2, 90], [2000, 1]])
def test_turns_are_exact_in_order_and_evenly_spread(counts: list[int]) -> None:
    total = sum(counts)
    streams, turns = interleave(counts, np.arange(total))
    for stream, count in enumerate(counts):
        np.testing.assert_array_equal(turns[streams == stream], np.arange(count))
    first = np.cumsum(streams == 0)
    assert np.abs(first - np.arange(1, total + 1) * counts[0] / total).max() <= 1


def test_turns_of_huge_streams_are_exact() -> None:
    counts = [2**40, 3 * 2**40 + 1, 2**39]
    total = sum(counts)
    streams, turns = interleave(counts, np.arange(total - 1000, total, dtype=object))
    for stream, count in enumerate(counts):
        mine = turns[streams == stream]
        assert len(mine) and mine[-1] == count - 1
        np.testing.assert_array_equal(np.diff(mine), 1)


def mixture(sizes: list[int], counts: list[int], seed: int | None = 9) -> Mixture:
    firsts = np.cumsum([0, *sizes])
    return Mixture(
        [
            MixedStream(GlobalOrder(size, seed=index), int(first), count)
            for index, (size, count, first) in enumerate(zip(sizes, counts, firsts, strict=False))
        ],
        seed,
    )


@pytest.mark.parametrize("counts", [[900, 300, 1800], [100, 900, 1]])
def test_every_epoch_of_a_mixture_has_the_same_proportions(counts: list[int]) -> None:
    sizes = [900, 600, 400]
    ids = mixture(sizes, counts).sample_ids(0, 6 * sum(counts))
    streams = np.searchsorted(np.cumsum(sizes), ids, side="right")
    for epoch in streams.reshape(6, -1):
        np.testing.assert_array_equal(np.bincount(epoch, minlength=3), counts)
    for stream, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        own = ids[streams == stream]
        seen = np.bincount(own - sum(sizes[:stream]), minlength=size)
        # Positions are taken out of order within a window only, so that no sample gets far ahead of another.
        assert seen.max() - seen.min() <= 2 and seen.sum() == 6 * count
    for window in streams[: sum(counts) // WINDOW * WINDOW].reshape(-1, WINDOW):
        assert (np.abs(np.bincount(window, minlength=3) - np.array(counts) * WINDOW / sum(counts)) < 3).all()


def test_the_turns_of_a_mixture_are_shuffled() -> None:
    sizes = [5000, 5000]
    streams = mixture(sizes, sizes).sample_ids(0, 10_000) // 5000
    followed = np.mean(streams[:-1] == streams[1:])
    assert abs(followed - 0.5) < 4 * 0.5 / np.sqrt(10_000)
    even = mixture(sizes, sizes, seed=None).sample_ids(0, 10) // 5000
    assert even.tolist() == [0, 1] * 5 or even.tolist() == [1, 0] * 5


def test_a_mixture_does_not_depend_on_how_it_is_cut() -> None:
    order = mixture([70, 30, 500], [140, 1, 300])
    whole = order.sample_ids(0, 3000)
    for size in (1, 8, 441, 1024):
        again = pickle.loads(pickle.dumps(order))
        pieces = [again.sample_ids(start, min(size, 3000 - start)) for start in range(0, 3000, size)]
        np.testing.assert_array_equal(np.concatenate(pieces), whole)
    far = 2**40
    np.testing.assert_array_equal(order.sample_ids(far, 10), [order.sample_ids(far + k, 1)[0] for k in range(10)])
    with pytest.raises(ValueError, match="negative"):
        order.sample_ids(-1, 3)


def test_one_stream_alone_is_its_own_order_whatever_its_count() -> None:
    expected = GlobalOrder(50, seed=66).sample_ids(0, 200)
    for count in (50, 100, 20):
        alone = Mixture([MixedStream(GlobalOrder(50, seed=66), 0, count)], seed=66)
        np.testing.assert_array_equal(alone.sample_ids(0, 200), expected)


def test_the_mixture_never_changes_between_releases() -> None:
    ids = mixture([70, 30, 500], [140, 1, 300]).sample_ids(435, 12).tolist()
    assert ids == [593, 417, 238, 565, 372, 354, 61, 217, 292, 63, 175, 59]


def test_counts_follow_epochs_or_weights() -> None:
    assert epoch_counts([100, 10, 1], [1.0, 4.0, 0.1], [None] * 3) == [100, 40, 1]
    assert epoch_counts([100, 50, 50], [1.0] * 3, [2.0, 1.0, 1.0]) == [100, 50, 50]
    assert epoch_counts([100, 50, 50], [1.0] * 3, [1.0, 1.0, 8.0]) == [20, 20, 160]
    assert epoch_counts([100, 100], [1.0] * 2, [1e-9, 1.0]) == [1, 200]


def test_a_replacement_is_of_the_same_stream_and_near_first() -> None:
    sizes = [400, 100]
    blocks = Mixture(
        [MixedStream(BlockOrder([10] * 40, 2, 1), 0, 400), MixedStream(GlobalOrder(100, 0), 400, 100)], seed=4
    )
    for position in range(0, 2000, 37):
        (original,) = blocks.sample_ids(position, 1)
        chosen = [blocks.replacement(position, attempt) for attempt in range(100)]
        assert chosen == [blocks.replacement(position, attempt) for attempt in range(100)]
        assert {sample >= sizes[0] for sample in chosen} == {original >= sizes[0]}
        if original < sizes[0]:
            assert len({sample // 10 for sample in [*chosen[:32], original]}) <= 2
            assert len({sample // 10 for sample in chosen}) > 10


def test_a_mixture_of_blocks_needs_two_blocks_of_every_stream() -> None:
    """Fetches of an LRU cache of that size: each shard once in an epoch."""
    size, shards, block = 500, 12, 2
    streams = [
        MixedStream(BlockOrder([size] * shards, block, seed), seed * size * shards, size * shards) for seed in (0, 1)
    ]
    ids = Mixture(streams, seed=4).sample_ids(0, 2 * size * shards)
    held: dict[int, None] = {}
    fetched = Counter()
    for shard in (ids // size).tolist():
        fetched[shard] += shard not in held
        held.pop(shard, None)
        held[shard] = None
        if len(held) > 2 * block * len(streams):
            held.pop(next(iter(held)))
    assert set(fetched.values()) == {1} and len(fetched) == 2 * shards
