"""From keys to pairs of documents, and from pairs to groups that have to be looked at together.

Documents are numbered through: those of the first task, then those of the second, and so on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from data_prep.deduplicate.signatures import NO_KEY

__all__ = ["clusters", "find_pairs"]

# Bounds the memory: keys that are sorted at once.
KEYS_AT_ONCE = 2**27


def find_pairs(
    keys: Sequence[np.ndarray], keys_at_once: int = KEYS_AT_ONCE, share: int = 0, shares: int = 1
) -> np.ndarray:
    """Link every document to the first with the same key.

    Keys are hashes, so a range of keys is a fair share of them: where there are many, ranges are sorted one after
    the other. Memory: the keys themselves (none, if they are memory-mapped files), 40 bytes for each of
    `keys_at_once` (5 GiB), and 16 for each pair. For 10**9 documents: 8 GB of file per band, read 8 times.

    Args:
        keys: per task, in their order: uint64, shape (n,) for one band, or (n, 2) for the exact hashes. Keys
            `NO_KEY`, in both columns, are passed over.
        keys_at_once: bound of the memory.
        share: which of the `shares` ranges of keys to look at.
        shares: equal ranges, a power of two; all of them together give the pairs of one that is all.

    Returns:
        int64, shape (pairs, 2): a document and the first one with its key, sorted by the former.
    """
    if not keys:
        return np.empty((0, 2), dtype=np.int64)
    offsets = np.cumsum([0, *map(len, keys)])
    parts = 1
    while offsets[-1] > parts * shares * keys_at_once:
        parts *= 2
    pairs = [_pairs_in_range(keys, offsets, share * parts + part, shares * parts) for part in range(parts)]
    found = np.concatenate(pairs)
    return found[np.argsort(found[:, 0])]


def _pairs_in_range(keys: Sequence[np.ndarray], offsets: np.ndarray, number: int, ranges: int) -> np.ndarray:
    """The pairs among the keys of one of `ranges` equal ranges, a power of two."""
    values, documents = _keys_in_range(keys, offsets, number, ranges)
    # Stable: among equal keys the numbers stay in ascending order.
    order = np.argsort(values[0], kind="stable") if len(values) == 1 else np.lexsort(values[::-1])
    documents = documents[order]
    repeats = np.ones(max(len(documents) - 1, 0), dtype=bool)
    for column in values:
        ordered = column[order]
        repeats &= ordered[1:] == ordered[:-1]
    # The place of the first of each group, carried forward to the group's end.
    firsts = np.arange(len(documents))
    firsts[1:][repeats] = 0
    np.maximum.accumulate(firsts, out=firsts)
    return np.stack([documents[1:][repeats], documents[firsts[1:][repeats]]], axis=1)


def _keys_in_range(
    keys: Sequence[np.ndarray], offsets: np.ndarray, number: int, ranges: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """Columns of the keys, each of shape (count,), and the numbers of their documents, shape (count,)."""
    chosen: list[list[np.ndarray]] = [[] for _ in range(keys[0].shape[1] if keys[0].ndim == 2 else 1)]
    numbers = []
    for task_keys, offset in zip(keys, offsets, strict=False):
        columns = [task_keys] if task_keys.ndim == 1 else list(task_keys.T)
        wanted = np.zeros(len(task_keys), dtype=bool)
        for column in columns:
            wanted |= column != NO_KEY
        # A shift by 64 bits, for one range, is undefined.
        if ranges > 1:
            wanted &= columns[0] >> np.uint64(65 - ranges.bit_length()) == number
        places = np.flatnonzero(wanted)
        for collected, column in zip(chosen, columns, strict=True):
            collected.append(column[places])
        numbers.append(places + offset)
    return [np.concatenate(column) for column in chosen], np.concatenate(numbers)


def clusters(total: int, pairs: Iterable[np.ndarray]) -> np.ndarray:
    """Join pairs to groups and name each group by its first document.

    Similarity is passed on: if the first is similar to the second and the second to the third, they are one group.

    Memory: 9 bytes per document (18 from 2**32 documents on), and about 60 per pair of the array that is at work.
    For 10**9 documents of which a fifth repeat a key: 9 GB and 12 GB.

    Args:
        total: number of documents.
        pairs: arrays of `find_pairs`; a generator may read one after the other.

    Returns:
        For each document the smallest number in its group, shape (total,), uint32, or int64 from 2**32 documents
        on.
    """
    parents = np.arange(total, dtype=np.uint32 if total < 2**32 else np.int64)
    for some in pairs:
        _join(parents, some)
    while not np.array_equal(higher := parents[parents], parents):
        parents = higher
    return parents


def _join(parents: np.ndarray, pairs: np.ndarray) -> None:
    """Put both documents of each pair into one tree. A parent's number is smaller than its child's, or the same."""
    left, right = pairs.astype(parents.dtype).T
    while True:
        left, right = _roots(parents, left), _roots(parents, right)
        apart = left != right
        if not apart.any():
            return
        left, right = left[apart], right[apart]
        # Of several pairs for one root the smallest partner wins; the others are still apart in the next round.
        np.minimum.at(parents, np.maximum(left, right), np.minimum(left, right))


def _roots(parents: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """The root of each document's tree; the ways there become shorter."""
    above = parents[documents]
    while not np.array_equal(higher := parents[above], above):
        parents[documents] = higher
        above = higher
    return above
