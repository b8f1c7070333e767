"""From the inputs of a source to the parts that tasks read."""

from __future__ import annotations

import glob
import sys
from collections.abc import Callable, Sequence
from itertools import chain, pairwise
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

from data_prep.documents import Part
from data_prep.errors import DataPrepError
from data_prep.readers.contents import has_extension, look_into
from data_prep.readers.csv_files import columns_of
from data_prep.readers.faults import DamagedFile, printable
from data_prep.readers.formats import (
    COMPRESSIBLE,
    EMBEDDED,
    SUFFIXES,
    compression_of,
    format_of,
    is_about_the_data,
    require_packages,
    why_left_out,
)
from data_prep.readers.huggingface import ROW_FORMATS, data_files, is_dataset
from data_prep.readers.stores import FileState, Store, absolute, store_of
from data_prep.readers.tables import row_group_bytes
from data_prep.readers.text_files import LARGEST_TEXT_BYTES
from data_prep.recipe import SourceSettings

__all__ = ["find_parts"]

# Sizes and Parquet footers of remote files are asked for at once: each answer takes tens of milliseconds.
THREADS = 16
# Files in one message.
NAMED = 20
NOT_UTF8 = (
    "its name is not UTF-8; rename it, e.g. with convmv"
    if sys.getfilesystemencoding() == "utf-8"
    else f"names are read as {sys.getfilesystemencoding()} here; set PYTHONUTF8=1"
)


class _File(NamedTuple):
    location: str
    format: str
    compression: str | None


LeaveOut = Callable[[str, str], None]
"""Told of a location and why it is left out."""


def find_parts(
    source: SourceSettings,
    task_bytes: int,
    leave_out: LeaveOut = lambda location, why: None,
    own: Sequence[Path] = (),
) -> list[Part]:
    """The parts of a source, in the order in which they are read.

    A folder stands for the files below it that are data, by their names or, where those say nothing, their content; a
    glob for the files it matches and those below the folders it matches. A forced format is believed for every file
    that an input names by itself or by a glob.

    Args:
        source: what to find; its inputs are paths, globs or URLs.
        task_bytes: larger JSONL files are cut to ranges of at most this size, unless they are compressed, and larger
            Parquet files to ranges of row groups of about this size. Other files are one part each.
        leave_out: told of every file of a folder or glob that is not read, and why.
        own: absolute paths of what the preparation makes, which is no input of it.

    Raises:
        DataPrepError: an input is missing, of an unknown kind, holds no data or cannot be read, a file is named twice,
            or a package is missing. Files that are empty or damaged are left to `read_part` where bad documents are
            skipped.
    """
    files = list(chain.from_iterable(_files_of(text, source, leave_out, own) for text in source.inputs))
    _refuse_repeats([file.location for file in files])
    with ThreadPool(THREADS) as pool:
        parts = list(chain.from_iterable(pool.imap(lambda file: _parts_of(file, source, task_bytes), files)))
    if source.bad_documents == "error":
        _refuse_empty([part.location for part in parts if part.bytes == 0 and part.format != EMBEDDED])
    return parts


def _files_of(text: str, source: SourceSettings, leave_out: LeaveOut, own: Sequence[Path]) -> list[_File]:
    """Each file that an input stands for."""
    if text == EMBEDDED:
        return [_File(EMBEDDED, EMBEDDED, None)]
    location = absolute(text)
    if printable(location) != location:
        raise DataPrepError(f"{printable(location)}: {NOT_UTF8}")
    store, wanted = store_of(location), source.format
    left: list[str] = []

    def leave(location: str, why: str) -> None:
        left.append(f"; {printable(location)} is left out: {why}")
        leave_out(printable(location), why)

    kind = store.kind(location)
    if kind == "file":
        return [_named_file(location, wanted)]
    if kind == "folder":
        files = _files_in_folder(store, location, source, leave, own)
        if not files:
            raise DataPrepError(
                f"{location}: holds no {_names(wanted)} file; give a folder with data{''.join(left[:1])}"
            )
        return _each_once(store, files, leave)
    if not glob.has_magic(text):
        raise DataPrepError(f"{location}: does not exist; give a file, a folder, a glob, a URL or `{EMBEDDED}`")
    files = _matching_files(store, location, source, leave, own)
    if not files:
        raise DataPrepError(f"{location}: matches no {_names(wanted)} file; check the pattern{''.join(left[:1])}")
    return _each_once(store, files, leave)


