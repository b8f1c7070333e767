"""Which documents are near copies: of those that share a MinHash key, the ones that resemble a document that stays."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

import numpy as np

from data_prep.deduplicate.groups import clusters

__all__ = ["near_copies"]

# A key that very many documents share comes of a text that all of them quote. Copies share most of their keys, so they
# are found among the documents with the most keys in common, and the work for one document has a bound.
STAYING_PER_KEY = 512
COMPARED = 64


def near_copies(
    total: int,
    bands: Iterable[np.ndarray],
    removed: np.ndarray,
    similarity: Callable[[int, int], float],
    threshold: float,
) -> np.ndarray:
    """Goes through the documents in their order: one that resembles an earlier one that stays is a copy.

    Every copy resembles the document that stays for it, so a chain of neighbours is not one group.

    Args:
        total: number of documents.
        bands: for each band the pairs of `find_pairs`.
        removed: documents that are gone already and stay for no other, bool, shape (total,).
        similarity: of two documents, given their numbers.
        threshold: the least similarity of a copy.

    Returns:
        bool, shape (total,). Memory: 9 bytes per document, about 60 per pair.
    """
    copies = np.zeros(total, dtype=bool)
    staying: dict[tuple[int, int], deque[int]] = {}
    current = -1
    for group, document, keys in _by_group(total, list(bands), removed):
        if group != current:
            current, staying = group, defaultdict(lambda: deque(maxlen=STAYING_PER_KEY))
        shared: Counter[int] = Counter()
        for key in keys:
            shared.update(staying[key])
        if any(similarity(document, other) >= threshold for other, _ in shared.most_common(COMPARED)):
            copies[document] = True
            continue
        for key in keys:
            staying[key].append(document)
    return copies


def _by_group(
    total: int, bands: list[np.ndarray], removed: np.ndarray
) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
    """Group, document and keys of every document that shares one, the documents of a group together, in their order.

    A group is what pairs connect; a key is a band and the first document that has it.
    """
    columns = []
    for band, pairs in enumerate(bands):
        firsts = np.unique(pairs[:, 1])
        documents = np.concatenate([firsts, pairs[:, 0]])
        columns.append(
            np.stack([documents, np.full(len(documents), band), np.concatenate([firsts, pairs[:, 1]])], axis=1)
        )
    rows = np.concatenate(columns) if columns else np.empty((0, 3), dtype=np.int64)
    rows = rows[~removed[rows[:, 0]]]
    groups = clusters(total, bands)[rows[:, 0]]
    order = np.lexsort((rows[:, 1], rows[:, 0], groups))
    rows, groups = rows[order], groups[order]
    bounds = np.flatnonzero(np.diff(rows[:, 0], prepend=-1, append=-1)).tolist()
    for start, stop in pairwise(bounds):
        keys = [(band, first) for _, band, first in rows[start:stop].tolist()]
        yield int(groups[start]), int(rows[start, 0]), keys
