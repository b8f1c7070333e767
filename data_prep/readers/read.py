"""The documents of a part, whatever its format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from data_prep import embedded_corpus
from data_prep.documents import BadDocument, Document, Part
from data_prep.errors import DataPrepError
from data_prep.readers.compression import BUFFER_BYTES, open_decompressed
from data_prep.readers.csv_files import read_csv
from data_prep.readers.faults import DamagedFile
from data_prep.readers.formats import EMBEDDED
from data_prep.readers.json_lines import read_json_lines
from data_prep.readers.stores import open_stored, store_of
from data_prep.readers.tables import read_arrow, read_parquet
from data_prep.readers.text_files import read_text
from data_prep.readers.warcs import read_warc
from data_prep.readers.webdataset import read_webdataset
from data_prep.recipe import SourceSettings

__all__ = ["read_part"]

Reader = Callable[[Part, SourceSettings], Iterator[Document | BadDocument]]


def read_part(part: Part, source: SourceSettings) -> Iterator[Document | BadDocument]:
    """The documents of a part in the order in which they stand; only text files are held in memory as a whole.

    The `bytes_read` of what is yielded add up to `part.bytes`: exact for each line of plain JSONL, in the steps in
    which the file is read for compressed files and tars, shared out by rows for tables. A range in which no line begins
    yields nothing.

    Args:
        part: what to read, as `find_parts` found it.
        source: the source it belongs to.

    Raises:
        DataPrepError: the file cannot be read, changed since it was found, or has no such column; or it is damaged,
            holds no document or a bad one, and `source.bad_documents` is `error`.
    """
    _check_unchanged(part)
    if source.bad_documents == "skip" and (corruption := _corruption(part)) is not None:
        yield BadDocument(part.location, "bad_archive", corruption, part.bytes)
        return
    for document in _whole(part, READERS[part.format](part, source)):
        if isinstance(document, BadDocument) and document.is_fault and source.bad_documents == "error":
            raise DataPrepError(f"{document.place}: {document.message}")
        yield document
    _check_unchanged(part)


def _corruption(part: Part) -> str | None:
    """Why a compressed file cannot be trusted: its checksum comes after the documents that it is about.

    Nor can what stands before a cut: a flipped bit, too, lets a decompressor run past the end.
    """
    if part.compression is None:
        return None
    try:
        with open_stored(part.location) as stored, open_decompressed(stored, part.location, part.compression) as stream:
            while stream.read(BUFFER_BYTES):
                pass
    except DamagedFile as error:
        return str(error)
    return None


def _read_embedded(part: Part, source: SourceSettings) -> Iterator[Document]:
    for number, text in enumerate(embedded_corpus.collect(), start=1):
        yield Document(text, f"{EMBEDDED}:{number}")


READERS: dict[str, Reader] = {
    "text": read_text,
    "jsonl": read_json_lines,
    "parquet": read_parquet,
    "arrow": read_arrow,
    "csv": read_csv,
    "warc": read_warc,
    "webdataset": read_webdataset,
    EMBEDDED: _read_embedded,
}


def _whole(part: Part, documents: Iterator[Document | BadDocument]) -> Iterator[Document | BadDocument]:
    """The same documents, damage and emptiness as bad ones among them; the last takes the bytes that are left."""
    rest = part.bytes
    last = None
    for document in _with_damage(part, documents):
        if last is not None:
            yield last
        rest -= document.bytes_read
        last = document
    if last is not None:
        yield replace(last, bytes_read=last.bytes_read + rest)
    elif part.start == 0 and part.stop is None:
        yield BadDocument(part.location, "empty_file", "holds no document; remove it from the inputs", rest)


def _with_damage(part: Part, documents: Iterator[Document | BadDocument]) -> Iterator[Document | BadDocument]:
    try:
        yield from documents
    except DamagedFile as error:
        yield BadDocument(part.location, "bad_archive", str(error))


def _check_unchanged(part: Part) -> None:
    if part.location != EMBEDDED and store_of(part.location).state(part.location).version != part.version:
        raise DataPrepError(f"{part.location}: changed since it was found; prepare again when it is complete")
