"""Finding and reading sources: every document as it stands in its file, every fault named with its place."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cola_megatron.data.manifest import sha256_of
from data_prep import embedded_corpus
from data_prep.errors import DataPrepError

__all__ = ["EMBEDDED", "Document", "Source", "find_sources", "read_documents"]

EMBEDDED = "embedded"
TEXT_SUFFIXES = (".txt", ".md")
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz")
SUFFIXES = TEXT_SUFFIXES + JSONL_SUFFIXES


class Document(NamedTuple):
    """One document."""

    text: str
    bytes_read: int
    """Bytes of the source that reading this document consumed (compressed ones, if it is compressed)."""


@dataclass(frozen=True)
class Source:
    """One file, or the embedded corpus, in the state in which it was found."""

    name: str
    """Absolute path, or `embedded`."""
    bytes: int
    """Size of the file; 0 for the embedded corpus, which is not one file."""
    modified_ns: int

    @staticmethod
    def of_file(path: Path) -> Source:
        """The source that a file is now."""
        try:
            status = path.stat()
        except OSError as error:
            raise DataPrepError(f"{path}: cannot be read ({error.strerror}); check the path and its rights") from error
        return Source(str(path), status.st_size, status.st_mtime_ns)

    @staticmethod
    def of_embedded() -> Source:
        """The embedded corpus."""
        return Source(EMBEDDED, 0, 0)

    def sha256(self) -> str:
        """SHA-256 of the file; of the version and build of Python for the embedded corpus, which follows from it."""
        if self.name == EMBEDDED:
            return hashlib.sha256(sys.version.encode()).hexdigest()
        try:
            return sha256_of(Path(self.name))
        except OSError as error:
            raise DataPrepError(f"{self.name}: cannot be read ({error.strerror}); check its rights") from error

    def check_unchanged(self) -> None:
        """Raises DataPrepError if the file is no longer as it was found."""
        if self.name != EMBEDDED and Source.of_file(Path(self.name)) != self:
            raise DataPrepError(f"{self.name}: changed while it was being read; run again when it is complete")


def _files_below(folder: Path) -> list[Path]:
    """Readable kinds of files below a folder, hidden ones left out, in the order of their paths."""

    def refuse(error: OSError) -> None:
        raise DataPrepError(f"{error.filename}: cannot be listed ({error.strerror}); check its rights") from error

    found = []
    for parent, subfolders, names in os.walk(folder, onerror=refuse):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        found += [Path(parent, name) for name in sorted(names) if name.lower().endswith(SUFFIXES) and name[0] != "."]
    if not found:
        raise DataPrepError(f"{folder}: holds no {', '.join(SUFFIXES)} file; give a folder with text")
    return found


def find_sources(inputs: list[str]) -> list[Source]:
    """The sources that `PrepSettings.inputs` name, in order.

    Raises:
        DataPrepError: an input is missing, of an unknown kind, a folder without text, or named twice.
    """
    sources: list[Source] = []
    for text in inputs:
        path = Path(text).expanduser().absolute()
        if text == EMBEDDED:
            sources.append(Source.of_embedded())
        elif path.is_dir():
            sources += [Source.of_file(file) for file in _files_below(path)]
        elif not path.exists():
            raise DataPrepError(f"{path}: does not exist; give a file, a folder or `{EMBEDDED}`")
        elif not path.name.lower().endswith(SUFFIXES):
            raise DataPrepError(f"{path}: unknown kind of file; rename or convert it to one of {', '.join(SUFFIXES)}")
        else:
            sources.append(Source.of_file(path))
    seen: set[str] = set()
    for source in sources:
        if source.name in seen:
            raise DataPrepError(f"{source.name}: named twice by the inputs; leave one out")
        seen.add(source.name)
    return sources


def read_documents(source: Source, text_field: str) -> Iterator[Document]:
    """The documents of a source: a text file is one, a JSONL file has one per line (blank lines are passed over).

    Args:
        source: where to read.
        text_field: field of each JSON object that holds the document.

    Raises:
        DataPrepError: the file cannot be read, is empty, is not UTF-8, or a line is not a JSON object with a
            string in `text_field`; names file and line.
    """
    path = Path(source.name)
    try:
        if source.name == EMBEDDED:
            yield from (Document(text, len(text.encode())) for text in embedded_corpus.collect())
        elif path.name.lower().endswith(TEXT_SUFFIXES):
            yield Document(_read_text(path), source.bytes)
        else:
            yield from _read_jsonl(path, text_field)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataPrepError(f"{path}: not a whole gzip file ({error}); copy or compress it again") from error
    except OSError as error:
        raise DataPrepError(f"{path}: cannot be read ({error.strerror}); check the file and its rights") from error


def _decode(data: bytes, path: Path, first_line: int) -> str:
    """UTF-8 text of `data`, which begins at line `first_line` of the file."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        raise DataPrepError(
            f"{path}:{line}: not valid UTF-8 (byte 0x{data[error.start]:02x}); convert the file, e.g. with iconv"
        ) from error


def _read_text(path: Path) -> str:
    # Bytes, not text mode: that would turn \r\n into \n.
    text = _decode(path.read_bytes(), path, first_line=1)
    if not text.strip():
        raise DataPrepError(f"{path}: holds no text; remove it from the inputs")
    return text


def _read_jsonl(path: Path, text_field: str) -> Iterator[Document]:
    documents = consumed = 0
    with path.open("rb") as raw:
        lines = gzip.GzipFile(fileobj=raw) if path.name.lower().endswith(".gz") else raw
        for number, line in enumerate(lines, start=1):
            if line.isspace():
                continue
            text = _text_of(_decode(line, path, first_line=number), path, number, text_field)
            position = raw.tell()
            yield Document(text, position - consumed)
            consumed = position
            documents += 1
    if not documents:
        raise DataPrepError(f"{path}: holds no document; remove it from the inputs")


def _text_of(line: str, path: Path, number: int, text_field: str) -> str:
    """The document in one JSONL line."""
    place = f"{path}:{number}"
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        where = f"{error.msg} at column {error.colno}"
        raise DataPrepError(f"{place}: not valid JSON ({where}); repair or remove the line") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, nesting without end
        raise DataPrepError(f"{place}: JSON that cannot be read ({error}); repair or remove the line") from error
    if not isinstance(fields, dict):
        raise DataPrepError(f"{place}: a JSON {type(fields).__name__}, not an object; repair or remove the line")
    if text_field not in fields:
        known = ", ".join(list(fields)[:8]) or "none"
        raise DataPrepError(f"{place}: no field {text_field!r} (fields: {known}); set text_field or repair the line")
    text = fields[text_field]
    if not isinstance(text, str):
        raise DataPrepError(f"{place}: field {text_field!r} is a {type(text).__name__}, not a string; repair the line")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataPrepError(f"{place}: an unpaired surrogate at character {error.start}; repair the line") from error
    return text
