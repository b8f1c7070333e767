"""CSV and TSV: a header, then one document per row."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from data_prep.documents import BadDocument, Document, Part
from data_prep.errors import DataPrepError
from data_prep.readers.compression import open_decompressed
from data_prep.readers.faults import BadRecord, DamagedFile
from data_prep.readers.records import Meter, known_names, text_and_url
from data_prep.readers.stores import StoredFile, open_stored
from data_prep.recipe import SourceSettings

__all__ = ["columns_of", "read_csv"]

# A quotation mark that is never closed must not fill the memory.
LONGEST_FIELD = 2**28


def read_csv(part: Part, source: SourceSettings) -> Iterator[Document | BadDocument]:
    """The rows below the header; fields may hold line breaks within quotation marks."""
    meter = Meter(part)
    with open_stored(part.location) as stored, _open(stored, part.location, part.compression) as rows:
        header = next(_rows(rows), None)
        if header is None:
            return
        if isinstance(header, BadRecord):
            raise DataPrepError(f"{part.location}:1: {header}")
        _check_columns(part.location, header, source)
        for row in _rows(rows):
            place, bytes_read = f"{part.location}:{rows.line_num}", meter.take(stored.tell())
            try:
                text, url = text_and_url(_fields(row, header), source)
            except BadRecord as bad:
                yield BadDocument(place, bad.rule, str(bad), bytes_read)
            else:
                yield Document(text, place, url, bytes_read)


def columns_of(location: str, compression: str | None) -> list[str]:
    """The names in the header; none where the file has no header that can be read."""
    try:
        with open_stored(location) as stored, _open(stored, location, compression) as rows:
            header = next(_rows(rows), None)
    except DamagedFile:
        return []
    return header if isinstance(header, list) else []


@contextmanager
def _open(stored: StoredFile, location: str, compression: str | None) -> Iterator[Any]:
    """A `csv.reader` of the file."""
    csv.field_size_limit(LONGEST_FIELD)
    with open_decompressed(stored, location, compression) as stream:
        # A row that is not UTF-8 is bad by itself: `text_and_url` finds the surrogates.
        lines = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")
        yield csv.reader(lines, delimiter="\t" if ".tsv" in location.lower() else ",", strict=True)


def _rows(rows: Any) -> Iterator[list[str] | BadRecord]:
    """Rows that are not empty, and what is wrong with those that cannot be read."""
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield BadRecord("bad_csv", f"no row of CSV ({error}); repair it")
            continue
        if row:
            yield row


def _check_columns(location: str, header: list[str], source: SourceSettings) -> None:
    for setting, name in (("text_field", source.text_field), ("url_field", source.url_field)):
        if name is not None and header.count(name) != 1:
            many = "two columns" if name in header else "no column"
            raise DataPrepError(f"{location}: {many} {name!r} (columns: {known_names(header)}); set {setting}")


def _fields(row: list[str] | BadRecord, header: list[str]) -> dict[str, str]:
    if isinstance(row, BadRecord):
        raise row
    if len(row) != len(header):
        raise BadRecord("bad_csv", f"{len(row)} fields, the header has {len(header)}; repair it")
    return dict(zip(header, row, strict=True))