def _each_once(store: Store, files: list[_File], leave_out: LeaveOut) -> list[_File]:
    """Of the names of one file in a folder or glob its own; the others are links, such as `latest`."""
    names: dict[str, list[str]] = {}
    for file in files:
        names.setdefault(store.identity(file.location), []).append(file.location)
    kept = {real if real in found else found[0] for real, found in names.items()}
    for real, found in names.items():
        for location in found:
            if location not in kept:
                leave_out(location, f"a link to {real}, which is read once")
    return [file for file in files if file.location in kept]


def _kind_of(location: str) -> tuple[str | None, str | None]:
    """Format and compression."""
    return (format_of(location), compression_of(location)) if has_extension(location) else look_into(location)


def _named_file(location: str, wanted: str) -> _File:
    """A file that an input names: its format is known, or believed."""
    format, compression = _kind_of(location)
    if wanted not in ("auto", "huggingface"):
        return _File(location, wanted, compression if wanted in COMPRESSIBLE else None)
    if format is None or (wanted == "huggingface" and format not in ROW_FORMATS):
        raise DataPrepError(
            f"{location}: unknown kind of file; set format, or rename or convert it to one of {_names(wanted)}"
        )
    return _File(location, format, compression)


def _files_in_folder(
    store: Store, folder: str, source: SourceSettings, leave_out: LeaveOut, own: Sequence[Path]
) -> list[_File]:
    wanted = source.format
    files, hidden_or_linked = store.files_below(folder)
    for each in own:
        if any(_is_below(file, each) for file in files):
            leave_out(str(each), "this preparation makes it")
            files = [file for file in files if not _is_below(file, each)]
    files = [file for file in files if _has_text_as_name(file, leave_out)]
    for location, why in sorted(hidden_or_linked.items()):
        if not any(_is_below(location, each) for each in own):
            leave_out(location, why)
    if wanted == "huggingface" or (wanted == "auto" and is_dataset(folder, files)):
        rows = data_files(folder, files)
        for location in sorted(set(files) - set(rows)):
            leave_out(location, "no data file of this Hugging Face dataset")
        files = rows
    with ThreadPool(THREADS) as pool:
        found = _wanted(
            [(file, *kind) for file, kind in zip(files, pool.imap(_kind_of, files), strict=True)], wanted, leave_out
        )
    return _data_alone(found, source, leave_out)


def _data_alone(files: list[_File], source: SourceSettings, leave_out: LeaveOut) -> list[_File]:
    """Those of some files that are data, where others are records and the source does not say what it wants."""
    if source.format != "auto" or all(file.format == "text" for file in files):
        return files
    return [file for file in files if not _is_beside_the_data(file, source, leave_out)]


def _is_beside_the_data(file: _File, source: SourceSettings, leave_out: LeaveOut) -> bool:
    """Whether a file beside records is no data itself: a description, or a table of something else."""
    if is_about_the_data(file.location):
        leave_out(file.location, "describes the data beside it; to read it, name it as an input")
        return True
    if file.format == "csv" and source.text_field not in columns_of(file.location, file.compression):
        leave_out(file.location, f"a table without a column {source.text_field!r}")
        return True
    return False


def _is_below(location: str, folder: Path) -> bool:
    return location == str(folder) or location.startswith(f"{folder}/")


def _has_text_as_name(location: str, leave_out: LeaveOut) -> bool:
    """Whether plans and messages can hold the name."""
    if printable(location) == location:
        return True
    leave_out(location, NOT_UTF8)
    return False


def _matching_files(
    store: Store, pattern: str, source: SourceSettings, leave_out: LeaveOut, own: Sequence[Path]
) -> list[_File]:
    found: dict[str, _File] = {}
    wanted = source.format
    matched, linked = store.matches(pattern)
    for location, why in sorted(linked.items()):
        leave_out(location, why)
    for location, kind in matched.items():
        if any(_is_below(location, each) for each in own) or not _has_text_as_name(location, leave_out):
            continue
        if kind == "folder":
            files = _files_in_folder(store, location, source, leave_out, own)
        elif wanted not in ("auto", "huggingface"):
            files = [_named_file(location, wanted)]
        else:
            files = _wanted([(location, *_kind_of(location))], wanted, leave_out)
        found |= {file.location: file for file in files}
    return _data_alone([found[location] for location in sorted(found)], source, leave_out)


