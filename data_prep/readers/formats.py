"""What the name of a file says about it."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from data_prep.packages import require

__all__ = [
    "COMPRESSIBLE",
    "EMBEDDED",
    "SUFFIXES",
    "compression_of",
    "format_of",
    "is_about_the_data",
    "require_packages",
    "why_left_out",
]

EMBEDDED = "embedded"
SUFFIXES = {
    "text": (".txt", ".md", ".text"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet",),
    "arrow": (".arrow", ".feather"),
    "csv": (".csv", ".tsv"),
    "warc": (".warc", ".wet"),
    "webdataset": (".tar", ".tgz"),
}
COMPRESSIONS = {
    ".gz": "gzip",
    ".tgz": "gzip",
    ".bz2": "bzip2",
    ".xz": "xz",
    ".zst": "zstd",
    ".zstd": "zstd",
    ".lz4": "lz4",
    ".br": "brotli",
}
# Parquet and Arrow files compress their own columns and are read by position.
COMPRESSIBLE = ("text", "jsonl", "csv", "warc", "webdataset")
# What `datasets` writes beside the data: descriptions, and results of transformations.
_BESIDE_THE_DATA = re.compile(r"state\.json|dataset_(dict|infos?)\.json|cache-.*\.arrow")
# What people write beside data that is not text files itself.
_ABOUT_THE_DATA = re.compile(
    r"(readme|licen[cs]e|citation|notice|changelog|datasheet|dataset_card)(\.(md|txt|text|json))?"
)
_MARKUP = (".html", ".htm", ".xhtml", ".xml")


def format_of(location: str) -> str | None:
    """The format that the name of a path or URL stands for; None where it is no data."""
    name = _name(location)
    if _BESIDE_THE_DATA.fullmatch(name):
        return None
    stem = name
    if compression_of(location) and not name.endswith(".tgz"):
        stem = name[: name.rindex(".")]
    for format, suffixes in SUFFIXES.items():
        if stem.endswith(suffixes):
            return format if stem == name or format in COMPRESSIBLE else None
    return None


def is_about_the_data(location: str) -> bool:
    """Whether a name is that of a dataset card or the like."""
    return _ABOUT_THE_DATA.fullmatch(_name(location)) is not None


def why_left_out(location: str) -> str:
    """Why the name of a file stands for no format."""
    name = _name(location)
    if _BESIDE_THE_DATA.fullmatch(name):
        return "what `datasets` writes beside the data"
    if name.endswith(_MARKUP):
        return "markup, not text; extract it, or take it as it is by a glob and format: text"
    if compression_of(name) is not None:
        name = name.rpartition(".")[0]
    _, dot, extension = name.rpartition(".")
    if dot and not extension.isdecimal():
        return f"files named .{extension} are not read; convert it, or set format"
    return "its name says nothing, and its content is no JSONL, Parquet, Arrow, WARC or tar; rename it, or set format"


def compression_of(location: str) -> str | None:
    """`gzip`, `bzip2`, `xz`, `zstd`, `lz4`, `brotli`, or None."""
    return next((kind for suffix, kind in COMPRESSIONS.items() if _name(location).endswith(suffix)), None)


def require_packages(location: str, format: str, compression: str | None) -> None:
    """Raises DataPrepError if reading the file needs a package that is not installed."""
    if format in ("parquet", "arrow") or compression in ("lz4", "brotli"):
        require("pyarrow", f"{location} needs it")
    elif compression == "zstd":
        require("zstandard", f"{location} needs it")


def _name(location: str) -> str:
    # Only the web's URLs have a query; elsewhere a name may hold its characters.
    path = urlsplit(location).path if location.startswith(("http://", "https://")) else location
    return path.rpartition("/")[2].lower()
