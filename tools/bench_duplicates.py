"""Time and memory of finding duplicates among synthetic signatures, per million documents.

    python -m tools.bench_duplicates 1 2 4 --shares 4

A fifth of the documents are copies of earlier ones and share all their keys with them; the keys of the others are their
own, and a hundredth of those meets another document by one key. A number is measured in a process of its own: one task
of `match` (one key, one range of the keys) from files, then `group`, then one task of `cluster`, whose comparisons are
those of sketches of 256 hashes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.deduplicate import clusters, find_pairs, near_copies, similarity
from data_prep.step_deduplicate import share_of_group

COPIES, MEETING = 5, 100
DOCUMENTS_PER_FILE = 250_000
SKETCH = 256


def main() -> None:
    """Prints one JSON object per number of documents."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("millions", nargs="+", type=float)
    parser.add_argument("--bands", type=int, default=14)
    parser.add_argument("--shares", type=int, default=1, help="tasks of a key, and of groups: a power of two")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    for millions in arguments.millions:
        total = int(millions * 1e6)
        with tempfile.TemporaryDirectory() as name:
            answer: dict[str, Any] = {"documents": total}
            for work in (_write, _match, _group, _cluster):
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_measured, args=(work, Path(name), total, arguments, sender))
                process.start()
                sender.close()
                answer[work.__name__.strip("_")] = receiver.recv()
                process.join()
            print(json.dumps(answer), flush=True)


def _measured(work: Any, folder: Path, total: int, arguments: argparse.Namespace, sender: Any) -> None:
    at_first = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    found = work(folder, total, arguments)
    spent = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - at_first
    sender.send({"cpu_seconds": round(spent, 2), "megabytes": round(peak / 1024), "found": found})


def _original(numbers: np.ndarray) -> np.ndarray:
    """Of each document the one that it is a copy of, or itself."""
    return np.where(numbers % COPIES == COPIES - 1, numbers // COPIES * COPIES, numbers)


def _keys(numbers: np.ndarray, band: int) -> np.ndarray:
    """SplitMix64's finaliser over original and band."""
    numbers = _original(numbers)
    meets = numbers % (MEETING * 14) == band * MEETING
    value = np.where(meets, numbers - 1, numbers).astype(np.uint64) * np.uint64(64) + np.uint64(band + 1)
    value *= np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _write(folder: Path, total: int, arguments: argparse.Namespace) -> int:
    for start in range(0, total, DOCUMENTS_PER_FILE):
        numbers = np.arange(start, min(start + DOCUMENTS_PER_FILE, total))
        for band in range(arguments.bands):
            np.save(folder / f"keys_{band:02d}_{start // DOCUMENTS_PER_FILE:05d}.npy", _keys(numbers, band))
    return total


def _match(folder: Path, total: int, arguments: argparse.Namespace) -> int:
    """Every task; the time is that of all of them, the memory that of the largest."""
    found = 0
    for band in range(arguments.bands):
        for share in range(arguments.shares):
            keys = [np.load(path, mmap_mode="r") for path in sorted(folder.glob(f"keys_{band:02d}_*.npy"))]
            pairs = find_pairs(keys, share=share, shares=arguments.shares)
            np.save(folder / f"pairs_{band:02d}_{share:03d}.npy", pairs)
            found += len(pairs)
    return found


def _group(folder: Path, total: int, arguments: argparse.Namespace) -> int:
    paths = sorted(folder.glob("pairs_*.npy"))
    groups = clusters(total, map(np.load, paths))
    for path in paths:
        pairs = np.load(path)
        of_pair = share_of_group(groups[pairs[:, 1]], arguments.shares)
        for share in range(arguments.shares):
            np.save(folder / f"rows_{share:03d}_{path.name}", pairs[of_pair == share])
    return int((groups != np.arange(total)).sum())


def _cluster(folder: Path, total: int, arguments: argparse.Namespace) -> int:
    """The first task of `shares`."""
    tables: list[list[np.ndarray]] = [[] for _ in range(arguments.bands)]
    for path in sorted(folder.glob("rows_000_pairs_*.npy")):
        tables[int(path.name.split("_")[3])].append(np.load(path))
    bands = [np.concatenate(table) for table in tables]
    documents, places = np.unique(np.concatenate(bands), return_inverse=True)
    ends = np.cumsum([0, *map(len, bands)])
    local = [places.reshape(-1, 2)[start:stop] for start, stop in pairwise(ends)]

    def sketch(document: int) -> np.ndarray:
        original = int(_original(np.array([document]))[0])
        return np.arange(original % 1000, original % 1000 + SKETCH, dtype=np.uint32) * np.uint32(original % 9973 + 1)

    def alike(one: int, other: int) -> float:
        return similarity(sketch(int(documents[one])), sketch(int(documents[other])))

    return int(near_copies(len(documents), local, np.zeros(len(documents), dtype=bool), alike, 0.75).sum())


if __name__ == "__main__":
    main()