def _wanted(files: list[tuple[str, str | None, str | None]], wanted: str, leave_out: LeaveOut) -> list[_File]:
    """The files whose format is known and among those of a source."""
    found = []
    for location, format, compression in files:
        if format is None:
            leave_out(location, why_left_out(location))
        elif format not in _formats(wanted):
            leave_out(location, f"{format}, and format is {wanted}")
        else:
            found.append(_File(location, format, compression))
    return found


def _formats(wanted: str) -> tuple[str, ...]:
    """The formats of files that a `SourceSettings.format` takes from a folder."""
    return {"auto": tuple(SUFFIXES), "huggingface": ROW_FORMATS}.get(wanted, (wanted,))


def _names(wanted: str) -> str:
    suffixes = [suffix for format in _formats(wanted) for suffix in SUFFIXES[format]]
    return ", ".join(suffixes)


def _refuse_empty(locations: list[str]) -> None:
    if len(locations) == 1:
        raise DataPrepError(f"{locations[0]}: is empty; remove it from the inputs, or set bad_documents to skip")
    if locations:
        named = ", ".join(locations[:NAMED]) + (", ..." if len(locations) > NAMED else "")
        raise DataPrepError(
            f"{len(locations):,} files are empty; remove them from the inputs, or set bad_documents to skip: {named}"
        )


def _refuse_repeats(locations: list[str]) -> None:
    seen: dict[str, str] = {}
    for location in locations:
        identity = location if location == EMBEDDED else store_of(location).identity(location)
        if identity in seen:
            same = "" if seen[identity] == location else f" (the same file as {seen[identity]})"
            raise DataPrepError(f"{location}: named twice by the inputs{same}; leave one out")
        seen[identity] = location


def _parts_of(file: _File, source: SourceSettings, task_bytes: int) -> list[Part]:
    """The parts of one file."""
    location, format, compression = file
    if location == EMBEDDED:
        # The documents follow from the version and build of Python.
        return [Part(source=source.name, location=EMBEDDED, format=EMBEDDED, bytes=0, version=sys.version)]
    require_packages(location, format, compression)
    state = store_of(location).state(location, listed=True)
    if format == "text" and state.bytes > LARGEST_TEXT_BYTES:
        raise DataPrepError(
            f"{location}: {state.bytes} bytes would be one document, the limit is {LARGEST_TEXT_BYTES}; "
            "convert it to JSONL, one document per line"
        )
    try:
        ranges = _ranges(file, state, task_bytes)
    except DamagedFile as error:
        if source.bad_documents == "error":
            raise DataPrepError(f"{location}: {error}") from error
        ranges = [(0, None, state.bytes)]
    return [
        Part(
            source=source.name,
            location=location,
            format=format,
            bytes=size,
            start=start,
            stop=stop,
            compression=compression,
            version=state.version,
        )
        for start, stop, size in ranges
    ]


def _ranges(file: _File, state: FileState, task_bytes: int) -> list[tuple[int, int | None, int]]:
    """Start, stop and size in bytes of each range; the sizes add up to that of the file."""
    if state.bytes > task_bytes and file.format == "jsonl" and file.compression is None:
        count = -(-state.bytes // task_bytes)
        bounds = [state.bytes * index // count for index in range(count + 1)]
        return [(start, stop, stop - start) for start, stop in pairwise(bounds)]
    if state.bytes > task_bytes and file.format == "parquet":
        return _row_group_ranges(row_group_bytes(file.location), state.bytes, task_bytes)
    return [(0, None, state.bytes)]


def _row_group_ranges(sizes: list[int], file_bytes: int, task_bytes: int) -> list[tuple[int, int | None, int]]:
    """As `_ranges`: row groups in order, a new range wherever the next one would make it larger than `task_bytes`."""
    total = max(sum(sizes), 1)
    ranges: list[tuple[int, int | None, int]] = []
    start = before = held = 0
    for group, size in enumerate([*sizes, task_bytes + 1]):
        if held and held + size > task_bytes:
            share = file_bytes * (before + held) // total - file_bytes * before // total
            ranges.append((start, group, share))
            start, before, held = group, before + held, 0
        held += size
    return ranges if len(ranges) > 1 else [(0, None, file_bytes)]
