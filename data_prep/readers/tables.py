"""Parquet files and Arrow streams: one document per row, of which only the columns in use are read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from data_prep.documents import BadDocument, Document, Part
from data_prep.errors import DataPrepError
from data_prep.packages import require
from data_prep.readers.compression import BUFFER_BYTES
from data_prep.readers.faults import BadRecord, DamagedFile, one_line
from data_prep.readers.records import Meter, decode, known_names
from data_prep.readers.stores import StoredFile, open_stored
from data_prep.recipe import SourceSettings

__all__ = ["read_arrow", "read_parquet", "row_group_bytes"]

BATCH_ROWS = 256
# pyarrow takes a stream that ends between two batches for a whole one.
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def read_parquet(part: Part, source: SourceSettings) -> Iterator[Document | BadDocument]:
    """The rows of the part's row groups."""
    with open_stored(part.location) as stored, _parquet(stored, part.location) as file:
        columns = _columns(file.schema_arrow, part.location, source)
        rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        stop = len(rows) if part.stop is None else part.stop
        first, count = sum(rows[: part.start]), sum(rows[part.start : stop])
        batches = file.iter_batches(BATCH_ROWS, range(part.start, stop), columns, use_threads=False)
        meter, done = Meter(part), 0
        for batch in batches:
            for row, values in enumerate(_rows(batch, source), start=done + 1):
                yield _document(values, f"{part.location}:row {first + row}", meter.take(part.bytes * row // count))
            done += batch.num_rows


def row_group_bytes(location: str) -> list[int]:
    """Compressed size of each row group of a Parquet file, in bytes.

    Raises:
        DamagedFile: it is no whole Parquet file.
    """
    with open_stored(location) as stored, _parquet(stored, location) as file:
        groups = [file.metadata.row_group(index) for index in range(file.num_row_groups)]
        return [sum(group.column(k).total_compressed_size for k in range(group.num_columns)) for group in groups]


def read_arrow(part: Part, source: SourceSettings) -> Iterator[Document | BadDocument]:
    """The rows of a stream, one record batch in memory at a time."""
    arrow = require("pyarrow", f"{part.location} needs it")
    import pyarrow.ipc

    meter, done = Meter(part), 0
    with open_stored(part.location) as stored, _faults(arrow, "Arrow stream"):
        reader = pyarrow.ipc.open_stream(stored)
        columns = _columns(reader.schema, part.location, source)
        begin = stored.tell()
        for batch in reader:
            end = stored.tell()
            for row, values in enumerate(_rows(batch.select(columns), source), start=1):
                position = begin + (end - begin) * row // batch.num_rows
                yield _document(values, f"{part.location}:row {done + row}", meter.take(position))
            done += batch.num_rows
            begin = end
        stored.seek(max(part.bytes - len(END_OF_STREAM), 0))
        if stored.read(len(END_OF_STREAM)) != END_OF_STREAM:
            raise DamagedFile("not a whole Arrow stream (it ends too early); copy or write it again")


@contextmanager
def _parquet(stored: StoredFile, location: str) -> Iterator[Any]:
    """An open `pyarrow.parquet.ParquetFile`, read a buffer at a time."""
    arrow = require("pyarrow", f"{location} needs it")
    import pyarrow.parquet

    with _faults(arrow, "Parquet file"):
        yield pyarrow.parquet.ParquetFile(stored, buffer_size=BUFFER_BYTES, pre_buffer=False)


@contextmanager
def _faults(arrow: ModuleType, kind: str) -> Iterator[None]:
    """Turns what pyarrow raises into DamagedFile; what the store raises is a DataPrepError already."""
    try:
        yield
    except (arrow.ArrowException, OSError) as error:
        raise DamagedFile(f"not a whole {kind} ({one_line(error)}); copy or write it again") from error


def _columns(schema: Any, location: str, source: SourceSettings) -> list[str]:
    """The columns in use: the text's, and the URL's where there is one."""
    settings = {"text_field": source.text_field, "url_field": source.url_field}
    for setting, name in settings.items():
        if name is not None and name not in schema.names:
            raise DataPrepError(f"{location}: no column {name!r} (columns: {known_names(schema.names)}); set {setting}")
        if name is not None and not _is_text(schema.field(name).type):
            kind = schema.field(name).type
            raise DataPrepError(f"{location}: column {name!r} is of type {kind}, not string; set {setting}")
    return list(dict.fromkeys(name for name in settings.values() if name is not None))


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _rows(batch: Any, source: SourceSettings) -> Iterable[tuple[str | bytes | None, str | bytes | None]]:
    """Text and URL of each row; bytes where a column holds some that are not UTF-8."""
    texts = _values(batch.column(source.text_field))
    urls = [None] * batch.num_rows if source.url_field is None else _values(batch.column(source.url_field))
    return zip(texts, urls, strict=True)


def _values(column: Any) -> list[str | bytes | None]:
    from pyarrow import types

    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return column.cast("large_binary").to_pylist()


def _document(
    values: tuple[str | bytes | None, str | bytes | None], place: str, bytes_read: int
) -> Document | BadDocument:
    try:
        text, url = (decode(value) if isinstance(value, bytes) else value for value in values)
        if text is None:
            raise BadRecord("bad_field", "the text is null; set bad_documents to skip, or repair it")
    except BadRecord as bad:
        return BadDocument(place, bad.rule, str(bad), bytes_read)
    return Document(text, place, url, bytes_read)
