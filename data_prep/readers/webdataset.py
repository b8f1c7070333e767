"""WebDataset tars: consecutive members with one key are a sample, and a sample is a document.

The key of `a/b.c.json` is `a/b`, its extension `c.json`. The field `txt` is the member with that extension; the field
`c.json.url` is the entry `url` of the object in the member `c.json`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from data_prep.documents import BadDocument, Document, Part
from data_prep.readers.compression import open_decompressed
from data_prep.readers.faults import BadRecord
from data_prep.readers.records import Meter, decode, parse_object, text_and_url
from data_prep.readers.stores import open_stored
from data_prep.readers.tars import read_members
from data_prep.recipe import SourceSettings

__all__ = ["read_webdataset"]

_MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)


def read_webdataset(part: Part, source: SourceSettings) -> Iterator[Document | BadDocument]:
    """The samples of an archive, in their order; members without key or extension are passed over."""
    wanted = {_extension(name) for name in (source.text_field, source.url_field) if name is not None}
    meter = Meter(part)
    with open_stored(part.location) as stored, open_decompressed(stored, part.location, part.compression) as stream:
        sample = None
        for name, content in read_members(stream, lambda name: _split(name)[1] in wanted):
            key, extension = _split(name)
            if not key:
                continue
            if sample is None or sample.key != key:
                if sample is not None:
                    yield _document(sample, part.location, source, meter.take(stored.tell()))
                sample = _Sample(key)
            sample.add(name, extension, content)
        if sample is not None:
            yield _document(sample, part.location, source, meter.take(stored.tell()))


@dataclass(slots=True)
class _Sample:
    key: str
    names: dict[str, str] = field(default_factory=dict)
    """Extension to name of the member."""
    contents: dict[str, bytes] = field(default_factory=dict)
    """Extension to content, of the members in use."""
    repeated: str | None = None

    def add(self, name: str, extension: str, content: bytes | None) -> None:
        if extension in self.names:
            self.repeated = name
        self.names[extension] = name
        if content is not None:
            self.contents[extension] = content


def _split(name: str) -> tuple[str, str]:
    """Key and extension of a member; empty where it has none."""
    match = _MEMBER.fullmatch(name)
    return (match[1], match[2].lower()) if match else ("", "")


def _extension(name: str) -> str:
    """The extension of the member that holds a field."""
    member, dot, _ = name.partition("json.")
    return f"{member}json" if dot and (not member or member.endswith(".")) else name


def _document(sample: _Sample, location: str, source: SourceSettings, bytes_read: int) -> Document | BadDocument:
    extension = _extension(source.text_field)
    place = f"{location}/{sample.names.get(extension, sample.key)}"
    try:
        if sample.repeated is not None:
            raise BadRecord("bad_archive", f"the sample has two members {sample.repeated!r}; pack it again")
        text, url = text_and_url(_fields(sample, source), source)
    except BadRecord as bad:
        return BadDocument(place, bad.rule, str(bad), bytes_read)
    return Document(text, place, url, bytes_read)


def _fields(sample: _Sample, source: SourceSettings) -> dict[str, Any]:
    """The fields in use, and the names of the members beside them."""
    fields: dict[str, Any] = dict.fromkeys(sample.names)
    for name in (source.text_field, source.url_field):
        if name is None or (content := sample.contents.get(_extension(name))) is None:
            continue
        if _extension(name) == name:
            fields[name] = decode(content)
        else:
            fields |= {f"{_extension(name)}.{key}": value for key, value in parse_object(content).items()}
    return fields
