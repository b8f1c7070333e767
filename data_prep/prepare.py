"""Preparation of a data set: from sources to a finished folder of shards, tokenizer and manifest."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

from tqdm import tqdm

from cola_megatron.data.manifest import MANIFEST_NAME, TOKENIZER_NAME, Manifest, SourceRecord, SplitRecord
from data_prep.errors import DataPrepError
from data_prep.existing import finished_folder
from data_prep.pack import HELD_OUT, TRAIN, split_of
from data_prep.readers import Document, Source, find_sources, read_documents
from data_prep.settings import PrepSettings
from data_prep.tokenizer import DocumentTokenizer, train_tokenizer
from data_prep.write import SplitWriter, file_records, new_folder

__all__ = ["PrepSettings", "prepare"]

# Tokenised at a time: enough to keep every core busy, little beside a shard in memory.
BATCH_CHARACTERS = 2**20


def prepare(settings: PrepSettings, progress: bool = True, force: bool = False) -> Path:
    """Tokenise, split and pack the documents of `settings.inputs` into `settings.output`.

    The folder appears whole or not at all. The same sources and settings make the same shards, byte for byte; where
    the folder already holds them, nothing is done. Its layout is in `cola_megatron.data.shards`.

    Args:
        settings: what to prepare, and how.
        progress: show progress bars and notes on stderr.
        force: replace a folder that was prepared from other sources or settings, or is damaged.

    Returns:
        The absolute path of the folder.

    Raises:
        DataPrepError: a source, a setting or the output folder is at fault, or the disk is full; one line with the
            cure.
    """
    output = settings.output.expanduser().absolute()
    sources = find_sources(settings.inputs)
    if finished_folder(output, settings, sources, force):
        _note(f"{output}: already prepared from these sources with these settings; nothing to do", progress)
        return output
    for partial in sorted(output.parent.glob(f".{output.name}.partial-*")):
        _note(f"{partial}: left by an interrupted run, unless another one is writing it; can be removed", progress)
    hashes = {source: source.sha256() for source in sources}
    with new_folder(output, replace=force) as folder:
        tokenizer = _place_tokenizer(folder / TOKENIZER_NAME, settings, sources, progress)
        splits, tally = _write_splits(folder, settings, sources, tokenizer, progress)
        for source in sources:
            source.check_unchanged()
        manifest = _manifest(folder, settings, tokenizer, splits, tally, hashes)
        (folder / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    for name, split in manifest.splits.items():
        _note(
            f"{output / name}: {split.documents:,} documents, {split.sequences:,} sequences, {split.tokens:,} tokens "
            f"({split.dropped_tokens:,} at the end dropped)",
            progress,
        )
    return output


def _note(line: str, progress: bool) -> None:
    if progress:
        tqdm.write(line, file=sys.stderr)


def _documents(sources: list[Source], text_field: str, task: str, progress: bool) -> Iterator[tuple[str, Document]]:
    """(source name, document) of every source in order, under a progress bar in bytes of the sources."""
    # The embedded corpus has no size.
    total = sum(source.bytes for source in sources) if all(source.bytes for source in sources) else None
    with tqdm(total=total, desc=task, unit="B", unit_scale=True, disable=not progress, file=sys.stderr) as bar:
        for source in sources:
            for document in read_documents(source, text_field):
                yield source.name, document
                bar.update(document.bytes_read)


def _place_tokenizer(path: Path, settings: PrepSettings, sources: list[Source], progress: bool) -> DocumentTokenizer:
    """Copy the given tokenizer to `path`, or train one there on the train documents."""
    if settings.tokenizer is not None:
        given = settings.tokenizer.expanduser()
        tokenizer = DocumentTokenizer(given, settings.end_of_text, settings.padding)
        path.write_bytes(given.read_bytes())
        return tokenizer
    texts = (
        document.text
        for _, document in _documents(sources, settings.text_field, "training the tokenizer", progress)
        if split_of(document.text, settings.held_out_fraction, settings.seed) == TRAIN
    )
    trained = train_tokenizer(texts, settings.vocab_size, settings.end_of_text, settings.padding)
    path.write_text(trained.to_str(pretty=True), encoding="utf-8")
    return DocumentTokenizer(path, settings.end_of_text, settings.padding)


def _batches(documents: Iterable[tuple[str, Document]]) -> Iterator[list[tuple[str, str]]]:
    """(source name, text) of the documents, in groups of about `BATCH_CHARACTERS` characters."""
    batch: list[tuple[str, str]] = []
    characters = 0
    for name, document in documents:
        batch.append((name, document.text))
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _Tally:
    """Documents and characters per source, and the documents left out for want of text."""

    def __init__(self) -> None:
        self.documents: Counter[str] = Counter()
        self.characters: Counter[str] = Counter()
        self.empty = 0


def _write_splits(
    folder: Path, settings: PrepSettings, sources: list[Source], tokenizer: DocumentTokenizer, progress: bool
) -> tuple[dict[str, SplitRecord], _Tally]:
    """Write the shards of both splits below `folder`."""
    tally = _Tally()
    left = sys.maxsize if settings.max_tokens is None else settings.max_tokens
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(
                SplitWriter(folder / name, settings.sequence_length, tokenizer.token_dtype, settings.shard_size_bytes)
            )
            for name in (TRAIN, HELD_OUT)
        }
        for batch in _batches(_documents(sources, settings.text_field, "tokenising and packing", progress)):
            for (name, text), tokens in zip(batch, tokenizer.encode([text for _, text in batch]), strict=True):
                if not left:
                    break
                if not text:
                    tally.empty += 1
                    continue
                kept = tokens[:left]
                left -= len(kept)
                tally.documents[name] += 1
                tally.characters[name] += len(text)
                writers[split_of(text, settings.held_out_fraction, settings.seed)].add(kept, len(text))
            if not left:
                break
        splits = {name: writer.record for name, writer in writers.items()}
        if not splits[TRAIN].sequences:
            raise DataPrepError(
                f"the train documents have {splits[TRAIN].dropped_tokens} tokens, fewer than one sequence of "
                f"{settings.sequence_length}; give more text or lower sequence_length"
            )
    return splits, tally


def _manifest(
    folder: Path,
    settings: PrepSettings,
    tokenizer: DocumentTokenizer,
    splits: dict[str, SplitRecord],
    tally: _Tally,
    hashes: dict[Source, str],
) -> Manifest:
    """The manifest of what was written below `folder`."""
    packages = ("mosaicml-streaming", "numpy", "tokenizers")
    return Manifest(
        layout_version=1,
        sequence_length=settings.sequence_length,
        token_dtype=tokenizer.token_dtype,
        vocab_size=tokenizer.vocab_size,
        end_of_text_id=tokenizer.end_of_text_id,
        padding_id=tokenizer.padding_id,
        empty_documents=tally.empty,
        splits=splits,
        sources=[
            SourceRecord(
                source=source.name,
                bytes=source.bytes,
                modified_ns=source.modified_ns,
                sha256=sha256,
                documents=tally.documents[source.name],
                characters=tally.characters[source.name],
            )
            for source, sha256 in hashes.items()
        ],
        settings=settings.model_dump(mode="json"),
        versions={
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in packages},
        },
        files=file_records(folder),
    )
