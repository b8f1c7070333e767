"""WARC, the archives of the web: the texts of WET files, and the main text of the pages in answers of servers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from data_prep.documents import BadDocument, Document, Part
from data_prep.packages import require
from data_prep.readers.compression import open_decompressed
from data_prep.readers.faults import BadRecord, DamagedFile, one_line
from data_prep.readers.records import Meter, decode
from data_prep.readers.stores import open_stored
from data_prep.recipe import SourceSettings

__all__ = ["read_warc"]

# Requests, descriptions and repeats are about documents, and none themselves.
WITH_CONTENT = ("conversion", "response", "resource")
MARKUP = ("text/html", "application/xhtml+xml")


def read_warc(part: Part, source: SourceSettings) -> Iterator[Document | BadDocument]:
    """The records that hold text; every other answer is counted as `not_text`, or `no_text` for a page without one."""
    require("warcio", f"{part.location} needs it")
    from warcio.archiveiterator import ArchiveIterator
    from warcio.exceptions import ArchiveLoadFailed

    meter = Meter(part)
    with open_stored(part.location) as stored, open_decompressed(stored, part.location, part.compression) as stream:
        try:
            for record in ArchiveIterator(stream):
                if record.rec_type not in WITH_CONTENT:
                    continue
                url = record.rec_headers.get_header("WARC-Target-URI")
                place = f"{part.location}/{record.rec_headers.get_header('WARC-Record-ID')}"
                content = record.content_stream().read()
                if record.raw_stream.limit:
                    raise DamagedFile("not a whole WARC file (it ends too early); copy it again")
                bytes_read = meter.take(stored.tell())
                try:
                    yield Document(_text(record, content), place, url, bytes_read)
                except BadRecord as bad:
                    yield BadDocument(place, bad.rule, str(bad), bytes_read, is_fault=bad.rule == "bad_utf8")
        except ArchiveLoadFailed as error:
            raise DamagedFile(f"not a whole WARC file ({one_line(error)}); copy it again") from error


def _text(record: Any, content: bytes) -> str:
    """The document of a record."""
    headers = record.http_headers or record.rec_headers
    kind = (headers.get_header("Content-Type") or "").partition(";")[0].strip().lower()
    status = record.http_headers.get_statuscode() if record.http_headers else "200"
    if status != "200" or kind not in ("text/plain", *MARKUP):
        raise BadRecord("not_text", f"an answer {status} of type {kind or 'unknown'}")
    if kind == "text/plain":
        return decode(content)
    why = "the text of web pages is taken out with it"
    require("lxml_html_clean", why)  # trafilatura's own, which it does not declare
    trafilatura = require("trafilatura", why)
    text = trafilatura.extract(content, include_comments=False, deduplicate=False)
    if not text:
        raise BadRecord("no_text", "a page without a main text")
    return text
