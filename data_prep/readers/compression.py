"""Decompression in pieces, which notices a file that ends too early."""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from typing import Any

from data_prep.packages import require
from data_prep.readers.faults import DamagedFile, one_line
from data_prep.readers.stores import StoredFile

__all__ = ["open_decompressed"]

# Compressed bytes at a time: gzip makes at most 1,032 times as many of them.
CHUNK_BYTES = 2**16
BUFFER_BYTES = 2**20
ARROW_CODECS = ("lz4", "brotli")


def open_decompressed(stored: StoredFile, location: str, compression: str | None) -> io.BufferedReader:
    """The content of a stored file, decompressed; `compression` is that of `Part`.

    Reading raises DamagedFile where the compressed data is cut or corrupt.
    """
    if compression is None:
        return io.BufferedReader(stored, BUFFER_BYTES)
    if compression in ARROW_CODECS:
        return io.BufferedReader(_ArrowDecompressed(stored, compression, location), BUFFER_BYTES)
    return io.BufferedReader(_Decompressed(stored, compression, location), BUFFER_BYTES)


class _Decompressed(io.RawIOBase):
    """The content of one or more compressed streams, one after the other in a file."""

    def __init__(self, stored: StoredFile, compression: str, location: str) -> None:
        self._stored = stored
        self._compression = compression
        self._new, self._errors = _codec(compression, location)
        self._stream: Any = None
        self._compressed = b""
        self._content = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._content:
            if not self._compressed:
                self._compressed = self._stored.read(CHUNK_BYTES)
            if not self._compressed:
                if self._stream is not None:
                    raise DamagedFile(
                        f"not a whole {self._compression} file (it ends too early); copy or compress it again"
                    )
                return 0
            self._content = memoryview(self._decompress())
        count = min(len(buffer), len(self._content))
        buffer[:count] = self._content[:count]
        self._content = self._content[count:]
        return count

    def _decompress(self) -> bytes:
        """What the compressed bytes at hand hold, up to the end of their stream."""
        if self._stream is None:
            # Tapes and xz pad files with zeros.
            self._compressed = self._compressed.lstrip(b"\0")
            if not self._compressed:
                return b""
            self._stream = self._new()
        try:
            content = self._stream.decompress(self._compressed)
        except self._errors as error:
            raise self._damaged(one_line(error)) from error
        self._compressed = b""
        if self._stream.eof:
            self._compressed = self._stream.unused_data
            self._stream = None
        return content

    def _damaged(self, why: str) -> DamagedFile:
        return DamagedFile(f"not a whole {self._compression} file ({why}); copy or compress it again")


class _ArrowDecompressed(io.RawIOBase):
    """The content of compressed streams that pyarrow knows and the standard library does not."""

    def __init__(self, stored: StoredFile, compression: str, location: str) -> None:
        arrow = require("pyarrow", f"{location} needs it")
        self._compression = compression
        self._stream = arrow.CompressedInputStream(stored, compression)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            content = self._stream.read(len(buffer))
        except OSError as error:
            raise DamagedFile(
                f"not a whole {self._compression} file ({one_line(error)}); copy or compress it again"
            ) from error
        buffer[: len(content)] = content
        return len(content)


def _codec(compression: str, location: str) -> tuple[Callable[[], Any], tuple[type[Exception], ...]]:
    """What makes a decompressor of one stream, and the errors it raises."""
    if compression == "zstd":
        zstandard = require("zstandard", f"{location} needs it")
        # Streams of `zstd --ultra --long=31` have the largest window.
        long = zstandard.ZstdDecompressor(max_window_size=2**31)
        return long.decompressobj, (zstandard.ZstdError,)
    return {
        "gzip": (lambda: zlib.decompressobj(wbits=16 + zlib.MAX_WBITS), (zlib.error,)),
        "bzip2": (bz2.BZ2Decompressor, (OSError, ValueError)),
        "xz": (lzma.LZMADecompressor, (lzma.LZMAError,)),
    }[compression]
