"""Where files lie: the local file system, and every other one that fsspec opens by URL.

Credentials, endpoints and the like are fsspec's to know: its environment variables and ~/.config/fsspec.
"""

from __future__ import annotations

import io
import os
import re
import stat
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import fsspec

from data_prep.errors import DataPrepError
from data_prep.readers.faults import one_line
from data_prep.readers.local_folders import matches_of, walk

__all__ = ["FileState", "Store", "StoredFile", "absolute", "open_stored", "store_of"]

# pip names of what fsspec asks for.
PACKAGES = {
    "abfs": "adlfs",
    "az": "adlfs",
    "gcs": "gcsfs",
    "gs": "gcsfs",
    "hf": "huggingface_hub",
    "http": "aiohttp requests",
    "https": "aiohttp requests",
    "s3": "s3fs",
    "s3a": "s3fs",
}
# What stores call the mark of a content, the surest first.
VERSION_KEYS = ("ETag", "etag", "blob_id", "md5Hash", "Content-MD5", "checksum", "generation")
TIME_KEYS = ("Last-Modified", "LastModified", "last_modified", "mtime", "created")
Kind = Literal["file", "folder"]
_PROTOCOL = re.compile(r"(?:[a-z0-9+.-]+::)*([a-z][a-z0-9+.-]*)://")


@dataclass(frozen=True, slots=True)
class FileState:
    """What tells a file from its later versions."""

    bytes: int
    version: str
    """See `Part.version`."""


class Store(Protocol):
    """Lists and opens files by location; every method raises DataPrepError where the store fails."""

    def kind(self, location: str) -> Kind | None:
        """What there is; None for nothing."""

    def files_below(self, folder: str) -> tuple[list[str], dict[str, str]]:
        """Every file of a folder and its subfolders, in the order of their paths, and what is left out, with why."""

    def matches(self, pattern: str) -> tuple[dict[str, Kind], dict[str, str]]:
        """What a glob stands for, hidden names not, in the order of the paths, and what is left out, with why."""

    def state(self, location: str, *, listed: bool = False) -> FileState:
        """Size and version of a file as it is now, or as a listing of its folder has just said."""

    def identity(self, location: str) -> str:
        """The same for two names of one file."""

    def open(self, location: str) -> io.RawIOBase:
        """The file, unbuffered or not, to read bytes from."""


class LocalStore:
    """Files by absolute path."""

    def kind(self, location: str) -> Kind | None:
        if os.path.isdir(location):
            return "folder"
        return "file" if os.path.exists(location) else None

    def files_below(self, folder: str) -> tuple[list[str], dict[str, str]]:
        below = walk(folder)
        return below.files, below.left_out

    def matches(self, pattern: str) -> tuple[dict[str, Kind], dict[str, str]]:
        found, left_out = matches_of(pattern)
        return {location: "folder" if os.path.isdir(location) else "file" for location in found}, left_out

    def state(self, location: str, *, listed: bool = False) -> FileState:
        try:
            status = os.stat(location)
        except OSError as error:
            raise _cannot_be_read(location, error) from error
        if not stat.S_ISREG(status.st_mode):
            raise DataPrepError(f"{location}: is not a regular file; copy what it gives to one")
        return FileState(status.st_size, f"{status.st_size}-{status.st_mtime_ns}")

    def identity(self, location: str) -> str:
        return os.path.realpath(location)

    def open(self, location: str) -> io.RawIOBase:
        try:
            return open(location, "rb", buffering=0)
        except OSError as error:
            raise _cannot_be_read(location, error) from error


