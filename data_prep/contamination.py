"""What was found of the evaluation sets: counted by each task, added up by the merge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from data_prep.decontaminate import ContaminationIndex
from data_prep.documents import Document

__all__ = ["ContaminationCounter", "added_up"]

EXAMPLES = 20

Report = dict[str, dict[str, Any]]
"""By evaluation task: `found` items, `documents` with words of one of them, and `examples`."""


class ContaminationCounter:
    """Looks for evaluation items in documents and remembers what it found. Memory: an entry for each item found."""

    def __init__(self, index: ContaminationIndex) -> None:
        self._index = index
        self._found: dict[str, set[str]] = {}
        self._documents: Counter[str] = Counter()
        self._examples: dict[str, list[str]] = {}

    def found_in(self, document: Document) -> bool:
        """Whether a document has words of any item."""
        shared = self._index.shared_words(document.text)
        for (task, item), words in shared.items():
            self._found.setdefault(task, set()).add(str(item))
            examples = self._examples.setdefault(task, [])
            if len(examples) < EXAMPLES:
                examples.append(f"{document.place}: item {item}: {words}")
        self._documents.update({task for task, _ in shared})
        return bool(shared)

    @property
    def report(self) -> Report:
        """What was found so far."""
        return {
            task: {"found": sorted(found), "documents": self._documents[task], "examples": self._examples[task]}
            for task, found in self._found.items()
        }


def added_up(items: dict[str, int], searched: dict[str, int], reports: Iterable[Report]) -> dict[str, dict[str, Any]]:
    """The reports on all documents as one, for every evaluation task.

    Args:
        items: number of items of each evaluation task.
        searched: of these, the ones that are long enough to be searched.
    """
    total: dict[str, dict[str, Any]] = {
        task: {"items": items[task], "searched": searched[task], "found": set(), "documents": 0, "examples": []}
        for task in items
    }
    for report in reports:
        for task, each in report.items():
            total[task]["found"].update(each["found"])
            total[task]["documents"] += each["documents"]
            total[task]["examples"] += each["examples"]
    return {
        task: {**each, "found": len(each["found"]), "examples": each["examples"][:EXAMPLES]}
        for task, each in total.items()
    }
