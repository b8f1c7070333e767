"""What the name of a file says about it."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from data_prep.packages import require

__all__ = ["EMBEDDED", "SUFFIXES", "compression_of", "format_of", "require_packages"]

EMBEDDED = "embedded"
SUFFIXES = {
    "text": (".txt", ".md"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet",),
    "arrow": (".arrow",),
    "webdataset": (".tar", ".tgz"),
}
COMPRESSIONS = {".gz": "gzip", ".tgz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd", ".zstd": "zstd"}
# Parquet and Arrow files compress their own columns and are read by position.
COMPRESSIBLE = ("text", "jsonl", "webdataset")
# What `datasets` writes beside the data: descriptions, and results of transformations.
_BESIDE_THE_DATA = re.compile(r"state\.json|dataset_(dict|infos?)\.json|cache-.*\.arrow")


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


def compression_of(location: str) -> str | None:
    """`gzip`, `bzip2`, `xz`, `zstd`, or None."""
    return next((kind for suffix, kind in COMPRESSIONS.items() if _name(location).endswith(suffix)), None)


def require_packages(location: str, format: str) -> None:
    """Raises DataPrepError if reading the file needs a package that is not installed."""
    if format in ("parquet", "arrow"):
        require("pyarrow", f"{location} needs it")
    elif compression_of(location) == "zstd":
        require("zstandard", f"{location} needs it")


def _name(location: str) -> str:
    # Only the web's URLs have a query; elsewhere a name may hold its characters.
    path = urlsplit(location).path if location.startswith(("http://", "https://")) else location
    return path.rpartition("/")[2].lower()
