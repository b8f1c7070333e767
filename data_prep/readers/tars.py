"""Members of a tar that is read once from front to back, with every way of being cut noticed.

`tarfile` takes an archive that ends between two members for a whole one.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator

from data_prep.readers.compression import BUFFER_BYTES
from data_prep.readers.faults import DamagedFile, one_line, printable

__all__ = ["read_members"]

BLOCK_BYTES = 512
REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
WITHOUT_CONTENT = (
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
)


def read_members(stream: io.BufferedReader, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes | None]]:
    """Name and content of each regular file in the archive; the content of an unwanted name is passed over, and None.

    Raises:
        DamagedFile: the archive is cut or corrupt, or another one follows it in the same file.
    """
    long_name, attributes = None, {}
    while (header := _exactly(stream, BLOCK_BYTES)) != bytes(BLOCK_BYTES):
        try:
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise _damaged(one_line(error)) from error
        if member.type == tarfile.GNUTYPE_LONGNAME:
            long_name = _text(_content(stream, member.size).rstrip(b"\0"))
        elif member.type == tarfile.XHDTYPE:
            attributes = _attributes(_content(stream, member.size))
        elif member.type in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
            _skip(stream, member.size)
        else:
            name = printable(attributes.get("path") or long_name or member.name)
            size = _number(attributes["size"]) if "size" in attributes else member.size
            if member.type in REGULAR and wanted(name):
                yield name, _content(stream, size)
            elif member.type not in WITHOUT_CONTENT:
                _skip(stream, size)
                if member.type in REGULAR:
                    yield name, None
            long_name, attributes = None, {}
    while rest := stream.read(BUFFER_BYTES):
        if rest.strip(b"\0"):
            raise _damaged("another one follows it; tars cannot be joined with cat")


def _content(stream: io.BufferedReader, size: int) -> bytes:
    content = _exactly(stream, size)
    _exactly(stream, -size % BLOCK_BYTES)
    return content


def _skip(stream: io.BufferedReader, size: int) -> None:
    """Passes over a content; a cut in it shows at the next header."""
    size += -size % BLOCK_BYTES
    if stream.seekable():
        stream.seek(size, io.SEEK_CUR)
        return
    while size > 0:
        size -= len(_exactly(stream, min(size, BUFFER_BYTES)))


def _exactly(stream: io.BufferedReader, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise _damaged("it ends too early")
    return data


def _attributes(data: bytes) -> dict[str, str]:
    """The records `LENGTH KEY=VALUE\\n` of an extended header."""
    found = {}
    while data:
        length = _number(_text(data.partition(b" ")[0]))
        key, _, value = _text(data[:length]).partition(" ")[2].removesuffix("\n").partition("=")
        found[key] = value
        data = data[max(length, 1) :]
    return found


def _number(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise _damaged(f"{text[:20]!r} is no number")
    return int(text)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _damaged(why: str) -> DamagedFile:
    return DamagedFile(f"not a whole tar archive ({why}); copy or pack it again")
