"""The documents of a part as the last steps see them: as they stand in the source, or cleaned and deduplicated."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from data_prep.deduplicate.sketches import load_array
from data_prep.documents import BadDocument, Document
from data_prep.errors import DataPrepError
from data_prep.packages import require
from data_prep.plan import Plan
from data_prep.work import WorkFolder

__all__ = [
    "CLEANED_NAME",
    "ENDS_NAME",
    "EXACT",
    "EXACT_NAME",
    "NEAR",
    "NEAR_NAME",
    "CleanedWriter",
    "kept_documents",
]

CLEANED_NAME = "documents.jsonl.zst"
ENDS_NAME = "ends.npy"
"""In the folder of the step `group`: numbers of the first kept document of every task, and of all documents."""
EXACT_NAME = "exact.npy"
"""There too: ascending numbers of the documents that are exact copies."""
NEAR_NAME = "near.npy"
"""In every folder of the step `cluster`: those of near copies."""
EXACT, NEAR = "duplicate/exact", "duplicate/near"


def kept_documents(
    plan: Plan,
    work: WorkFolder,
    task: int,
    bad: Callable[[BadDocument], None] = lambda document: None,
    copy: Callable[[str, Document], None] = lambda rule, document: None,
) -> Iterator[Document]:
    """The documents of input `task` that go on to the tokenizer, in order.

    Args:
        bad: told of every record that is no document, where the source skips those and nothing was cleaned before.
        copy: told of every document that goes as a duplicate, and by which rule.

    Raises:
        DataPrepError: a source is at fault, or a step before is not finished.
    """
    if not plan.recipe.cleans:
        for document in plan.documents(task):
            if isinstance(document, BadDocument):
                bad(document)
            else:
                yield document
        return
    dropped = _dropped(plan, work, task)
    for index, document in enumerate(_cleaned(work.folder("clean", task) / CLEANED_NAME)):
        if index not in dropped:
            yield document
        else:
            copy(dropped[index], document)


def _dropped(plan: Plan, work: WorkFolder, task: int) -> dict[int, str]:
    """Of the kept documents of a task those that are copies, and of which kind."""
    if plan.recipe.deduplication is None:
        return {}
    grouped = work.folder("group", 0)
    first, stop = load_array(grouped / ENDS_NAME)[task : task + 2].tolist()
    found = {}
    near = [(NEAR, work.folder("cluster", share) / NEAR_NAME) for share in range(plan.shares)]
    for rule, path in [(EXACT, grouped / EXACT_NAME), *near]:
        numbers = load_array(path)
        own = numbers[np.searchsorted(numbers, first) : np.searchsorted(numbers, stop)]
        found.update(dict.fromkeys((own - first).tolist(), rule))
    return found


class CleanedWriter:
    """Writes the documents that the rules kept, one JSON object per line. A context manager."""

    def __init__(self, path: Path) -> None:
        zstandard = require("zstandard", "cleaned documents are stored with it")
        # One thread and no time in the frame: the same documents give the same bytes.
        self._file = zstandard.open(path, "wb", cctx=zstandard.ZstdCompressor(level=3))

    def write(self, document: Document) -> None:
        """Adds one document."""
        line = {"text": document.text, "place": document.place, "bytes": document.bytes_read}
        self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")

    def __enter__(self) -> CleanedWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _cleaned(path: Path) -> Iterator[Document]:
    zstandard = require("zstandard", "cleaned documents are stored with it")
    try:
        with zstandard.open(path, "rb") as file:
            for line in io.BufferedReader(file):
                fields = json.loads(line)
                yield Document(fields["text"], fields["place"], None, fields["bytes"])
    except (OSError, ValueError, KeyError, zstandard.ZstdError) as error:
        raise DataPrepError(f"{path}: cannot be read ({error}); remove {path.parent} and run again") from error
