"""What a file without an extension holds, by its first bytes."""

from __future__ import annotations

from data_prep.readers.compression import open_decompressed
from data_prep.readers.faults import BadRecord, DamagedFile
from data_prep.readers.formats import compression_of
from data_prep.readers.records import parse_object
from data_prep.readers.stores import open_stored

__all__ = ["has_extension", "look_into"]

HEAD_BYTES = 2**16
# Brotli has no mark.
COMPRESSION_MARKS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}
FORMAT_MARKS = (
    (0, b"PAR1", "parquet"),
    (0, b"\xff\xff\xff\xff", "arrow"),
    (0, b"ARROW1", "arrow"),
    (0, b"WARC/", "warc"),
    (257, b"ustar", "webdataset"),
)


def has_extension(location: str) -> bool:
    """Whether a name says what it is; the numbers of parts (`part.00000`) and a compression say nothing."""
    name = location.rpartition("/")[2]
    if compression_of(name) is not None:
        name = name.rpartition(".")[0]
    _, dot, extension = name.rpartition(".")
    return bool(dot) and not extension.isdecimal()


def look_into(location: str) -> tuple[str | None, str | None]:
    """Format and compression of a file; None where its content is none that is known, or empty.

    Raises:
        DataPrepError: it cannot be read.
    """
    with open_stored(location) as stored:
        head = stored.read(HEAD_BYTES)
    compression = compression_of(location)
    compression = compression or next((kind for mark, kind in COMPRESSION_MARKS.items() if head.startswith(mark)), None)
    if compression is not None:
        try:
            with open_stored(location) as stored, open_decompressed(stored, location, compression) as stream:
                head = stream.read(HEAD_BYTES)
        except DamagedFile:
            return None, compression
    for place, mark, format in FORMAT_MARKS:
        if head[place:].startswith(mark):
            # Columns are read by their place in the file.
            return (None if compression and format in ("parquet", "arrow") else format), compression
    return ("jsonl" if _is_object(head) else None), compression


def _is_object(head: bytes) -> bool:
    line, feed, _ = head.lstrip().partition(b"\n")
    if not feed and len(head) == HEAD_BYTES:
        return line.startswith(b"{")
    try:
        parse_object(line)
    except BadRecord:
        return False
    return True
