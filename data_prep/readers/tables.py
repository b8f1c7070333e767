"""Parquet, Arrow and Feather files: one document per row, of which only the columns in use are read."""

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
from data_prep.readers.records import Meter, decode, known_names, path_of
from data_prep.readers.stores import StoredFile, open_stored
from data_prep.recipe import SourceSettings

__all__ = ["read_arrow", "read_parquet", "row_group_bytes"]

BATCH_ROWS = 256
# pyarrow takes a stream that ends between two batches for a whole one.
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
FEATHER, OLD_FEATHER = b"ARROW1", b"FEA1"


def read_parquet(part: Part, source: SourceSettings) -> Iterator[Document | BadDocument]:
    """The rows of the part's row groups."""
    with open_stored(part.location) as stored, _parquet(stored, part.location) as file:
        columns = _columns(file.schema_arrow, part.location, source)
        rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        stop = len(rows) if part.stop is None else part.stop
        first, count = sum(rows[: part.start]), sum(rows[part.start : stop])
        names = list(dict.fromkeys(".".join(path) for path in columns))
        batches = file.iter_batches(BATCH_ROWS, range(part.start, stop), names, use_threads=False)
        meter, done = Meter(part), 0
        for batch in batches:
            for row, values in enumerate(_rows(batch, columns), start=done + 1):
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
    """The rows of a stream, or of a file that is read by position (Feather), one record batch in memory at a time."""
    with open_stored(part.location) as stored:
        mark = stored.read(len(FEATHER))
    if mark.startswith(OLD_FEATHER):
        raise DamagedFile("Feather of version 1 is not read; write it again, e.g. with pandas' to_feather")
    yield from (_read_arrow_file if mark == FEATHER else _read_arrow_stream)(part, source)


def _read_arrow_file(part: Part, source: SourceSettings) -> Iterator[Document | BadDocument]:
    arrow = require("pyarrow", f"{part.location} needs it")
    import pyarrow.ipc

    meter, done = Meter(part), 0
    with open_stored(part.location) as stored, _faults(arrow, "Arrow file"):
        reader = pyarrow.ipc.open_file(stored)
        columns = _columns(reader.schema, part.location, source)
        batches = reader.num_record_batches
        for number in range(batches):
            batch = reader.get_batch(number)
            for row, values in enumerate(_rows(batch.select(_tops(columns)), columns), start=1):
                position = part.bytes * (number * batch.num_rows + row) // (batches * batch.num_rows)
                yield _document(values, f"{part.location}:row {done + row}", meter.take(position))
            done += batch.num_rows


def _read_arrow_stream(part: Part, source: SourceSettings) -> Iterator[Document | BadDocument]:
    arrow = require("pyarrow", f"{part.location} needs it")
    import pyarrow.ipc

    meter, done = Meter(part), 0
    with open_stored(part.location) as stored, _faults(arrow, "Arrow stream"):
        reader = pyarrow.ipc.open_stream(stored)
        columns = _columns(reader.schema, part.location, source)
        begin = stored.tell()
        for batch in reader:
            end = stored.tell()
            for row, values in enumerate(_rows(batch.select(_tops(columns)), columns), start=1):
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


ColumnPath = tuple[str, ...]
"""A column, and the fields inside of it that lead to the text."""


def _columns(schema: Any, location: str, source: SourceSettings) -> list[ColumnPath]:
    """The columns in use: the text's, and the URL's where there is one."""
    settings = {"text_field": source.text_field, "url_field": source.url_field}
    return [_column(schema, location, name, setting) for setting, name in settings.items() if name is not None]


def _column(schema: Any, location: str, name: str, setting: str) -> ColumnPath:
    found = _found(schema, name)
    if found is None:
        raise DataPrepError(f"{location}: no column {name!r} (columns: {known_names(schema.names)}); set {setting}")
    path, kind = found
    if schema.names.count(path[0]) > 1:
        raise DataPrepError(f"{location}: two columns {path[0]!r}; rename one, or set {setting}")
    if not _is_text(kind):
        raise DataPrepError(f"{location}: column {name!r} is of type {kind}, not string; set {setting}")
    return path


def _found(schema: Any, name: str) -> tuple[ColumnPath, Any] | None:
    """Where a column is, or by its path a field inside of one, and its type."""
    from pyarrow import types

    if name in schema.names:
        return (name,), schema.types[schema.names.index(name)]
    for outer, inner in path_of(name):
        kind = schema.types[schema.names.index(outer)] if outer in schema.names else None
        if kind is None or not types.is_struct(kind):
            continue
        inside = _found(_Inside(kind), inner)
        if inside is not None:
            return (outer, *inside[0]), inside[1]
    return None


class _Inside:
    """The fields of a struct, as those of a schema."""

    def __init__(self, kind: Any) -> None:
        fields = [kind.field(index) for index in range(kind.num_fields)]
        self.names, self.types = [field.name for field in fields], [field.type for field in fields]


def _tops(columns: list[ColumnPath]) -> list[str]:
    return list(dict.fromkeys(path[0] for path in columns))


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    texts = (types.is_string, types.is_large_string, types.is_string_view)
    return any(is_kind(kind) for is_kind in (*texts, types.is_binary, types.is_large_binary, types.is_binary_view))


def _rows(batch: Any, columns: list[ColumnPath]) -> Iterable[tuple[str | bytes | None, str | bytes | None]]:
    """Text and URL of each row; bytes where a column holds bytes, or some that are not UTF-8."""
    texts, *urls = [_values(batch.column(path[0]), path[1:]) for path in columns]
    return zip(texts, urls[0] if urls else [None] * batch.num_rows, strict=True)


def _values(column: Any, inside: ColumnPath = ()) -> list[str | bytes | None]:
    import pyarrow.compute
    from pyarrow import types

    for name in inside:
        column = pyarrow.compute.struct_field(column, name)
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
