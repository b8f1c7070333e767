"""Documents that share long n-grams of words with items of evaluation sets."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np

from cola_megatron.evaluation.items import Item, read_items
from cola_megatron.evaluation.prompts import Question
from cola_megatron.evaluation.tasks import Task, task_named
from data_prep.clean.hashes import SubstringHashes
from data_prep.clean.settings import DecontaminationSettings

__all__ = ["ContaminationIndex", "ItemName", "wordings"]

ItemName = tuple[str, int | str]
"""Task and id of an item."""

HASHES_NAME = "ngrams.npy"
OWNERS_NAME = "owners.npy"
ITEMS_NAME = "items.json"
# Of each n-gram 24 bits are looked up first, in a table that stays in the cache or near it.
_TABLE_BITS = 24

_WORD = re.compile(r"[^\W_]+")
_FIRST_OPTION = re.compile(r"\n(?:Options:\n)?\(A\) ")
# SQuAD's template puts the passage and the question into one text.
_BEFORE_QUESTION = "\nQuestion: "


class ContaminationIndex:
    """The n-grams of evaluation sets.

    Of an item these wordings are searched: the question, without demonstrations and the words of the template; the
    question with each right answer; the question with its options as they are printed. A wording of `ngram` words or
    more is found by any n-gram of it; one of at least `shortest` words only as a whole; a shorter one never. A short
    question that several items ask ("Which of the following statements is not correct?") tells none of them apart
    and is searched only with its answers and options.
    """

    def __init__(self, hashes: np.ndarray, owners: np.ndarray, contents: dict) -> None:
        """Use `build` or `load`.

        Args:
            hashes: of n-grams, uint64, ascending, shape (n-grams,); once for each item that has it.
            owners: position of that item in contents["items"], uint32, shape (n-grams,).
            contents: what `items.json` holds: `items` (task and id of each item that is searched), `lengths` (the
                numbers of words that n-grams have) and `counts` (items of each task).
        """
        self._hashes = hashes
        self._owners = owners
        self._contents = contents
        self._table = np.zeros(2**_TABLE_BITS, dtype=bool)
        self._table[hashes >> np.uint64(64 - _TABLE_BITS)] = True

    @property
    def items(self) -> dict[str, int]:
        """How many items each task has."""
        return dict(self._contents["counts"])

    @property
    def searched(self) -> dict[str, int]:
        """How many items of each task are long enough to be searched."""
        searched = Counter(task for task, _ in self._contents["items"])
        return {task: searched[task] for task in self._contents["counts"]}

    @classmethod
    def build(cls, settings: DecontaminationSettings) -> ContaminationIndex:
        """Read the evaluation sets.

        Raises:
            EvaluationError: a task has no data in the folder, or data that cannot be read; says the cure.
        """
        tasks = [task_named(name) for name in settings.tasks]
        items = [(task, item) for task in tasks for item in read_items(settings.folder, task)]
        texts = [[_Words(wording) for wording in wordings(item, task)] for task, item in items]
        asked = Counter(question.text for question, *_ in texts if question.count < settings.ngram)
        searched: list[ItemName] = []
        hashes: list[np.ndarray] = []
        lengths: set[int] = set()
        for (task, item), (question, *others) in zip(items, texts, strict=True):
            chosen = [words for words in others if words.count >= settings.shortest]
            if question.count >= settings.shortest and asked[question.text] <= 1:
                chosen.append(question)
            if not chosen:
                continue
            searched.append((task.name, item.id))
            sizes = [min(words.count, settings.ngram) for words in chosen]
            lengths.update(sizes)
            hashes.append(np.unique(np.concatenate([words.ngrams(n) for words, n in zip(chosen, sizes, strict=True)])))
        owners = np.repeat(np.arange(len(hashes), dtype=np.uint32), [len(ngrams) for ngrams in hashes])
        merged = np.concatenate([np.empty(0, dtype=np.uint64), *hashes])
        order = np.argsort(merged, kind="stable")
        counts = Counter(task.name for task, _ in items)
        contents = {"items": searched, "lengths": sorted(lengths, reverse=True), "counts": dict(counts)}
        return cls(merged[order], owners[order], contents)

    def save(self, folder: Path) -> None:
        """Write three files into an existing folder."""
        np.save(folder / HASHES_NAME, self._hashes)
        np.save(folder / OWNERS_NAME, self._owners)
        (folder / ITEMS_NAME).write_text(json.dumps(self._contents), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> ContaminationIndex:
        """The index that `save` wrote there."""
        contents = json.loads((folder / ITEMS_NAME).read_text(encoding="utf-8"))
        return cls(np.load(folder / HASHES_NAME), np.load(folder / OWNERS_NAME), contents)

    def hits(self, text: str) -> list[ItemName]:
        """Task and id of the items that a document has words of, each once, in the order of the evaluation sets."""
        return list(self.shared_words(text))

    def shared_words(self, text: str) -> dict[ItemName, str]:
        """What a document shares with each item: the first n-gram, in lower case without punctuation."""
        words = _Words(text)
        found: dict[int, str] = {}
        for n in self._contents["lengths"]:
            ngrams = words.ngrams(n)
            # Most n-grams of most documents end here.
            places = np.flatnonzero(self._table[ngrams >> np.uint64(64 - _TABLE_BITS)])
            lefts = np.searchsorted(self._hashes, ngrams[places], side="left")
            rights = np.searchsorted(self._hashes, ngrams[places], side="right")
            known = rights > lefts
            for place, left, right in zip(places[known], lefts[known], rights[known], strict=True):
                for owner in self._owners[left:right].tolist():
                    if owner not in found:
                        found[owner] = words.between(place, place + n)
        return {tuple(self._contents["items"][owner]): found[owner] for owner in sorted(found)}


def wordings(item: Item, task: Task) -> list[str]:
    """The texts that give an item away: its question first, then with each right answer, then with its options.

    A passage that stands before the question counts as a text of its own.
    """
    before, after = task.template.render(Question("\0", "")).split("\0")
    asked = item.prompt.removeprefix(before).removesuffix(after)
    options = _FIRST_OPTION.search(asked)
    *passages, question = (asked[: options.start()] if options else asked).split(_BEFORE_QUESTION)
    answered = [f"{question} {truth}" for truth in item.truths]
    return [question, *answered, *([asked] if options else []), *passages]


class _Words:
    """A text as words in lower case, without punctuation."""

    def __init__(self, text: str) -> None:
        if not text.isascii():
            text = unicodedata.normalize("NFKC", text)
        self.text = " ".join(_WORD.findall(text.lower()))
        self._hashes = SubstringHashes(self.text)
        spaces = np.flatnonzero(self._hashes.codes == ord(" "))
        words = 1 if self.text else 0
        self._starts = np.concatenate([np.zeros(words, dtype=np.int64), spaces + 1])
        self._ends = np.concatenate([spaces, np.full(words, len(self.text))])

    @property
    def count(self) -> int:
        """How many words."""
        return len(self._starts)

    def ngrams(self, n: int) -> np.ndarray:
        """Hashes of all n-grams in their order: uint64, shape (max(count - n + 1, 0),)."""
        return self._hashes.between(self._starts[: max(self.count - n + 1, 0)], self._ends[n - 1 :])

    def between(self, start: int, end: int) -> str:
        """Words from `start` to `end`, exclusive."""
        return self.text[self._starts[start] : self._ends[end - 1]]
