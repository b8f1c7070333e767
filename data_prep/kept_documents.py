"""The documents of a part as the last steps see them: as they stand in the source, or cleaned and deduplicated."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from data_prep.documents import BadDocument, Document
from data_prep.errors import DataPrepError
from data_prep.packages import require
from data_prep.plan import Plan
from data_prep.work import WorkFolder

__all__ = ["CLEANED_NAME", "DROPPED_NAME", "EXACT", "EXACT_NAME", "NEAR", "CleanedWriter", "kept_documents"]

CLEANED_NAME = "documents.jsonl.zst"
DROPPED_NAME = "dropped_{task:05d}.npy"
EXACT_NAME = "exact_{task:05d}.npy"
"""Those of the dropped that are exact copies."""
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
    dropped, exact = _numbers(plan, work, DROPPED_NAME, task), _numbers(plan, work, EXACT_NAME, task)
    for index, document in enumerate(_cleaned(work.folder("clean", task) / CLEANED_NAME)):
        if index not in dropped:
            yield document
        else:
            copy(EXACT if index in exact else NEAR, document)


def _numbers(plan: Plan, work: WorkFolder, name: str, task: int) -> set[int]:
    """Of the kept documents of a task those that a file of the step `cluster` has, where there is one."""
    path = work.folder("cluster", 0) / name.format(task=task)
    if plan.recipe.deduplication is None or (name == EXACT_NAME and not path.exists()):  # work of an older version
        return set()
    return set(np.load(path).tolist())


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
