"""Step `tokenize`: the kept documents of a part become sequences in shards."""

from __future__ import annotations

import functools
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cola_megatron.data.manifest import TOKENIZER_NAME, FileRecord, sha256_of
from data_prep.documents import BadDocument, Document
from data_prep.errors import DataPrepError
from data_prep.examples import Examples
from data_prep.kept_documents import kept_documents
from data_prep.pack import HELD_OUT, TRAIN, new_packer, share_of, split_of
from data_prep.pieces import LONGEST_PIECE, TooLong
from data_prep.plan import Plan
from data_prep.recipe import SourceSettings, TokenizerSettings
from data_prep.tiktoken_backend import BYTE_PAIRS_NAME, BytePairs, TiktokenBackend
from data_prep.tokenizer import DocumentTokenizer
from data_prep.work import WorkFolder
from data_prep.write import INDEX_NAME, SplitWriter

__all__ = ["file_record", "open_tokenizer", "tokenize_input"]

# Tokenised at a time: enough to keep every core busy, little beside a shard in memory.
BATCH_CHARACTERS = 2**20
EXAMPLES = 3


def open_tokenizer(plan: Plan, work: WorkFolder) -> DocumentTokenizer:
    """The tokenizer that the step before has left."""
    recipe = plan.recipe
    settings = recipe.tokenizer.model_dump_json()
    placed = work.folder("tokenizer", 0)
    fast = recipe.tokenizer.backend != "tokenizers" and (placed / BYTE_PAIRS_NAME).exists()
    return _open(placed, settings, recipe.packing.method == "best_fit", fast)


@functools.lru_cache(maxsize=1)
def _open(placed: Path, settings: str, pads: bool, fast: bool) -> DocumentTokenizer:
    """Once for all tasks of a process: a large one takes a fifth of a second."""
    tokenizer = DocumentTokenizer(placed / TOKENIZER_NAME, TokenizerSettings.model_validate_json(settings), pads)
    if fast and find_spec("tiktoken") is not None:
        alone = os.environ.get("TOKENIZERS_PARALLELISM") == "false"  # as the tokenizers library understands it
        pairs = BytePairs.load(placed / BYTE_PAIRS_NAME, tokenizer.content)
        tokenizer.encode_with(TiktokenBackend(pairs, 1 if alone else len(os.sched_getaffinity(0))))
    return tokenizer


def tokenize_input(
    plan: Plan, work: WorkFolder, task: int, folder: Path, advance: Callable[[int], None]
) -> dict[str, Any]:
    """Leaves `train/` and `held_out/` with shards and an index each.

    The report holds a `StreamRecord` per split, the documents that were empty, a histogram of their lengths (powers of
    two of tokens), the tokens and those that the tokenizer does not know, the outcome of the round-trip check, and the
    size and hash of every shard.
    """
    recipe, tokenizer = plan.recipe, open_tokenizer(plan, work)
    left = plan.token_cap(task)
    left = sys.maxsize if left is None else left
    lengths: Counter[int] = Counter()
    check = _RoundTrip(tokenizer, recipe.tokenizer.round_trip_share, recipe.seed)
    bad: Counter[str] = Counter()
    examples = Examples()
    empty = unknown = written = 0
    with ExitStack() as stack:
        writers = {split: stack.enter_context(_writer(plan, tokenizer, folder / split)) for split in (TRAIN, HELD_OUT)}

        def is_bad(document: BadDocument) -> None:
            bad[document.rule] += 1
            examples.add(document.rule, document.place, document.message)

        def is_copy(rule: str, document: Document) -> None:
            examples.add(rule, document.place, text=document.text)

        documents = kept_documents(plan, work, task, is_bad, is_copy)
        for batch in _batches(documents):
            for document, tokens in zip(batch, tokenizer.encode([each.text for each in batch]), strict=True):
                if not left:
                    break
                if not document.text:
                    empty += 1
                    continue
                if isinstance(tokens, TooLong):
                    _refuse(document, tokens, recipe.source(plan.inputs[task].source))
                    bad["too_long"] += 1
                    examples.add("too_long", document.place, str(tokens), document.text)
                    continue
                check(document, tokens[:-1])
                lengths[int(math.log2(len(tokens)))] += 1
                kept = tokens[:left]
                left -= len(kept)
                written += len(kept)
                unknown += 0 if tokenizer.unknown_id is None else int((kept == tokenizer.unknown_id).sum())
                writers[split_of(document.text, recipe)].add(kept, len(document.text))
            advance(sum(document.bytes_read for document in batch))
            if not left:
                break
    return {
        "source": plan.inputs[task].source,
        "splits": {split: writer.record for split, writer in writers.items()},
        "empty": empty,
        "bad": dict(bad),
        "examples": examples.found,
        "tokens": written,
        "unknown_tokens": unknown,
        "lengths": {str(2**power): count for power, count in sorted(lengths.items())},
        "round_trip": check.report,
        "files": {
            path.relative_to(folder).as_posix(): file_record(path).model_dump()
            for path in sorted(folder.glob("*/*"))
            if path.name != INDEX_NAME
        },
    }


def _refuse(document: Document, error: TooLong, source: SourceSettings) -> None:
    if source.bad_documents == "error":
        raise DataPrepError(
            f"{document.place}: {len(document.text):,} characters are too long for one document ({error}); split it, "
            f"or set bad_documents of source {source.name} to skip"
        )


def file_record(path: Path) -> FileRecord:
    """Size and hash of a file."""
    return FileRecord(bytes=path.stat().st_size, sha256=sha256_of(path))


def _writer(plan: Plan, tokenizer: DocumentTokenizer, folder: Path) -> SplitWriter:
    packing = plan.recipe.packing
    packer = new_packer(packing, tokenizer.token_dtype, tokenizer.padding_id)
    return SplitWriter(folder, plan.recipe.shards, packer, tokenizer.token_dtype, packing.sequence_length)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """The documents in groups of about `BATCH_CHARACTERS` characters."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _RoundTrip:
    """Decodes some documents again: a tokenizer that cannot write what it reads trains a model that cannot either."""

    def __init__(self, tokenizer: DocumentTokenizer, share: float, seed: int) -> None:
        self._tokenizer, self._share, self._seed = tokenizer, share, seed
        self._checked = self._different = 0
        self._examples: list[str] = []

    def __call__(self, document: Document, tokens: Any) -> None:
        # Decoding takes some hundred bytes per token.
        if (
            not self._share
            or len(document.text) > LONGEST_PIECE
            or share_of(document.text, self._seed, "round trip") >= self._share
        ):
            return
        self._checked += 1
        if self._tokenizer.decode(tokens) != document.text:
            self._different += 1
            if len(self._examples) < EXAMPLES:
                self._examples.append(document.place)

    @property
    def report(self) -> dict[str, Any]:
        return {"checked": self._checked, "different": self._different, "examples": self._examples}
