"""JSONL: one object per line, in whole files or in ranges of bytes."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator

from data_prep.documents import BadDocument, Document, Part
from data_prep.readers.compression import BUFFER_BYTES, open_decompressed
from data_prep.readers.faults import BadRecord
from data_prep.readers.records import BYTE_ORDER_MARK, Meter, parse_object, text_and_url
from data_prep.readers.stores import StoredFile, open_stored
from data_prep.recipe import SourceSettings

__all__ = ["read_json_lines"]

# A file without line feeds must not fill the memory.
LONGEST_LINE_BYTES = 2**28


def read_json_lines(part: Part, source: SourceSettings) -> Iterator[Document | BadDocument]:
    """The documents of the lines whose first byte is in the part; blank lines are passed over."""
    compressed = part.compression is not None
    meter = Meter(part)
    with open_stored(part.location) as stored, open_decompressed(stored, part.location, part.compression) as stream:
        for number, (start, stop, line) in enumerate(_lines(stream, part.start, part.stop), start=1):
            if line.isspace():
                continue
            # Lines before a range are not counted: a range far into a file would read all of it.
            place = f"{part.location}:byte {start}" if part.start else f"{part.location}:{number}"
            bytes_read = meter.take(stored.tell() if compressed else stop - part.start)
            try:
                if len(line) == LONGEST_LINE_BYTES:
                    raise BadRecord("bad_json", f"a line of over {LONGEST_LINE_BYTES} bytes; is the file JSONL?")
                text, url = text_and_url(parse_object(line), source)
            except BadRecord as bad:
                if part.start and source.bad_documents == "error":
                    place = f"{part.location}:{_line_number(part.location, start)}"
                yield BadDocument(place, bad.rule, str(bad), bytes_read)
            else:
                yield Document(text, place, url, bytes_read)


def _lines(stream: io.BufferedReader, start: int, stop: int | None) -> Iterator[tuple[int, int, bytes]]:
    """First byte, end and content of the lines that begin in [start, stop); overlong ones are cut."""
    position = start
    if start > 0:
        # From the byte before: if that is a line feed, a line begins at `start`.
        stream.seek(start - 1)
        position = start - 1 + _skip_line(stream)
    stop = sys.maxsize if stop is None else stop
    while position < stop and (line := stream.readline(LONGEST_LINE_BYTES)):
        end = position + len(line)
        if len(line) == LONGEST_LINE_BYTES and not line.endswith(b"\n"):
            end += _skip_line(stream)
        yield position, end, line.removeprefix(BYTE_ORDER_MARK) if position == 0 else line
        position = end


def _skip_line(stream: io.BufferedReader) -> int:
    """Bytes of the rest of a line, which is passed over."""
    skipped = 0
    while piece := stream.readline(BUFFER_BYTES):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped


def _line_number(location: str, position: int) -> int:
    """The number of the line that begins at a byte of an uncompressed file."""
    with open_stored(location) as stored:
        return 1 + sum(piece.count(b"\n") for piece in _pieces(stored, position))


def _pieces(stored: StoredFile, size: int) -> Iterator[bytes]:
    """The first `size` bytes of a file."""
    while size > 0 and (piece := stored.read(min(size, BUFFER_BYTES))):
        size -= len(piece)
        yield piece
