"""Text files: each is one document."""

from __future__ import annotations

from collections.abc import Iterator

from data_prep.documents import BadDocument, Document, Part
from data_prep.readers.compression import open_decompressed
from data_prep.readers.faults import BadRecord
from data_prep.readers.records import BYTE_ORDER_MARK, decode
from data_prep.readers.stores import open_stored
from data_prep.recipe import SourceSettings

__all__ = ["LARGEST_TEXT_BYTES", "read_text"]

# A document is held in memory, more than once.
LARGEST_TEXT_BYTES = 2**30


def read_text(part: Part, source: SourceSettings) -> Iterator[Document | BadDocument]:
    """The whole file; nothing if it holds only white space."""
    # Bytes, not text mode: that would turn \r\n into \n.
    with open_stored(part.location) as stored, open_decompressed(stored, part.location, part.compression) as stream:
        data = stream.read().removeprefix(BYTE_ORDER_MARK)
    try:
        text = decode(data)
    except BadRecord as bad:
        line = data.count(b"\n", 0, bad.position) + 1
        yield BadDocument(f"{part.location}:{line}", bad.rule, str(bad), part.bytes)
    else:
        if text.strip():
            yield Document(text, part.location, bytes_read=part.bytes)
