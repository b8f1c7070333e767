"""How many documents near-duplicate matching keeps of corpora whose documents resemble one another.

    python -m tools.near_duplicates

Beside it what stays where all documents that meet are one group and all numbers one number, as in datatrove's pipeline.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_prep.clean.settings import DeduplicationSettings, NearDuplicateSettings
from data_prep.deduplicate import Signatures, Sketches, clusters, find_pairs, near_copies, similarity

__all__ = ["CORPORA", "chain", "documents_of_a_template", "number_tables", "sheets_of_sums", "words"]


def words(chooser: random.Random, count: int) -> list[str]:
    """Words of six random letters."""
    return ["".join(chooser.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(count)]


def sheets_of_sums(count: int) -> list[str]:
    """Twelve sums each, all different."""
    chooser = random.Random(1)
    pairs = [[(chooser.randrange(1000), chooser.randrange(1000)) for _ in range(12)] for _ in range(count)]
    return ["\n".join(f"{one} + {other} = {one + other}" for one, other in sheet) for sheet in pairs]


def number_tables(count: int) -> list[str]:
    """Twelve lines of six numbers each."""
    chooser = random.Random(2)
    tables = [[[str(chooser.randrange(10_000)) for _ in range(6)] for _ in range(12)] for _ in range(count)]
    return ["\n".join(" ".join(line) for line in table) for table in tables]


def documents_of_a_template(count: int) -> list[str]:
    """Four fifths of the words are the same in all: two documents have a Jaccard similarity of 0.66."""
    chooser = random.Random(3)
    form = words(chooser, 320)
    return [" ".join([*form[:160], *words(chooser, 76), *form[160:]]) for _ in range(count)]


def chain(count: int) -> list[str]:
    """Windows over one long text: neighbours have a similarity of 0.93, those far apart none."""
    stream = words(random.Random(4), 200 + 7 * count)
    return [" ".join(stream[7 * number : 7 * number + 200]) for number in range(count)]


CORPORA: dict[str, tuple[Callable[[int], list[str]], int]] = {
    "sheets of sums": (sheets_of_sums, 1000),
    "number tables": (number_tables, 500),
    "documents of one template": (documents_of_a_template, 1000),
    "a chain of neighbours": (chain, 400),
}


def main() -> None:
    """Prints a line per corpus."""
    print(f"{'corpus':28}{'documents':>10}{'groups of all that meet':>25}{'compared':>10}")
    for name, (make, count) in CORPORA.items():
        texts = make(count)
        print(f"{name:28}{count:10,}{_groups(texts):25,}{_compared(texts):10,}")


def _bands(signed: Signatures) -> list[np.ndarray]:
    return [find_pairs([band]) for band in signed.arrays()[1]]


def _signed(texts: list[str], near: NearDuplicateSettings) -> Signatures:
    signed = Signatures(DeduplicationSettings(near=near))
    for text in texts:
        signed.add(text)
    return signed


def _groups(texts: list[str]) -> int:
    signed = _signed(texts, NearDuplicateSettings(numbers_alike=True))
    return len(set(clusters(len(texts), _bands(signed)).tolist()))


def _compared(texts: list[str]) -> int:
    settings = NearDuplicateSettings()
    signed = _signed(texts, settings)
    with tempfile.TemporaryDirectory() as folder:
        signed.save(Path(folder))
        sketches = Sketches([Path(folder)])
        removed = near_copies(
            len(texts),
            _bands(signed),
            np.zeros(len(texts), dtype=bool),
            lambda one, other: similarity(sketches[one], sketches[other]),
            settings.similarity,
        )
    return int((~removed).sum())


if __name__ == "__main__":
    main()
