"""From the bytes of a record to the text of a document, or a BadRecord that says why not."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from data_prep.documents import Part
from data_prep.readers.faults import BadRecord
from data_prep.recipe import SourceSettings

__all__ = [
    "BYTE_ORDER_MARK",
    "MISSING",
    "Meter",
    "decode",
    "known_names",
    "parse_object",
    "path_of",
    "text_and_url",
    "value_at",
]

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
OVER_LINES = (
    "one JSON text over several lines; write one object per line, an array with jq -c '.[]', objects with jq -c ."
)


MISSING = object()


class Meter:
    """Shares the bytes of a part out over its documents."""

    def __init__(self, part: Part) -> None:
        self._total = part.bytes
        self._taken = 0

    def take(self, position: int) -> int:
        """Bytes between the last position and this one, both counted from the beginning of the part and kept in it."""
        taken = self._taken
        self._taken = max(taken, min(position, self._total))
        return self._taken - taken


def decode(data: bytes) -> str:
    """UTF-8 text."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        message = f"not valid UTF-8 (byte 0x{data[error.start]:02x}); convert the file, e.g. with iconv"
        raise BadRecord("bad_utf8", message, error.start) from error


def parse_object(data: bytes) -> dict[str, Any]:
    """The JSON object in `data`.

    The standard library's parser: orjson is twice as fast (1.0 against 0.5 GB/s), which is lost beside any cleaning or
    tokenizing, but refuses the NaN that Python writes and surrogates in fields that nobody reads.
    """
    text = decode(data)
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{error.msg} at column {error.colno}"
        if text.strip() in ("[", "{") or text.lstrip().startswith("[{"):
            raise BadRecord("bad_json", f"not valid JSON ({where}): {OVER_LINES}") from error
        raise BadRecord("bad_json", f"not valid JSON ({where}); repair or remove it") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, nesting without end
        raise BadRecord("bad_json", f"JSON that cannot be read ({error}); repair or remove it") from error
    if not isinstance(fields, dict):
        kind = type(fields).__name__
        raise BadRecord("bad_json", f"a JSON {kind}, not an object; write one object per line, e.g. with jq -c '.[]'")
    return fields


def text_and_url(fields: dict[str, Any], source: SourceSettings) -> tuple[str, str | None]:
    """The document in an object, and where it came from; a null URL is none, and one that is skipped as bad is too."""
    text = _string(fields, source.text_field, "text_field")
    if source.url_field is None or value_at(fields, source.url_field) is None:
        return text, None
    try:
        return text, _string(fields, source.url_field, "url_field")
    except BadRecord:
        if source.bad_documents == "error":
            raise
        return text, None


def value_at(fields: dict[str, Any], name: str) -> Any:
    """The value of a field, or of one inside of others by its path (`data.text`); MISSING where there is none."""
    if name in fields:
        return fields[name]
    for outer, inner in path_of(name):
        if isinstance(fields.get(outer), dict) and (value := value_at(fields[outer], inner)) is not MISSING:
            return value
    return MISSING


def path_of(name: str) -> list[tuple[str, str]]:
    """The ways to read a name as a field and a name inside of it; a field's own name may have dots."""
    parts = name.split(".")
    return [(".".join(parts[:count]), ".".join(parts[count:])) for count in range(len(parts) - 1, 0, -1)]


def known_names(names: Iterable[str]) -> str:
    """The first few of some names, for messages."""
    return ", ".join(list(names)[:8]) or "none"


def _string(fields: dict[str, Any], name: str, setting: str) -> str:
    text = value_at(fields, name)
    if text is MISSING:
        raise BadRecord("bad_field", f"no field {name!r} (fields: {known_names(fields)}); set {setting} or repair it")
    if not isinstance(text, str):
        kind = type(text).__name__
        raise BadRecord("bad_field", f"field {name!r} is a {kind}, not a string; set {setting} or repair it")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRecord("bad_utf8", f"an unpaired surrogate at character {error.start}; repair it") from error
    return text
