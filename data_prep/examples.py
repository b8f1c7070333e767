"""Examples of the documents that each rule removed, to look at: the first of every task, some of each source."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, zip_longest

__all__ = ["Example", "Examples", "merged"]

Example = dict[str, str]
"""`place`, `detail` (what the rule found, where it says so) and `text`, the beginning of the document."""

OF_A_TASK = 3
OF_A_SOURCE = 10
CHARACTERS = 500


class Examples:
    """Of the documents that one task removes, the first by every rule."""

    def __init__(self) -> None:
        self.found: dict[str, list[Example]] = {}
        """By rule."""

    def add(self, rule: str, place: str, detail: str = "", text: str = "") -> None:
        """Notes a document, unless there are enough by its rule."""
        those = self.found.setdefault(rule, [])
        if len(those) < OF_A_TASK:
            those.append({"place": place, "detail": detail, "text": text[:CHARACTERS]})


def merged(tasks: Iterable[dict[str, list[Example]]]) -> dict[str, list[Example]]:
    """Those of some tasks, in turn from each, at most `OF_A_SOURCE` by rule."""
    by_rule: dict[str, list[list[Example]]] = {}
    for found in tasks:
        for rule, examples in found.items():
            by_rule.setdefault(rule, []).append(examples)
    return {
        rule: [each for each in chain.from_iterable(zip_longest(*by_rule[rule])) if each is not None][:OF_A_SOURCE]
        for rule in sorted(by_rule)
    }
