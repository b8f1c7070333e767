"""How alike two documents are: the share of their word n-grams that they have in common."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

__all__ = ["SKETCH_SIZE", "SketchWriter", "Sketches", "load_array", "similarity", "sketch_of"]

# Up to so many different n-grams the similarity is exact, beyond them estimated with an error of at most 0.016.
SKETCH_SIZE = 1024
SKETCHES_NAME = "sketches.npy"
ENDS_NAME = "sketch_ends.npy"
# Of documents that stay and are asked for again and again: 256 MiB at most.
REMEMBERED = 2**16
# A header alone.
EMPTY_FILE_BYTES = 128


def sketch_of(ngrams: np.ndarray) -> np.ndarray:
    """The smallest of some 64-bit hashes, as 32-bit numbers: uint32, ascending, shape (at most SKETCH_SIZE,)."""
    return np.unique((ngrams >> np.uint64(32)).astype("<u4"))[:SKETCH_SIZE]


def similarity(one: np.ndarray, other: np.ndarray) -> float:
    """Jaccard similarity of what two sketches stand for; 0 where one of them is empty."""
    if not len(one) or not len(other):
        return 0.0
    both = np.sort(np.concatenate([one, other]))
    repeats = both[1:] == both[:-1]
    if max(len(one), len(other)) < SKETCH_SIZE:
        common = int(repeats.sum())
        return common / (len(both) - common)
    # A full sketch says nothing of what is larger than its last hash: the smallest of the union are a fair sample.
    last = both[np.flatnonzero(np.concatenate([[True], ~repeats]))[SKETCH_SIZE - 1]]
    return int((both[1:][repeats] <= last).sum()) / SKETCH_SIZE


class SketchWriter:
    """The sketches of a sequence of documents. Memory: 4 bytes per different n-gram, at most 4 KiB per document."""

    def __init__(self) -> None:
        self._hashes, self._ends = bytearray(), [0]

    def add(self, sketch: np.ndarray) -> None:
        """The sketch of the next document."""
        self._hashes += sketch.tobytes()
        self._ends.append(len(self._hashes) // 4)

    def save(self, folder: Path) -> None:
        """Writes them as two files into an existing folder."""
        np.save(folder / SKETCHES_NAME, np.frombuffer(self._hashes, dtype="<u4"))
        np.save(folder / ENDS_NAME, np.array(self._ends, dtype=np.int64))


class Sketches:
    """The sketches that were saved in several folders, by the number of the document through all of them."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._hashes = [load_array(folder / SKETCHES_NAME) for folder in folders]
        self._ends = [np.load(folder / ENDS_NAME) for folder in folders]
        self._first = np.cumsum([0, *(len(ends) - 1 for ends in self._ends)])
        self._of = lru_cache(REMEMBERED)(self._read)

    def __getitem__(self, document: int) -> np.ndarray:
        return self._of(document)

    def _read(self, document: int) -> np.ndarray:
        task = int(np.searchsorted(self._first, document, side="right")) - 1
        place = document - int(self._first[task])
        return np.array(self._hashes[task][self._ends[task][place] : self._ends[task][place + 1]])


def load_array(path: Path) -> np.ndarray:
    """An array that was saved there, memory-mapped unless it is empty: there is nothing to map."""
    return np.load(path, mmap_mode="r" if path.stat().st_size > EMPTY_FILE_BYTES else None)