class UrlStore:
    """Files by URL, all of one fsspec file system."""

    def __init__(self, file_system: fsspec.AbstractFileSystem) -> None:
        self._files = file_system

    def kind(self, location: str) -> Kind | None:
        try:
            return "folder" if self._call(location, self._files.info)["type"] == "directory" else "file"
        except FileNotFoundError:
            return None

    def files_below(self, folder: str) -> tuple[list[str], dict[str, str]]:
        listing = self._call(folder, partial(self._files.find, detail=True))
        visible = self._visible(folder.rstrip("/"), listing)
        hidden = {self._files.unstrip_protocol(path) for path in listing} - visible.keys()
        return list(visible), dict.fromkeys(sorted(hidden), "hidden")

    def matches(self, pattern: str) -> tuple[dict[str, Kind], dict[str, str]]:
        fixed = re.split(r"[*?\[]", pattern, maxsplit=1)[0].rpartition("/")[0]
        return self._visible(fixed, self._call(pattern, partial(self._files.glob, detail=True))), {}

    def state(self, location: str, *, listed: bool = False) -> FileState:
        if not listed:
            self._files.invalidate_cache()
        try:
            info = self._call(location, self._files.info)
        except FileNotFoundError as error:
            raise DataPrepError(f"{location}: is no longer there; check its place") from error
        if info.get("size") is None:
            raise DataPrepError(f"{location}: its server does not say how large it is; download it first")
        mark = next((str(info[key]) for key in VERSION_KEYS + TIME_KEYS if info.get(key) is not None), "")
        # Some stores quote their ETags in one answer and not in the next, or call them weak.
        mark = mark.removeprefix("W/").strip('"')
        return FileState(info["size"], f"{info['size']}-{mark}")

    def identity(self, location: str) -> str:
        return self._files.unstrip_protocol(self._files._strip_protocol(location))

    def open(self, location: str) -> io.RawIOBase:
        try:
            return self._call(location, partial(self._files.open, mode="rb"))
        except FileNotFoundError as error:
            raise _cannot_be_read(location, error) from error

    def _call(self, location: str, function: Any) -> Any:
        """function(path); FileNotFoundError is left to the caller."""
        try:
            return function(self._files._strip_protocol(location))
        except FileNotFoundError:
            raise
        except Exception as error:  # each store has errors of its own
            raise _cannot_be_read(location, error) from error

    def _visible(self, folder: str, listing: dict[str, dict[str, Any]]) -> dict[str, Kind]:
        """The URLs in a listing, in order, without those that are hidden below a folder."""
        length = len(self._files._strip_protocol(folder))
        return {
            self._files.unstrip_protocol(path): "folder" if listing[path]["type"] == "directory" else "file"
            for path in sorted(listing)
            if not re.search(r"/\.", path[length:])
        }


class StoredFile(io.RawIOBase):
    """An open file that knows its position without asking the store, and names itself where the store fails."""

    def __init__(self, file: io.RawIOBase, location: str) -> None:
        self._file = file
        self._location = location
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def readinto(self, buffer: Any) -> int:
        try:
            count = self._file.readinto(buffer)
        except Exception as error:
            raise _cannot_be_read(self._location, error) from error
        self._position += count
        return count

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        try:
            self._position = self._file.seek(offset, whence)
        except Exception as error:
            raise _cannot_be_read(self._location, error) from error
        return self._position

    def tell(self) -> int:
        return self._position

    def close(self) -> None:
        self._file.close()
        super().close()


def absolute(text: str) -> str:
    """The location that an input names: an absolute path, or a URL as listings of its store spell it."""
    if text.startswith(("file://", "local://")):
        text = text.partition("://")[2]
    elif _PROTOCOL.match(text):
        return store_of(text).identity(text)
    return str(Path(text).expanduser().absolute())


def store_of(location: str) -> Store:
    """The store that a location lies in.

    Raises:
        DataPrepError: the protocol of a URL is unknown or needs a package; names it.
    """
    url = _PROTOCOL.match(location)
    if url is None:
        return LocalStore()
    if "::" in location:
        raise DataPrepError(f"{location}: chained URLs are not read; give the URL of the file itself")
    protocol = url[1]
    try:
        return UrlStore(fsspec.core.url_to_fs(location)[0])
    except ImportError as error:
        package = PACKAGES.get(protocol)
        cure = f"pip install {package}" if package else one_line(error)
        raise DataPrepError(f"{location}: {protocol}:// needs a package that is not installed: {cure}") from error
    except ValueError as error:
        raise DataPrepError(f"{location}: cannot be opened ({one_line(error)}); check the URL") from error


def open_stored(location: str) -> StoredFile:
    """The stored bytes of a file, as a context manager."""
    return StoredFile(store_of(location).open(location), location)


def _cannot_be_read(location: str, error: Exception) -> DataPrepError:
    why = getattr(error, "strerror", None) or one_line(error)
    return DataPrepError(f"{location}: cannot be read ({why}); check the file and its rights")
