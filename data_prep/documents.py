"""What travels between the steps of a preparation: parts of sources, and documents."""

from __future__ import annotations

from dataclasses import dataclass

from cola_megatron.config import Section
from cola_megatron.config.types import Int

__all__ = ["BadDocument", "Document", "LeftOut", "Part"]


class Part(Section):
    """A piece of one source that a task reads by itself: a file, or a range of one."""

    source: str
    """Name of its source in the recipe."""
    location: str
    """Absolute path or URL of the file, or `embedded`."""
    format: str
    """How it is read: one of the formats of `data_prep.readers`, never `auto`."""
    bytes: Int
    """Size of what is read (of the range, where there is one); 0 for the embedded corpus."""
    start: Int = 0
    """First byte of a JSONL range (a line belongs to the range that holds its first byte), or first row group of a
    Parquet range."""
    stop: Int | None = None
    """End of the range, exclusive; None reads to the end of the file."""
    compression: str | None = None
    """How it is compressed as a whole: gzip, bzip2, xz, zstd, lz4, brotli."""
    version: str
    """Changes when the file does: size and modification time, or what the store says (ETag)."""


class LeftOut(Section):
    """A file that an input shows and no task reads."""

    location: str
    """Its path or URL; of a hidden folder the folder's."""
    why: str


@dataclass(frozen=True, slots=True)
class Document:
    """One document of a part."""

    text: str
    place: str
    """Where it stands, for messages: `file:line`, `file:byte N`, `file:row 7`, `archive.tar/member`, `embedded:N`."""
    url: str | None = None
    """Where it came from, if the source says so."""
    bytes_read: int = 0
    """Bytes of the part that reading it consumed (compressed ones, if it is compressed)."""


@dataclass(frozen=True, slots=True)
class BadDocument:
    """A record that cannot be a document, in a source whose `bad_documents` is `skip`."""

    place: str
    rule: str
    """What is wrong with it, as it is counted: `bad_json`, `bad_field`, `bad_utf8`, `bad_csv`, `bad_archive`,
    `empty_file`, `too_long`; or `not_text`, `no_text`."""
    message: str
    bytes_read: int = 0
    is_fault: bool = True
    """False for what is as it should be and only no text: it never ends the run."""
